"""Tests of baselines.mixed_filters: what the filters compute and how they start, against NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dns_jax
from experiments.baselines.mixed_filters import MixedFilters
from experiments.networks.models import convolution_by_products

# Height, width and number of each group's filters, under windows of 3 × 5.
GROUPS = {'horizontal': (1, 5, 24), 'vertical': (3, 1, 40), 'full': (3, 5, 16)}
OUTGOING = 1 * 5 * 24 + 3 * 1 * 40 + 3 * 5 * 16  # from each input: Σ w h d
CHANNELS = 32


def random(shape, seed=0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def many(features=None):
    return MixedFilters(24, 40, 16, (3, 5), features)


def start(layer, shape, seed=0) -> Any:
    return layer.init(jax.random.key(seed), jnp.zeros(shape))['params']


def output_of(layer, params, images) -> Any:
    return layer.apply({'params': params}, images)


def correlate(images, leaves, window, padding):
    """One output after the other: a filter sees the middle of the window that all share."""
    images, kernel = np.asarray(images, np.float64), leaves['kernel']
    if padding == 'SAME':
        edges = [((size - 1) // 2, size // 2) for size in window]
        images = np.pad(images, [(0, 0), *edges, (0, 0)])
    height, width, _, features = kernel.shape
    top, left = (window[0] - height) // 2, (window[1] - width) // 2
    rows, columns = images.shape[1] - window[0] + 1, images.shape[2] - window[1] + 1
    found = np.zeros((len(images), rows, columns, features))
    for row, column in np.ndindex(rows, columns):
        seen = images[:, row + top : row + top + height, column + left : column + left + width]
        found[:, row, column] = np.einsum('bhwc,hwcn->bn', seen, kernel)
    return found + leaves.get('bias', 0)


@pytest.mark.parametrize('padding', ['SAME', 'VALID'])
@pytest.mark.parametrize(
    ('numbers', 'window', 'features'),
    [((2, 3, 1), (3, 5), None), ((2, 0, 0), (5, 3), 3), ((0, 1, 2), (4, 2), 3)],
)
def test_filters_lie_side_by_side(numbers, window, features, padding):
    horizontal, vertical, full = numbers
    layer = MixedFilters(horizontal, vertical, full, window, features, padding)
    images = random((2, 6, 7, 4))
    shapes = jax.eval_shape(layer.init, jax.random.key(0), images)['params']
    params = {
        name: {part: random(leaf.shape, 1) for part, leaf in leaves.items()}
        for name, leaves in shapes.items()
    }
    names = [name for name, number in zip(GROUPS, numbers, strict=True) if number]
    assert params.keys() == {*names, *(['mixing'] if features else [])}
    groups = [correlate(images, params[name], window, padding) for name in names]
    expected = np.concatenate(groups, axis=-1)
    if features:
        expected = correlate(expected, params['mixing'], (1, 1), 'VALID')
    np.testing.assert_allclose(output_of(layer, params, images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('padding', ['SAME', 'VALID'])
def test_whole_filters_alone_are_a_convolution(padding):
    layer = MixedFilters(0, 0, 6, (5, 4), padding=padding)
    images = random((2, 9, 8, 3))
    params = start(layer, images.shape)
    expected = jax.lax.conv_general_dilated(
        images,
        params['full']['kernel'],
        (1, 1),
        padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    np.testing.assert_allclose(output_of(layer, params, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('padding', ['SAME', 'VALID'])
def test_filters_may_be_computed_as_in_lenet5(padding):
    asked = []

    def convolve(images, kernel, *arguments, **options):
        asked.append(kernel.shape)
        return convolution_by_products(images, kernel, *arguments, **options)

    images = random((2, 8, 8, 3))
    params = start(MixedFilters(2, 3, 1, (3, 5), 4, padding), images.shape)
    expected = output_of(MixedFilters(2, 3, 1, (3, 5), 4, padding), params, images)
    found = output_of(MixedFilters(2, 3, 1, (3, 5), 4, padding, convolve), params, images)
    assert asked == [(1, 5, 3, 2), (3, 1, 3, 3), (3, 5, 3, 1), (1, 1, 6, 4)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_parameters_are_as_many_as_filters_have():
    for features, others in ((None, 24 + 40 + 16), (10, (24 + 40 + 16) * 10 + 10)):
        images = jnp.zeros((1, 8, 8, CHANNELS))
        params = jax.eval_shape(many(features).init, jax.random.key(0), images)['params']
        # Biases below the 1×1 convolution would add nothing.
        sizes = sum(leaf.size for leaf in jax.tree.leaves(params))
        assert sizes == CHANNELS * OUTGOING + others


def gradient_variance(layer, params):
    """Of an input pixel, for gradients of variance 1 behind a ReLU; away from the border."""
    images = random((8, 16, 16, CHANNELS))
    function = lambda images: jax.nn.relu(output_of(layer, params, images))  # noqa: E731
    outputs, backward = jax.vjp(function, images)
    (gradients,) = backward(jnp.asarray(random(outputs.shape, 1)))
    return float(jnp.var(gradients[:, 4:-4, 4:-4]))


def start_by_groups(params, axis):
    """As He et al. have it for each group by itself, with incoming or outgoing connections."""
    return {
        name: {
            'kernel': random(leaves['kernel'].shape, 3)
            * np.float32(np.sqrt(2 / np.delete(leaves['kernel'].shape, axis).prod())),
            'bias': leaves['bias'],
        }
        for name, leaves in params.items()
    }


@pytest.mark.parametrize('features', [None, 30])
def test_gradients_keep_their_size(features):
    layer = many(features)
    params = start(layer, (1, 16, 16, CHANNELS))
    assert 0.85 < gradient_variance(layer, params) < 1.15


def test_each_group_by_itself_would_change_the_size_of_gradients():
    layer = many()
    params = start(layer, (1, 16, 16, CHANNELS))
    assert gradient_variance(layer, start_by_groups(params, axis=2)) > 2.5  # three groups
    assert gradient_variance(layer, start_by_groups(params, axis=3)) > 2


def test_outputs_have_the_variance_of_their_filters():
    """What follows for random normal images: more, the larger the filter."""
    images = random((8, 16, 16, CHANNELS))
    outputs = output_of(many(), start(many(), images.shape), images)
    groups = jnp.split(outputs[:, 4:-4, 4:-4], [24, 24 + 40], axis=-1)
    for (height, width, _), group in zip(GROUPS.values(), groups, strict=True):
        expected = 2 * height * width * CHANNELS / OUTGOING
        np.testing.assert_allclose(jnp.var(group), expected, rtol=0.15)


def test_weights_start_normal_with_one_spread():
    params = start(many(), (1, 16, 16, 4 * CHANNELS))
    for leaves in params.values():
        weights = np.asarray(leaves['kernel']).ravel() * np.sqrt(OUTGOING / 2)
        np.testing.assert_allclose(np.std(weights), 1, rtol=0.03)
        assert 2.5 < np.mean(weights**4) < 3.5  # 3 for a normal distribution, 2.3 where truncated
        assert abs(np.mean(weights)) < 0.05
        assert not leaves['bias'].any()


def test_all_groups_take_part_in_surgery():
    params = start(MixedFilters(3, 3, 2, (3, 3), 4), (4, 6, 6, 2))
    masks = dns_jax.get_masks(dns_jax.prune_to(density=0.5, steps=3).init(params))
    parts = {name for name, leaves in masks.items() if leaves['kernel'].ndim}
    assert parts == {*GROUPS, 'mixing'}


@pytest.mark.parametrize(
    ('layer', 'message'),
    [
        (MixedFilters(-1, 2, 0, (3, 3)), 'horizontal must be .*0 or more, but is -1'),
        (MixedFilters(1, 2, -3, (3, 3)), 'full must be .*0 or more, but is -3'),
        (MixedFilters(0, 0, 0, (3, 3)), 'filters .*at least one'),
        (MixedFilters(1, 1, 0, (0, 3)), r'kernel_size .*but is \(0, 3\)'),
        (MixedFilters(1, 1, 0, (3, 3), 0), 'features .*but is 0'),
        (MixedFilters(1, 1, 0, (3, 3), None, 'CIRCULAR'), "padding .*but is 'CIRCULAR'"),
        (MixedFilters(1, 1, 0, (7, 3), None, 'VALID'), r'images .*7 × 3 .*\(1, 6, 6, 2\)'),
    ],
)
def test_errors(layer, message):
    with pytest.raises(ValueError, match=message):
        start(layer, (1, 6, 6, 2))


def test_one_image_is_no_batch():
    with pytest.raises(ValueError, match=r'images .*\(batch, .*\(6, 6, 2\)'):
        start(MixedFilters(1, 1, 0, (3, 3)), (6, 6, 2))
