"""Tests of measurements.loops: the loops of users, of which both do the same."""

import chex
import jax
import pytest

import dns_jax
from experiments.measurements import loops


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(loops, '_BATCHES', 2)


def test_both_loops_train_and_prune_alike():
    ends = []
    for name in loops.LOOPS:
        loop, carry = loops.make_loop(name, 'sgd', 'moving')
        milliseconds, (params, state) = loop.milliseconds(carry)
        assert milliseconds > 0
        masks = dns_jax.get_masks(state)
        total = dns_jax.measure_sizes(params, masks).total
        assert total.kept < 0.03 * total.parameters
        ends.append((params, masks))
    chex.assert_trees_all_equal(ends[0][1], ends[1][1])
    chex.assert_trees_all_close(ends[0][0], ends[1][0], atol=1e-6)


def test_what_is_told_is_of_the_rounds_after_two(monkeypatch):
    times = iter([9.0] * 2 * 28 + [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0] * 4)
    monkeypatch.setattr(loops, 'make_loop', lambda *key: (loops.Loop(None, None), None))
    monkeypatch.setattr(loops.Loop, 'milliseconds', lambda loop, carry: (next(times), carry))
    medians = loops.measure(1)
    row = {'dense_ms': 2.0, **dict(zip(loops.PRUNERS, (1.5, 2.0, 2.5, 3.0, 3.5, 4.0), strict=True))}
    assert medians == {loop: dict.fromkeys(loops.OPTIMIZERS, row) for loop in loops.LOOPS}
    last = loops.format_rows(medians)[-1]
    assert last.startswith('lenet300, scanned step, adam: dense 2.000 ms; while masks move ×1.500')
    assert last.endswith('of 2:4 ×3.000, packed ×3.500; after surgery ×4.000')


def test_surgery_that_is_over_moves_nothing():
    pruner, params = loops.PRUNERS['after'](), {'fc': {'kernel': jax.numpy.ones((40, 5))}}
    state = pruner.init(params)
    for _ in range(2):
        _, state = pruner.update(params, state, params)
    assert int(state.count) == 2
