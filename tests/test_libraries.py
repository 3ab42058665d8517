"""Model libraries: docs/libraries.md runs, and all libraries do the same from the same start."""

import functools
import re
from pathlib import Path

import chex
import equinox
import haiku
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

from dns_jax import apply_masks, get_masks, group_by_layer, init_masks, is_kernel, layer_names

PAGE = (Path(__file__).parents[1] / 'docs' / 'libraries.md').read_text()
PREAMBLE, *SECTIONS = PAGE.split('\n## ')
RECIPES = {section.partition('\n')[0]: section for section in SECTIONS}
# Of each recipe, its row in the report and what its layers are called.
ROWS = {
    'Flax linen': ('flax.linen', ['fc1', 'fc2']),
    'Flax NNX, State': ('flax.nnx, State', ['fc1', 'fc2']),
    'Flax NNX, pure dict': ('flax.nnx, pure dict', ['layers/0', 'layers/2']),
    'Haiku': ('Haiku', ['fc1', 'fc2']),
    'Equinox': ('Equinox', ['layers/0', 'layers/1']),
    'Tuples': ('plain tuples', ['0', '1']),
    'A bare array': ('a bare array', ['']),
}
STEPS = 200


def code_of(text):
    (code,) = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    return compile(code, 'docs/libraries.md', 'exec')


@pytest.fixture(autouse=True)
def defaults_of_jax():
    # A reader's own code adds biases as JAX allows by default.
    with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
        yield


@functools.cache
def run_recipe(library):
    """Runs the preamble and one recipe; gives the names that they leave behind."""
    names = {}
    exec(code_of(PREAMBLE), names)
    exec(code_of(RECIPES[library]), names)
    return names


def by_layer(tree):
    """The arrays of each layer by their number of axes, layers in the order of their names.

    Kernels come as (inputs, outputs), for which Equinox's are turned; none is square.
    """
    layers = {}
    for name, leaf in zip(*map(jax.tree.leaves, (layer_names(tree), tree)), strict=True):
        layers.setdefault(name, {})[leaf.ndim] = np.asarray(leaf)
    for layer in layers.values():
        if 1 in layer and layer[2].shape[1] != layer[1].size:
            layer[2] = layer[2].T
    return [layers[name] for name in sorted(layers)]


def put(start, tree):
    """Gives the tree of a library the weights of another, which are as `by_layer` gives them."""
    names = layer_names(tree)
    order = sorted(set(jax.tree.leaves(names)))

    def replace(name, leaf):
        found = jnp.asarray(start[order.index(name)][leaf.ndim])
        return found if found.shape == leaf.shape else found.T

    return jax.tree.map(replace, names, tree)


def train(names, apply, params):
    """Trains by the page's own step; gives the weights, and the masks after each step."""
    state = names['optimizer'].init(params)
    masks = [by_layer(get_masks(state))]
    for _ in range(STEPS):
        params, state = names['step'](apply, params, state)
        masks.append(by_layer(get_masks(state)))
    return by_layer(params), jax.tree.map(lambda *leaves: np.stack(leaves), *masks)


@functools.cache
def expected(library):
    """Where all begin and where they must get: as tuples, or one matrix as linen's layer."""
    names = run_recipe('Tuples')
    if library == 'A bare array':
        network = linen.Dense(4, use_bias=False)
        params, apply = network.init(jax.random.key(3), names['x']), network.apply
    else:
        params, apply = names['params'], names['apply']
    return by_layer(params), *train(names, apply, params)


def test_every_recipe_is_tried():
    assert list(RECIPES) == list(ROWS)


@pytest.mark.parametrize('library', ROWS)
def test_library(library, compat):
    row, layers = ROWS[library]
    compat('libraries', row)
    names = run_recipe(library)
    apply, x, masks = names['apply'], names['x'], names['masks']

    # The recipe: about a quarter is kept, the network has learned, and the pruned one, as the
    # library has it, is the one with these masks.
    assert list(group_by_layer(masks)) == layers
    kept, total = (sum(map(function, jax.tree.leaves(masks))) for function in (jnp.sum, jnp.size))
    assert 0.15 < kept / total < 0.35
    assert jnp.mean(names['logits'].argmax(1) == names['labels']) > 0.8
    pruned_logits = apply(apply_masks(names['weights'], masks), x)
    chex.assert_trees_all_close(names['logits'], pruned_logits, rtol=1e-5, atol=1e-5)
    assert not np.allclose(names['logits'], apply(names['weights'], x), atol=0.1)

    # The same from the same weights. Sums may be taken in another order, as Equinox's are.
    start, expected_weights, expected_masks = expected(library)
    weights, masks = train(names, apply, put(start, names['params']))
    chex.assert_trees_all_equal(masks, expected_masks)
    chex.assert_trees_all_close(weights, expected_weights, rtol=0, atol=1e-6)

    # And surgery was done: in every layer, both ways.
    events = [(layer[2][:-1], layer[2][1:]) for layer in masks]
    pruned = [np.sum(before & ~after) for before, after in events]
    spliced = [np.sum(after & ~before) for before, after in events]
    assert min(pruned) > 0
    assert min(spliced) > 0
    exact = jax.tree.all(jax.tree.map(np.array_equal, weights, expected_weights))
    found = (
        f'{STEPS} steps, {sum(pruned)} kernel weights pruned, {sum(spliced)} spliced; masks equal'
    )
    compat('libraries', row, f'{found}, weights {"equal" if exact else "within 1e-6"}')


def test_coins_are_dealt_in_the_order_of_names():
    names = run_recipe('Tuples')
    _, expected_weights, expected_masks = expected('Tuples')

    def run(first, second):
        def apply(params, x):
            return names['apply']((params[first], params[second]), x)

        return train(names, apply, dict(zip((first, second), names['params'], strict=True)))

    weights, masks = run('layers/2', 'layers/3')
    chex.assert_trees_all_equal(masks, expected_masks)
    chex.assert_trees_all_close(weights, expected_weights, rtol=0, atol=1e-6)
    _, (_, first) = run('layers/2', 'layers/10')
    assert not np.array_equal(first[2], expected_masks[0][2])


class Block(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(x)


class Blocks(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(Block()(x))


def test_layers_that_nobody_named():
    key, x = jax.random.key(0), jnp.zeros((1, 8))
    params = Blocks().init(key, x)['params']
    assert list(group_by_layer(params)) == ['Block_0/Dense_0', 'Dense_0']
    for forward, layers in (
        (lambda x: haiku.Linear(4)(haiku.Linear(4)(x)), ['linear', 'linear_1']),
        (lambda x: haiku.nets.MLP([4, 4])(x), ['mlp/~/linear_0', 'mlp/~/linear_1']),
    ):
        assert list(group_by_layer(haiku.transform(forward).init(key, x))) == layers


def test_biases_of_equinox_convolutions():
    network = equinox.nn.Conv2d(1, 4, 3, key=jax.random.key(0))
    params = equinox.filter(network, equinox.is_inexact_array)
    assert init_masks(params, is_kernel).bias.shape == (4, 1, 1)
    masks = init_masks(params, lambda path, leaf: path.endswith('weight'))
    assert masks.weight.shape == (4, 1, 3, 3)
    assert masks.bias.shape == ()
