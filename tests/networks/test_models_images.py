"""Tests of AlexNet and VGG-16 of experiments.networks.models against Caffe's layers in NumPy.

At full size only shapes are looked at; what is computed is a small fraction of the width.
"""

import functools
import math

import caffe_layers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.networks import models

# Of images 227 and 224 pixels a side: kernel, parameters, multiply-adds of one image.
LARGE = {
    'alexnet': {
        'conv1': ((11, 11, 3, 96), 34_944, 105_415_200),
        'conv2': ((5, 5, 48, 256), 307_456, 223_948_800),
        'conv3': ((3, 3, 256, 384), 885_120, 149_520_384),
        'conv4': ((3, 3, 192, 384), 663_936, 112_140_288),
        'conv5': ((3, 3, 192, 256), 442_624, 74_760_192),
        'fc6': ((9_216, 4_096), 37_752_832, 37_748_736),
        'fc7': ((4_096, 4_096), 16_781_312, 16_777_216),
        'fc8': ((4_096, 1_000), 4_097_000, 4_096_000),
    },
    'vgg16': {
        'conv1_1': ((3, 3, 3, 64), 1_792, 86_704_128),
        'conv1_2': ((3, 3, 64, 64), 36_928, 1_849_688_064),
        'conv2_1': ((3, 3, 64, 128), 73_856, 924_844_032),
        'conv2_2': ((3, 3, 128, 128), 147_584, 1_849_688_064),
        'conv3_1': ((3, 3, 128, 256), 295_168, 924_844_032),
        'conv3_2': ((3, 3, 256, 256), 590_080, 1_849_688_064),
        'conv3_3': ((3, 3, 256, 256), 590_080, 1_849_688_064),
        'conv4_1': ((3, 3, 256, 512), 1_180_160, 924_844_032),
        'conv4_2': ((3, 3, 512, 512), 2_359_808, 1_849_688_064),
        'conv4_3': ((3, 3, 512, 512), 2_359_808, 1_849_688_064),
        'conv5_1': ((3, 3, 512, 512), 2_359_808, 462_422_016),
        'conv5_2': ((3, 3, 512, 512), 2_359_808, 462_422_016),
        'conv5_3': ((3, 3, 512, 512), 2_359_808, 462_422_016),
        'fc6': ((25_088, 4_096), 102_764_544, 102_760_448),
        'fc7': ((4_096, 4_096), 16_781_312, 16_777_216),
        'fc8': ((4_096, 1_000), 4_097_000, 4_096_000),
    },
}


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def shapes_of(network, image_shape):
    """Shapes of the weights and of the logits of seven images."""
    images = jax.ShapeDtypeStruct((7, *image_shape), jnp.float32)
    logits, variables = jax.eval_shape(
        lambda images: network.init_with_output(jax.random.key(0), images), images
    )
    return variables['params'], logits


@pytest.mark.parametrize(
    ('name', 'parameters', 'multiply_adds'),
    [('alexnet', 60_965_224, 724_406_816), ('vgg16', 138_357_544, 15_470_264_320)],
)
def test_sizes_of_the_networks_for_colour_images(name, parameters, multiply_adds):
    network, inputs = models.NETWORKS[name](), models.INPUTS[name]
    image_shape = (inputs.size, inputs.size, len(inputs.mean))
    params, logits = shapes_of(network, image_shape)
    positions = models.count_positions(network, image_shape)
    found = {
        layer: (
            leaves['kernel'].shape,
            sum(leaf.size for leaf in leaves.values()),
            leaves['kernel'].size * positions.get(layer, 1),
        )
        for layer, leaves in params.items()
    }
    assert found == LARGE[name]
    assert all(leaves['bias'].shape == leaves['kernel'].shape[-1:] for leaves in params.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    assert sum(layer[2] for layer in found.values()) == multiply_adds
    assert (logits.shape, logits.dtype) == ((7, 1_000), jnp.float32)


# 71 pixels make every window at the border of AlexNet's poolings reach over it.
SMALL = {'alexnet': (67, 71, 3), 'vgg16': (33, 40, 3)}
WIDTHS = {'alexnet': 1 / 16, 'vgg16': 1 / 32}


def small_network(name, **options):
    return models.NETWORKS[name](classes=10, width=WIDTHS[name], **options)


@functools.cache
def small_params(name):
    """Weights under which activations are of the size that they have in a trained network."""
    shapes = shapes_of(small_network(name), SMALL[name])[0]
    return {
        layer: {
            'kernel': random(leaves['kernel'].shape, seed=at)
            * np.float32(math.sqrt(2 / math.prod(leaves['kernel'].shape[:-1]))),
            'bias': random(leaves['bias'].shape, seed=100 + at),
        }
        for at, (layer, leaves) in enumerate(shapes.items())
    }


def small_images(name):
    return 60 * random((2, *SMALL[name]), seed=7)


def logits_of(network, params, images, **options):
    return jax.jit(lambda *inputs: network.apply({'params': inputs[0]}, inputs[1], **options))(
        params, images
    )


def in_layout_of_caffe(params, maps):
    """Weight and bias of each layer; the maps are those behind the convolutions."""
    blobs = {}
    for layer, leaves in params.items():
        kernel = leaves['kernel']
        if layer == 'fc6':
            kernel = kernel.reshape(*maps, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
        weight = kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)
        blobs[layer] = weight, leaves['bias']
    return blobs


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
@pytest.mark.parametrize(('name', 'maps'), [('alexnet', (1, 2, 16)), ('vgg16', (2, 2, 16))])
def test_networks_for_colour_images_compute_what_caffe_does(name, maps, backend, monkeypatch):
    by_groups = []

    def spy(*arguments, **options):
        by_groups.append(arguments)
        return convolution_by_groups(*arguments, **options)

    params, images = small_params(name), small_images(name)
    convolution_by_groups = models.convolution_by_groups
    monkeypatch.setattr(models, 'convolution_by_groups', spy)
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    found = logits_of(small_network(name), params, images)
    assert len(by_groups) == (3 if (name, backend) == ('alexnet', 'cpu') else 0)
    forward, blobs = getattr(caffe_layers, name), in_layout_of_caffe(params, maps)
    wanted = [forward(blobs, image.transpose(2, 0, 1)) for image in images]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize('name', LARGE)
def test_half_precision_is_for_computing_alone(name):
    params, images = small_params(name), small_images(name)
    half = small_network(name, dtype=jnp.bfloat16)
    own_params, _ = shapes_of(half, SMALL[name])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(own_params))
    found, wanted = (logits_of(network, params, images) for network in (half, small_network(name)))
    assert found.dtype == jnp.float32
    # Eight bits of each number, through eight and sixteen layers.
    difference = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < difference < 0.05


@pytest.mark.parametrize('name', LARGE)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_all_layers_learn(name, dtype):
    network, images = small_network(name, dtype=dtype), small_images(name)
    gradients = jax.jit(
        jax.grad(lambda params: jnp.sum(jnp.square(network.apply({'params': params}, images))))
    )(small_params(name))
    for leaf in jax.tree.leaves(gradients):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


def outputs_of(name, params, images, **options):
    """What each layer gives, before its activation."""
    network = small_network(name)
    _, variables = jax.jit(
        lambda params, images: network.apply(
            {'params': params}, images, capture_intermediates=True, **options
        )
    )(params, images)
    outputs = variables['intermediates']
    return {layer: outputs[layer]['__call__'][0] for layer in params}


@pytest.mark.parametrize(('before', 'behind'), [('conv3', 'conv4'), ('conv4', 'conv5')])
def test_a_group_sees_the_channels_of_its_own_group(before, behind):
    params, images = small_params('alexnet'), small_images('alexnet')
    changed = jax.tree.map(np.copy, params)
    changed[before]['bias'][20] += 10  # of 24, in the second group
    one, other = (outputs_of('alexnet', each, images)[behind] for each in (params, changed))
    half = one.shape[-1] // 2
    np.testing.assert_array_equal(one[..., :half], other[..., :half])
    assert (one[..., half:] != other[..., half:]).any((0, 1, 2)).all()


@pytest.mark.parametrize('name', LARGE)
@pytest.mark.parametrize('dropped', ['fc6', 'fc7', None])
def test_dropout_is_behind_the_first_two_products(name, dropped):
    """So near to a rate of one that nothing is left, the next layer gives its biases."""
    params, images = small_params(name), small_images(name)
    rates = {layer: jnp.float32(layer == dropped) * (1 - 1e-6) for layer in ('fc6', 'fc7')}
    options = {'dropout': rates, 'rngs': {'dropout': jax.random.key(0)}}
    found, whole = (outputs_of(name, params, images, **each) for each in (options, {}))
    before = True  # dropout
    for layer in params:
        if before:
            np.testing.assert_array_equal(found[layer], whole[layer])
        elif layer == {'fc6': 'fc7', 'fc7': 'fc8'}[dropped]:
            bias = np.broadcast_to(params[layer]['bias'], found[layer].shape)
            np.testing.assert_array_equal(found[layer], bias)
        before = before and layer != dropped


def test_dropout_goes_with_half_precision():
    params, images = small_params('alexnet'), small_images('alexnet')
    network = small_network('alexnet', dtype=jnp.bfloat16)
    rates = {layer: jnp.float32(0.5) for layer in ('fc6', 'fc7')}
    rngs = {'dropout': jax.random.key(0)}
    logits = logits_of(network, params, images, dropout=rates, rngs=rngs)
    assert logits.dtype == jnp.float32
    assert not np.array_equal(logits, logits_of(network, params, images))


@functools.cache
def initial(name, width):
    network = models.NETWORKS[name](width=width)
    images = jnp.zeros((1, 39, 39, 3))
    return jax.jit(network.init)(jax.random.key(0), images)['params']


ALEXNET_BIASES = {'conv2': 0.1, 'conv4': 0.1, 'conv5': 0.1, 'fc6': 0.1, 'fc7': 0.1}


def test_alexnet_starts_as_in_the_model_zoo():
    """Normal numbers of 0.01, 0.005 in fc6 and fc7; narrower layers above the first get larger."""
    width = 1 / 16
    for layer, leaves in initial('alexnet', width).items():
        spread = 0.005 if layer in ('fc6', 'fc7') else 0.01
        spread /= 1 if layer == 'conv1' else math.sqrt(width)
        kernel = np.asarray(leaves['kernel']) / spread
        # Of 2,178 weights, the fewest, 5 % are three times the error of these shares.
        assert kernel.std() == pytest.approx(1, abs=0.05)
        assert abs(kernel.mean()) < 0.07
        assert np.mean(np.abs(kernel) < 1) == pytest.approx(0.683, abs=0.03)
        np.testing.assert_array_equal(leaves['bias'], np.float32(ALEXNET_BIASES.get(layer, 0)))


def test_vgg_starts_as_xavier_has_it():
    for leaves in initial('vgg16', 1 / 16).values():
        kernel = np.asarray(leaves['kernel'])
        limit = np.sqrt(3 / np.prod(kernel.shape[:-1]))
        assert 0.95 * limit < np.abs(kernel).max() <= limit
        assert kernel.std() == pytest.approx(limit / np.sqrt(3), rel=0.1)
        np.testing.assert_array_equal(leaves['bias'], 0)


@pytest.mark.parametrize(
    ('name', 'width', 'units'),
    [
        ('alexnet', 0.5, [48, 128, 192, 192, 128, 2048, 2048, 1000]),
        ('alexnet', 0.1, [10, 26, 38, 38, 26, 410, 410, 1000]),
        ('alexnet', 1e-6, [2, 2, 2, 2, 2, 2, 2, 1000]),
        ('vgg16', 0.1, [6, 6, 13, 13, 26, 26, 26, 51, 51, 51, 51, 51, 51, 410, 410, 1000]),
    ],
)
def test_width_scales_all_layers_but_the_last(name, width, units):
    params, _ = shapes_of(models.NETWORKS[name](width=width), (64, 64, 3))
    assert [leaves['bias'].size for leaves in params.values()] == units


@pytest.mark.parametrize(
    ('name', 'image_shape', 'maps'),
    [
        ('alexnet', (39, 39, 3), 1),
        ('alexnet', (224, 224, 3), 36),
        ('alexnet', (39, 227, 1), 6),
        ('vgg16', (1, 1, 3), 1),
        ('vgg16', (225, 32, 3), 8),
    ],
)
def test_images_of_other_sizes(name, image_shape, maps):
    params, logits = shapes_of(small_network(name), image_shape)
    assert logits.shape == (7, 10)
    assert params['fc6']['kernel'].shape[0] == maps * 16


@pytest.mark.parametrize(
    ('name', 'image_shape', 'message'),
    [
        ('alexnet', (38, 227, 3), r'\(7, 38, 227, 3\) must be .* at least 39 pixels'),
        ('alexnet', (227, 38, 3), r'\(7, 227, 38, 3\) must be .* at least 39 pixels'),
        ('alexnet', (227, 227), r'\(7, 227, 227\) must be \(batch, height, width, channels\)'),
        ('vgg16', (0, 32, 3), r'\(7, 0, 32, 3\) must be .* at least 1 pixels'),
    ],
)
def test_images_that_are_too_small(name, image_shape, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(small_network(name), image_shape)


@pytest.mark.parametrize('name', LARGE)
@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'width': 0.0}, r'width=0\.0 must be above 0'),
        ({'width': math.nan}, 'width=nan must be above 0'),
        ({'classes': 0}, 'classes=0 at least 1'),
    ],
)
def test_networks_without_units(name, options, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(models.NETWORKS[name](**options), (64, 64, 3))
