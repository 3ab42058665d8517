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
from flax import linen, nnx
from safetensors.numpy import load_file

import dns_jax
from dns_jax import apply_masks, get_masks, group_by_layer, init_masks, layer_names
from dns_jax.files.sparse import load_sparse
from dns_jax.layers import _ROLES, map_leaves, named_leaves, parent_path

PAGE = (Path(__file__).parents[2] / 'docs' / 'libraries.md').read_text()
PREAMBLE, *PARTS = PAGE.split('\n## ')
SECTIONS = {part.partition('\n')[0]: part for part in PARTS}
COMPLETE_PREAMBLE, *PARTS = SECTIONS.pop('Complete recipes').split('\n### ')
COMPLETE = {part.partition('\n')[0]: part for part in PARTS}
RECIPES = {name: text for name, text in SECTIONS.items() if '```python' in text}
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
DONE = 'trained, resumed to the same bits, fine-tuned under frozen masks, exported and read again'


def code_of(text):
    """The blocks of a text as one program."""
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    return compile('\n'.join(blocks), 'docs/libraries.md', 'exec')


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
    """The kernel and the bias of each layer, layers in the order of their names.

    Kernels come as (inputs, outputs), for which Equinox's are turned.
    """
    layers = {}
    for path, leaf in named_leaves(tree):
        kind = 'bias' if path.endswith(('bias', '/b', '/1')) else 'kernel'
        array = np.asarray(leaf)
        turned = array.T if path.endswith('weight') else array
        layers.setdefault(parent_path(path), {})[kind] = turned
    return [layers[name] for name in sorted(layers)]


def put(start, tree):
    """Gives the tree of a library the weights of another, which are as `by_layer` gives them."""
    order = sorted(set(jax.tree.leaves(layer_names(tree))))

    def replace(path, leaf):
        kind = 'bias' if path.endswith(('bias', '/b', '/1')) else 'kernel'
        found = jnp.asarray(start[order.index(parent_path(path))][kind])
        return found if found.shape == leaf.shape else found.T

    return map_leaves(replace, tree)


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


@pytest.mark.parametrize('library', ROWS)
def test_units_and_n_of_m_in_every_library(library, compat):
    compat('libraries', f'{ROWS[library][0]}: units, N of M')
    params = run_recipe(library)['params']
    kernels = dict(named_leaves(params))
    half = dns_jax.layer_density(0.5)
    for structure, thresholds in ((dns_jax.Units(), half), (dns_jax.NofM(1, 2, -1), None)):
        rule = dns_jax.Rule(thresholds, structure=structure)
        pruner = dns_jax.surgery(rule, jax.random.key(0))
        _, state = jax.jit(pruner.update)(params, pruner.init(params), params)
        for path, mask in named_leaves(get_masks(state)):
            weights, own = np.abs(kernels[path]), np.asarray(mask)
            if own.ndim and thresholds:
                units = np.square(weights).reshape(-1, own.shape[-1]).sum(0)
                wanted = np.broadcast_to(units >= np.median(units), own.shape)
                np.testing.assert_array_equal(own, wanted)
            elif own.ndim:
                largest = weights.reshape(*own.shape[:-1], -1, 2).argmax(-1)
                np.testing.assert_array_equal(own[..., 1::2], largest == 1)
                np.testing.assert_array_equal(own[..., ::2], largest == 0)


def test_every_recipe_is_tried():
    assert list(RECIPES) == list(ROWS)


@pytest.mark.parametrize('library', ROWS)
def test_library(library, compat):
    row, layers = ROWS[library]
    compat('libraries', row)
    names = run_recipe(library)
    apply, x, masks = names['apply'], names['x'], names['masks']

    # The recipe: a quarter of the kernels' weights is kept, biases stay whole, the network has
    # learned, and the pruned one, as the library has it, is the one with these masks.
    assert list(group_by_layer(masks)) == layers
    kernels = [layer['kernel'] for layer in by_layer(masks)]
    assert sum(map(np.sum, kernels)) * 4 == sum(map(np.size, kernels))
    assert all(layer['bias'].shape == () for layer in by_layer(masks) if 'bias' in layer)
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
    events = [(layer['kernel'][:-1], layer['kernel'][1:]) for layer in masks]
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
    sigma = dns_jax.update_probability(gamma=0.01, stop=160)
    rule = dns_jax.Rule(dns_jax.mean_std(0.5), sigma)
    surgery = dns_jax.surgery(rule, jax.random.key(1))
    optimizer = optax.chain(surgery, optax.sgd(0.05, momentum=0.9))

    def run(first, second):
        def apply(params, x):
            return names['apply']((params[first], params[second]), x)

        @jax.jit
        def step(params, state):
            def loss_fn(params):
                logits = apply(params, names['x'])
                return optax.softmax_cross_entropy_with_integer_labels(
                    logits, names['labels']
                ).mean()

            gradients = dns_jax.masked_value_and_grad(loss_fn)(params, get_masks(state))[1]
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        params = dict(zip((first, second), names['params'], strict=True))
        state = optimizer.init(params)
        for _ in range(40):
            params, state = step(params, state)
        return jax.tree.map(np.asarray, [get_masks(state)[name][0] for name in (first, second)])

    chex.assert_trees_all_equal(run('layers/2', 'layers/3'), run('0', '1'))
    assert not np.array_equal(run('layers/2', 'layers/10')[0], run('0', '1')[0])


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
    masks = init_masks(params)
    assert masks.weight.shape == (4, 1, 3, 3)
    assert masks.bias.shape == ()


def test_the_table_of_roles_is_that_of_the_code():
    rows = re.findall(r'(?m)^\| (\w+) \| (.*?) \|', SECTIONS['Roles of leaves'])
    said = {word: role for role, words in rows for word in re.findall(r'`(\w+)`', words)}
    del said['b']  # Haiku's alone, and only where it is the whole name
    assert said == _ROLES
    for name in said:
        assert dns_jax.role(f'layer/{name}', jnp.zeros((2, 2))) == said[name]
    for layer, leaf, role in (
        ('fc1', 'b', 'bias'),
        ('cell', 'bias_ih', 'bias'),
        *((layer, 'weight', 'scale') for layer in ('norm1', 'layer_norm', 'ln', 'bn')),
        *((layer, 'weight', 'embedding') for layer in ('embed', 'token_embedding', 'wte')),
        *(('fc1', leaf, 'kernel') for leaf in ('w', 'weight', '0', 'lora_a', 'lora_b')),
    ):
        axes = 1 if role in ('bias', 'scale') else 2
        assert dns_jax.role(f'{layer}/{leaf}', jnp.zeros((2,) * axes)) == role
    assert dns_jax.role('fc1/1', jnp.zeros(2)) == 'bias'
    assert dns_jax.role('fc1/weight', jnp.zeros(2)) == 'scale'
    assert dns_jax.role('fc1/0', jnp.zeros(())) == 'scale'


def run_complete(name):
    names = {}
    exec(code_of(COMPLETE_PREAMBLE), names)
    exec(code_of(COMPLETE[name]), names)
    return names


def check_export(names, file, params):
    """The files hold the weights under the masks; those of the dense one have zeros."""
    pruned = dict(named_leaves(apply_masks(params, names['masks'])))
    loaded = load_sparse(names['folder'] / f'{file}.safetensors')
    chex.assert_trees_all_equal(dict(named_leaves(loaded.params)), pruned)
    for path, mask in named_leaves(loaded.masks):
        masks = dict(named_leaves(names['masks']))
        assert np.array_equal(mask, masks.get(path, True))
    dense = load_file(names['folder'] / 'dense.safetensors')
    chex.assert_trees_all_equal(dense, {path.replace('/', '.'): pruned[path] for path in pruned})


def is_right(names, labels):
    return float(jnp.mean(names['logits'].argmax(-1) == labels))


@pytest.mark.slow  # test_nnx has the optimizer of NNX, and the two below go through the same calls
def test_the_resnet(compat):
    row = 'flax.nnx: ResNet with BatchNorm and Dropout, nnx.Optimizer, nnx.jit'
    compat('recipes', row)
    names = run_complete('A ResNet in Flax NNX')
    step, data = names['train_step'], (names['images'], names['labels'])

    # The same without a stop ends with the same bits, batch statistics and all.
    model, optimizer = names['make']()
    for _ in range(80):
        step(model, optimizer, *data)
    masks = get_masks(optimizer.opt_state)
    chex.assert_trees_all_equal(masks, names['masks'])
    total = dns_jax.measure_sizes(nnx.state(model, nnx.Param), masks).total
    assert total.kept == total.parameters // 4
    optimizer = nnx.Optimizer(model, names['fine_tuning'], wrt=nnx.Param)
    for _ in range(20):
        step(model, optimizer, *data)
    kinds = (nnx.Param, nnx.BatchStat)
    for kind in kinds:
        chex.assert_trees_all_equal(nnx.state(model, kind), nnx.state(names['model'], kind))
    chex.assert_trees_all_equal(get_masks(names['optimizer'].opt_state), masks)

    params = nnx.state(model, nnx.Param)
    check_export(names, 'resnet', params)
    nnx.update(model, apply_masks(params, masks))
    model.eval()
    chex.assert_trees_all_equal(names['logits'], model(names['images']))
    assert is_right(names, names['labels']) > 0.95
    compat('recipes', row, DONE)


@pytest.mark.slow  # test_stacking has an optimizer around a stack
def test_the_transformer(compat):
    row = 'flax.linen: transformer with scanned layers, TrainState'
    compat('recipes', row)
    names = run_complete('A transformer in Flax linen')
    state = names['make']()
    for _ in range(80):
        state, _ = names['train_step'](state, names['tokens'])
    masks = get_masks(state.opt_state)
    chex.assert_trees_all_equal(masks, names['masks'])
    state = type(state).create(
        apply_fn=state.apply_fn, params=state.params, tx=names['fine_tuning']
    )
    for _ in range(20):
        state, _ = names['train_step'](state, names['tokens'])
    chex.assert_trees_all_equal(state.params, names['state'].params)
    chex.assert_trees_all_equal(get_masks(names['state'].opt_state), masks)

    kernels = [mask for mask in jax.tree.leaves(masks) if mask.ndim]
    assert sum(map(np.sum, kernels)) * 4 == sum(map(np.size, kernels))
    assert masks['embed']['embedding'].shape == masks['positions'].shape == ()
    assert {'blocks/0/up', 'blocks/1/attention/value'} <= names['sizes'].layers.keys()
    check_export(names, 'transformer', state.params)
    assert is_right(names, names['tokens'][:, 1:]) > 0.85  # the first step is anyone's guess
    compat('recipes', row, DONE)


def test_the_equinox_network(compat):
    row = 'Equinox: convolution, LayerNorm and attention, filter_jit'
    compat('recipes', row)
    names = run_complete('A vision network in Equinox')
    step, data = names['train_step'], (names['images'], names['labels'])
    network, state = names['make']()
    for _ in range(80):
        network, state, _ = step(names['optimizer'], network, state, *data)
    masks = get_masks(state)
    chex.assert_trees_all_equal(masks, names['masks'])
    params = equinox.filter(network, equinox.is_inexact_array)
    state = names['fine_tuning'].init(params)
    for _ in range(20):
        network, state, _ = step(names['fine_tuning'], network, state, *data)
    params = equinox.filter(network, equinox.is_inexact_array)
    chex.assert_trees_all_equal(params, names['params'])
    chex.assert_trees_all_equal(get_masks(names['state']), masks)

    total = dns_jax.measure_sizes(params, masks).total
    assert total.kept == total.parameters // 4
    assert masks.attention.value_proj.weight.shape == (16, 16)
    check_export(names, 'network', params)
    assert is_right(names, names['labels']) > 0.95
    compat('recipes', row, DONE)


def test_the_adapters(compat):
    row = 'LoRA: optax.partition around surgery, frozen weights'
    compat('recipes', row)
    names = run_complete('Adapters beside frozen weights')
    start, state = names['make']()
    params, state = names['train'](names['optimizer'], start, state, 80)
    masks = get_masks(state)
    chex.assert_trees_all_equal(masks, names['masks'])
    state = names['fine_tuning'].init(params)
    params, state = names['train'](names['fine_tuning'], params, state, 20)
    chex.assert_trees_all_equal(params, names['params'])
    chex.assert_trees_all_equal(get_masks(names['state']), masks)

    kept = jax.tree.leaves(masks)
    assert sum(map(np.sum, kept)) * 2 == sum(map(np.size, kept))
    for layer in ('fc1', 'fc2'):
        for name in ('kernel', 'bias'):
            assert np.array_equal(params[layer][name], start[layer][name])
    check_export(names, 'adapted', params)
    assert is_right(names, names['labels']) > 0.95
    compat('recipes', row, DONE)


def test_every_complete_recipe_is_tried():
    assert list(COMPLETE) == [
        'A ResNet in Flax NNX',
        'A transformer in Flax linen',
        'A vision network in Equinox',
        'Adapters beside frozen weights',
    ]
