"""What people's own loops, libraries and machines do with surgery."""

import dataclasses
import functools
import io
import itertools
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dns_jax
from dns_jax import (
    Rule,
    apply_masks,
    count_kept,
    freeze,
    get_masks,
    global_density,
    importance,
    layer_density,
    mean_std,
    measure_sizes,
    prune_to,
    pruners,
    surgery,
    update_probability,
)
from dns_jax.layers import named_leaves

COMPAT_TABLE = 'field'

KEY = jax.random.key(0)


def slow_but(names, *fast):
    """All names, those that are not named again for `make test-all` alone."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def array(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def network(seed=0):
    return {
        'fc1': {'kernel': array(16, 24, seed=seed), 'bias': array(24, seed=seed)},
        'fc2': {'kernel': array(24, 8, seed=seed) * 5, 'bias': array(8, seed=seed)},
        'norm': {'scale': array(8, seed=seed)},
    }


def run(pruner, steps=4, seeds=None, state=None):
    state = pruner.init(network(0)) if state is None else state
    update = jax.jit(pruner.update)
    for step in range(steps):
        params = network(step)
        _, state = update(network(step + 100), state, params)
    return state


# Given masks.


class Params(NamedTuple):
    fc1: Any
    fc2: Any
    norm: Any


class Peer(NamedTuple):
    masks: Any
    other: int


def from_file(masks, tmp_path):
    sparse = pytest.importorskip('dns_jax.files.sparse')
    sparse.save_sparse(tmp_path / 'f', network(), masks)
    return sparse.load_sparse(tmp_path / 'f').masks


ORIGINS = {
    'a state': lambda masks, _: masks,
    'NumPy': lambda masks, _: jax.device_get(masks),
    'a file': from_file,
    'another tree': lambda masks, _: Params(**masks),
    "a peer's state": lambda masks, _: get_masks((optax.EmptyState(), Peer(masks, 0))),
}


@pytest.mark.parametrize('takes_part', [dns_jax.is_kernel, dns_jax.has_axes])
@pytest.mark.parametrize('origin', slow_but(ORIGINS, 'a file'))
def test_surgery_goes_on_from_masks(origin, takes_part, tmp_path):
    first = run(surgery(Rule(layer_density(0.5)), KEY, takes_part=takes_part))
    masks = ORIGINS[origin](first.masks, tmp_path)
    for make in (
        lambda: surgery(Rule(layer_density(0.25)), KEY, masks=masks),
        lambda: prune_to(density=0.25, steps=3, masks=masks),
    ):
        pruner = make()
        start = pruner.init(network())
        chex.assert_trees_all_equal(start.masks, first.masks)
        assert jax.tree.structure(start.masks) == jax.tree.structure(network())
        after = run(pruner)
        for before, mask in zip(*map(jax.tree.leaves, (first.masks, after.masks)), strict=True):
            assert before.shape == mask.shape  # what took no part still takes none
        kept, was = count_kept(after.masks), count_kept(first.masks)
        assert kept.keys() == was.keys()
        assert sum(kept.values()) == pytest.approx(sum(was.values()) / 2, abs=2)


def test_masks_and_a_rule_for_some_layers_only():
    first = run(surgery(Rule(layer_density(0.5)), KEY))
    after = run(surgery({'fc2': Rule(layer_density(0.1))}, KEY, masks=first.masks))
    chex.assert_trees_all_equal(after.masks['fc1'], first.masks['fc1'])
    assert count_kept(after.masks)['fc2'] == 19


@pytest.mark.parametrize('origin', slow_but(ORIGINS, 'a file'))
def test_frozen_masks_stay(origin, tmp_path):
    first = run(surgery(Rule(layer_density(0.3)), KEY))
    frozen = freeze(ORIGINS[origin](first.masks, tmp_path))
    optimizer = optax.chain(frozen, optax.sgd(0.1, 0.9))
    params, state = network(), optimizer.init(network())
    for _ in range(3):
        updates, state = jax.jit(optimizer.update)(params, state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(get_masks(state), first.masks)
    # The first state may be donated, and the masks are the user's own still.
    donated = jax.jit(optimizer.update, donate_argnums=1)(params, optimizer.init(params), params)
    chex.assert_trees_all_equal(get_masks(donated[1]), first.masks)
    chex.assert_trees_all_equal(frozen.init(params).masks, first.masks)


def test_masks_all_scalar_or_without_a_rule():
    masks = jax.tree.map(lambda leaf: jnp.ones((), bool), network())
    chex.assert_trees_all_equal(run(freeze(masks)).masks, masks)


WRONG_MASKS = [
    (lambda m: {**m, 'fc1': {'kernel': m['fc1']['kernel']}}, 'fc1/bias'),
    (lambda m: {**m, 'fc9': m['fc1']}, 'fc9'),
    (lambda m: {**m, 'fc1': {**m['fc1'], 'kernel': np.ones((16, 23), bool)}}, 'fc1/kernel'),
    (lambda m: {**m, 'fc1': {**m['fc1'], 'kernel': np.ones((16, 24))}}, 'fc1/kernel'),
    (lambda m: {**m, 'fc1': {**m['fc1'], 'kernel': optax.MaskedNode()}}, None),
]


@pytest.mark.parametrize(('damage', 'named'), WRONG_MASKS)
def test_masks_that_do_not_fit_are_named(damage, named):
    masks = damage(surgery(Rule(layer_density(0.3)), KEY).init(network()).masks)
    for make in (lambda: freeze(masks), lambda: prune_to(density=0.1, steps=2, masks=masks)):
        if named is None:
            make().init(network())  # a hole is a leaf that takes no part
            continue
        with pytest.raises((ValueError, TypeError), match=named):
            make().init(network())


RESUMED = {
    # how the state was made, how it goes on, what the error names
    'biases came in': ({}, {'takes_part': dns_jax.has_axes}, 'takes_part'),
    'biases went out': ({'takes_part': dns_jax.has_axes}, {}, 'takes_part'),
    'a leaf went out': (
        {'takes_part': lambda path, leaf: leaf.ndim > 0 and 'norm' not in path},
        {'takes_part': lambda path, leaf: path in ('fc1/kernel', 'fc2/kernel', 'fc2/bias')},
        'fc1/bias',
    ),
    'a layer went out': ({}, {'takes_part': lambda path, leaf: path == 'fc1/kernel'}, 'fc2'),
    'a layer came in': ({'takes_part': lambda path, leaf: path == 'fc1/kernel'}, {}, 'fc2'),
    'other layers': ({}, {'layer_of': lambda path: path}, 'layer_of'),
    'one layer': ({}, {'layer_of': lambda path: ''}, 'layer_of'),
    'exchanged layers': (
        {},
        {'layer_of': lambda path: {'fc1': 'fc2', 'fc2': 'fc1'}.get(path[:3], path)},
        None,  # cannot be told
    ),
    'other rules': ({}, {'rules': {'fc1': Rule(layer_density(0.3))}}, 'rules'),
    'more rules': ({'rules': {'fc1': Rule(layer_density(0.3))}}, {}, 'rules'),
    'stacked': ({}, {'stacked': {'fc1': 0}}, 'fc1/0'),
}


@pytest.mark.parametrize('name', RESUMED)
def test_a_state_under_other_words_is_refused_by_name(name):
    first, then, named = RESUMED[name]

    def make(options):
        return surgery(**{'rules': Rule(layer_density(0.3)), 'key': KEY, **options})

    state = run(make(first), 2)
    if named is None:
        return
    with pytest.raises(ValueError, match=named):
        run(make(then), 1, state=state)
    run(make(first), 1, state=state)  # its own goes on


def test_a_state_of_another_network_is_refused_by_name():
    state = run(surgery(Rule(layer_density(0.3)), KEY))
    other = {**network(), 'fc2': {'kernel': array(24, 9), 'bias': array(9)}}
    pruner = surgery(Rule(layer_density(0.3)), KEY)
    with pytest.raises(ValueError, match=r'fc2/(bias|kernel)'):
        pruner.update(other, state, other)


# Devices.

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
SPECS = {
    'rows': {2: jax.P('x'), 1: jax.P()},
    'columns': {2: jax.P(None, 'x'), 1: jax.P('x')},
    'both': {2: jax.P('x', 'y'), 1: jax.P('y')},
    'together': {2: jax.P(('x', 'y')), 1: jax.P(('x', 'y'))},
}


@functools.cache
def on_one_device(name):
    return run(MAKERS[name]())


def explicit(shape, names):
    return jax.make_mesh(shape, names, devices=jax.devices('cpu')[:8])


@pytest.mark.parametrize(
    ('name', 'spec'),
    [
        ('norm', 'both'),
        ('RigL', 'both'),
        *(
            pytest.param(name, 'both', marks=pytest.mark.slow)
            for name in MAKERS
            if name not in ('norm', 'RigL')
        ),
        *(
            pytest.param(name, spec, marks=pytest.mark.slow)
            for name in ('norm', 'RigL', 'prune_to')
            for spec in SPECS
            if spec != 'both'
        ),
    ],
)
def test_explicit_meshes_give_what_one_device_gives(name, spec):
    mesh = explicit((4, 2), ('x', 'y')) if spec in ('both', 'together') else explicit((8,), ('x',))
    assert jax.sharding.AxisType.Explicit in mesh.axis_types

    def place(tree):
        return jax.tree.map(
            lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, SPECS[spec][leaf.ndim])), tree
        )

    pruner = MAKERS[name]()
    with jax.set_mesh(mesh):
        state, update = pruner.init(place(network(0))), jax.jit(pruner.update)
        for step in range(4):
            _, state = update(place(network(step + 100)), state, place(network(step)))
        whole = on_one_device(name)
        masks = state.masks
        chex.assert_trees_all_equal(jax.device_get(masks), jax.device_get(whole.masks))
        if name != 'freeze':
            for mask, leaf in zip(*map(jax.tree.leaves, (masks, place(network()))), strict=True):
                assert mask.ndim == 0 or mask.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
        for layer, band in whole.thresholds.items():
            # Sums over shards are taken in another order: the last bits of means and norms differ.
            found = [*map(float, state.thresholds[layer])]
            np.testing.assert_allclose(found, [*map(float, band)], rtol=1e-5)
        params = place(network())
        masked = jax.jit(apply_masks)(params, masks)
        chex.assert_trees_all_equal(
            jax.device_get(masked), jax.device_get(apply_masks(network(), whole.masks))
        )
        assert count_kept(masks) == count_kept(whole.masks)
        assert {k: int(n) for k, n in jax.jit(count_kept)(masks).items()} == count_kept(whole.masks)
        assert measure_sizes(params, masks) == measure_sizes(network(), whole.masks)
        before = jax.tree.map(jnp.ones_like, masks)
        assert dns_jax.count_events(before, masks) == dns_jax.count_events(
            jax.tree.map(jnp.ones_like, whole.masks), whole.masks
        )


def test_gradient_at_masks_on_an_explicit_mesh():
    mesh = explicit((8,), ('x',))
    masks = run(surgery(Rule(layer_density(0.3)), KEY)).masks

    def loss_fn(params, x):
        return jnp.sum(jnp.square(x @ params['fc1']['kernel']))

    wanted = dns_jax.masked_value_and_grad(loss_fn)(network(), masks, array(4, 16))
    with jax.set_mesh(mesh):
        place = lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, jax.P()))  # noqa: E731
        batch = jax.device_put(array(8, 16)[:4].repeat(2, 0), jax.NamedSharding(mesh, jax.P('x')))
        found = jax.jit(dns_jax.masked_value_and_grad(loss_fn))(
            jax.tree.map(place, network()), jax.tree.map(place, masks), batch
        )
    assert found[1]['fc1']['kernel'].shape == wanted[1]['fc1']['kernel'].shape


@pytest.mark.parametrize('name', slow_but(list(MAKERS)[:-1], 'mean_std', 'norm', 'RigL'))
def test_shards_under_shard_map_are_refused_with_the_way_out(name, mesh):
    pruner = MAKERS[name]()
    whole = pruner.init(network())

    def update(with_init, params):
        parts = pruner.init(params) if with_init else whole
        state = pruner.update(params, parts, params)[1]
        return state.masks['fc1']['kernel']

    for with_init in (True, False):
        mapped = jax.shard_map(
            functools.partial(update, with_init),
            mesh=mesh,
            in_specs=jax.P('x'),
            out_specs=jax.P('x'),
        )
        with pytest.raises(ValueError, match=r'fc1/.*shard_map.*jit'):
            jax.eval_shape(mapped, network())


@pytest.mark.parametrize(
    'name', slow_but(['mean_std', 'norm', 'prune_to', 'RigL', 'SET', 'gradient'], 'norm')
)
def test_whole_weights_under_shard_map_are_pruned_as_everywhere(name, mesh):
    """Data parallel: batches are sharded, weights and gradients are not."""
    pruner = MAKERS[name]()
    state = pruner.init(network(0))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(jax.P(), jax.P(), jax.P(), jax.P('x')),
        out_specs=jax.P(),
    )
    def update(params, gradients, state, batch):
        mean = jax.lax.pmean(jnp.mean(batch), 'x')
        gradients = jax.tree.map(lambda leaf: leaf + 0.0 * mean, gradients)
        return pruner.update(gradients, state, params)[1]

    for step in range(4):
        state = update(network(step), network(step + 100), state, jnp.ones((8, 2)))
    chex.assert_trees_all_equal(
        jax.device_get(state.masks), jax.device_get(on_one_device(name).masks)
    )


def test_shards_are_refused_without_check_vma_too(mesh):
    pruner = surgery(Rule(layer_density(0.3)), KEY)

    def update(params):
        state = pruner.update(params, pruner.init(params), params)[1]
        return state.masks['fc1']['kernel']

    mapped = jax.shard_map(
        update, mesh=mesh, in_specs=jax.P('x'), out_specs=jax.P('x'), check_vma=False
    )
    with pytest.raises(ValueError, match='shard_map'):
        jax.eval_shape(mapped, network())


def test_pmap_is_refused_since_shards_look_like_whole_weights_there():
    pruner, params = MAKERS['norm'](), network()
    together = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (8, *leaf.shape)), params)
    with pytest.raises(ValueError, match=r'pmap.*jit'):
        jax.pmap(pruner.init)(together)


def test_gradients_that_differ_from_device_to_device_are_refused(mesh):
    # Without a pmean, RigL would grow other connections on every device.
    pruner, state = MAKERS['gradient'](), MAKERS['gradient']().init(network())

    def update(batch):
        gradients = jax.tree.map(lambda leaf: leaf * jnp.sum(batch), network())
        return pruner.update(gradients, state, network())[1].masks

    mapped = jax.shard_map(update, mesh=mesh, in_specs=jax.P('x'), out_specs=jax.P())
    with pytest.raises((ValueError, TypeError), match=r'shard_map|vary|varying'):
        jax.eval_shape(mapped, jnp.ones((8, 2)))


# Leaves of size zero.

EMPTY = {
    'an empty bias': lambda: {'fc': {'kernel': array(8, 6), 'bias': jnp.zeros((0,))}},
    'an adapter of rank 0': lambda: {
        'fc': {'kernel': array(8, 6)},
        'lora': {'lora_a': jnp.zeros((8, 0)), 'lora_b': jnp.zeros((0, 6))},
    },
    'beside in one layer': lambda: {'fc': {'kernel': array(8, 6), 'lora_a': jnp.zeros((8, 0))}},
}


@pytest.mark.parametrize(
    ('name', 'tree'),
    [
        ('erk', 'an adapter of rank 0'),
        *(
            pytest.param(name, tree, marks=pytest.mark.slow)
            for name, tree in itertools.product(list(MAKERS)[:-1], EMPTY)
            if tree == 'beside in one layer' or name in ('mean_std', 'erk', 'prune_to', 'RigL')
        ),
    ],
)
def test_empty_leaves_count_nothing_and_stay(name, tree):
    pruner, params = MAKERS[name](), EMPTY[tree]()
    state, update = pruner.init(params), jax.jit(pruner.update)
    alone = {'fc': {'kernel': params['fc']['kernel']}}
    alone_state, alone_update = pruner.init(alone), jax.jit(pruner.update)
    for _ in range(3):
        _, state = update(params, state, params)
        _, alone_state = alone_update(alone, alone_state, alone)
    if name not in ('SET', 'RigL', 'gradient', 'chance'):  # whose numbers depend on the leaves
        chex.assert_trees_all_equal(state.masks['fc']['kernel'], alone_state.masks['fc']['kernel'])
    masked = apply_masks(params, state.masks)
    chex.assert_trees_all_equal_shapes_and_dtypes(masked, params)
    assert dns_jax.find_empty_layers(state.masks) == []
    assert set(count_kept(state.masks)) == {'fc'}
    sizes = measure_sizes(params, state.masks)
    assert (
        sizes.total == measure_sizes(alone, {'fc': {'kernel': state.masks['fc']['kernel']}}).total
    )
    if 'lora' in params:
        assert sizes.layers['lora'].parameters == 0


@pytest.mark.parametrize('takes_part', [dns_jax.is_kernel, dns_jax.has_axes])
@pytest.mark.parametrize('tree', EMPTY)
def test_empty_leaves_in_files_and_back(tree, takes_part, tmp_path):
    sparse = pytest.importorskip('dns_jax.files.sparse')
    params = EMPTY[tree]()
    pruner = surgery(Rule(layer_density(0.5)), KEY, takes_part=takes_part)
    _, state = pruner.update(params, pruner.init(params), params)
    sparse.save_sparse(tmp_path / 'f', params, state.masks)
    back = sparse.load_sparse(tmp_path / 'f')
    chex.assert_trees_all_equal_shapes(back.params, params)
    again = surgery(Rule(layer_density(0.25)), KEY, masks=back.masks)
    _, after = again.update(params, again.init(params), params)
    assert dns_jax.find_empty_layers(after.masks) == []
    assert dns_jax.measure_sizes(params, after.masks).total.parameters == sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )


def test_metrics_of_masks_that_are_empty_themselves():
    params = {'a': jnp.zeros((0, 3)), 'b': {'kernel': array(2, 2)}}
    masks = {'a': jnp.ones((0, 3), bool), 'b': {'kernel': jnp.ones((2, 2), bool)}}
    assert dns_jax.find_empty_layers(masks) == []
    total = measure_sizes(params, masks).total
    assert (total.parameters, total.density, total.compression) == (4, 1.0, 1.0)
    pruner = surgery(Rule(global_density(0.5)), KEY, masks=masks)
    _, state = pruner.update(params, pruner.init(params), params)
    assert count_kept(state.masks)['b'] == 2
    nothing = {'a': jnp.zeros((0, 3))}
    size = measure_sizes(nothing, {'a': jnp.ones((), bool)}).total
    assert size.parameters == size.kept == 0
    assert size.density in (0.0, 1.0) or np.isnan(size.density)  # and no ZeroDivisionError


# NNX.


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.masks = nnx.Linear(4, 3, rngs=rngs)  # a subtree that is called so

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.conv(x))))
        return self.masks(x.mean((1, 2)))


@pytest.fixture
def defaults_of_jax():
    with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
        yield


def masked_loss(model, masks, x):
    """The loss at W⊙T and the gradient there, BatchNorm and Dropout within."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params):
        inner = nnx.merge(graph, params, rest, copy=True)
        loss = jnp.mean(jnp.square(inner(x) - 1.0))
        return loss, nnx.state(inner, nnx.Not(nnx.Param))

    (loss, rest), grads = dns_jax.masked_value_and_grad(loss_fn, has_aux=True)(params, masks)
    nnx.update(model, rest)
    return loss, grads


@pytest.mark.parametrize(
    ('which', 'jitted', 'pruner'),
    [
        ('Optimizer', True, 'prune_to'),
        pytest.param('Optimizer', False, 'prune_to', marks=pytest.mark.slow),
        pytest.param('ModelAndOptimizer', True, 'prune_to', marks=pytest.mark.slow),
        pytest.param('Optimizer', True, 'RigL', marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures('defaults_of_jax')
def test_the_optimizers_of_nnx(which, jitted, pruner):
    model = Net(nnx.Rngs(0))
    make = {
        'prune_to': lambda: prune_to(density=0.25, steps=4),
        'RigL': lambda: pruners.regrow(0.25, 1, 9, KEY),
    }[pruner]
    transform = optax.chain(make(), optax.adam(1e-2))
    if which == 'Optimizer':
        optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    else:
        optimizer = nnx.ModelAndOptimizer(model, transform, wrt=nnx.Param)

    def step(model, optimizer, x):
        loss, grads = masked_loss(model, get_masks(optimizer.opt_state), x)
        if which == 'Optimizer':
            optimizer.update(model, grads)
        else:
            optimizer.update(grads)
        return loss

    if jitted:
        step = nnx.jit(step)
    x = array(5, 8, 8, 1)
    for _ in range(6 if jitted else 2):
        step(model, optimizer, x)
    masks = get_masks(optimizer.opt_state)
    params = nnx.state(model, nnx.Param)
    small = apply_masks(params, masks)
    sizes = measure_sizes(params, masks).layers
    if jitted:
        kernels = sizes['conv'].multiply_adds + sizes['masks'].multiply_adds
        kept = sizes['conv'].kept_multiply_adds + sizes['masks'].kept_multiply_adds
        assert (kernels, kept) == (36 + 12, 12)
        assert (
            sum(
                int((leaf != 0).sum())
                for leaf in (small['conv']['kernel'][...], small['masks']['kernel'][...])
            )
            <= 12
        )
    nnx.update(model, small)
    model(x)


@pytest.mark.usefixtures('defaults_of_jax')
def test_nnx_gives_what_a_plain_loop_gives():
    model = Net(nnx.Rngs(0))
    transform = optax.chain(prune_to(density=0.25, steps=4), optax.sgd(1e-1))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = transform.init(params)
    for seed in range(5):
        own = jax.tree.map(lambda leaf, seed=seed: array(*leaf.shape, seed=seed), params)
        grads = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(grads, own)
        optimizer.update(model, grads)
        updates, state = transform.update(own, state, params)
        params = optax.apply_updates(params, updates)
    found = dict(named_leaves(get_masks(optimizer.opt_state)))
    for path, mask in named_leaves(get_masks(state)):
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(mask), err_msg=path)


# Wrappers that deal a network out.

LABELS = {
    'by leaf': lambda params: (
        jax.tree.map(lambda _: 'a', params) | {'fc2': jax.tree.map(lambda _: 'b', params['fc2'])}
    ),
    'by subtree': lambda params: {'fc1': 'a', 'fc2': 'b', 'norm': 'a'},
    'by function': None,
}


@pytest.mark.parametrize(
    ('how', 'labels', 'both'),
    [
        ('multi_transform', 'by subtree', True),
        *(
            pytest.param('partition', labels, both, marks=pytest.mark.slow)
            for labels, both in itertools.product(LABELS, (True, False))
        ),
    ],
)
def test_networks_dealt_out(how, labels, both):
    params = network()

    def label(tree):
        return {
            layer: jax.tree.map(lambda _, to=layer: 'b' if to == 'fc2' else 'a', leaves)
            for layer, leaves in tree.items()
        }

    chosen = label if labels == 'by function' else LABELS[labels](params)
    sigma = update_probability(power=0, stop=3)
    second = surgery(Rule(layer_density(0.25), sigma), KEY) if both else optax.identity()
    optimizer = getattr(optax, how)(
        {
            'a': optax.chain(surgery(Rule(layer_density(0.5), sigma), KEY), optax.sgd(0.1)),
            'b': optax.chain(second, optax.sgd(0.1)),
        },
        chosen,
    )
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        masks = get_masks(state)
        _, grads = dns_jax.masked_value_and_grad(
            lambda params: jnp.sum(jnp.square(params['fc1']['kernel'] @ params['fc2']['kernel']))
        )(params, masks)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    masks = get_masks(state)
    assert count_kept(masks) == {'fc1': 192, **({'fc2': 48} if both else {})}
    small = apply_masks(params, masks)
    assert int((small['fc1']['kernel'] != 0).sum()) <= 192
    assert int((small['fc2']['kernel'] != 0).sum()) <= (48 if both else 192)
    sizes = measure_sizes(params, masks)
    assert sizes.layers['fc1'].kept == 192 + 24
    assert sizes.total.parameters == 16 * 24 + 24 + 24 * 8 + 8 + 8


@pytest.mark.parametrize('mask', [{'fc1': True, 'fc2': False, 'norm': False}, 'function'])
def test_masked_surgery_as_with_frozen_subtrees(mask):
    params = network()
    if mask == 'function':
        mask = lambda tree: {k: jax.tree.map(lambda _, k=k: k == 'fc1', v) for k, v in tree.items()}  # noqa: E731
    optimizer = optax.chain(
        optax.masked(prune_to(density=0.25, steps=2), mask), optax.sgd(0.1, 0.9)
    )
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = jax.jit(optimizer.update)(params, state, params)
        params = optax.apply_updates(params, updates)
    assert count_kept(get_masks(state)) == {'fc1': 96}
    chex.assert_trees_all_equal(apply_masks(params, get_masks(state))['fc2'], params['fc2'])


def test_a_subtree_called_masks():
    params = {'masks': {'kernel': array(8, 8)}, 'other': {'masks': array(8, 4)}}
    optimizer = optax.chain(prune_to(density=0.25, steps=2), optax.sgd(0.1, 0.9))
    state = optimizer.init(params)
    for _ in range(3):
        _, state = jax.jit(optimizer.update)(params, state, params)
    assert count_kept(get_masks(state), lambda path: '') == {'': 24}


def test_no_masks_is_said():
    with pytest.raises(ValueError, match='masks'):
        get_masks(optax.adam(1e-3).init(network()))
    with pytest.raises(ValueError, match='two masks of'):
        get_masks(optax.chain(freeze_of(0.5), freeze_of(0.3)).init(network()))


def freeze_of(share):
    return freeze(jax.tree.map(lambda leaf: leaf > share, network()))


# Types.

SCRIPT = """
import jax
import jax.numpy as jnp
import optax

import dns_jax
from dns_jax.sparse import load_sparse

params = {'fc': {'kernel': jnp.ones((4, 4)), 'bias': jnp.ones(4)}}
rule = dns_jax.Rule(dns_jax.global_density(0.1), 0.5)
pruner = dns_jax.surgery(rule, jax.random.key(0))
optimizer = optax.chain(dns_jax.prune_to(compression=10, steps=100), optax.adam(1e-3))
state = optimizer.init(params)
masks = dns_jax.get_masks(state)
print(dns_jax.apply_masks(params, masks)['fc']['kernel'].shape)
print(load_sparse('file').params['fc']['kernel'].shape, load_sparse('file').masks['fc'])
print(pruner.init(params).masks['fc'], pruner.init(params).thresholds['fc'].low)
print(masks['fc']['kernel'].sum())
print(dns_jax.prune_to(density=0.1, steps=10).init(params).masks['fc'])
print(dns_jax.freeze(masks).init(params).masks)
sizes = dns_jax.measure_sizes(params, masks)
print(sizes.total.compression + 1, sizes.layers['fc'].kept // 2)
loss, grads = dns_jax.masked_value_and_grad(lambda p, x: (p['fc']['kernel'] @ x).sum())(
    params, masks, jnp.ones(4)
)
print(loss + 1, grads['fc'])
print(dns_jax.count_kept(masks)['fc'] + 1, dns_jax.count_events(masks, masks)['fc'].pruned)
(apart,) = dns_jax.unstack({'fc': 0}, params)
print(apart['fc'], dns_jax.init_masks(params)['fc'], dns_jax.find_empty_layers(masks)[0])
_, new = pruner.update(grads, pruner.init(params), params)
print(new.masks['fc'])
tuples = (jnp.ones(3), jnp.ones(3))
first, second = dns_jax.apply_masks(tuples, tuples)
print(first.shape)
"""


def test_pyright_takes_what_the_pages_show(tmp_path):
    pyright = Path(sys.executable).parent / 'pyright'
    if not pyright.exists():
        pytest.skip('no pyright')
    root = Path(dns_jax.__file__).parents[1]
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'pyrightconfig.json').write_text(
        json.dumps({'typeCheckingMode': 'standard', 'extraPaths': [str(root)]})
    )
    done = subprocess.run(
        [pyright, '--pythonpath', sys.executable, '-p', tmp_path, tmp_path / 'script.py'],
        capture_output=True,
        text=True,
        check=False,
    )
    if 'nodeenv' in done.stderr:
        pytest.skip('no node')
    assert '0 errors' in done.stdout, textwrap.indent(done.stdout, '  ')


# Errors.


@pytest.mark.parametrize('sigma', [0, 1, 0.5, np.float32(0.5), 1.0, lambda step: 0.5])
def test_a_number_is_a_chance(sigma):
    state = run(surgery(Rule(mean_std(0.3), sigma), KEY), 3)
    assert int(state.count) == 3


WRONG_RULES = [
    (lambda: surgery({'fc1': Rule(mean_std(0.3), 1.5)}, KEY), 'fc1'),
    (lambda: surgery({'fc1': Rule(mean_std(0.3), -0.1)}, KEY), 'fc1'),
    (lambda: surgery({'fc1': Rule(mean_std(0.3), float('nan'))}, KEY), 'fc1'),
    (lambda: surgery({'fc1': Rule(mean_std(0.3), 'often')}, KEY), 'fc1'),
    (lambda: surgery({'fc1': Rule(mean_std(0.3), None)}, KEY), 'fc1'),
    (lambda: surgery({'fc1': mean_std(0.3)}, KEY), 'fc1'),
    (lambda: surgery(mean_std(0.3), KEY), 'Rule'),
    (lambda: surgery(global_density(0.3), KEY), 'Rule'),
    (lambda: surgery(0.1, KEY), 'Rule'),
    (lambda: surgery({'fc1': 0.1}, KEY), 'fc1'),
    (lambda: surgery({'fc1': Rule(0.1)}, KEY), 'fc1'),
    (lambda: surgery({'fc1': Rule(mean_std(0.3), 1.0, -1)}, KEY), 'fc1'),
    (lambda: surgery({'fc1': Rule(mean_std(0.3), 1.0, 1.5)}, KEY), 'fc1'),
    (lambda: surgery(Rule(mean_std(0.3)), 0), 'key'),
    (lambda: surgery({'fc9': Rule(mean_std(0.3))}, KEY).init(network()), 'fc9'),
]


@pytest.mark.parametrize(('make', 'named'), WRONG_RULES)
def test_wrong_rules_are_named(make, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make()


def large():
    return {f'block{n:03}': {'kernel': jnp.ones((2, 3))} for n in range(500)}


MISMATCHES = {
    'lacks one': lambda masks: {k: v for k, v in masks.items() if k != 'block250'},
    'has one more': lambda masks: {**masks, 'block999': masks['block000']},
    'other names': lambda masks: {f'x{k}': v for k, v in masks.items()},
    'another shape': lambda masks: {**masks, 'block250': {'kernel': np.ones((3, 2), bool)}},
    'another type': lambda masks: {**masks, 'block250': {'kernel': np.ones((2, 3), int)}},
    'deeper': lambda masks: {**masks, 'block250': {'kernel': {'more': np.ones((2, 3), bool)}}},
}


@pytest.mark.parametrize('name', MISMATCHES)
def test_mismatches_name_one_path_and_stay_short(name):
    params = large()
    masks = MISMATCHES[name](jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params))
    wanted = {'other names': 'block000', 'has one more': 'block999'}.get(name, 'block250')
    for function in (
        lambda: apply_masks(params, masks),
        lambda: measure_sizes(params, masks),
        lambda: freeze(masks).init(params),
        lambda: dns_jax.count_events(
            jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params), masks
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=wanted) as caught:
            function()
        assert len(str(caught.value)) < 400


LONG = {
    'a pattern': lambda: surgery({'blok*': Rule(layer_density(0.5))}, KEY).init(large()),
    'a hidden pattern': lambda: surgery(
        {'block*': Rule(layer_density(0.5)), 'block1*': Rule(layer_density(0.5))}, KEY
    ).init(large()),
    'nothing takes part': lambda: surgery(
        Rule(layer_density(0.5)), KEY, takes_part=lambda path, leaf: False
    ).init(large()),
    'a stack': lambda: dns_jax.unstack({'blocks': 0}, large()),
    'positions': lambda: measure_sizes(
        large(), jax.tree.map(lambda leaf: np.ones((), bool), large()), {'conv': 3}
    ),
    'a state of other layers': lambda: surgery(Rule(layer_density(0.5)), KEY).update(
        large(),
        dns_jax.SurgeryState(jnp.int32(0), KEY, jax.tree.map(lambda leaf: leaf > 0, large()), {}),
        large(),
    ),
    'thresholds': lambda: dns_jax.update_masks(
        KEY, large(), jax.tree.map(lambda leaf: leaf > 0, large()), {}, {}
    ),
}


@pytest.mark.parametrize('name', LONG)
def test_errors_of_large_networks_can_be_read(name):
    with pytest.raises(ValueError, match='block') as caught:
        LONG[name]()
    assert len(str(caught.value)) < 1000


# Typed keys.


def trained():
    optimizer = optax.chain(surgery(Rule(mean_std(0.3), 0.5, 2), KEY), optax.sgd(0.1, 0.9))
    params, state = network(), optimizer.init(network())
    for _ in range(3):
        updates, state = jax.jit(optimizer.update)(params, state, params)
        params = optax.apply_updates(params, updates)
    return optimizer, params, state


def is_key(leaf):
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def without_keys(tree):
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


def with_keys(tree, like):
    return jax.tree.map(
        lambda leaf, old: jax.random.wrap_key_data(jnp.asarray(leaf)) if is_key(old) else leaf,
        tree,
        like,
    )


def by_flax(state, like):
    data = flax.serialization.to_bytes(without_keys(state))
    return flax.serialization.from_bytes(without_keys(like), data)


def by_numpy(state, like):
    file = io.BytesIO()
    leaves = jax.tree.leaves(without_keys(state))
    np.savez(file, **{str(number): leaf for number, leaf in enumerate(leaves)})
    file.seek(0)
    loaded = np.load(file, allow_pickle=False)
    return jax.tree.unflatten(
        jax.tree.structure(like), [loaded[str(number)] for number in range(len(leaves))]
    )


def by_equinox(state, like):
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, without_keys(state))
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, without_keys(like))


@pytest.mark.parametrize('how', [by_flax, by_numpy, by_equinox])
def test_a_state_survives_serialisers(how):
    optimizer, params, state = trained()
    back = with_keys(how(state, optimizer.init(network())), state)
    chex.assert_trees_all_equal(back, state)
    ends = []
    for start in (state, jax.tree.map(jnp.asarray, back)):
        _, end = jax.jit(optimizer.update)(params, start, params)
        ends.append(end)
    chex.assert_trees_all_equal(*ends)


# Cost and shape of the program.


@pytest.mark.parametrize(
    'name', slow_but(['mean_std', 'layer_density', 'norm', 'erk', 'prune_to'], 'prune_to')
)
def test_init_of_eighty_layers_compiles_little(name):
    params = {f'block{n}': {'kernel': array(4 + n % 3, 5, seed=n)} for n in range(80)}
    compiled = []
    pruner = MAKERS[name]()
    pruner.init({'block0': params['block0']})  # the small programs that all use

    def listen(event, duration, **_):
        if event == '/jax/core/compile/backend_compile_duration':
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        pruner.init(params)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) <= 20


@pytest.mark.parametrize('name', slow_but(MAKERS, 'freeze', 'prune_to'))
def test_state_and_weights_can_be_donated(name):
    pruner = MAKERS[name]()
    optimizer = optax.chain(pruner, optax.sgd(0.1))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params, state = network(), optimizer.init(network())
    mask = get_masks(state)['fc1']['kernel']
    for _ in range(2):
        params, state = step(params, state)
    assert mask.is_deleted()
    assert int(state[0].count) == 2
    optimizer.init(network())  # again, though the first is gone


def test_thresholds_alone_do_not_depend_on_the_dtype_of_the_step():
    sigma = update_probability(power=0, stop=3)
    for step in (0, np.int32(0), jnp.int32(0)):
        assert float(sigma(step)) == 1.0


@dataclasses.dataclass
class NoTree:
    """What JAX takes for a leaf."""

    value: Any


@pytest.mark.parametrize('updates', [{}, {'fc': {'kernel': None}}, {'fc': optax.MaskedNode()}])
def test_updates_without_an_array_pass(updates):
    params = {'fc': {'kernel': array(4, 4)}}
    pruner = surgery(Rule(mean_std(0.3), 1.0, 1), KEY)
    returned, state = pruner.update(updates, pruner.init(params), params)
    assert jax.tree.structure(returned) == jax.tree.structure(updates)
    assert not state.masks['fc']['kernel'].all()


def test_a_leaf_that_is_no_array_is_named():
    with pytest.raises((ValueError, TypeError), match='fc'):
        surgery(Rule(layer_density(0.5)), KEY, takes_part=dns_jax.has_axes).init(
            {'fc': np.ones((2, 2), int)}
        )
