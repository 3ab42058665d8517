"""Tests of networks.models: sizes, and the convolution and pooling that stand in for XLA's."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

import dns_jax
from dns_jax.inference.chain import max_pool
from experiments.networks import models

IMAGE_SHAPE = (28, 28, 1)
SHAPES = {
    'lenet300': {
        'fc1': ((784, 300), (300,)),
        'fc2': ((300, 100), (100,)),
        'fc3': ((100, 10), (10,)),
    },
    'lenet5': {
        'conv1': ((5, 5, 1, 20), (20,)),
        'conv2': ((5, 5, 20, 50), (50,)),
        'fc1': ((800, 500), (500,)),
        'fc2': ((500, 10), (10,)),
    },
}


@functools.partial(jax.jit, static_argnames='name')
def initial(name, key):
    return models.NETWORKS[name]().init(key, jnp.zeros((1, *IMAGE_SHAPE)))['params']


@pytest.fixture(scope='module')
def all_params():
    return {name: initial(name, jax.random.key(0)) for name in SHAPES}


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, arguments, cotangent):
    value, gradients = jax.vjp(function, *arguments)
    return value, gradients(cotangent)


def test_the_networks():
    networks = [*SHAPES, 'alexnet', 'vgg16', 'resnet', 'gpt']
    assert list(models.INPUTS) == list(models.NETWORKS) == networks


@pytest.mark.parametrize('name', SHAPES)
def test_shapes_and_types_of_the_layers(all_params, name):
    found = {
        layer: (leaves['kernel'].shape, leaves['bias'].shape)
        for layer, leaves in all_params[name].items()
    }
    assert found == SHAPES[name]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(all_params[name]))


@pytest.mark.parametrize('name', SHAPES)
def test_kernels_are_uniform_up_to_the_limit_of_xavier(all_params, name):
    for layer in all_params[name].values():
        kernel = np.asarray(layer['kernel'])
        limit = np.sqrt(3 / np.prod(kernel.shape[:-1]))
        assert np.abs(kernel).max() <= limit
        # A uniform variable in ±limit has this spread; 500 weights, the fewest, hold it to 10 %.
        assert kernel.std() == pytest.approx(limit / np.sqrt(3), rel=0.1)
        assert np.abs(kernel).max() > 0.95 * limit


@pytest.mark.parametrize('name', SHAPES)
def test_biases_start_at_zero(all_params, name):
    for layer in all_params[name].values():
        np.testing.assert_array_equal(layer['bias'], 0)


@pytest.mark.parametrize('name', SHAPES)
def test_the_seed_decides_the_weights(all_params, name):
    layer = next(iter(SHAPES[name]))
    first = all_params[name][layer]['kernel']
    again, other = (initial(name, jax.random.key(seed))[layer]['kernel'] for seed in (0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize('name', SHAPES)
def test_logits_have_one_column_per_class(name):
    network = models.NETWORKS[name]()
    images = jax.ShapeDtypeStruct((7, *IMAGE_SHAPE), jnp.float32)
    logits, _ = jax.eval_shape(lambda x: network.init_with_output(jax.random.key(0), x), images)
    assert (logits.shape, logits.dtype) == ((7, 10), jnp.float32)


@pytest.mark.parametrize(
    ('name', 'expected'), [('lenet300', {}), ('lenet5', {'conv1': 24 * 24, 'conv2': 8 * 8})]
)
def test_positions_are_those_of_the_convolutions(name, expected):
    assert models.count_positions(models.NETWORKS[name](), IMAGE_SHAPE) == expected


def test_positions_follow_the_size_of_the_image():
    network = models.NETWORKS['lenet5']()
    assert models.count_positions(network, (36, 28, 1)) == {'conv1': 32 * 24, 'conv2': 12 * 8}


@pytest.mark.parametrize(
    ('ranks', 'expected'),
    [
        (
            {},
            {
                'conv1': 20 * 25 * 24 * 24,
                'conv2': 50 * 20 * 25 * 8 * 8,
                'fc1': 800 * 500,
                'fc2': 500 * 10,
            },
        ),
        (
            {'conv1': 3, 'conv2': None, 'fc1': 7},
            {
                'conv1/first': 3 * 5 * 24 * 28,  # not yet narrower
                'conv1/second': 20 * 3 * 5 * 24 * 24,
                'conv2': 50 * 20 * 25 * 8 * 8,
                'fc1/first': 800 * 7,
                'fc1/second': 7 * 500,
                'fc2': 500 * 10,
            },
        ),
    ],
)
def test_multiply_adds_are_those_counted_by_hand(ranks, expected):
    network = models.LeNet5(FrozenDict(ranks))
    params = network.init(jax.random.key(0), jnp.zeros((1, *IMAGE_SHAPE)))['params']
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    positions = models.count_positions(network, IMAGE_SHAPE)
    layers = dns_jax.measure_sizes(params, masks, positions).layers
    assert {name: size.kept_multiply_adds for name, size in layers.items()} == expected


@pytest.mark.parametrize(
    ('make', 'layers'),
    [(models.LeNet300, 'fc1, fc2, fc3'), (models.LeNet5, 'conv1, conv2, fc1, fc2')],
)
def test_ranks_of_layers_that_are_not_there_are_refused(make, layers):
    message = re.escape(f"ranks must be of {layers}, but has ['fc', 'x']")
    with pytest.raises(ValueError, match=message):
        models.shapes(make(FrozenDict(x=3, fc1=2, fc=None)), IMAGE_SHAPE)


def convolve_by_products(images, kernel):
    return models.convolution_by_products(images, kernel, (1, 1), 'VALID')


@pytest.mark.parametrize(
    ('strides', 'padding', 'options'),
    [
        ((2, 2), 'VALID', {}),
        ((1, 1), 'SAME', {}),
        ((1, 1), ((0, 0), (1, 0)), {}),
        ((1, 1), 'VALID', {'rhs_dilation': (2, 2)}),
    ],
)
def test_other_convolutions_are_refused(strides, padding, options):
    with pytest.raises(ValueError, match='only a plain VALID convolution'):
        models.convolution_by_products(
            random((1, 8, 8, 1)), random((5, 5, 1, 2)), strides, padding, **options
        )


def convolve(images, kernel):
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(1, 1),
        padding='VALID',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision='highest',
    )


@pytest.mark.parametrize(
    ('image_shape', 'kernel_shape'),
    [
        ((2, 28, 28, 1), (5, 5, 1, 20)),
        ((3, 12, 12, 20), (5, 5, 20, 50)),
        ((1, 5, 5, 2), (5, 5, 2, 3)),  # one position
        ((2, 9, 6, 3), (2, 4, 3, 5)),  # neither image nor kernel square
        ((2, 6, 9, 3), (4, 1, 3, 2)),
        ((2, 4, 5, 3), (1, 1, 3, 4)),
    ],
)
def test_convolution_by_products_is_that_of_xla(image_shape, kernel_shape):
    images, kernel = random(image_shape), random(kernel_shape, 1) / 10
    height, width = (image_shape[axis] - kernel_shape[axis - 1] + 1 for axis in (1, 2))
    cotangent = random((image_shape[0], height, width, kernel_shape[3]), 2) / 10
    expected, found = (
        value_and_gradients(function, (images, kernel), cotangent)
        for function in (convolve, convolve_by_products)
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        # A kernel's gradient sums over up to 1,152 positions, hence the absolute part.
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape', [(2, 24, 24, 20), (3, 8, 6, 5), (1, 2, 2, 1)])
def test_pooling_is_that_of_flax(shape):
    images, cotangent = random(shape), random((shape[0], shape[1] // 2, shape[2] // 2, shape[3]), 1)
    expected, found = (
        value_and_gradients(function, (images,), cotangent)
        for function in (lambda x: nn.max_pool(x, (2, 2), (2, 2)), lambda x: max_pool(x, 2, axis=1))
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
def test_lenet5_gives_the_same_with_the_convolution_of_either_backend(
    all_params, backend, monkeypatch
):
    by_products = []

    def spy(*arguments, **options):
        by_products.append(arguments)
        return convolution_by_products(*arguments, **options)

    convolution_by_products = models.convolution_by_products
    params, images = all_params['lenet5'], random((4, *IMAGE_SHAPE))
    hidden = nn.max_pool(convolve(images, params['conv1']['kernel']), (2, 2), (2, 2))
    hidden = nn.max_pool(convolve(hidden, params['conv2']['kernel']), (2, 2), (2, 2))
    hidden = nn.relu(hidden.reshape(4, -1) @ params['fc1']['kernel'])
    expected = hidden @ params['fc2']['kernel']

    monkeypatch.setattr(models, 'convolution_by_products', spy)
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    # Compiled by a function of its own, so that no trace with the other backend is used again.
    logits = jax.jit(lambda x: models.NETWORKS['lenet5']().apply({'params': params}, x))(images)
    assert len(by_products) == (2 if backend == 'cpu' else 0)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_lenet300_computes_two_hidden_layers_of_relu(all_params):
    params = jax.tree.map(lambda leaf: leaf + 0.01, all_params['lenet300'])
    images = random((4, *IMAGE_SHAPE))
    hidden = np.asarray(images).reshape(4, -1)
    for layer in ('fc1', 'fc2', 'fc3'):
        hidden = hidden @ np.asarray(params[layer]['kernel']) + np.asarray(params[layer]['bias'])
        hidden = hidden if layer == 'fc3' else np.maximum(hidden, 0)
    logits = models.NETWORKS['lenet300']().apply({'params': params}, images)
    np.testing.assert_allclose(logits, hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', models.INPUTS)
def test_inputs_are_those_of_caffe_or_of_cifar(name):
    """The means are those of the two networks of the model zoo and of the images, red first."""
    expected = {
        'alexnet': ((122.679, 116.669, 104.007), 1, 227),
        'vgg16': ((123.68, 116.779, 103.939), 1, 224),
        'resnet': ((125.3, 123.0, 113.9), 1 / 64, 32),
        'gpt': (),  # characters, as they are
    }
    assert models.INPUTS[name] == expected.get(name, ((0.0,), 1 / 256, 28))
