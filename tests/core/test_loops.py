"""Tests of loops: a step that is taken once or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dns_jax._core.loops import once_if


def step(turn, carry):
    assert turn.dtype == jnp.int32
    return {'number': carry['number'] * 2 + turn.astype(jnp.float32), 'other': carry['other']}


@pytest.mark.parametrize('due', [True, False])
@pytest.mark.parametrize('transform', [lambda function: function, jax.jit])
def test_a_step_is_taken_once_or_not_at_all(due, transform):
    carry = {'number': jnp.float32(3), 'other': jnp.int32(1)}
    turns, new = transform(lambda due, carry: once_if(due, step, carry))(jnp.array(due), carry)
    assert (int(turns), float(new['number']), int(new['other'])) == (due, 6 if due else 3, 1)


def test_each_of_many_goes_by_its_own():
    due = jnp.array([True, False, True])
    carry = {'number': jnp.arange(1.0, 4.0), 'other': jnp.zeros(3)}
    turns, new = jax.vmap(lambda due, carry: once_if(due, step, carry))(due, carry)
    np.testing.assert_array_equal(turns, due)
    np.testing.assert_array_equal(new['number'], [2, 2, 6])
