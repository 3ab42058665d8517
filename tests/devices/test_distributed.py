"""Tests of runs of many processes: real ones on loopback, that are stopped, killed and resumed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import wait_for_record

from dns_jax.files.sparse import load_sparse
from experiments.devices import hosts

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240  # seconds that a process of these tests may take
FLAGS = {
    **{'dataset': 'digits', 'image_size': 8, 'crop': 'whole', 'batch_size': 16, 'accumulate': 2},
    **{'reference_steps': 40, 'surgery_steps': 120, 'finetuning_steps': 0, 'dropout': 0.2},
    **{'record_every': 10, 'checkpoint_every': 20, 'refresh_every': 5, 'compression': 5},
    **{'reference_learning_rate': 'fixed:0.1', 'learning_rate': 'fixed:0.1'},
}


@pytest.mark.parametrize(
    ('text', 'arguments'),
    [
        ('auto', {}),
        (
            '10.0.0.1:9999,4,3',
            {'coordinator_address': '10.0.0.1:9999', 'num_processes': 4, 'process_id': 3},
        ),
    ],
)
def test_parse_distributed(text, arguments):
    assert hosts.parse_distributed(text) == arguments


@pytest.mark.parametrize(
    'text',
    ['yes', 'host', 'host:port,2,0', ':9999,2,0', 'host:9999', 'host:9999,2', 'host:9999,2,-1'],
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=f'--distributed={text} must be auto or HOST:PORT'):
        hosts.parse_distributed(text)


def test_a_process_beyond_the_last_is_refused():
    with pytest.raises(ValueError, match='names process 2 of 2; they count from 0'):
        hosts.parse_distributed('host:9999,2,2')


def test_alone_the_first_acts_and_its_errors_pass():
    done = []
    hosts.on_first(lambda: done.append(1))
    assert done == [1]
    assert hosts.is_first()
    assert hosts.max_over_processes(7) == 7
    for kind in (ValueError, OSError):
        with pytest.raises(kind, match='a reason'):
            hosts.on_first(lambda kind=kind: (_ for _ in ()).throw(kind('a reason')))


def free_address():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return f'127.0.0.1:{free.getsockname()[1]}'


@pytest.fixture(scope='module')
def start(data_dir, tmp_path_factory):
    """Starts processes of one run; those still alive at the end are killed."""
    started = []
    # Else every process compiles what those before it have compiled.
    cache = {
        'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('compiled')),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }

    def start(workdir, processes, devices, *flags):
        address = free_address()
        values = {**FLAGS, 'data_dir': data_dir, 'workdir': workdir}
        command = [sys.executable, 'tests/helpers/tiny.py']
        command += [f'--{name}={value}' for name, value in values.items()]
        command += flags
        environment = {**os.environ, **cache, 'JAX_NUM_CPU_DEVICES': str(devices)}
        environment['PYTHONPATH'] = str(ROOT)
        options = {'cwd': ROOT, 'env': environment, 'text': True, 'stdout': subprocess.PIPE}
        options['start_new_session'] = True
        group = []
        for process in range(processes):
            joined = [f'--distributed={address},{processes},{process}'] if processes > 1 else []
            with (Path(workdir).parent / f'{process}.err').open('ab') as errors:
                group.append(subprocess.Popen([*command, *joined], stderr=errors, **options))
        started.extend(group)
        return group

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


def all_live(group):
    return all(process.poll() is None for process in group)


def end_of(group):
    return [process.wait(timeout=LIMIT) for process in group]


@pytest.mark.slow
def test_two_processes_are_one_run(start, tmp_path):
    """Stopped by a signal to one, killed, robbed of a checkpoint: as one process on two devices."""
    folder, alone = tmp_path / 'two' / 'run', tmp_path / 'one' / 'run'
    for path in (folder, alone):
        path.parent.mkdir()
    errors = [folder.parent / f'{process}.err' for process in range(2)]

    group = start(folder, 2, 1)
    wait_for_record(folder, lambda: all_live(group), 'reference', 10)
    group[1].send_signal(signal.SIGTERM)
    assert end_of(group) == [1, 1]
    for path in errors:
        assert 'Stopped: SIGTERM: saved' in path.read_text()

    group = start(folder, 2, 1, '--resume')
    saved = folder / 'checkpoints' / 'surgery'
    wait_for_record(folder, lambda: all_live(group), 'surgery', 50)
    while not (saved / '40').exists() and group[0].poll() is None:  # written in the background
        time.sleep(0.01)
    group[1].kill()
    killed = time.monotonic()
    assert end_of(group)[0] not in (0, None)
    assert time.monotonic() - killed < 90
    text = errors[0].read_text()
    assert 'another task died' in text or 'most likely because another is gone' in text

    newest = max(int(path.name) for path in saved.iterdir() if path.name.isdigit())
    manifest = saved / str(newest) / 'leaves' / 'manifest.ocdbt'
    manifest.write_bytes(manifest.read_bytes()[:20])
    group = start(folder, 2, 1, '--resume')
    assert end_of(group) == [0, 0]
    assert len(list(saved.glob(f'damaged-{newest}-*'))) == 1
    assert json.loads(group[0].stdout.read().splitlines()[-1])['steps'] == 120
    printed = [line for line in group[1].stdout if not line.startswith('[Gloo]')]
    assert not printed, 'the first alone prints'

    assert end_of(start(alone, 1, 2)) == [0]
    assert (folder / 'flags.json').read_bytes() == (alone / 'flags.json').read_bytes()
    ours, its = (load_sparse(path / 'pruned.safetensors') for path in (folder, alone))
    jax.tree.map(np.testing.assert_array_equal, ours.masks, its.masks)
    if len(os.sched_getaffinity(0)) > 1:
        # On one core a process with two devices has a thread for each, and sums in other orders.
        for name in ('metrics.jsonl', 'pruned.safetensors'):
            assert (folder / name).read_bytes() == (alone / name).read_bytes(), name

    # From the network of the first, one layer split over the processes.
    split = tmp_path / 'two' / 'split'
    flags = ('--mesh=model:2', f'--reference={folder}', '--count_returns', '--ramp_end=30')
    group = start(split, 2, 1, *flags)
    assert end_of(group) == [0, 0]
    summary = json.loads(group[0].stdout.read().splitlines()[-1])
    assert summary['compression'] == pytest.approx(5, rel=0.01)
    assert summary['returns']['returned'] <= summary['returns']['pruned']


@pytest.mark.slow
def test_a_signal_to_all_spares_the_workers(start, tmp_path):
    """As Ctrl-C and clusters send it: the run needs its decoders until it has saved."""
    folder, alone = tmp_path / 'stopped' / 'run', tmp_path / 'whole' / 'run'
    for path in (folder, alone):
        path.parent.mkdir()
    group = start(folder, 1, 1, '--workers=2')
    wait_for_record(folder, lambda: all_live(group), 'reference', 10)
    os.killpg(group[0].pid, signal.SIGTERM)
    assert end_of(group) == [1]
    assert 'Stopped: SIGTERM: saved' in (folder.parent / '0.err').read_text()
    assert end_of(start(folder, 1, 1, '--workers=2', '--resume')) == [0]
    assert end_of(start(alone, 1, 1)) == [0]
    for name in ('metrics.jsonl', 'pruned.safetensors'):
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name


REFUSAL = """
import sys, types
from experiments.devices import hosts

def refuse():
    raise ValueError('the folder is taken')

act = hosts.with_processes(lambda config: hosts.on_first(refuse))
act(types.SimpleNamespace(distributed=sys.argv[1]))
"""


@pytest.mark.slow
def test_a_refusal_of_the_first_ends_all():
    address = free_address()
    group = [
        subprocess.Popen(
            [sys.executable, '-c', REFUSAL, f'{address},2,{number}'],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for number in range(2)
    ]
    try:
        errors = [process.communicate(timeout=LIMIT)[1] for process in group]
    finally:
        for process in group:
            process.kill()
    assert [process.returncode for process in group] == [1, 1]
    assert 'ValueError: the folder is taken' in errors[0]
    assert 'RuntimeError: the first process could not go on; its own message says' in errors[1]
