"""Tests of inference._reasons: what had to stay is named, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dns_jax.inference._liveness import analyze
from dns_jax.inference._program import trace
from dns_jax.inference._reasons import find_stayed

X = np.ones((2, 5), np.float32)


def stayed(apply, params=X):
    plan = analyze(trace(apply, params, [X]), [params])
    return [(axis, units, name) for _, axis, units, name, _ in find_stayed(plan)]


def normalize(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1)


def root_normalize(x):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1)


@pytest.mark.parametrize('norm', [normalize, root_normalize])
def test_entries_that_a_norm_alone_reads(norm):
    dead = [(1, (0, 3), 'reduce_sum')]
    kept = np.array([1, 2, 4])
    assert stayed(lambda params, x: norm(jnp.sin(x * params))[:, kept]) == dead
    assert stayed(lambda params, x: norm(jnp.sin(x * params))) == []
    # The values of the softmax that stayed are those of its sum, and of its maximum.
    found = stayed(lambda params, x: jax.nn.softmax(jnp.sin(x * params))[:, kept])
    assert found
    assert {units for _, units, _ in found} == {(0, 3)}
    assert {name for *_, name in found} <= {'reduce_sum', 'reduce_max'}


def test_entries_that_are_known_need_not_stay():
    params = np.float32([[1, 0, 1, 1, 0]])
    assert stayed(lambda params, x: root_normalize(x * params)[:, 2:], params) == [
        (1, (0,), 'reduce_sum')
    ]


def test_entries_that_weights_of_zero_read_are_dead():
    params = np.float32(np.eye(5) + np.eye(5)[::-1])
    params[[0, 4]] = 0

    def apply(params, x):
        units = jnp.sin(x)
        return root_normalize(units)[:, 1:], units @ params

    assert stayed(apply, params) == [(1, (0,), 'reduce_sum')]


def test_what_is_pooled_is_not_dead():
    assert stayed(lambda params, x: (x * params).mean(1)) == []
    assert stayed(lambda params, x: (x * params).reshape(2, 5, 1).max(1)) == []


def test_entries_of_an_earlier_norm_are_found_behind_a_pool():
    found = stayed(lambda params, x: normalize(jnp.sin(x * params))[:, 1:].mean(0))
    assert found == [(1, (0,), 'reduce_sum')]


def test_primitives_that_are_not_followed():
    found = stayed(lambda params, x: jnp.sort(x * params)[:, 1:] * jax.lax.top_k(x, 4)[0])
    assert sorted(found) == [(None, (), 'sort'), (None, (), 'top_k')]
