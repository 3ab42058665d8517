"""The contract that every rule of thresholds keeps: test_contract has that of the transformations.

A new rule is one more entry in RULES. It is asked about every entry of LAYERS, alone, and says
nothing here of which numbers it gives, but that they do not depend on how it is asked.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from situations import slow_but

from dns_jax import (
    Thresholds,
    global_density,
    has_axes,
    init_masks,
    layer_density,
    log_linear_density,
    mean_std,
    polynomial_density,
)
from dns_jax.thresholds import weight_std

RULES = {
    'mean_std': mean_std(0.4, hysteresis=0.2),
    'weight_std': weight_std(0.7),
    'layer_density': layer_density(polynomial_density(0.2, 0, 9, initial=0.9)),
    'global_density by norm': global_density(log_linear_density(0.1, 0, 9, initial=0.8)),
    'global_density by rms': global_density(0.3, 'rms', hysteresis=0.2),
    'global_density by erk': global_density(0.3, 'erk'),
}
# Whose bands change with the step.
FALLING = ('layer_density', 'global_density by norm')
# Those that ask which connections are kept.
COUNTING = [name for name in RULES if 'density' in name]


def layers(dtype=jnp.float32):
    """Layers of several scales, with one leaf or two, and masks that keep about half of each."""
    random = np.random.default_rng(0)
    shapes = {'conv1': ([3, 3, 1, 8], [8]), 'fc1': ([24, 16], [16]), 'out/fc': ([16, 8],)}
    weights, masks = {}, {}
    for scale, (layer, leaves) in enumerate(shapes.items(), 1):
        weights[layer] = [(scale * random.normal(size=s)).astype(dtype) for s in leaves]
        masks[layer] = [random.random(s) < 0.5 for s in leaves]
    return weights, masks


LAYERS = {
    'float32': layers,
    'bfloat16': lambda: layers(jnp.bfloat16),
    'float16': lambda: layers(jnp.float16),
    'tuples': lambda: tuple({k: tuple(v) for k, v in tree.items()} for tree in layers()),
    'one weight, at the root': lambda: ({'': [jnp.array([-2.0])]}, {'': [jnp.array([True])]}),
    'zeros': lambda: (jax.tree.map(jnp.zeros_like, layers()[0]), init_masks(layers()[0], has_axes)),
    'all pruned': lambda: (layers()[0], jax.tree.map(jnp.zeros_like, layers()[1])),
}

each_rule = pytest.mark.parametrize('name', RULES)


@functools.cache
def ask(name):
    """The rule under jit, compiled once for all tests that ask about the same layers."""
    return jax.jit(RULES[name])


@functools.cache
def expected(name, step=3):
    """What others are compared with."""
    return ask(name)(*layers(), jnp.int32(step))


def close(bands, others):
    """A sum may be taken in another order, by an ulp or two."""
    chex.assert_trees_all_close(jax.device_get(bands), jax.device_get(others), rtol=2e-6)


@pytest.mark.parametrize('case', slow_but(LAYERS, *(case for case in LAYERS if case != 'float16')))
@each_rule
def test_bands_are_float32_scalars_by_the_names_of_the_layers(name, case):
    weights, masks = LAYERS[case]()
    bands = ask(name)(weights, masks, jnp.int32(3))
    assert 'callback' not in str(ask(name).trace(weights, masks, jnp.int32(3)).jaxpr)
    assert bands.keys() == weights.keys()
    for band in bands.values():
        assert isinstance(band, Thresholds)
        for bound in band:
            assert (bound.shape, bound.dtype, bound.weak_type) == ((), jnp.float32, False)
        assert 0 <= band.low <= band.high < jnp.inf


@each_rule
def test_the_same_without_jit(name):
    close(RULES[name](*layers(), 3), expected(name))


@each_rule
def test_the_same_under_scan_and_vmap(name):
    weights, masks = layers()
    steps = jnp.arange(6)
    alone = jax.tree.map(lambda *bounds: jnp.stack(bounds), *(expected(name, i) for i in range(6)))

    # A scan holds what is carried to its structure, shapes and dtypes.
    def step(bands, count):  # as a cond does
        del bands
        bands = RULES[name](weights, masks, count)
        return bands, bands

    close(jax.jit(lambda: jax.lax.scan(step, expected(name), steps)[1])(), alone)
    close(jax.jit(jax.vmap(RULES[name], (None, None, 0)))(weights, masks, steps), alone)
    for layer, band in alone.items():
        assert (np.unique(band.low).size > 1) == (name in FALLING), layer


@each_rule
def test_sharded_weights_have_the_same_bands(name, mesh):
    def place(leaf):
        axes = (*[None] * (leaf.ndim - 1), 'x')
        return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*axes)))

    placed = jax.tree.map(place, layers())
    assert len(placed[0]['conv1'][0].addressable_shards) == 8
    close(ask(name)(*placed, jnp.int32(3)), expected(name))


@each_rule
def test_order_of_the_layers_sign_and_unit_of_the_weights_do_not_matter(name):
    weights, masks = layers()
    backwards = [dict(reversed(tree.items())) for tree in (weights, masks)]
    close(ask(name)(*backwards, jnp.int32(3)), expected(name))
    eightfold = jax.tree.map(lambda leaf: -8 * leaf, weights)
    wanted = jax.tree.map(lambda bound: 8 * bound, expected(name))
    close(ask(name)(eightfold, masks, jnp.int32(3)), wanted)


@each_rule
def test_masks_and_step_are_looked_at_by_those_that_say_so(name):
    weights, masks = layers()
    other = ask(name)(weights, jax.tree.map(jnp.logical_not, masks), jnp.int32(3))
    assert (other != expected(name)) == (name in COUNTING)
    if name not in COUNTING:
        again = jax.jit(lambda: RULES[name](weights, {}, None))()
        chex.assert_trees_all_close(again, other, rtol=1e-6)  # another program, other roundings
