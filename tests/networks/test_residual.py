"""Tests of networks.residual: its sizes as the paper has them, and what it computes in NumPy."""

import functools
import math

import caffe_layers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dns_jax
from dns_jax.layers import named_leaves
from experiments.networks import models
from experiments.networks.residual import ResNet, shortcut

IMAGE_SHAPE = (32, 32, 3)
TINY = ResNet(8, classes=5, width=1 / 8)  # 2, 4 and 8 features
ODD = (9, 6, 3)  # becomes 5×3 and 3×2


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_the_table(blocks):
    """Parameters by the paper's table: 2n layers a stage, 16, 32 and 64 filters of 3×3."""
    pairs = [(3, 16), (16, 32), (32, 64)]
    # The first layer of all is in no block, hence one more of its stage.
    pairs += [(16, 16)] * (2 * blocks) + [(32, 32), (64, 64)] * (2 * blocks - 1)
    # A filter has a scale and a bias of its norm; the last layer tells ten classes apart.
    return sum(9 * before * after + 2 * after for before, after in pairs) + 64 * 10 + 10


@pytest.mark.parametrize(
    ('depth', 'parameters'), [(8, 75_290), (20, 269_722), (56, 853_018), (110, 1_727_962)]
)
def test_parameters_are_those_of_the_paper(depth, parameters):
    params = models.shapes(ResNet(depth), IMAGE_SHAPE)
    assert by_the_table((depth - 2) // 6) == parameters
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    kernels = [leaf for path, leaf in named_leaves(params) if dns_jax.is_kernel(path, leaf)]
    assert len(kernels) == depth


def test_the_leaves_and_what_they_are():
    network, images = ResNet(8), jax.ShapeDtypeStruct((1, *IMAGE_SHAPE), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    features = {
        **{'conv1': (3, 16), 'block1_1/conv1': (16, 16), 'block1_1/conv2': (16, 16)},
        **{'block2_1/conv1': (16, 32), 'block2_1/conv2': (32, 32)},
        **{'block3_1/conv1': (32, 64), 'block3_1/conv2': (64, 64)},
    }
    kernels = {f'{layer}/kernel': (3, 3, *pair) for layer, pair in features.items()}
    norms = {layer.replace('conv', 'norm'): pair[1:] for layer, pair in features.items()}
    others = {f'{norm}/{leaf}': s for norm, s in norms.items() for leaf in ('scale', 'bias')}
    found = dict(named_leaves(variables['params']))
    assert {path: leaf.shape for path, leaf in found.items()} == {
        **kernels,
        **others,
        **{'head/kernel': (64, 10), 'head/bias': (10,)},
    }
    pruned = {path for path, leaf in found.items() if dns_jax.is_kernel(path, leaf)}
    assert pruned == {*kernels, 'head/kernel'}
    statistics = dict(named_leaves(variables['batch_stats']))
    assert {path: leaf.shape for path, leaf in statistics.items()} == {
        f'{norm}/{leaf}': shape for norm, shape in norms.items() for leaf in ('mean', 'var')
    }
    assert {dns_jax.role(*each) for each in statistics.items()} == {'statistic'}


def test_positions_are_those_of_the_convolutions():
    """Of which a norm is none."""
    assert models.count_positions(ResNet(8), IMAGE_SHAPE) == {
        **dict.fromkeys(('conv1', 'block1_1/conv1', 'block1_1/conv2'), 32 * 32),
        **dict.fromkeys(('block2_1/conv1', 'block2_1/conv2'), 16 * 16),
        **dict.fromkeys(('block3_1/conv1', 'block3_1/conv2'), 8 * 8),
    }


def test_kernels_start_as_he_has_them_and_norms_do_nothing():
    images = jnp.zeros((1, 8, 8, 3))
    variables = jax.jit(ResNet(8).init)(jax.random.key(0), images)
    for path, leaf in named_leaves(variables['params']):
        if dns_jax.is_kernel(path, leaf):
            kernel = np.asarray(leaf) / math.sqrt(2 / math.prod(leaf.shape[:-1]))
            # Of 432 weights, the fewest, 10 % are three times the error of the spread.
            assert kernel.std() == pytest.approx(1, abs=0.1)
            assert np.abs(kernel).max() > 2.5  # not cut off
        else:
            np.testing.assert_array_equal(leaf, float(path.endswith('scale')))


@functools.cache
def variables():
    """Numbers for all leaves of the tiny network, none of which is as it starts."""
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), jnp.zeros((1, *ODD)))
    numbers = {
        path: random(leaf.shape, seed) * 0.3
        for seed, (path, leaf) in enumerate(named_leaves(shapes))
    }
    numbers = {
        path: np.abs(leaf) + np.float32(0.5) if path.endswith(('var', 'scale')) else leaf
        for path, leaf in numbers.items()
    }
    return jax.tree.unflatten(jax.tree.structure(shapes), list(numbers.values()))


class InNumpy:
    """The tiny network in float64; the statistics of batches are gathered."""

    def __init__(self, params, running, train):
        self.params, self.running, self.train = params, running, train
        self.statistics = {}

    def convolve(self, layer, images, stride):
        weight = self.params[f'{layer}/kernel'].transpose(3, 2, 0, 1)
        bias = np.zeros(len(weight))
        found = [
            caffe_layers.convolve(image.transpose(2, 0, 1), weight, bias, stride, pad=1)
            for image in images
        ]
        return np.stack(found).transpose(0, 2, 3, 1)

    def normalise(self, layer, images):
        mean, variance = images.mean((0, 1, 2)), images.var((0, 1, 2))
        self.statistics |= {f'{layer}/mean': mean, f'{layer}/var': variance}
        if not self.train:
            mean, variance = self.running[f'{layer}/mean'], self.running[f'{layer}/var']
        scale, bias = self.params[f'{layer}/scale'], self.params[f'{layer}/bias']
        return (images - mean) / np.sqrt(variance + 1e-5) * scale + bias

    def __call__(self, images):
        hidden = np.maximum(self.normalise('norm1', self.convolve('conv1', images, 1)), 0)
        for block, stride in (('block1_1', 1), ('block2_1', 2), ('block3_1', 2)):
            inside = self.convolve(f'{block}/conv1', hidden, stride)
            inside = np.maximum(self.normalise(f'{block}/norm1', inside), 0)
            inside = self.normalise(f'{block}/norm2', self.convolve(f'{block}/conv2', inside, 1))
            passed = np.zeros_like(inside)
            passed[..., : hidden.shape[-1]] = hidden[:, ::stride, ::stride]
            hidden = np.maximum(inside + passed, 0)
        return hidden.mean((1, 2)) @ self.params['head/kernel'] + self.params['head/bias']


def in_numpy(images, train):
    """Logits, and the statistics of the batch."""
    leaves = [
        {path: leaf.astype(float) for path, leaf in named_leaves(variables()[collection])}
        for collection in ('params', 'batch_stats')
    ]
    network = InNumpy(*leaves, train)
    return network(images.astype(float)), network.statistics


@functools.partial(jax.jit, static_argnames=('network', 'train'))
def apply(network, images, train):
    return network.apply(variables(), images, train, mutable=['batch_stats'] if train else False)


def test_training_normalises_by_the_batch_and_keeps_its_statistics():
    images = random((3, *ODD), 100)
    logits, kept = apply(TINY, images, train=True)
    wanted, statistics = in_numpy(images, train=True)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)
    running = dict(named_leaves(variables()['batch_stats']))
    found = dict(named_leaves(kept['batch_stats']))
    assert found.keys() == statistics.keys()
    for path, value in statistics.items():
        moved = 0.9 * running[path] + 0.1 * value
        np.testing.assert_allclose(found[path], moved, rtol=1e-4, atol=1e-5)


def test_without_momentum_the_statistics_are_those_of_the_batch():
    images = random((3, *ODD), 101)
    _, kept = apply(TINY.clone(momentum=0.0), images, train=True)
    _, statistics = in_numpy(images, train=True)
    for path, value in named_leaves(kept['batch_stats']):
        np.testing.assert_allclose(value, statistics[path], rtol=1e-4, atol=1e-5)


def test_evaluation_normalises_by_the_running_statistics():
    images = random((3, *ODD), 102)
    logits = apply(TINY, images, train=False)
    wanted, _ = in_numpy(images, train=False)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


def test_half_precision_is_within_its_rounding_and_logits_are_whole():
    images = random((3, *ODD), 103)
    with jax.numpy_dtype_promotion('standard'):  # which Flax takes for granted
        logits = apply(TINY.clone(dtype=jnp.bfloat16), images, train=False)
    whole = apply(TINY, images, train=False)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, whole, atol=0.05 * np.abs(whole).max())
    assert not np.array_equal(logits, whole)


def test_every_layer_computes_in_half_precision():
    network, images = TINY.clone(dtype=jnp.bfloat16), jnp.zeros((1, *ODD))
    with jax.numpy_dtype_promotion('standard'):
        _, found = jax.eval_shape(
            lambda images: network.apply(variables(), images, capture_intermediates=True), images
        )
    outputs = dict(named_leaves(found['intermediates']))
    assert outputs.pop('__call__/0').dtype == jnp.float32
    # Seven convolutions, as many norms, three blocks, and the head.
    assert [output.dtype for output in outputs.values()] == [jnp.bfloat16] * 18


def test_a_shortcut_keeps_every_other_pixel_and_adds_channels_of_zeros():
    images = jnp.arange(1.0, 19.0).reshape(1, 3, 3, 2)
    passed = [[[1, 2, 0], [5, 6, 0]], [[13, 14, 0], [17, 18, 0]]]
    np.testing.assert_array_equal(shortcut(images, 3, 2), [passed])
    np.testing.assert_array_equal(shortcut(images, 2, 1), images)


@pytest.mark.parametrize(
    ('width', 'features'), [(0.5, {8, 16, 32}), (0.1, {2, 3, 6}), (2, {32, 64, 128}), (1e-6, {1})]
)
def test_width_scales_all_layers_but_the_last(width, features):
    params = models.shapes(ResNet(8, width=width), IMAGE_SHAPE)
    found = {leaf.size for path, leaf in named_leaves(params) if path.endswith('scale')}
    assert found == features
    assert params['head']['kernel'].shape == (max(features), 10)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'depth': 18}, r'depth=18 must be 6n \+ 2'),
        ({'depth': 2}, r'depth=2 must be 6n \+ 2 with n of at least 1'),
        ({'depth': -4}, 'depth=-4 must be'),
        ({'width': 0.0}, r'width=0\.0 must be above 0'),
        ({'width': math.nan}, 'width=nan must be above 0'),
        ({'classes': 0}, 'classes=0 at least 1'),
    ],
)
def test_networks_that_there_are_not(options, message):
    with pytest.raises(ValueError, match=message):
        models.shapes(ResNet(**options), IMAGE_SHAPE)


@pytest.mark.parametrize('shape', [(32, 32), (0, 32, 3), (32, 0, 3)])
def test_images_without_pixels(shape):
    with pytest.raises(ValueError, match=r'images of shape .* must be \(batch, height, width'):
        models.shapes(ResNet(8), shape)
