"""Tests of measurements.timing: on one core, with the flags that were given."""

import dataclasses
import os

import jax.numpy as jnp
import pytest

import dns_jax
from experiments.config.command_line import flag
from experiments.measurements import timing


def test_one_core():
    before = os.sched_getaffinity(0)
    with timing.on_one_core():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize('kind', timing.RULES)
def test_a_step_prunes_but_where_it_is_dense(kind):
    optimizer = timing.make_timed_optimizer(kind, refresh_every=2)
    params = {'fc': {'kernel': jnp.arange(200.0).reshape(20, 10)}}
    _, state = optimizer.update(params, optimizer.init(params), params)
    kept = sum(dns_jax.count_kept(dns_jax.get_masks(state)).values())
    assert (kept == 0) if kind == 'dense' else (0 < kept < 100)  # a dense step has no masks


def test_flags_are_those_that_differ_from_their_defaults():
    @dataclasses.dataclass
    class Flags:
        rounds: int = flag(3, 'how often')
        model: str = flag('', 'which')
        output: str = flag('', 'where')

    assert timing.given_flags(Flags(5, output='some/where')) == ['--rounds=5']
