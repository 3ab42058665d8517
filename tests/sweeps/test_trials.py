"""Tests of sweeps.trials: what wins, is given up, and survives.

Training is played: its errors and sizes follow from the flags of the run, so that it is known what
must come out.
"""

import contextlib
import dataclasses
import json
import re
import signal
import sqlite3
import threading
from pathlib import Path

import opened
import pytest
from optuna.trial import TrialState
from PIL import Image
from searches import REFERENCE_ERROR, SIZES, error_of, number_of, parse, trials_of
from terminal import terminal

from experiments import search
from experiments.config.parsers import parse_table
from experiments.data import resident
from experiments.sweeps import space, studies, trials
from experiments.training import side_by_side
from experiments.training.divergence import Diverged
from experiments.training.flags import Config
from experiments.training.phases import Stopped


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
    (summary,) = opened.do(best)
    for name in ('kept', 'compression', 'validation_error', 'reference_validation_error'):
        assert summary[name] == result[name]
    head = Path(path).read_text().partition('\n--')[0]
    error, reference = summary['validation_error'], summary['reference_validation_error']
    assert f'python -m experiments.tiny --flagfile={path}\n' in head
    assert f'Expected result, seed 0: {summary["kept"]:,} of 6,370 parameters kept,\n' in head
    assert f'validation error {error:.2f} %, that of the reference {reference:.2f} %\n' in head


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


def test_the_smallest_network_of_allowed_error_wins(make_played, capsys):
    config = make_played(trials=14, draw=studies.draw)
    result = search.search(config)
    found = {}
    for trial in trials_of(config):
        own = space.make_config(config, trial.params)
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
    for name in ('importance', 'pareto'):
        with Image.open(Path(config.workdir, f'{name}.png')) as image:
            image.load()
            assert min(image.size) > 300


def test_a_bar_shows_trials(make_played, monkeypatch):
    config = make_played(trials=1, tolerance=1000.0)
    with terminal(monkeypatch) as seen:
        search.search(config)
    assert '0/1' in ''.join(seen)
    assert 'best=0, kept=' in ''.join(seen)


@pytest.mark.slow
def test_the_seed_decides_a_search(make_played):
    choices = []
    # The first ten are drawn at random, those after them by what came of these.
    for seed, amount in ((3, 12), (3, 12), (4, 1)):
        config = make_played(seed=seed, trials=amount, surgery_steps=3, tolerance=1000.0)
        search.search(config)
        choices.append([trial.params for trial in trials_of(config)])
    assert choices[0] == choices[1]
    assert choices[0][0] != choices[2][0]


def test_a_study_goes_on_to_its_trials_in_all_and_no_further(make_played, capsys):
    config = make_played(trials=2, tolerance=1000.0)
    results = [search.search(config)]
    results.append(search.search(opened.change(config, trials=3)))
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
            search.search(opened.change(config, **fields))
    assert (Path(config.workdir) / 'best.flags').read_text() == before
    # Another study in the same folder is another matter.
    other = opened.change(config, study='other', tolerance=900.0)
    assert search.search(other)['study'] == 'other'
    assert len(trials_of(other)) == len(trials_of(config)) == 1


def test_studies_of_other_spaces_share_the_reference(make_config):
    config = make_config(space='layer_density')
    task = trials.Task(config.base())
    folder = Path(trials._train_reference(config, task, []))
    records = (folder / 'metrics.jsonl').read_text()
    for fields in ({'space': 'c_rate'}, {'surgery_steps': 9, 'learning_rate': 'fixed:0.1'}):
        other = opened.change(config, study='other', **fields)
        assert trials._train_reference(other, task, []) == str(folder)
    assert (folder / 'metrics.jsonl').read_text() == records
    with pytest.raises(ValueError, match=r'momentum was 0\.9, is 0\.5'):
        trials._train_reference(opened.change(config, momentum=0.5), task, [])


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
    with pytest.raises(Stopped, match=message):
        search.search(config)
    assert search.search(config)['completed'] == 3
    states = [trial.state.name for trial in trials_of(config)]
    assert states == ['COMPLETE', 'FAIL', 'COMPLETE', 'COMPLETE']


def test_a_signal_between_trials_costs_none(make_played, monkeypatch):
    config = make_played(trials=2, tolerance=1000.0)
    monkeypatch.setattr(side_by_side, 'finetune', lambda *args: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped, match=r'^SIGTERM: '):
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
    other = opened.change(config, workdir=f'{tmp_path}/other', trials=2)
    assert search.search(other)['completed'] == 2
    assert not Path(config.workdir, 'study.db').exists()
    text = Path(other.workdir, 'best.flags').read_text()
    assert 'shared.db' not in text


def test_workers_of_a_folder_go_in_one_by_one(tmp_path):
    stopping = []
    with trials._one_at_a_time(tmp_path / 'lock', []):
        threading.Timer(0.3, stopping.append, [signal.SIGTERM]).start()
        with pytest.raises(Stopped), trials._one_at_a_time(tmp_path / 'lock', stopping):
            pytest.fail('there were two')
        assert stopping
    with trials._one_at_a_time(tmp_path / 'lock', []):
        pass


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'ramp': 'steep'}, '--ramp must be log'),
        ({'ramp_start': '100%'}, 'must come after --ramp_start=100%'),
        ({'ramp_start': 'soon'}, "--ramp_start or --stop: 'soon' must be a step"),
        ({'stop': 'conv:3'}, "--stop: pattern 'conv'"),
        ({'learning_rate': 'foo'}, "--learning_rate: 'foo' must begin with one of"),
        (
            {'space': 'compression', 'prune_biases': False, 'network': 'lenet300'},
            '410 take no part',
        ),
        ({'tolerance': float('nan')}, '--tolerance must be finite in float32, but is nan'),
        ({'tolerance': 1e39}, '--tolerance must be finite in float32, but is 1e'),
        ({'checkpoint_every': 3, 'record_every': 2}, '--checkpoint_every=3 must be a multiple'),
    ],
)
def test_flags_that_fit_no_trial_are_refused_before_any(make_config, tmp_path, fields, message):
    workdir = tmp_path / 'search'
    with pytest.raises(ValueError, match=re.escape(message)):
        search.search(make_config(workdir=str(workdir), **fields))
    assert not workdir.exists()


def test_a_folder_that_is_none_is_refused(make_config, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match=rf'^--workdir={tmp_path}/file must be a folder'):
        search.search(make_config(workdir=str(tmp_path / 'file')))
