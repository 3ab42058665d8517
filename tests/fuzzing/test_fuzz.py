"""Every reader of files and flags, given damaged input: it refuses it as documented, or is right.

The inputs are drawn from valid ones, the same in every run. Whatever they are, a reader raises
nothing but what it documents, takes memory in proportion to the input, and ends.
"""

import collections
import gc
import importlib.util
import re
import resource
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from damage import HOSTILE, arbitrary, damaged
from hypothesis import HealthCheck, given, settings
from readers import READERS

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = [  # what is spliced into files of another kind
    (ROOT / name).read_bytes()[:2_000]
    for name in (
        'zoo/lenet5.dns',
        'zoo/lenet5.safetensors',
        'zoo/lenet5.json',
        'results/bench.json',
    )
]
_SECONDS = 10  # of processor time, for any input; the slowest take a tenth of one
_GROWTH = 512 * 2**20  # bytes of all memory, also what is not Python's, over all inputs
_UNIT = 1 if sys.platform == 'darwin' else 1024  # of `ru_maxrss`


class TooSlow(BaseException):
    """No `Exception`, lest a reader that refuses damage of any kind takes it for that."""


@pytest.fixture
def folder():
    """A folder for the thousands of small files, in memory where there is such a place."""
    memory = Path('/dev/shm')
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


@pytest.fixture
def bounded():
    """Calls a reader and asserts what all inputs have in common; counts what became of them."""

    def stop(number, frame):
        raise TooSlow(f'it takes more than {_SECONDS} seconds')

    def call(reader, data):
        tracemalloc.start()
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        try:
            reader.read(data)
            outcomes['accepted'] += 1
        except reader.errors:
            outcomes['refused'] += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < reader.fixed + reader.factor * len(data)

    outcomes = collections.Counter()
    call.outcomes = outcomes
    handler = signal.signal(signal.SIGPROF, stop)
    # Garbage counts as memory: it is looked for as often as Python does, but among these inputs'.
    threshold = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(700)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield call
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * _UNIT
        assert grown < _GROWTH
    finally:
        signal.signal(signal.SIGPROF, handler)
        gc.set_threshold(*threshold)
        gc.unfreeze()


def fuzz(name, folder, bounded, mutations):
    """Reads the valid inputs of a reader, known attacks, damaged ones and any bytes."""
    reader = READERS[name](folder)
    quick = settings(suppress_health_check=list(HealthCheck), deadline=None)
    for seed in reader.seeds:
        reader.read(seed)
        bounded(reader, seed)
    for data in (*HOSTILE, *reader.attacks):
        refused = bounded.outcomes['refused']
        bounded(reader, data)
        assert data in HOSTILE or bounded.outcomes['refused'] > refused

    @settings(quick, max_examples=mutations)
    @given(damaged(reader.seeds, FOREIGN, reader.words))
    def mutate(data):
        bounded(reader, data)

    @settings(quick, max_examples=max(1, mutations // 4))
    @given(arbitrary(reader.seeds))
    def make_up(data):
        bounded(reader, data)

    mutate()
    make_up()
    return bounded.outcomes


@pytest.mark.parametrize('mutations', [40, pytest.param(2_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', READERS)
def test_damaged_input_is_refused_or_right(name, mutations, folder, bounded, compat):
    row = name if mutations < 2_000 else f'{name}, at length'
    compat('readers', row)
    outcomes = fuzz(name, folder, bounded, mutations)
    assert outcomes.total() > mutations
    assert min(outcomes['accepted'], outcomes['refused']) > 0
    compat('readers', row, count(outcomes))


def count(outcomes):
    return f'{outcomes.total():,} inputs, {outcomes["refused"]:,} refused, 0 crashes'


@pytest.mark.slow
@pytest.mark.parametrize('name', READERS)
def test_input_guided_by_coverage_is_refused_or_right(name, tmp_path, compat):
    if importlib.util.find_spec('atheris') is None:
        pytest.skip('atheris does not install here')
    compat('readers', f'{name}, guided by coverage')
    script = ROOT / 'tests' / 'tools' / 'fuzz_atheris.py'
    # From a shell: Linux counts as a program's what the process held that turned into it, and of
    # these tests' own process that is more than the fuzzer allows.
    command = ['sh', '-c', '"$@"; exit $?', 'sh', sys.executable, script, name]
    command.append('-max_total_time=20')
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    done = re.search(r'^Done (\d+) runs', answer.stderr, re.MULTILINE)
    assert done, answer.stderr[-3_000:]
    assert answer.returncode == 0
    compat('readers', f'{name}, guided by coverage', f'{int(done[1]):,} inputs, 0 crashes')
