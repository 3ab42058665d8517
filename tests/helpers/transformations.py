"""Every transformation of masks that the contracts ask, trees for them, and how they are run.

A new pruner is one more entry in TRANSFORMATIONS: a function of a key that returns the optax
transformation. It is asked to work on every tree of TREES, so its patterns must match any.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from situations import slow_but

from dns_jax import (
    Blocks,
    NofM,
    Rule,
    Units,
    get_masks,
    global_density,
    has_axes,
    importance,
    is_kernel,
    layer_density,
    log_linear_density,
    mean_std,
    polynomial_density,
    prune_to,
    pruners,
    surgery,
    update_probability,
)

SIGMA = update_probability(gamma=0.3, stop=12)
RULE = Rule(mean_std(0.2), SIGMA)
BY_LAYER = Rule(layer_density(polynomial_density(0.2, 0, 9, initial=0.8)), SIGMA, refresh_every=3)
GLOBAL = Rule(global_density(log_linear_density(0.1, 2, 10, initial=0.7)), SIGMA, refresh_every=2)
FOLLOWED = GLOBAL._replace(refresh_every=None)


def one_layer(path):
    del path
    return 'all'


ALL = {'takes_part': has_axes}  # biases too
TRANSFORMATIONS = {
    'surgery': lambda key: surgery(RULE, key, **ALL),
    'surgery of kernels as one': lambda key: surgery({'*': RULE}, key, layer_of=one_layer),
    'units': lambda key: surgery(RULE._replace(structure=Units()), key, **ALL),
    'rows over all': lambda key: surgery(
        FOLLOWED._replace(structure=Blocks((1, -1))), key, takes_part=is_kernel
    ),
    'one of two': lambda key: surgery(
        Rule(None, SIGMA, structure=NofM(1, 2, axis=-1)), key, takes_part=is_kernel
    ),
    'surgery of nothing': lambda key: surgery({}, key),
    'a density per layer': lambda key: surgery({'*': BY_LAYER}, key, **ALL),
    'a density over all': lambda key: surgery(GLOBAL, key, **ALL),
    'a density that is followed': lambda key: surgery(FOLLOWED, key, **ALL),
    'prune_to': lambda key: prune_to(density=0.2, steps=12, key=key),
    'surgery without splicing': lambda key: surgery(RULE, key, splicing=False, **ALL),
    'Han': lambda key: pruners.han(0.3, [0, 3, 9], key, **ALL),
    'iterative': lambda key: pruners.iterative(
        0.3, [0, 5], key, importance=importance.taylor, **ALL
    ),
    'straight-through': lambda key: pruners.straight_through(0.3, key, **ALL),
    'AC/DC': lambda key: pruners.ac_dc(0.3, 0, 9, 3, key, importance=importance.chance, **ALL),
    'SET': lambda key: pruners.regrow(0.3, 3, 9, key, growth=importance.chance, **ALL),
    'RigL': lambda key: pruners.regrow(0.3, 2, 9, key, 0.5, initial=importance.magnitude, **ALL),
    'gradual': lambda key: pruners.gradual(0.2, 0, 9, 3, key, importance=importance.chance, **ALL),
}
# Of these another key changes nothing.
COINLESS = (
    'Han',
    'iterative',
    'RigL',
    'straight-through',
    'one of two',
    'surgery of kernels as one',
)
# The trees that a structure does not divide.
UNFIT = {'one of two': ('tuples', 'bare array')}
# Those that change masks at the first step.
ACTIVE = [
    name for name in TRANSFORMATIONS if name not in ('surgery of nothing', 'prune_to', 'gradual')
]


class Dense(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A module filtered to its arrays, as Equinox does it: None where there was no array."""

    kernel: jax.Array
    bias: jax.Array | None
    inner: Any


def array(*shape, dtype=jnp.float32):
    values = np.random.default_rng(sum(shape)).normal(size=shape)
    return jnp.asarray(values.astype(dtype))


def linen():
    layers = {
        'conv1': {'kernel': array(3, 3, 1, 4), 'bias': array(4)},
        'fc1': {'kernel': array(8, 6), 'bias': array(6)},
    }
    return {'params': layers}


def nnx_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv1 = nnx.Conv(1, 4, (3, 3), rngs=rngs)
            self.fc1 = nnx.Linear(8, 6, rngs=rngs)

    return nnx.state(Net(nnx.Rngs(0)), nnx.Param)


TREES = {
    'linen': linen,
    'tuples': lambda: ((array(4, 3), array(3)), (array(3, 2), array(2))),
    'bare array': lambda: array(6, 5),
    'nnx.State': nnx_state,
    'nnx pure dict': lambda: nnx.to_pure_dict(nnx_state()),
    'named tuple': lambda: {'fc1': Dense(array(8, 6), array(6))},
    'module with None': lambda: Module(array(4, 4), None, [Module(array(5, 4), array(4), None)]),
    'scalar beside': lambda: {'fc1': {'kernel': array(8, 6)}, 'temperature': jnp.ones(())},
    'bfloat16': lambda: optax.tree.cast(linen(), jnp.bfloat16),
    'float16': lambda: optax.tree.cast(linen(), jnp.float16),
}
# Between them they go every way through the code; the others keep the contract in `make test-all`.
BRIEFLY = (
    'surgery',
    'rows over all',
    'one of two',
    'a density that is followed',
    'prune_to',
    'iterative',
    'RigL',
)
each_transformation = pytest.mark.parametrize('name', slow_but(TRANSFORMATIONS, *BRIEFLY))
# That `surgery` is wrapped shows in test_wrappers.
each_active = pytest.mark.parametrize('name', slow_but(ACTIVE, 'RigL'))


def make(name, seed=0):
    return TRANSFORMATIONS[name](jax.random.key(seed))


def gradients_at(params, count):
    """Some gradients, another sign at every step, so that weights go to and fro."""
    sign = jnp.where(count % 2 == 0, 1.0, -1.0)
    return jax.tree.map(lambda leaf: (leaf * sign).astype(leaf.dtype), params)


def run(optimizer, params, steps=14, state=None, first=0):
    """Trains for some steps, in one program that stays on the device.

    Returns the weights, the state and the masks after every step.
    """
    traces = []

    @jax.jit
    def step(params, state, count):
        traces.append(1)
        updates, state = optimizer.update(gradients_at(params, count), state, params)
        return optax.apply_updates(params, updates), state

    state, course = optimizer.init(params) if state is None else state, []
    for count in range(first, first + steps):
        params, state = step(params, state, jnp.int32(count))
        course.append((params, state, get_masks(state)))
    assert len(traces) == 1
    assert 'callback' not in str(step.trace(params, state, jnp.int32(0)).jaxpr)
    return course


def before(transform):
    return optax.chain(transform, optax.sgd(0.1))


@functools.cache
def started(name):
    """A transformation and its state at the start."""
    transform = make(name)
    return transform, transform.init(linen())


@functools.cache
def whole_run(name):
    """What others are compared with."""
    return run(before(make(name)), linen())
