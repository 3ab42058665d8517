"""Surgery by two tables of rules, run in every way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import dns_jax
from dns_jax import (
    Rule,
    global_density,
    has_axes,
    layer_density,
    log_linear_density,
    mean_std,
    polynomial_density,
    update_probability,
)

# As in the paper, biases take part.
surgery = functools.partial(dns_jax.surgery, takes_part=has_axes)
init_masks = functools.partial(dns_jax.init_masks, takes_part=has_axes)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
RULES = {
    'fc1': Rule(mean_std(0.2), update_probability(gamma=0.1)),
    'fc*': Rule(mean_std(-0.3, 0.3), update_probability(gamma=0.5, stop=15)),
}
STEPS = 20
# Rules that are asked again: the first at steps 4, 6, 8 …, the second at 0, 3, 6 and at the last.
REFRESHED = {
    'fc1': Rule(
        layer_density(polynomial_density(0.1, 1, 9, initial=0.8)),
        update_probability(gamma=0, start=3),
        refresh_every=2,
    ),
    'fc*': Rule(
        global_density(log_linear_density(0.2, 0, 8, initial=0.9), hysteresis=0.2),
        update_probability(gamma=0.1, stop=8),
        refresh_every=3,
    ),
}


def network(dtype=jnp.float32):
    random = np.random.default_rng(0)
    shapes = {'fc1': {'kernel': (16, 8), 'bias': (8,)}, 'fc2': {'kernel': (8, 8), 'bias': (8,)}}
    return jax.tree.map(
        lambda shape: random.normal(size=shape).astype(dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def drift(params, count):
    """Moves the weights to and fro, the same for every order of evaluation."""
    factors = jnp.where(count % 2 == 0, jnp.float32(1.25), jnp.float32(0.75))
    return jax.tree.map(lambda leaf: leaf * factors.astype(leaf.dtype), params)


def wander(params, count):
    """Moves every weight on a wave of its own, so that other weights are the largest."""

    def move(leaf):
        phases = jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape) ** 2
        return (leaf.astype(jnp.float32) + jnp.sin(phases + jnp.float32(count))).astype(leaf.dtype)

    return jax.tree.map(move, params)


def masks_of_run(how, params, key=None, steps=STEPS, rules=RULES, move=drift):
    """Runs some updates and returns the masks after each, stacked."""
    return states_of_run(how, params, key, steps, rules, move).masks


def states_of_run(how, params, key=None, steps=STEPS, rules=RULES, move=drift):
    """Runs some updates and returns the states after each, stacked."""
    transform = surgery(rules, jax.random.key(4) if key is None else key)
    state = transform.init(params)

    def step(state, count):
        moved = move(params, count)
        # The updates are not the weights, nor of their size.
        _, state = transform.update(jax.tree.map(jnp.ones_like, moved), state, moved)
        return state, state

    counts = jnp.arange(steps)
    if how == 'scan':
        return jax.lax.scan(step, state, counts)[1]
    if how == 'jit':
        step = jax.jit(step)
    seen = []
    for count in counts:
        state, _ = step(state, count)
        seen.append(state)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)


def three_layers(dtype=jnp.float32):
    params = network(dtype)
    kernel = 5 * np.random.default_rng(1).normal(size=(8, 16))
    return params | {'fc3': {'kernel': kernel.astype(dtype)}}
