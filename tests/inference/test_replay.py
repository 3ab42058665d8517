"""Tests of inference._replay: outputs by a plan, and nothing computed that it does not hold."""

import jax
import jax.numpy as jnp
import numpy as np

from dns_jax.inference._liveness import analyze
from dns_jax.inference._program import trace
from dns_jax.inference._replay import replay


def test_outputs_by_a_plan():
    random = np.random.default_rng(0)
    weights = random.normal(size=(3, 5)).astype(np.float32)
    weights[:, 1] = 0
    x = random.normal(size=(2, 3)).astype(np.float32)

    def apply(weights, x):
        units = jnp.cos(x @ weights)[:, :4]
        return units, jnp.concatenate([x, jnp.ones((2, 1))], 1), units[:, 1], jnp.arange(3)

    program = trace(apply, weights, [x])
    plan = analyze(program, [weights])
    given = replay(plan, [weights[:, [0, 2, 3]]], [x])
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6),
        tuple(given),
        apply(weights, x),
    )
    products = [
        equation
        for equation in jax.make_jaxpr(lambda w, x: replay(plan, [w], [x]))(weights[:, :3], x).eqns
        if equation.primitive.name == 'dot_general'
    ]
    assert [equation.outvars[0].aval.shape for equation in products] == [(2, 3)]


def test_what_is_not_followed_gets_all_of_its_operands():
    weights = np.float32([[1, 0, 2]])

    def apply(weights, x):
        return jnp.sort(x * weights, -1)[:, ::2]

    x = np.float32([[3, 4, -5], [1, 2, 3]])
    plan = analyze(trace(apply, weights, [x]), [weights])
    (given,) = replay(plan, [weights[:, [0, 2]]], [x])
    np.testing.assert_allclose(given, apply(weights, x))
