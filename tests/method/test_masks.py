"""Tests of masks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dns_jax import (
    Thresholds,
    apply_masks,
    count_events,
    count_kept,
    init_masks,
    prune_to,
    soft_threshold,
    update_masks,
)
from dns_jax.layers import has_axes
from dns_jax.masks import discriminate, throw_coins

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
# Quarters are exact in all three types, so that weights meet the thresholds again and again.
quarters = st.integers(-12, 12).map(lambda n: n / 4)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def networks(draw):
    """Weights, masks and bands of two layers, one with a bias, as NumPy arrays."""
    shapes = {'a': {'bias': (3,), 'kernel': (4, 3)}, 'b': {'kernel': (2, 2, 1, 3)}}
    is_shape = {'is_leaf': lambda node: isinstance(node, tuple)}
    weights = jax.tree.map(
        lambda shape: draw(hnp.arrays(np.float32, shape, elements=quarters)), shapes, **is_shape
    )
    masks = jax.tree.map(lambda shape: draw(hnp.arrays(bool, shape)), shapes, **is_shape)
    bands = {}
    for layer in shapes:
        low, high = sorted((abs(draw(quarters)), abs(draw(quarters))))
        bands[layer] = Thresholds(np.float32(low), np.float32(high))
    return weights, masks, bands


def cast(weights, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), weights)


def both(probability):
    return {'a': np.float32(probability), 'b': np.float32(probability)}


@pytest.mark.parametrize('dtype', DTYPES)
@given(network=networks(), seed=seeds)
def test_update_masks_is_h(dtype, network, seed):
    weights, masks, bands = network
    new = update_masks(jax.random.key(seed), cast(weights, dtype), masks, bands, both(1.0))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, masks)
    for layer, leaves in weights.items():
        low, high = bands[layer]
        for name, leaf in leaves.items():
            old, got = masks[layer][name], np.asarray(new[layer][name])
            below, above = np.abs(leaf) < low, np.abs(leaf) >= high
            assert not got[below].any()
            assert got[above & ~below].all()
            inside = ~below & ~above
            np.testing.assert_array_equal(got[inside], old[inside])


@pytest.mark.parametrize('dtype', DTYPES)
def test_discriminate_at_the_ends_of_the_band(dtype):
    # Below a; at it; between; at b; above. Pruned and kept, and of either sign.
    weights = jnp.array([[0.25, 0.5, 0.75, 1.0, 2.0]] * 2, dtype) * jnp.array([[1], [-1]], dtype)
    for mask, want in [(False, [0, 0, 0, 1, 1]), (True, [0, 1, 1, 1, 1])]:
        new = discriminate(weights, jnp.full((2, 5), mask), Thresholds(0.5, jnp.float32(1.0)))
        assert new.dtype == bool
        assert new.tolist() == [[bool(kept) for kept in want]] * 2
    # At an empty band there is nothing between.
    new = discriminate(weights, jnp.zeros((2, 5), bool), Thresholds(0.75, 0.75))
    assert new.tolist() == [[False, False, True, True, True]] * 2


@given(network=networks(), seed=seeds)
def test_update_probability_0_keeps_all_masks(network, seed):
    weights, masks, bands = network
    new = update_masks(jax.random.key(seed), cast(weights, 'float32'), masks, bands, both(0.0))
    chex.assert_trees_all_equal(new, masks)


@pytest.mark.parametrize('mask', [True, False])
@pytest.mark.parametrize('weight', [jnp.nan, jnp.inf, -jnp.inf])
def test_lost_coin_keeps_the_mask_of_a_weight_that_is_not_finite(weight, mask):
    new = update_masks(
        jax.random.key(0),
        jnp.array([weight]),
        jnp.array([mask]),
        {'': Thresholds(1.0, 2.0)},
        {'': 0.0},
    )
    assert bool(new[0]) is mask


@given(network=networks(), seed=seeds, probability=st.floats(0, 1, width=32))
def test_layer_is_updated_whole_or_not_at_all(network, seed, probability):
    weights, masks, bands = network
    weights, key = cast(weights, 'float32'), jax.random.key(seed)
    always = update_masks(key, weights, masks, bands, both(1.0))
    new = update_masks(key, weights, masks, bands, both(probability))
    # The coins are those that the docstring promises.
    coins = np.asarray(jax.random.uniform(key, (2,))) < np.float32(probability)
    for layer, coin in zip(('a', 'b'), coins, strict=True):
        chex.assert_trees_all_equal(new[layer], (always if coin else masks)[layer])


def test_coin_that_equals_the_probability_is_lost():
    # So that σ = 0 never updates, whatever is drawn, and σ = 1 always does.
    weight, mask, key = jnp.zeros(1), jnp.ones(1, bool), jax.random.key(0)
    coin = np.asarray(jax.random.uniform(key, (1,)))[0]
    for sigma, kept in [(coin, True), (np.nextafter(coin, np.float32(1)), False)]:
        new = update_masks(key, weight, mask, {'': Thresholds(1.0, 2.0)}, {'': sigma})
        assert bool(new[0]) is kept


def test_weights_of_16_bits_are_compared_in_float32():
    # In bfloat16 the threshold would round onto the weight, and keep it.
    weight = jnp.array([0.09960938], jnp.bfloat16)
    band = {'': Thresholds(jnp.float32(0.0997), jnp.float32(0.2))}
    new = update_masks(jax.random.key(0), weight, jnp.array([True]), band, {'': 1.0})
    assert not new[0]


def test_updated_leaves_are_those_of_the_layer_function():
    params = {'a': {'kernel': jnp.zeros((2, 2))}, 'b': {'kernel': jnp.zeros((3, 2))}}
    new = update_masks(
        jax.random.key(0),
        params,
        init_masks(params),
        {'a': Thresholds(1.0, 2.0), 'b': Thresholds(0.0, 2.0)},
        both(1.0),
    )
    assert [int(jnp.sum(leaf)) for leaf in jax.tree.leaves(new)] == [0, 6]
    new = update_masks(
        jax.random.key(0),
        params,
        init_masks(params),
        {'all': Thresholds(1.0, 2.0)},
        {'all': 1.0},
        layer_of=lambda path: 'all',
    )
    assert count_kept(new, lambda path: 'all').keys() == {'all'}
    assert [int(jnp.sum(leaf)) for leaf in jax.tree.leaves(new)] == [0, 0]


def test_init_masks():
    params = {
        'a': {'kernel': jnp.zeros((2, 3)), 'bias': jnp.zeros(3, jnp.bfloat16)},
        'steps': jnp.zeros((), jnp.int32),
        'none': None,
    }
    masks = init_masks(params, has_axes)
    chex.assert_trees_all_equal_structs(masks, params)
    want = {'a': {'kernel': (2, 3), 'bias': (3,)}, 'steps': (), 'none': None}
    assert jax.tree.map(jnp.shape, masks) == want
    assert all(leaf.dtype == bool and leaf.all() for leaf in jax.tree.leaves(masks))
    kernels = init_masks(params)
    assert kernels['a']['bias'].shape == ()
    assert kernels['a']['kernel'].shape == (2, 3)


@given(network=networks())
def test_apply_masks(network):
    weights, masks, _ = network
    applied = apply_masks(cast(weights, 'float32'), masks)
    jax.tree.map(
        lambda got, weight, mask: np.testing.assert_array_equal(got, weight * mask),
        applied,
        weights,
        masks,
    )


@pytest.mark.parametrize('dtype', DTYPES)
def test_apply_masks_keeps_dtypes_and_gives_exact_zeros(dtype):
    weights = jnp.array([-1.0, jnp.nan, jnp.inf, -0.0, 2.0], dtype)
    applied = apply_masks(weights, jnp.array([False, False, False, False, True]))
    assert applied.dtype == dtype
    np.testing.assert_array_equal(np.asarray(applied, np.float32), [0, 0, 0, 0, 2])
    assert not np.signbit(np.asarray(applied, np.float32)).any()


def test_scalar_masks_cost_nothing():
    params = {'kernel': jnp.ones((4, 3)), 'bias': jnp.ones(3)}
    masks = init_masks(params, lambda path, leaf: False)
    assert [leaf.shape for leaf in jax.tree.leaves(masks)] == [(), ()]
    assert jax.make_jaxpr(apply_masks)(params, masks).jaxpr.eqns == []
    assert apply_masks(params, masks)['kernel'] is params['kernel']
    assert count_kept(masks) == {}
    chex.assert_trees_all_equal(update_masks(jax.random.key(0), params, masks, {}, {}), masks)


def test_a_scalar_mask_stays_beside_those_of_its_layer_and_without():
    params = {'a': {'bias': jnp.zeros(3), 'kernel': jnp.zeros((2, 3))}, 'b': {'bias': jnp.zeros(2)}}
    masks = init_masks(params)
    new = update_masks(jax.random.key(0), params, masks, {'a': Thresholds(1.0, 2.0)}, {'a': 1.0})
    want = {'a': {'bias': True, 'kernel': [[False] * 3] * 2}, 'b': {'bias': True}}
    assert jax.tree.map(lambda leaf: leaf.tolist(), new) == want


def test_counts_go_by_layer_and_leave_out_scalar_masks():
    masks = {
        'a': {'bias': jnp.array([True, False]), 'kernel': jnp.ones((2, 2), bool)},
        'b': {'bias': jnp.array(True), 'kernel': jnp.eye(3, dtype=bool)},
        'c': {'scale': jnp.array(True)},
    }
    assert count_kept(masks) == {'a': 5, 'b': 3}
    assert count_kept(masks, lambda path: path[2:]) == {'bias': 1, 'kernel': 7}
    assert list(count_events(masks, masks)) == ['a', 'b']


TREE = {'a': jnp.ones((2, 3)), 'b': jnp.ones(3)}
GOOD = init_masks(TREE, has_axes)


@pytest.mark.parametrize(
    ('before', 'after', 'error'),
    [
        ({'a': GOOD['a']}, GOOD, ValueError),
        (GOOD, {**GOOD, 'a': jnp.ones((3, 2), bool)}, ValueError),
        (GOOD, {**GOOD, 'a': jnp.ones((2, 3))}, TypeError),
        ({**GOOD, 'a': jnp.ones((2, 3), jnp.int32)}, GOOD, TypeError),
        (GOOD, {**GOOD, 'a': jnp.array(True)}, ValueError),
        ({**GOOD, 'a': jnp.array(True)}, GOOD, ValueError),
    ],
)
def test_count_events_of_masks_that_do_not_match(before, after, error):
    with pytest.raises(error, match='masks'):
        count_events(before, after)


@pytest.mark.parametrize(
    ('params', 'takes_part', 'error', 'message'),
    [
        ({}, None, ValueError, r'params must have at least one leaf.*\{\}'),
        ({'a': None}, None, ValueError, 'params must have at least one leaf'),
        ({'a': jnp.ones(3, jnp.int32)}, None, TypeError, r"params\['a'\].*int32"),
        ({'a': {'b': jnp.ones(3, bool)}}, None, TypeError, r"params\['a/b'\].*bool"),
        ({'a': jnp.ones(3, jnp.complex64)}, None, TypeError, r"params\['a'\].*complex64"),
        ({'a': jax.random.split(jax.random.key(0))}, None, TypeError, r"params\['a'\].*key"),
        ({'a': jnp.ones(())}, lambda path, leaf: True, ValueError, r"params\['a'\] is a scalar"),
    ],
)
def test_weights_without_masks(params, takes_part, error, message):
    with pytest.raises(error, match=message):
        init_masks(params, takes_part or has_axes)


@pytest.mark.parametrize('name', ['thresholds', 'update_probability'])
@pytest.mark.parametrize('layers', [[], ['a'], ['a', 'b', 'c'], ['a', 'c']])
def test_tables_that_name_other_layers(name, layers):
    tree = {'a': {'w': jnp.ones(2)}, 'b': {'w': jnp.ones(2)}}
    tables = {
        'thresholds': {layer: Thresholds(0.0, 1.0) for layer in ['a', 'b']},
        'update_probability': both(1.0),
    }
    value = next(iter(tables[name].values()))
    tables[name] = dict.fromkeys(layers, value)
    with pytest.raises(ValueError, match=f'{name} must name the layers') as caught:
        update_masks(jax.random.key(0), tree, init_masks(tree, has_axes), **tables)
    assert "['a', 'b']" in str(caught.value)
    assert str(layers) in str(caught.value)


def test_a_weight_that_is_not_a_number_is_kept():
    """Pruning it would hide that training broke."""
    weights = jnp.array([jnp.nan, jnp.nan, 0.0, 2.0])
    masks = jnp.array([True, False, True, False])
    thresholds = {'': Thresholds(0.9, 1.1)}
    updated = update_masks(jax.random.key(0), weights, masks, thresholds, {'': 1.0})
    np.testing.assert_array_equal(updated, [True, True, False, True])


@pytest.mark.parametrize('chances', [(0.0, 1.0), (1.0, 1.0), (0.0, 0.0), (0.0, 1.0, 0.5)])
def test_coins_that_are_certain_are_those_of_a_draw(chances):
    keys = jax.random.split(jax.random.key(0), 20)

    def throw(key):
        return throw_coins(key, {f'{number}': c for number, c in enumerate(chances)})

    coins = jax.lax.map(throw, keys)
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (len(chances),)))(keys)
    wanted = np.asarray(drawn) < np.float32(chances)
    np.testing.assert_array_equal(np.stack([*coins.values()], 1), wanted)


@pytest.mark.parametrize('dtype', DTYPES)
@given(networks())
def test_softened_weights_are_nearer_to_zero_by_their_threshold(dtype, network):
    weights, masks, bands = network
    weights = cast(weights, dtype)
    found = soft_threshold(weights, masks, bands)
    for layer, leaves in weights.items():
        for name, leaf in leaves.items():
            cut = bands[layer].low
            exact = np.asarray(leaf, np.float32)
            expected = np.sign(exact) * np.maximum(np.abs(exact) - cut, 0) * masks[layer][name]
            assert found[layer][name].dtype == dtype
            np.testing.assert_allclose(
                np.asarray(found[layer][name], np.float32), expected, rtol=1e-2, atol=1e-2
            )


def test_nothing_is_softened_where_there_is_no_mask_or_no_threshold():
    weights = {'a': {'kernel': jnp.array([3.0, -0.5])}, 'b': {'scale': jnp.array([0.25])}}
    masks = {'a': {'kernel': jnp.array([True, False])}, 'b': {'scale': jnp.array(True)}}
    bands = {'a': Thresholds(jnp.float32(1.0), jnp.float32(2.0))}
    assert soft_threshold(weights, masks, bands)['b']['scale'].tolist() == [0.25]
    assert soft_threshold(weights, masks, {})['a']['kernel'].tolist() == [3.0, 0.0]


def test_thresholds_that_are_not_known_yet_soften_nothing():
    weights = {'fc': {'kernel': jnp.array([[0.1, -0.2, 0.3, 0.4]])}}
    state = prune_to(density=0.5, steps=8).init(weights)
    chex.assert_trees_all_equal(soft_threshold(weights, state.masks, state.thresholds), weights)


def test_stacked_layers_are_softened_by_thresholds_of_their_own():
    weights = {'blocks': {'fc': {'kernel': jnp.full((2, 1, 2), -3.0)}}}
    masks = {'blocks': {'fc': {'kernel': jnp.array([[[True, True]], [[True, False]]])}}}
    bands = {f'blocks/{n}/fc': Thresholds(jnp.float32(n + 1), jnp.float32(9)) for n in range(2)}
    found = jax.jit(lambda w: soft_threshold(w, masks, bands, stacked={'blocks': 0}))(weights)
    assert found['blocks']['fc']['kernel'].tolist() == [[[-2.0, -2.0]], [[-1.0, 0.0]]]
    for own in ({}, {'layer_of': lambda path: 'all', 'stacked': {'blocks': 0}}):
        with pytest.raises(ValueError, match=r"thresholds names \['blocks/0/fc', 'blocks/1/fc'\]"):
            soft_threshold(weights, masks, bands, **own)
