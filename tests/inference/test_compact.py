"""Tests of inference.compact: the small network gives what the masked one gives, and is small."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from networks import LENET5, LENET300, forward, networks

from dns_jax import apply_masks
from dns_jax.files.sparse import load_sparse
from dns_jax.inference.chain import Convolution, Dense, Flatten, MaxPool, Relu, Select, trace_shapes
from dns_jax.inference.compact import Shrunk, compact
from experiments.zoo import FOLDER


def ones(*shape, dtype=np.float32):
    return {'kernel': np.ones(shape, dtype), 'bias': np.ones(shape[-1], dtype)}


def masks_like(params, value=True):
    return {
        name: {leaf: np.full(np.shape(array), value) for leaf, array in weights.items()}
        for name, weights in params.items()
    }


@settings(max_examples=100)
@given(networks())
def test_outputs_are_those_of_the_masked_network(network):
    chain, params, masks, shape = network
    small = compact(chain, params, masks, shape)
    masked = apply_masks(params, masks)
    trace_shapes(small.chain, small.params, shape)  # the small network is a network
    for image in np.random.default_rng(1).normal(size=(3, *shape)):
        expected = forward(chain, masked, image)
        np.testing.assert_allclose(forward(small.chain, small.params, image), expected, atol=1e-5)

    names = [layer.name for layer in small.chain if isinstance(layer, Dense | Convolution)]
    for name, after in zip(names, [*names[1:], None], strict=True):
        kernel, report = small.params[name]['kernel'], small.layers[name]
        assert report.inputs == (params[name]['kernel'].shape[-2], kernel.shape[-2])
        assert report.units == (params[name]['kernel'].shape[-1], kernel.shape[-1])
        others = tuple(axis for axis in range(kernel.ndim) if axis != kernel.ndim - 2)
        if kernel.shape[-2] > 1:
            assert kernel.any(others).all(), 'an input that nothing reads'
        if after and kernel.shape[-1] > 1 and not report.refused:
            assert kernel.any(tuple(range(kernel.ndim - 1))).all(), 'a unit that nothing reaches'

    again = compact(small.chain, small.params, masks_like(small.params), shape)
    chex.assert_trees_all_equal_shapes(again.params, small.params)
    assert again.chain == small.chain


@pytest.mark.parametrize(('name', 'chain'), [('lenet5', LENET5), ('lenet300', LENET300)])
def test_networks_of_the_zoo(name, chain):
    network = load_sparse(FOLDER / f'{name}.safetensors')
    small = compact(chain, network.params, network.masks, (28, 28, 1))
    for image in np.random.default_rng(0).random((2, 28, 28, 1)):
        np.testing.assert_allclose(
            forward(small.chain, small.params, image),
            forward(chain, network.params, image),
            atol=1e-5,
        )
    assert all(report.units[1] < report.units[0] for report in list(small.layers.values())[:-1])


def test_constants_go_through_relu_pooling_and_flattening():
    chain = (Convolution('a'), Relu(), MaxPool(2), Flatten(), Dense('b'))
    params = {'a': ones(1, 1, 1, 3), 'b': ones(4 * 3, 2)}
    params['a']['bias'][:] = [2, -5, 7]
    masks = masks_like(params)
    masks['a']['kernel'][..., :2] = False
    small = compact(chain, params, masks, (4, 4, 1))
    # Filter 0 is 2 at each of four positions, filter 1 is max(-5, 0).
    np.testing.assert_array_equal(small.params['b']['bias'], np.float32([9, 9]))
    assert small.params['b']['kernel'].shape == (4, 2)
    assert small.chain == chain
    assert small.layers == {
        'a': Shrunk(inputs=(1, 1), units=(3, 1), folded=2, refused=''),
        'b': Shrunk(inputs=(12, 4), units=(2, 2), folded=0, refused=''),
    }


def test_constants_without_relu_keep_their_sign():
    chain = (Dense('a'), Dense('b'))
    params = {'a': ones(2, 2), 'b': ones(2, 1)}
    params['a']['bias'][:] = [-5, 0]
    masks = masks_like(params)
    masks['a']['kernel'][:, 0] = False
    small = compact(chain, params, masks, (2,))
    np.testing.assert_array_equal(small.params['b']['bias'], np.float32([-4]))


def test_constants_become_constants_of_the_next_layer():
    chain = (Dense('a'), Relu(), Dense('b'), Relu(), Dense('c'))
    params = {'a': ones(2, 2), 'b': ones(2, 2), 'c': ones(2, 1)}
    masks = masks_like(params)
    masks['a']['kernel'][:, 0] = False  # unit 0 of a is 1
    masks['b']['kernel'][1, 0] = False  # so unit 0 of b is 2
    small = compact(chain, params, masks, (2,))
    assert [small.layers[name].folded for name in 'abc'] == [1, 1, 0]
    np.testing.assert_array_equal(small.params['c']['bias'], np.float32([3]))


def test_constants_stay_where_the_next_layer_pads():
    chain = (Convolution('a'), Convolution('b', 'SAME'))
    params = {'a': ones(1, 1, 1, 3), 'b': ones(3, 3, 3, 1)}
    params['a']['bias'][:] = [2, 0, 1]
    masks = masks_like(params)
    masks['a']['kernel'][..., :2] = False
    small = compact(chain, params, masks, (4, 4, 1))
    assert small.layers['a'].units == (3, 2)  # that of 0 is exact
    assert small.layers['a'].folded == 1
    assert small.layers['a'].refused == '1 are constant, but b pads with zeros'
    image = np.random.default_rng(0).normal(size=(4, 4, 1))
    np.testing.assert_allclose(
        forward(small.chain, small.params, image),
        forward(chain, apply_masks(params, masks), image),
        atol=1e-6,
    )


def test_inputs_that_nothing_reads_are_not_selected():
    params = {'a': ones(12, 2)}
    masks = masks_like(params)
    masks['a']['kernel'][[0, 3, 11]] = False
    small = compact((Flatten(), Dense('a')), params, masks, (2, 2, 3))
    assert small.chain == (Flatten(), Select((1, 2, 4, 5, 6, 7, 8, 9, 10)), Dense('a'))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, np.float16, np.float32, np.float64])
def test_dtypes_stay(dtype):
    params = {'a': ones(3, 2, dtype=dtype)}
    small = compact((Dense('a'),), params, {'a': dict.fromkeys(params['a'], np.array(True))}, (3,))
    assert small.params['a']['kernel'].dtype == dtype
    assert small.params['a']['bias'].dtype == dtype


def test_inputs_stay_as_they_were():
    params, chain = {'a': ones(3, 3), 'b': ones(3, 2)}, (Dense('a'), Dense('b'))
    masks = masks_like(params)
    masks['a']['kernel'][:, 0] = False
    before = {name: {leaf: array.copy() for leaf, array in w.items()} for name, w in params.items()}
    compact(chain, params, masks, (3,))
    chex.assert_trees_all_equal(params, before)


def test_pruned_weights_may_be_anything():
    params = {'a': ones(2, 2)}
    params['a']['kernel'][0, 0] = np.nan
    masks = masks_like(params)
    masks['a']['kernel'][0, 0] = False
    small = compact((Dense('a'),), params, masks, (2,))
    np.testing.assert_array_equal(small.params['a']['kernel'], np.float32([[0, 1], [1, 1]]))
    with pytest.raises(ValueError, match=r"params\['a/kernel'\] has a kept weight that is not fin"):
        compact((Dense('a'),), params, masks_like(params), (2,))


def test_constants_that_do_not_fit():
    params = {'a': ones(2, 2, dtype=np.float16), 'b': ones(2, 1, dtype=np.float16)}
    params['a']['bias'][:], params['b']['kernel'][:] = 60_000, 60_000
    masks = masks_like(params)
    masks['a']['kernel'][:] = False
    with pytest.raises(ValueError, match="the biases of 'b' do not fit float16"):
        compact((Dense('a'), Dense('b')), params, masks, (2,))


@pytest.mark.parametrize('mask', [True, False])
def test_a_leaf_without_a_mask_of_its_own_is_kept(mask):
    params = {'a': ones(2, 2), 'other': ones(3)}
    masks = {'a': {'kernel': np.eye(2, dtype=bool), 'bias': np.array(mask)}, 'other': 3}
    small = compact((Dense('a'),), params, masks, (2,))
    np.testing.assert_array_equal(small.params['a']['bias'], np.ones(2, np.float32))


def test_bad_input():
    params = {'a': ones(2, 2)}
    with pytest.raises(ValueError, match='must have a layer with weights'):
        compact((Relu(),), {}, {}, (2,))
    with pytest.raises(ValueError, match='kernel of shape'):
        compact((Dense('a'),), params, masks_like(params), (3,))
    with pytest.raises(ValueError, match='masks'):
        compact((Dense('a'),), params, {}, (2,))
    with pytest.raises(TypeError, match='mask'):
        compact((Dense('a'),), params, masks_like(params, 1.0), (2,))
