"""The bench: its rows, its peer, its last line."""

import json
import sys

import pytest

from experiments import bench
from experiments.bench import BenchConfig
from experiments.measurements import loops

PEER = """
import json
row = {'dense': {'median_ms': 1000.0}, 'surgery': {'median_ms': 2000.0}}
print(json.dumps({'lenet300': row, 'lenet5': row}))
"""


@pytest.fixture
def small(monkeypatch):
    """One network, few steps: what it prints is tested, not how fast it is."""
    monkeypatch.setattr(bench, '_STEPS_PER_CALL', {'lenet300': 3})
    monkeypatch.setattr(bench, '_LARGE_LAYER', (30, 20))
    monkeypatch.setattr(loops, '_BATCHES', 2)


@pytest.fixture
def peer(tmp_path):
    script = tmp_path / 'peer.py'
    script.write_text(PEER)
    return script


@pytest.mark.slow
@pytest.mark.usefixtures('promotion')
def test_bench_measures_and_prints(small, peer, capsys):
    bench.bench(BenchConfig(rounds=2, peer=sys.executable, peer_script=str(peer), peer_rounds=1))
    out = capsys.readouterr().out
    table = json.loads(out.splitlines()[-1])
    row = table['lenet300']
    assert min(row['dense_ms'], row['surgery_ms']) > 0
    assert row['steps_per_s'] == pytest.approx(1e3 / row['surgery_ms'])
    assert isinstance(row['refresh_ms'], float)
    assert table['large']['weights'] == 600
    assert min(table['large'].values()) > 0
    # Masks are a byte per parameter; the masked weights four at the most.
    assert 0.2 < row['surgery_mib'] - row['dense_mib'] < 2
    assert table['peer'] == {'lenet300': {'dense_ms': 1000.0, 'surgery_ms': 2000.0}}
    assert f'{2000 / row["surgery_ms"]:.2f}× as fast' in out
    for loop in loops.LOOPS:
        for name in loops.OPTIMIZERS:
            assert min(table['loops'][loop][name].values()) > 0
            assert f'{loop} step, {name}: dense' in out


class Played(bench.TimedCall):
    """In place of programs, which take seconds to compile: all that they are asked."""

    def milliseconds(self):
        self.arguments.append(self.steps)
        return 1.0

    def peak_mebibytes(self):
        return 1.0


@pytest.fixture
def calls(small, monkeypatch):
    """The calls of all programs, none of which is compiled or run."""
    found = []
    monkeypatch.setattr(bench, 'compile_call', lambda name, kind: Played(None, found, 3))
    monkeypatch.setattr(loops, 'measure', lambda rounds: {})
    return found


def test_a_program_is_compiled_and_called(small, monkeypatch):
    monkeypatch.setattr(bench, '_EXAMPLES', 100)
    call = bench.compile_call('lenet300', 'density')
    assert call.milliseconds() > 0
    assert call.peak_mebibytes() > 3  # weights, momenta, masks


def test_rounds_are_the_timed_calls_and_peer_rounds_the_runs_of_the_peer(calls, peer, monkeypatch):
    runs = []
    answer = bench._run_peer
    monkeypatch.setattr(bench, '_run_peer', lambda *command: runs.append(1) or answer(*command))
    config = BenchConfig(rounds=7, peer=sys.executable, peer_script=str(peer), peer_rounds=3)
    table = bench.measure(config)
    assert (len(calls), len(runs)) == (3 * (1 + 7), 3)
    assert table['lenet300']['ratio'] == 1


def test_a_failing_peer_is_an_error(calls, tmp_path):
    (tmp_path / 'peer.py').write_text('raise SystemExit("no such thing")')
    script = str(tmp_path / 'peer.py')
    config = BenchConfig(rounds=1, peer=sys.executable, peer_script=script, peer_rounds=1)
    with pytest.raises(RuntimeError, match='failed: no such thing'):
        bench.measure(config)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'peer': 'python', 'peer_script': 'nowhere.py'}, '--peer_script must be a file.*nowhere'),
        ({'rounds': 2, 'peer_rounds': 3}, '--peer_rounds=3 must be at most --rounds=2'),
    ],
)
def test_bad_flags(fields, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**fields)
