"""Tests of search: what is refused, and workers that are real processes, on the digits."""

import contextlib
import json
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from searches import parse, trials_of
from tiny_runs import wait_for_record

from experiments.data import resident
from experiments.sweeps import studies

ROOT = Path(__file__).resolve().parents[2]


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

    killed = start()
    wait_for_record(folder / 'trials' / 'search-0', lambda: killed.poll() is None, 'surgery')
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
