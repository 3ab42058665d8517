"""The configuration of a search for a tiny network."""

import functools

import pytest
from searches import SIZES, PlayedRun, PlayedTask, error_of
from tiny import Tiny
from tiny_runs import write_random_images

from experiments.config.command_line import make
from experiments.config.parsers import parse_table
from experiments.networks import models
from experiments.sweeps import studies, trials
from experiments.sweeps.flags import SearchConfig
from experiments.training import side_by_side
from experiments.training.phases import Stopped


@pytest.fixture(scope='module')
def make_config(tmp_path_factory):
    """Makes the configuration of a search for a tiny network, on random images."""
    folder = tmp_path_factory.mktemp('data')
    write_random_images(folder, 'digits')

    def make_one(**fields):
        fields.setdefault('workdir', str(tmp_path_factory.mktemp('search') / 'search'))
        short = {'reference_steps': 2, 'surgery_steps': 10, 'finetuning_steps': 1}
        short |= {'record_every': 1, 'checkpoint_every': 2, 'refresh_every': 1, 'batch_size': 16}
        short |= {'network': 'tiny', 'trials': 3, 'tolerance': 100.0, 'dataset': 'digits'}
        return make(SearchConfig, **{'data_dir': str(folder), **short, **fields})

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.NETWORKS, 'tiny', functools.partial(Tiny, width=0.5))
        yield make_one


@pytest.fixture
def make_played(make_config, monkeypatch):
    """Makes the configuration of a search whose surgery is played.

    Its course is a function of the trial's run and of the step that returns the error. Pictures
    take longer than all else, and are drawn only where it is said how.
    """
    monkeypatch.setattr(trials, 'Task', PlayedTask)
    monkeypatch.setattr(trials, 'Run', PlayedRun)
    monkeypatch.setattr(side_by_side, 'train_references', lambda runs, stopping: [{}])
    monkeypatch.setattr(side_by_side, 'finetune', lambda runs, states, stopping: states)

    def make(course=lambda config, step: error_of(config), draw=lambda *places: None, **fields):
        monkeypatch.setattr(studies, 'draw', draw)

        def train_surgery(runs, references, stopping):
            (run,) = runs
            densities = parse_table(run.config.layer_density)
            kept = {layer: round(densities[layer] * SIZES[layer]) for layer in SIZES}
            for step in range(1, 1 + run.config.surgery_steps):
                error = course(run.config, step)
                if stopping:
                    raise Stopped('saved')
                record = {'phase': 'surgery', 'step': step, 'validation_error': error}
                run.on_record({**record, 'kept': kept})

        monkeypatch.setattr(side_by_side, 'train_surgery', train_surgery)
        fields = {'tolerance': 5.0, 'finetuning_steps': 0, 'surgery_steps': 5, **fields}
        return make_config(reference='elsewhere', **fields)

    return make
