"""Tests of search: what is refused, and workers that are real processes, on the digits."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import sqlalchemy
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
def postgres():
    """The URL of a PostgreSQL server that has nothing yet."""
    initdb, server = shutil.which('initdb'), shutil.which('postgres')
    if not (initdb and server):
        pytest.skip('PostgreSQL is not installed')
    # It refuses to run as root, and nobody else may look into a folder of pytest.
    own: dict = {'user': 'nobody'} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if own:
            shutil.chown(folder, **own)
        own |= {'cwd': folder, 'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
        make = [initdb, f'--pgdata={folder}/data', '--username=search', '--auth=trust', '--no-sync']
        subprocess.run([*make, '--encoding=UTF8'], check=True, **own)
        # Nobody reaches it but by a socket in that folder.
        command = [server, '-D', f'{folder}/data', '-h', '', '-k', folder]
        command += ['-c', 'log_min_messages=fatal']  # nobody reads them until it ends
        process = start(stack, command, **own)
        url = f'postgresql+psycopg://search@/postgres?host={folder}'
        wait_for_database(url, process)
        yield url
        process.send_signal(signal.SIGINT)  # its fast shutdown
        process.communicate(timeout=60)


def start(stack, command, **options):
    """Starts a process that does not outlive a stack."""
    process = stack.enter_context(subprocess.Popen(command, **options))
    stack.callback(process.kill)
    return process


def wait_for_database(url, process):
    for _ in range(600):
        assert process.poll() is None, process.stdout.read()
        with contextlib.suppress(OSError):
            return studies.check_storage(url)
        time.sleep(0.1)
    raise AssertionError(f'{url} cannot be reached')


@pytest.fixture(scope='module', params=['sqlite', 'postgres'])
def workers(request, tmp_path_factory):
    """A study on the digits: a worker that is killed in its first trial, then two at once."""
    folder, digits = tmp_path_factory.mktemp('workers') / 'search', tmp_path_factory.mktemp('tfds')
    storage = None if request.param == 'sqlite' else request.getfixturevalue('postgres')
    resident.load('digits', digits)
    fields = {'workdir': folder, 'dataset': 'digits', 'data_dir': digits, 'space': 'layer_density'}
    fields |= {'reference_steps': 100, 'surgery_steps': 400, 'batch_size': 32, 'tolerance': 90}
    fields |= {'finetuning_steps': 0, 'record_every': 10, 'checkpoint_every': 100, 'trials': 3}
    fields |= {'refresh_every': 10}
    flags = [f'--{name}={value}' for name, value in fields.items()]
    flags += [f'--storage={storage}'] if storage else []
    options = {'cwd': ROOT, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    command = [sys.executable, '-m', 'experiments.search', *flags]
    with contextlib.ExitStack() as stack:
        killed = start(stack, command, **options)
        wait_for_record(folder / 'trials' / 'search-0', lambda: killed.poll() is None, 'surgery')
        killed.kill()
        said = killed.communicate(timeout=60)
        config = parse(*flags)
        (trial,) = trials_of(config)
        assert (trial.state, killed.returncode) == (TrialState.RUNNING, -signal.SIGKILL), said
        engine = sqlalchemy.create_engine(storage or f'sqlite:///{folder}/study.db')
        with contextlib.closing(engine.raw_connection()) as base:
            long_ago = "now() - interval '1 hour'" if storage else "datetime('now', '-1 hour')"
            base.cursor().execute(f'UPDATE trial_heartbeats SET heartbeat = {long_ago}')
            base.commit()
        engine.dispose()
        both = [start(stack, command, **options) for _ in range(2)]
        answers = [(*process.communicate(timeout=240), process.returncode) for process in both]
        return config, answers


@pytest.mark.slow
def test_two_workers_share_a_study(workers):
    config, answers = workers
    shares = []
    for stdout, stderr, code in answers:
        # No progress bar where nobody watches, but lines if it takes long. Optuna says nothing.
        assert code == 0
        lines = stderr.splitlines()
        assert all(re.match(r'(search|reference|surgery): [\d,]+ of ', line) for line in lines)
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
