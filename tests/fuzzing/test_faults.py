"""Tests of what a run survives: kills, signals, full disks, damaged files, broken training.

The network is tiny, and processes are forked from one that has imported everything, so that a
life is short. What a user sees of the entry scripts is asked in `test_run`.
"""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import time

import opened
import pytest
from damaged_checkpoints import restore_damaged
from tiny import run_tiny
from tiny_runs import FIELDS, outcome, run_in_short_stretches, steps_of, wait_for_record

from experiments.reports.records import PHASES
from experiments.training import run, side_by_side

pytestmark = pytest.mark.usefixtures('tiny')
# So that a record is made of several calls.
LONG_RECORDS = FIELDS | {'record_every': 100, 'checkpoint_every': 100}


@pytest.fixture(scope='module')
def start_process():
    """Starts processes that have imported everything."""
    processes = multiprocessing.get_context('forkserver')
    processes.set_forkserver_preload(['tiny', 'damaged_checkpoints'])
    started = []

    def start_process(action, *arguments):
        process = processes.Process(target=action, args=arguments)
        process.start()
        started.append(process)
        return process

    yield start_process
    for process in started:
        process.kill()


@pytest.fixture(scope='module')
def start(start_process, data_dir, tmp_path_factory):
    """Starts runs in processes of their own."""
    nowhere = tmp_path_factory.mktemp('errors') / 'error.txt'

    def start(workdir, errors=nowhere, **fields):
        fields = {**FIELDS, 'data_dir': str(data_dir), 'workdir': str(workdir), **fields}
        return start_process(run_tiny, fields, errors)

    return start


def done(process):
    process.join(240)
    return process.exitcode


@pytest.fixture(scope='module')
def whole(start, tmp_path_factory):
    """The outcome of an unbroken run."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    assert done(start(folder)) == 0
    return outcome(folder)


def wait_for_life(process, folder):
    """Waits until a run has taken its folder."""
    flags = folder / 'flags.json'
    before = flags.stat().st_mtime_ns if flags.exists() else 0
    while process.is_alive() and not (flags.exists() and flags.stat().st_mtime_ns > before):
        time.sleep(0.002)


def saved(folder):
    """The newest checkpoint of each phase: grows as a run gets on, and only then."""
    return [max(steps_of(folder, phase), default=-1) for phase in PHASES]


def kill_again_and_again(start, folder, times):
    """Kills a run at random moments of starting, computing and saving, each time resumed.

    Returns how often it had saved something before it was killed.
    """
    moments, with_progress = random.Random(0), 0
    for _ in range(times):
        before = saved(folder)
        process = start(folder, resume=True)
        wait_for_life(process, folder)
        if moments.random() < 0.2:
            process.join(moments.uniform(0, 1))  # while it compiles
        else:
            while process.is_alive() and saved(folder) == before:
                time.sleep(0.001)
            process.join(moments.uniform(0, 0.1))
        assert process.is_alive()
        process.kill()
        process.join()
        with_progress += saved(folder) > before
    assert done(start(folder, resume=True)) == 0
    return with_progress


def assert_every_step_is_counted_once(folder):
    records = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    assert [(record['phase'], record['step']) for record in records] == [
        (phase, step) for phase in PHASES for step in range(10, FIELDS[f'{phase}_steps'] + 10, 10)
    ]


@pytest.mark.slow
def test_killed_fifty_times(start, tmp_path, monkeypatch, compat):
    compat('faults', 'SIGKILL at 50 random moments')
    longer = {'surgery_steps': 4_000, 'stop': '3000'}
    monkeypatch.setattr(f'{__name__}.FIELDS', FIELDS | longer)
    assert done(start(tmp_path / 'whole')) == 0
    with_progress = kill_again_and_again(start, tmp_path / 'run', 50)
    compat('faults', 'SIGKILL at 50 random moments', f'{with_progress} after a new checkpoint')
    assert with_progress > 25
    assert outcome(tmp_path / 'run') == outcome(tmp_path / 'whole')
    assert_every_step_is_counted_once(tmp_path / 'run')


# That both are waited for, `test_phases` asks.
@pytest.mark.parametrize(
    'number', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_leaves_within_five_seconds(start, tmp_path, number, compat):
    compat('faults', f'{number.name} in the middle of a record')
    longer = LONG_RECORDS | {'reference_steps': 10**7, 'checkpoint_every': 10**6}
    process = start(tmp_path / 'run', **longer)
    wait_for_record(tmp_path / 'run', process.is_alive)
    sent = time.monotonic()
    os.kill(process.pid, number)
    assert done(process) == 1
    seconds = time.monotonic() - sent
    compat('faults', f'{number.name} in the middle of a record', 'saved and left within 5 s')
    assert seconds < 5
    (step,) = steps_of(tmp_path / 'run', 'reference')
    records = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
    assert json.loads(records[-1])['step'] == step // 100 * 100


def test_stopped_after_every_call_a_run_ends_as_the_unbroken_one(make_config, tmp_path):
    short = LONG_RECORDS | {'reference_steps': 60, 'surgery_steps': 20, 'finetuning_steps': 0}
    opened.do(make_config(tmp_path / 'whole', **short))
    config = make_config(tmp_path / 'run', **short)
    # In calls of 20 steps; after the last, the phase is done.
    assert (
        run_in_short_stretches(config, side_by_side.train_references, stopping=[signal.SIGTERM])
        == 3
    )
    assert steps_of(tmp_path / 'run', 'reference') == [40, 60]
    opened.do(make_config(tmp_path / 'run', **short, resume=True))
    assert outcome(tmp_path / 'run') == outcome(tmp_path / 'whole')


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a small file system, which takes the rights of root."""
    folder = tmp_path / 'disk'
    folder.mkdir()

    def mount(options):
        command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    answer = mount('size=600k')
    if answer.returncode:
        pytest.skip(f'no small file system can be mounted here: {answer.stderr.strip()}')
    try:
        yield folder, lambda options: mount(f'remount,{options}')
    finally:
        subprocess.run(['umount', str(folder)], check=False)


@pytest.mark.slow
def test_a_full_disk(start, whole, tmp_path, compat, request):
    compat('faults', 'full disk', 'an error that says so; goes on from the last good checkpoint')
    disk, remount = request.getfixturevalue('small_disk')
    assert done(start(disk / 'run', tmp_path / 'error.txt')) == 1
    message = rf'OSError: {disk}/run.*: a checkpoint cannot be saved: .*No space left'
    assert re.match(message, (tmp_path / 'error.txt').read_text())
    assert steps_of(disk / 'run', 'reference')
    remount('size=50m')
    assert done(start(disk / 'run', resume=True)) == 0
    assert outcome(disk / 'run') == whole


def test_a_folder_that_cannot_be_written(make_config, compat, request):
    compat('faults', 'read-only folder', 'refused before any training')
    disk, remount = request.getfixturevalue('small_disk')
    remount('ro')
    with pytest.raises(OSError, match=r'--workdir=.*run must be a folder that can be written'):
        run.run(make_config(disk / 'run'))


def test_no_damage_to_a_checkpoint_brings_back_another_state(start_process, tmp_path, compat):
    row = 'damaged files in the newest checkpoint'
    compat('faults', row)
    # Of what it begins to read of a damaged file, orbax leaves tasks behind, and complaints.
    assert done(start_process(restore_damaged, tmp_path)) == 0
    steps = json.loads((tmp_path / 'steps.json').read_text())
    assert len(steps) > 50
    passed_over = steps.count(1)
    assert passed_over + steps.count(2) == len(steps)
    assert passed_over > len(steps) / 5
    compat('faults', row, f'{len(steps)} damages, {passed_over} led to the one before')
