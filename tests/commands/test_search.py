"""Tests of search: what is chosen, given up, refused, and survives.

What concerns processes is asked of real ones, on the digits. Elsewhere training is played: its
errors and sizes follow from the flags of the run, so that it is known what must come out.
"""

import contextlib
import dataclasses
import json
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import flax.linen as nn
import numpy as np
import optuna
import pytest
import sqlalchemy
from absl import flags as absl_flags
from optuna.trial import TrialState
from PIL import Image

from experiments import lenet300, search
from experiments.config.command_line import define, to_config
from experiments.config.parsers import parse_table
from experiments.data import resident
from experiments.networks import models
from experiments.sweeps import space, studies
from experiments.sweeps.flags import SearchConfig
from experiments.training import run
from experiments.training.divergence import Diverged
from experiments.training.flags import Config

ROOT = Path(__file__).resolve().parents[2]
SPACES = ('compression', 'layer_density', 'c_rate')


class Tiny(nn.Module):
    """Two layers, quick to compile and to train."""

    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Dense(8, name='fc1')(images.reshape(images.shape[0], -1)))
        return nn.Dense(10, name='fc2')(hidden)


SIZES = {'fc1': 785 * 8, 'fc2': 9 * 10}


def parse(*arguments, defaults=None, config_type=SearchConfig):
    flag_values = absl_flags.FlagValues()
    define(config_type, defaults or {}, flag_values)
    return to_config(config_type, defaults or {}, flag_values, flag_values(['program', *arguments]))


@pytest.fixture(scope='module')
def make_config(tmp_path_factory):
    """Makes the configuration of a search for a tiny network, on random images."""
    folder = tmp_path_factory.mktemp('data')
    (folder / 'dns_jax_cache').mkdir()
    random = np.random.default_rng(0)
    source, arrays = resident._SOURCES['digits'], {}
    for split, count in (('train', source.train), ('test', source.test)):
        arrays[f'{split}_labels'] = random.integers(0, 10, count, np.int32)
        arrays[f'{split}_images'] = random.integers(0, 256, (count, 28, 28, 1), np.uint8)
    np.savez(folder / 'dns_jax_cache' / f'digits-{source.version}.npz', **arrays)

    def make(**fields):
        fields.setdefault('workdir', str(tmp_path_factory.mktemp('search') / 'search'))
        short = {'reference_steps': 2, 'surgery_steps': 10, 'finetuning_steps': 1}
        short |= {'record_every': 1, 'checkpoint_every': 2, 'refresh_every': 1, 'batch_size': 16}
        short |= {'network': 'tiny', 'trials': 3, 'tolerance': 100.0, 'dataset': 'digits'}
        return SearchConfig(**{'data_dir': str(folder), **short, **fields})

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.NETWORKS, 'tiny', Tiny)
        yield make


def trials_of(config):
    url = config.storage or f'sqlite:///{config.workdir}/study.db'
    return optuna.load_study(study_name=config.study, storage=studies._open_storage(url)).trials


@pytest.fixture(scope='module')
def searched(make_config):
    """A search in which nothing is played, and what it returned."""
    config = make_config(trials=1, surgery_steps=5)
    with pytest.MonkeyPatch.context() as patch:
        load = resident.load
        # Whoever measures on the test images fails.
        patch.setattr(resident, 'load', lambda *args: dataclasses.replace(load(*args), test=None))
        return config, search.search(config)


def test_the_best_flagfile_repeats_the_best_trial(searched, make_config):
    """A run of it trains the reference anew, and on."""
    config, result = searched
    script = {'network': 'tiny', 'surgery_steps': 7, 'workdir': 'elsewhere', 'stop': '1'}
    path = f'{config.workdir}/best.flags'
    assert result['flagfile'] == path
    best = parse(f'--flagfile={path}', defaults=script, config_type=Config)
    assert best.workdir == f'{config.workdir}/best'
    (summary,) = run.run_together([best])
    for name in ('kept', 'compression', 'validation_error', 'reference_validation_error'):
        assert summary[name] == result[name]


def test_a_trial_leaves_its_records_but_no_checkpoints(searched):
    config, result = searched
    folder = Path(config.workdir, 'trials', f'search-{result["trial"]}')
    names = {path.name for path in folder.iterdir()}
    assert names == {'.lock', 'flags.json', 'metrics.jsonl'}
    last = json.loads((folder / 'metrics.jsonl').read_text().splitlines()[-1])
    assert (last['phase'], last['step']) == ('finetuning', 1)
    assert sum(last['kept'].values()) == result['kept']
    assert last['validation_error'] == result['validation_error']
    (trial,) = (one for one in trials_of(config) if one.number == result['trial'])
    # Its steps are those of both phases.
    assert list(trial.intermediate_values) == [1, 2, 3, 4, 5, 6]


REFERENCE_ERROR = 60.0


class PlayedTrainer:
    """What a search asks of a trainer, without the seconds that it takes to make one."""

    def __init__(self, config, on_record):
        self.config, self.on_record = config, on_record
        self.dataset = types.SimpleNamespace(validation=None)

    def error(self, params, split):
        return REFERENCE_ERROR


def error_of(config):
    """What a played training ends with: errors come below some density of each layer."""
    densities = parse_table(config.layer_density)
    lacking = [np.log10(least / densities[layer]) for layer, least in (('fc1', 0.03), ('fc2', 0.3))]
    return REFERENCE_ERROR + 10 * sum(max(0.0, lack) for lack in lacking)


def number_of(config):
    return int(config.workdir.rpartition('-')[2])


@pytest.fixture
def make_played(make_config, monkeypatch):
    """Makes the configuration of a search whose surgery is played.

    Its course is a function of the trial's run and of the step that returns the error.
    """
    monkeypatch.setattr(search, 'Trainer', PlayedTrainer)
    monkeypatch.setattr(run, 'train_references', lambda trainers, stopping: [{}])
    monkeypatch.setattr(run, 'finetune', lambda trainers, states, stopping: states)

    def make(course=lambda config, step: error_of(config), **fields):
        def train_surgery(trainers, references, stopping):
            (trainer,) = trainers
            densities = parse_table(trainer.config.layer_density)
            kept = {layer: round(densities[layer] * SIZES[layer]) for layer in SIZES}
            for step in range(1, 1 + trainer.config.surgery_steps):
                error = course(trainer.config, step)
                if stopping:
                    raise run.Stopped('saved')
                record = {'phase': 'surgery', 'step': step, 'validation_error': error}
                trainer.on_record({**record, 'kept': kept})

        monkeypatch.setattr(run, 'train_surgery', train_surgery)
        fields = {'tolerance': 5.0, 'finetuning_steps': 0, 'surgery_steps': 5, **fields}
        return make_config(reference='elsewhere', **fields)

    return make


def test_the_smallest_network_of_allowed_error_wins(make_played, capsys):
    config = make_played(trials=14)
    result = search.search(config)
    found = {}
    for trial in trials_of(config):
        own = space.make_run(config, trial.params)
        densities = parse_table(own.layer_density)
        kept = sum(round(densities[layer] * SIZES[layer]) for layer in SIZES)
        assert trial.state != TrialState.COMPLETE or trial.values == [kept]
        found[trial.number] = (kept, error_of(own))
    allowed = {number for number, (_, error) in found.items() if error <= REFERENCE_ERROR + 5}
    assert len(found) == 14
    # The rule decides something: there are smaller ones, and larger ones.
    best = min(allowed, key=lambda number: found[number])
    assert min(found.values()) < found[best] < max(found[number] for number in allowed)
    assert (result['trial'], (result['kept'], result['validation_error'])) == (best, found[best])
    assert result['compression'] == sum(SIZES.values()) / result['kept']
    assert result['reference_validation_error'] == REFERENCE_ERROR
    assert result['completed'] + result['given_up'] == 14
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == result
    assert [line for line in lines if line.startswith(f'trial {best}: kept {result["kept"]:,}, ')]


def test_the_pictures_are_there(make_played):
    config = make_played(trials=1, tolerance=1000.0)
    search.search(config)
    for name in ('importance', 'pareto'):
        with Image.open(Path(config.workdir, f'{name}.png')) as image:
            image.load()
            assert min(image.size) > 300


@pytest.mark.slow
def test_the_seed_decides_a_search(make_played):
    choices = []
    # The first ten are drawn at random, those after them by what came of these.
    for seed, trials in ((3, 12), (3, 12), (4, 1)):
        config = make_played(seed=seed, trials=trials, surgery_steps=3, tolerance=1000.0)
        search.search(config)
        choices.append([trial.params for trial in trials_of(config)])
    assert choices[0] == choices[1]
    assert choices[0][0] != choices[2][0]


def test_a_study_goes_on_to_its_trials_in_all_and_no_further(make_played, capsys):
    config = make_played(trials=2, tolerance=1000.0)
    results = [search.search(config)]
    results.append(search.search(dataclasses.replace(config, trials=3)))
    assert [result['completed'] for result in results] == [2, 3]
    capsys.readouterr()
    assert search.search(config) == results[1]
    assert 'trial 3' not in capsys.readouterr().out
    assert len(trials_of(config)) == 3


def test_a_study_of_other_flags_is_refused(make_played):
    config = make_played(trials=1, tolerance=1000.0)
    search.search(config)
    before = (Path(config.workdir) / 'best.flags').read_text()
    for fields, message in (
        ({'surgery_steps': 6}, 'surgery_steps was 5, is 6'),
        ({'space': 'c_rate'}, "space was 'layer_density', is 'c_rate'"),
        ({'tolerance': 1.0}, 'tolerance was 1000.0, is 1.0'),
    ):
        with pytest.raises(ValueError, match=f'^--study=search has other flags: {message}$'):
            search.search(dataclasses.replace(config, **fields))
    assert (Path(config.workdir) / 'best.flags').read_text() == before
    # Another study in the same folder is another matter.
    other = dataclasses.replace(config, study='other', tolerance=900.0)
    assert search.search(other)['study'] == 'other'
    assert len(trials_of(other)) == len(trials_of(config)) == 1


def test_studies_of_other_spaces_share_the_reference(make_config):
    config = make_config(space='layer_density')
    folder = Path(search._train_reference(config, []))
    records = (folder / 'metrics.jsonl').read_text()
    for fields in ({'space': 'c_rate'}, {'surgery_steps': 9, 'learning_rate': 'fixed:0.1'}):
        other = dataclasses.replace(config, study='other', **fields)
        assert search._train_reference(other, []) == str(folder)
    assert (folder / 'metrics.jsonl').read_text() == records
    with pytest.raises(ValueError, match=r'momentum was 0\.9, is 0\.5'):
        search._train_reference(dataclasses.replace(config, momentum=0.5), [])


def test_no_allowed_trial_is_an_error_and_leaves_no_flagfile(make_played):
    config = make_played(trials=2, tolerance=-1.0)
    Path(config.workdir).mkdir(parents=True)
    (Path(config.workdir) / 'best.flags').write_text('of another study')
    message = 'none of 2 trials, with 0 more given up, has a validation error of at most -1.0'
    with pytest.raises(RuntimeError, match=message):
        search.search(config)
    names = {path.name for path in Path(config.workdir).iterdir()}
    assert names == {'lock', 'study.db'}


def test_a_hopeless_trial_is_given_up(make_played, capsys):
    """The error of the sixth is high early, of the seventh in the middle, of the eighth late."""
    high = {(5, 1), (6, 2), (6, 3), (6, 4), (6, 5), (7, 5)}

    def course(config, step):
        return 80.0 if (number_of(config), step) in high else 62.0

    config = make_played(course, trials=8)
    result = search.search(config)
    assert (result['completed'], result['given_up']) == (7, 1)
    states = [trial.state for trial in trials_of(config)]
    assert states[6] == TrialState.PRUNED
    assert states.count(TrialState.COMPLETE) == 7
    trial = trials_of(config)[6]
    assert trial.intermediate_values == {1: 62.0, 2: 80.0}
    # The sampler learns from it what is not allowed.
    assert trial.constraints == {'validation error': 15.0}
    assert 'trial 6: given up, a validation error of 80.00 % at step 2\n' in capsys.readouterr().out
    assert trials_of(config)[7].constraints == {'validation error': 15.0}


def test_a_trial_that_breaks_is_given_up(make_played, capsys):
    def course(config, step):
        if number_of(config) == 0:
            raise Diverged('the loss is not finite', 'surgery')
        return 62.0

    config = make_played(course, trials=2)
    result = search.search(config)
    assert (result['completed'], result['given_up'], result['trial']) == (1, 1, 1)
    assert trials_of(config)[0].constraints == {'validation error': 100.0}
    assert 'trial 0: given up, the loss is not finite\n' in capsys.readouterr().out


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_costs_the_trial_alone(make_played, number):
    def course(config, step):
        if number_of(config) == 1 and step == 3:
            signal.raise_signal(number)
        return 62.0

    config = make_played(course, trials=3)
    message = f'^{number.name}: the same command goes on with the study$'
    with pytest.raises(run.Stopped, match=message):
        search.search(config)
    assert search.search(config)['completed'] == 3
    states = [trial.state.name for trial in trials_of(config)]
    assert states == ['COMPLETE', 'FAIL', 'COMPLETE', 'COMPLETE']


def test_a_signal_between_trials_costs_none(make_played, monkeypatch):
    config = make_played(trials=2, tolerance=1000.0)
    monkeypatch.setattr(run, 'finetune', lambda *args: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(run.Stopped, match=r'^SIGTERM: '):
        search.search(config)
    assert [trial.state.name for trial in trials_of(config)] == ['COMPLETE']


def test_a_database_that_breaks_is_named(make_played):
    def course(config, step):
        with contextlib.closing(sqlite3.connect(f'{config.workdir}/../../study.db')) as base:
            base.execute('DROP TABLE trial_intermediate_values')
        return 62.0

    config = make_played(course)
    message = rf'^--storage=sqlite:///{config.workdir}/study.db: no such table: trial_inter'
    with pytest.raises(OSError, match=message):
        search.search(config)


def test_the_storage_is_where_the_study_lies(make_played, tmp_path):
    config = make_played(storage=f'sqlite:///{tmp_path}/shared.db', trials=1, tolerance=1000.0)
    search.search(config)
    # A worker on another machine, with a folder of its own.
    other = dataclasses.replace(config, workdir=f'{tmp_path}/other', trials=2)
    assert search.search(other)['completed'] == 2
    assert not Path(config.workdir, 'study.db').exists()
    text = Path(other.workdir, 'best.flags').read_text()
    assert 'shared.db' not in text


@pytest.mark.parametrize(
    ('url', 'error', 'message'),
    [
        ('oracles', ValueError, 'oracles must be the URL of a database, such as postgresql://'),
        ('oracles://me:secret@host/name', ValueError, r'oracles://\*\*\*@host/name must be the'),
        ('postgresql://me:secret@host:1x/name', ValueError, r'//\*\*\*@host:\*\*\*/name must be'),
        ('postgresql://me:secret/name', ValueError, r'postgresql://me:\*\*\*/name must be'),
        ('mysql+none://me:secret@host:1/name?password=secret', ValueError, '@host:1/name must be'),
        ('sqlite:///missing/study.db', OSError, r'sqlite:///missing/study.db: unable to open'),
    ],
)
def test_a_storage_that_is_none_is_refused(make_played, url, error, message):
    config = make_played(storage=url)
    with pytest.raises(error, match=f'^--storage=.*{message}') as caught:
        search.search(config)
    assert 'secret' not in str(caught.value)
    assert not Path(config.workdir).exists()


def test_a_database_without_its_driver_or_server_is_refused_without_the_password(make_played):
    # Whether a driver is installed or not, nobody listens there.
    config = make_played(storage='mysql+pymysql://me:s3cr@t/word@localhost:1/name?password=s3cr')
    with pytest.raises(
        (ValueError, OSError), match=r'^--storage=mysql.*localhost:1/name'
    ) as caught:
        search.search(config)
    assert not re.search('s3cr|word', str(caught.value))
    assert not Path(config.workdir).exists()


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'ramp': 'steep'}, '--ramp must be log'),
        ({'ramp_start': '100%'}, 'must come after --ramp_start=100%'),
        ({'ramp_start': 'soon'}, "--ramp_start or --stop: 'soon' must be a step"),
        ({'stop': 'conv:3'}, "--stop: pattern 'conv'"),
        (
            {'space': 'compression', 'prune_biases': False, 'network': 'lenet300'},
            '410 take no part',
        ),
    ],
)
def test_flags_that_fit_no_trial_are_refused_before_any(make_config, fields, message):
    config = make_config(**fields)
    with pytest.raises(ValueError, match=re.escape(message)):
        search.search(config)
    assert not Path(config.workdir).exists()


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'tolerance': float('nan')}, '--tolerance must be finite in float32, but is nan'),
        ({'tolerance': 1e39}, '--tolerance must be finite in float32, but is 1e'),
        ({'learning_rate': 'warp:9'}, '--learning_rate: '),
        ({'checkpoint_every': 3, 'record_every': 2}, '--checkpoint_every=3 must be a multiple'),
    ],
)
def test_bad_flags(make_config, fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


def test_a_folder_that_is_none_is_refused(make_config, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match=rf'^--workdir={tmp_path}/file must be a folder'):
        search.search(make_config(workdir=str(tmp_path / 'file')))


def test_without_optuna_the_extra_is_named(tmp_path):
    code = (
        'import runpy, sys; sys.modules["optuna"] = None; '
        f'sys.argv[1:] = ["--workdir={tmp_path}/run"]; '
        'runpy.run_module("experiments.search", run_name="__main__")'
    )
    command = [sys.executable, '-c', code]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert answer.stderr == 'ValueError: experiments.search needs Optuna, the extra `search`\n'
    assert not (tmp_path / 'run').exists()


def test_workers_of_a_folder_go_in_one_by_one(tmp_path):
    stopping = []
    with search._one_at_a_time(tmp_path / 'lock', []):
        threading.Timer(0.3, stopping.append, [signal.SIGTERM]).start()
        with pytest.raises(run.Stopped), search._one_at_a_time(tmp_path / 'lock', stopping):
            pytest.fail('there were two')
        assert stopping
    with search._one_at_a_time(tmp_path / 'lock', []):
        pass


@pytest.mark.parametrize('failures', [2, 3])
def test_a_database_in_the_making_is_tried_again(make_config, monkeypatch, tmp_path, failures):
    """As where another worker makes the same tables at the same moment."""
    make, pauses = optuna.storages.RDBStorage.__init__, []

    def make_storage(*args, **kwargs):
        if len(pauses) < failures:
            raise sqlalchemy.exc.IntegrityError('INSERT', None, ValueError('it is there'))
        make(*args, **kwargs)

    monkeypatch.setattr(optuna.storages.RDBStorage, '__init__', make_storage)
    monkeypatch.setattr(studies.time, 'sleep', pauses.append)
    outcome = (
        contextlib.nullcontext() if failures == 2 else pytest.raises(sqlalchemy.exc.DBAPIError)
    )
    with outcome:
        assert studies.open_study(f'sqlite:///{tmp_path}/study.db', make_config()).trials == []
    assert len(pauses) == 2


def trial_like(number=0, value=0.0, constraint=0.0, course=()):
    trial = optuna.create_trial(
        value=value,
        constraints={'validation error': constraint},
        intermediate_values=dict(enumerate(course, start=1)),
    )
    trial.number = number
    return trial


def test_the_best_is_the_smallest_allowed_and_of_these_the_first():
    rows = [(0, 5.0, 0.1), (1, 9.0, -3.0), (2, 7.0, 0.0), (3, 7.0, -1.0), (4, 8.0, -1.0)]
    trials = [trial_like(*row) for row in rows]
    assert studies.find_best(trials).number == 2
    assert studies.find_best(trials[::-1]).number == 2
    assert studies.find_best(trials[:1]) is None
    assert studies.find_best([]) is None


def test_hopeless_is_what_would_have_to_recover_more_than_any():
    # From step 2 to their ends they fall by 4, 3, 1, −2 and −5 points.
    others = [trial_like(course=(9, 6 + fall, 7, 6)) for fall in (4, 3, 1, -2, -5)]
    assert not studies.is_hopeless(others, 2, 4.0)
    assert studies.is_hopeless(others, 2, 4.1)
    assert not studies.is_hopeless(others[:4], 2, 50.0)
    assert not studies.is_hopeless(others, 5, 50.0)
    # What is allowed already is never hopeless, even if all others got worse.
    worse = [trial_like(course=(1, 2))] * 5
    assert not studies.is_hopeless(worse, 1, 0.0)
    assert not studies.is_hopeless(worse, 1, -0.5)
    assert studies.is_hopeless(worse, 1, 0.1)


def test_what_is_chosen():
    config = parse('--space=compression', '--learning_rate=inv:0.01,1e-4,0.75')
    assert space.make_ranges(config) == {
        'compression': (20, 1000, True),
        'ramp': (0.4, 0.9, False),
        'learning rate': (0.3, 3, True),
        'weight decay': (0.1, 4, True),
    }
    choice = {'compression': 123.456, 'ramp': 0.5, 'learning rate': 2.0, 'weight decay': 0.33333}
    own = space.make_run(config, choice)
    assert (own.compression, own.ramp_end) == (123.5, '8000')
    assert (own.learning_rate, own.weight_decay) == ('inv:0.02,1e-4,0.75', 0.0001667)
    late = dataclasses.replace(config, ramp_start='50%')
    assert space.make_run(late, choice).ramp_end == '12000'
    late = dataclasses.replace(config, ramp_start='4001', stop='fc1:90%,*:8000')
    assert space.make_run(late, choice).ramp_end == '6000'


@pytest.mark.parametrize('name', ['layer_density', 'c_rate'])
@pytest.mark.parametrize(
    ('network', 'layers'),
    [('lenet300', ['fc1', 'fc2', 'fc3']), ('lenet5', ['conv1', 'conv2', 'fc1', 'fc2'])],
)
def test_what_is_chosen_for_each_layer(name, network, layers):
    config = parse(f'--space={name}', f'--network={network}')
    ranges = space.make_ranges(config)
    low, high, logarithmic = {'layer_density': (1e-3, 1, True), 'c_rate': (0, 6, False)}[name]
    assert all(ranges[f'{name} {layer}'] == (low, high, logarithmic) for layer in layers)
    assert ('ramp' in ranges) == (name == 'layer_density')
    assert len(ranges) == len(layers) + 2 + ('ramp' in ranges)
    choice = {**space.choice_at(config, 0.5), f'{name} {layers[1]}': 0.123456}
    own = space.make_run(config, choice)
    middle = (low * high) ** 0.5 if logarithmic else 3
    expected = {layer: pytest.approx(middle, rel=1e-3) for layer in layers}
    assert parse_table(getattr(own, name)) == {**expected, layers[1]: 0.1235}
    assert own.network == network
    ends = [
        parse_table(getattr(space.make_run(config, space.choice_at(config, at)), name))
        for at in (0, 1)
    ]
    assert ends == [dict.fromkeys(layers, low), dict.fromkeys(layers, high)]


# Flags of runs that trials have as well, and values that are not their defaults.
HANDED_ON = {
    'dataset': 'digits',
    'data_dir': 'some',
    'manual_dir': 'some',
    'reference': 'some',
    'tensorboard': True,
    'seed': 1,
    'batch_size': 8,
    'reference_steps': 2,
    'surgery_steps': 3,
    'finetuning_steps': 3,
    'record_every': 250,
    'checkpoint_every': 4_000,
    'reference_learning_rate': 'fixed:0.1',
    'finetuning_learning_rate': 'fixed:0.1',
    'reference_weight_decay': 0.1,
    'finetuning_weight_decay': 0.1,
    'momentum': 0.5,
    'bias_scale': 1.0,
    'decay_biases': False,
    'score': 'erk',
    'ramp': 'poly:3',
    'ramp_start': '10%',
    'refresh_every': 100,
    'start': '10',
    'stop': '80%',
    'hysteresis': 0.3,
    'update_gamma': 0.5,
    'update_power': 0.5,
    'prune_biases': False,
    'pruner': 'gradual',
    'importance': 'taylor',
    'splicing': False,
    'rounds': 3,
    'drop': 0.1,
    'dropout': 0.5,
    'pruned_dropout': 'kept',
}
# The flags beside which some of them have a meaning.
BESIDE = {'rounds': '--pruner=iterative', 'drop': '--pruner=set', 'pruned_dropout': '--dropout=0.5'}
# What these do is asked above, one by one.
OWN = ('network', 'workdir', 'space', 'trials', 'tolerance', 'study', 'storage')
SCALED = {'learning_rate': 'fixed:0.1', 'weight_decay': 0.1}
CHOSEN = ('compression', 'density', 'layer_density', 'c_rate', 'ramp_end')
PROBES = ('refresh_statistics', 'cut', 'cut_at', 'count_returns')
NO_FLAGS = (*CHOSEN, *PROBES, 'on_divergence', 'train_on_all', 'resume', 'overwrite')


def test_every_flag_is_tried():
    flag_values = absl_flags.FlagValues()
    define(SearchConfig, {}, flag_values)
    assert sorted(flag_values) == sorted([*HANDED_ON, *SCALED, *OWN])
    names = {field.name for field in dataclasses.fields(SearchConfig)}
    assert names - set(flag_values) == set(NO_FLAGS)


@pytest.mark.parametrize(('name', 'value'), (HANDED_ON | SCALED).items())
def test_trials_have_the_flags_of_the_search(name, value):
    beside = [BESIDE[name]] if name in BESIDE else []
    plain, config = parse(*beside), parse(*beside, f'--{name}={value}')
    choice = space.choice_at(plain, 0.4)
    own = space.make_run(config, choice)
    assert getattr(own, name) != getattr(space.make_run(plain, choice), name)
    if name in HANDED_ON:
        assert getattr(own, name) == value


@pytest.mark.parametrize('name', NO_FLAGS)
def test_what_the_search_chooses_is_no_flag(name):
    with pytest.raises(absl_flags.UnrecognizedFlagError):
        parse(f'--{name}=1')


@pytest.fixture(scope='module')
def workers(tmp_path_factory):
    """A study on the digits: a worker that is killed in its first trial, then two at once."""
    folder, digits = tmp_path_factory.mktemp('workers') / 'search', tmp_path_factory.mktemp('tfds')
    resident.load('digits', digits)
    fields = {'workdir': folder, 'dataset': 'digits', 'data_dir': digits, 'space': 'layer_density'}
    fields |= {'reference_steps': 100, 'surgery_steps': 400, 'batch_size': 32, 'tolerance': 90}
    fields |= {'finetuning_steps': 0, 'record_every': 10, 'checkpoint_every': 100, 'trials': 3}
    fields |= {'refresh_every': 10}
    flags = [f'--{name}={value}' for name, value in fields.items()]
    command, pipe = [sys.executable, '-m', 'experiments.search', *flags], subprocess.PIPE

    def start():
        return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)

    killed, records = start(), folder / 'trials' / 'search-0' / 'metrics.jsonl'
    deadline = time.monotonic() + 240
    while killed.poll() is None and time.monotonic() < deadline:
        if records.exists() and records.stat().st_size:
            break
        time.sleep(0.002)
    killed.kill()
    said = killed.communicate(timeout=60)
    storage = studies._open_storage(f'sqlite:///{folder}/study.db')
    (trial,) = optuna.load_study(study_name='search', storage=storage).trials
    assert (trial.state, killed.returncode) == (TrialState.RUNNING, -signal.SIGKILL), said
    with contextlib.closing(sqlite3.connect(folder / 'study.db')) as base:
        base.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
        base.commit()
    both = [start(), start()]
    answers = [(*process.communicate(timeout=240), process.returncode) for process in both]
    return parse(*flags), answers


@pytest.mark.slow
def test_two_workers_share_a_study(workers):
    config, answers = workers
    shares = []
    for stdout, stderr, code in answers:
        # No progress bar where nobody watches, and nothing that Optuna says by itself.
        assert (code, stderr) == (0, '')
        assert json.loads(stdout.splitlines()[-1])['completed'] >= 3
        shares.append({int(number) for number in re.findall(r'^trial (\d+): kept', stdout, re.M)})
    trials = trials_of(config)
    finished = {trial.number for trial in trials if trial.state == TrialState.COMPLETE}
    assert all(shares)
    assert not shares[0] & shares[1]
    assert shares[0] | shares[1] == finished
    # One more than asked for at most, by the worker that was not the last to begin.
    assert len(finished) in (3, 4)
    assert len({tuple(trial.params.values()) for trial in trials}) == len(trials)


@pytest.mark.slow
def test_a_killed_worker_loses_its_trial_alone(workers):
    states = [trial.state for trial in trials_of(workers[0])]
    assert states[0] == TrialState.FAIL
    assert set(states[1:]) == {TrialState.COMPLETE}


@pytest.mark.slow
def test_the_reference_is_trained_once(workers):
    """Two workers that start from the killed one's find it finished."""
    lines = Path(workers[0].workdir, 'reference', 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == list(range(10, 110, 10))


@pytest.mark.slow
def test_the_flagfile_is_that_of_the_best_trial(workers):
    config, answers = workers
    found = {}
    for trial in trials_of(config)[1:]:
        path = Path(config.workdir, 'trials', f'search-{trial.number}', 'metrics.jsonl')
        last = json.loads(path.read_text().splitlines()[-1])
        found[sum(last['kept'].values())] = (trial, last['validation_error'])
    reference = trial.user_attrs['reference_validation_error']
    kept = min(kept for kept, (_, error) in found.items() if error <= reference + 90)
    trial, error = found[kept]
    path = f'{config.workdir}/best.flags'
    best = parse(f'--flagfile={path}', defaults=lenet300.DEFAULTS, config_type=Config)
    expected = space.make_run(config, trial.params)
    assert best == dataclasses.replace(expected, workdir=f'{config.workdir}/best')
    head = Path(path).read_text().partition('\n--')[0]
    assert f'python -m experiments.lenet300 --flagfile={path}\n' in head
    assert f'Expected result, seed 0: {kept:,} of 266,610 parameters kept,\n' in head
    assert f'validation error {error:.2f} %, that of the reference {reference:.2f} %\n' in head
    results = [json.loads(stdout.splitlines()[-1]) for stdout, _, _ in answers]
    assert kept in [result['kept'] for result in results]


def test_what_is_said_of_dense_training_reaches_the_reference():
    names = {field.name for field in dataclasses.fields(Config)}
    assert set(search._REFERENCE_FLAGS) <= names
    of_dense_training = {name for name in names if name.startswith('reference_')}
    assert of_dense_training <= set(search._REFERENCE_FLAGS)
