"""Surgery on explicit meshes, under shard_map and under pmap."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from situations import KEY, MAKERS, network, on_one_device, slow_but

import dns_jax
from dns_jax import Rule, apply_masks, count_kept, layer_density, measure_sizes, surgery

COMPAT_TABLE = 'field'
SPECS = {
    'rows': {2: jax.P('x'), 1: jax.P()},
    'columns': {2: jax.P(None, 'x'), 1: jax.P('x')},
    'both': {2: jax.P('x', 'y'), 1: jax.P('y')},
    'together': {2: jax.P(('x', 'y')), 1: jax.P(('x', 'y'))},
}


def explicit(shape, names):
    return jax.make_mesh(shape, names, devices=jax.devices('cpu')[:8])


@pytest.mark.parametrize(
    ('name', 'spec'),
    [
        ('norm', 'both'),
        *(pytest.param(name, 'both', marks=pytest.mark.slow) for name in MAKERS if name != 'norm'),
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


@pytest.mark.parametrize('name', slow_but(list(MAKERS)[:-1], 'mean_std', 'RigL'))
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
