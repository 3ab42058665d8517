"""Tests of inference._liveness: what is needed, what is known, and what depends on what."""

import jax
import jax.numpy as jnp
import numpy as np

from dns_jax.inference._known import sizes
from dns_jax.inference._liveness import ACTIVATION, CONSTANT, WEIGHT, analyze
from dns_jax.inference._program import trace

X = np.ones((2, 3), np.float32)


def plan_of(apply, params, *inputs):
    return analyze(trace(apply, params, inputs), jax.tree.leaves(params))


def computed(plan):
    return [step.call.equation.primitive.name for step in plan.steps]


def test_what_depends_on_what():
    def apply(params, x):
        return x * jnp.sin(params) + fixed

    fixed = jnp.cos(X)
    plan = plan_of(apply, 2 * X, X)
    kinds = {
        equation.primitive.name: plan.kinds[equation.results[0]]
        for equation in plan.program.equations
    }
    assert kinds == {'sin': WEIGHT, 'mul': ACTIVATION, 'add': ACTIVATION}
    assert {plan.kinds[number] for number in plan.program.constants} == {CONSTANT}


def test_what_no_output_needs_is_not_computed():
    def apply(params, x):
        unread = jnp.exp(x * params).sum()
        return jnp.sin(x) + 0 * unread, 3 * params[0, 0]

    plan = plan_of(lambda params, x: apply(params, x)[1], X, X)
    assert 'exp' not in computed(plan)
    assert 'sin' not in computed(plan)
    assert sizes(plan.held[plan.program.leaves[0]]) == (1, 1)
    plan = plan_of(lambda params, x: jnp.exp(x).sum() * 0 * params, X, X)  # a product with 0 is 0
    assert computed(plan) == []


def test_what_depends_on_constants_alone_is_not_computed():
    plan = plan_of(lambda params, x: x * params + jnp.sin(jnp.arange(3.0))[None], X, X)
    assert computed(plan) == ['mul', 'add']


def test_what_depends_on_weights_alone_is_computed():
    plan = plan_of(lambda params, x: x + jnp.sin(jnp.zeros((2, 3)) + params), X, X)
    assert computed(plan) == ['add', 'sin', 'add']


def test_a_plan_forgets_the_weights():
    weights = np.arange(12, dtype=np.float32).reshape(3, 4)
    plan = plan_of(lambda params, x: jnp.sin(x @ params) @ params.T, weights, X)
    found = [known for step in plan.steps for known in step.call.known] + plan.known
    assert all(known.mask.size < weights.size for known in found)


def test_arrays_without_entries_are_taken_whole():
    def apply(params, x):
        return jnp.concatenate([x[:0], x * params]).sum(0), x[:0] + 1

    plan = plan_of(apply, X, X)
    assert sizes(plan.held[plan.program.leaves[0]]) == (2, 3)
