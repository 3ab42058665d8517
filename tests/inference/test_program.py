"""Tests of inference._program: one flat list of equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core.primitives import cond_p

from dns_jax.inference._program import evaluate, trace

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)


@jax.custom_jvp
def twice(x):
    return 2 * x


twice.defjvps(lambda tangent, _, x: 3 * tangent)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def times(x, factor):
    return x * factor


times.defvjp(lambda x, factor: (x * factor, None), lambda factor, _, tangent: (tangent,))


def names(function, *inputs):
    return [each.primitive.name for each in trace(function, X, inputs).equations]


@pytest.mark.parametrize(
    'function',
    [
        lambda x: jnp.sin(2 * x),
        jax.jit(lambda x: jnp.sin(jax.jit(lambda x: 2 * x)(x))),
        jax.checkpoint(lambda x: jnp.sin(2 * x)),
        lambda x: jnp.sin(twice(x)),
        lambda x: jnp.sin(times(x, 2.0)),
    ],
)
def test_bodies_of_calls_are_put_in_their_place(function):
    assert names(function) == ['mul', 'sin']


def test_other_bodies_stay():
    def choose(x):
        return jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x)

    program = trace(choose, X, [])
    equation = program.equations[-1]
    assert equation.primitive is cond_p
    (result,) = evaluate(equation, [np.int32(1), X])
    np.testing.assert_allclose(result, np.sin(X), rtol=1e-5)


def test_constants_are_literals_and_arrays_that_the_function_closes_over():
    closed = jnp.asarray(X)
    program = trace(lambda x, y: (2 * x + closed, y), X, [X])
    values = [np.asarray(value) for value in program.constants.values()]
    assert [value.shape for value in values] == [(2, 3), ()] or [v.shape for v in values] == [
        (),
        (2, 3),
    ]
    assert program.outputs[1] == program.inputs[0]
    assert jax.tree.unflatten(program.structure, [1, 2]) == (1, 2)


def test_side_effects_are_refused():
    def show(x):
        jax.debug.print('{}', x)
        return x

    with pytest.raises(ValueError, match='side effects'):
        trace(show, X, [])
