"""What tests of situations from the field share: a network, every pruner, and how it is run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dns_jax import (
    Rule,
    freeze,
    global_density,
    importance,
    layer_density,
    mean_std,
    prune_to,
    pruners,
    surgery,
)

KEY = jax.random.key(0)


def slow_but(names, *fast):
    """All names, those that are not named again for `make test-all` alone."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def array(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype))


def network(seed=0):
    return {
        'fc1': {'kernel': array(16, 24, seed=seed), 'bias': array(24, seed=seed)},
        'fc2': {'kernel': array(24, 8, seed=seed) * 5, 'bias': array(8, seed=seed)},
        'norm': {'scale': array(8, seed=seed)},
    }


def run(pruner, steps=4, state=None):
    state = pruner.init(network(0)) if state is None else state
    update = jax.jit(pruner.update)
    for step in range(steps):
        params = network(step)
        _, state = update(network(step + 100), state, params)
    return state


MAKERS = {
    'mean_std': lambda: surgery(Rule(mean_std(0.3), 0.7, 2), KEY),
    'layer_density': lambda: surgery(Rule(layer_density(0.2)), KEY),
    'norm': lambda: surgery(Rule(global_density(0.2)), KEY),
    'rms': lambda: surgery(Rule(global_density(0.2, 'rms')), KEY),
    'erk': lambda: surgery(Rule(global_density(0.2, 'erk')), KEY),
    'gradient': lambda: surgery(Rule(layer_density(0.2)), KEY, importance=importance.gradient),
    'taylor': lambda: surgery(Rule(global_density(0.2)), KEY, importance=importance.taylor),
    'chance': lambda: surgery(
        Rule(layer_density(0.2)), KEY, importance=importance.chance, splicing=False
    ),
    'prune_to': lambda: prune_to(density=0.2, steps=3),
    'compression': lambda: prune_to(compression=3, steps=3),
    'han': lambda: pruners.han(0.5, [0, 2], KEY),
    'iterative': lambda: pruners.iterative(0.2, [0, 2], KEY, global_density),
    'gradual': lambda: pruners.gradual(0.2, 0, 2, 1, KEY),
    'one_shot': lambda: pruners.one_shot(0.2, 1, KEY),
    'RigL': lambda: pruners.regrow(0.2, 1, 9, KEY),
    'SET': lambda: pruners.regrow(0.2, 1, 9, KEY, growth=importance.chance),
    'freeze': lambda: freeze(jax.tree.map(lambda leaf: leaf > 0, network())),
}


@functools.cache
def on_one_device(name):
    return run(MAKERS[name]())
