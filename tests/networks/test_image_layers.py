"""Tests of networks.image_layers against Caffe's definitions in NumPy and against XLA's."""

import caffe_layers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.networks.image_layers import (
    convolution_by_groups,
    normalize_across_channels,
    pool_as_caffe,
)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def of_each(layer, images, *arguments):
    """A layer of Caffe's on a batch in our layout."""
    found = [layer(image.transpose(2, 0, 1), *arguments) for image in np.asarray(images)]
    return np.stack(found).transpose(0, 2, 3, 1)


@st.composite
def poolings(draw):
    size = draw(st.integers(1, 4))
    stride = draw(st.integers(1, size))
    # Sides below the size down to those that leave one window, clipped.
    lengths = st.integers(max(1, size - stride + 1), 12)
    return size, stride, draw(lengths), draw(lengths)


@settings(max_examples=25)  # each is compiled
@given(poolings())
def test_pooling_is_that_of_caffe(pooling):
    size, stride, height, width = pooling
    images = random(2, height, width, 3) - 5  # below zero: what lies beyond the border is no zero
    found = jax.jit(pool_as_caffe, static_argnums=(1, 2))(images, size, stride)
    np.testing.assert_array_equal(found, of_each(caffe_layers.pool, images, size, stride))


@pytest.mark.parametrize(('height', 'width'), [(9, 7), (5, 11)])
def test_the_gradient_of_pooling_is_that_of_flax(height, width):
    """Where all windows lie within the image and maxima are single, as of random numbers."""
    images = random(2, height, width, 3)

    def gradient(pool):
        return jax.grad(lambda images: jnp.sum(pool(images) ** 2))(images)

    wanted = gradient(lambda images: nn.max_pool(images, (3, 3), (2, 2)))
    np.testing.assert_array_equal(gradient(lambda images: pool_as_caffe(images, 3, 2)), wanted)


def test_the_gradient_of_a_clipped_window_goes_to_its_maximum():
    images = jnp.asarray(np.arange(16.0, dtype=np.float32).reshape(1, 4, 4, 1))
    gradient = jax.grad(lambda images: jnp.sum(pool_as_caffe(images, 3, 2)))(images)
    # Of rows and columns 0 to 2 and 2 to 3: the last of each.
    np.testing.assert_array_equal(
        gradient[0, :, :, 0], [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    )


@pytest.mark.parametrize('channels', [1, 2, 4, 5, 6, 16])
def test_normalisation_is_that_of_caffe(channels):
    images = 200 * random(2, 3, 4, channels)  # large enough that the sum counts
    found = normalize_across_channels(jnp.asarray(images))
    wanted = of_each(caffe_layers.normalize, images)
    assert np.abs(wanted / images).min() < 0.8
    np.testing.assert_allclose(found, wanted, rtol=2e-6)


def test_the_gradient_of_normalisation_is_that_of_its_formula():
    images, direction = 200 * random(1, 2, 2, 7), random(1, 2, 2, 7, seed=1)
    cotangent = random(1, 2, 2, 7, seed=2)
    gradient = jax.jit(
        jax.grad(lambda images: jnp.sum(cotangent * normalize_across_channels(images)))
    )(images)
    near, far = (
        of_each(caffe_layers.normalize, images.astype(float) + step * direction)
        for step in (-1e-3, 1e-3)
    )
    wanted = (cotangent * (far - near) / 2e-3).sum()
    assert np.sum(gradient * direction) == pytest.approx(wanted, rel=1e-4)


def test_normalisation_of_half_precision_is_computed_in_whole():
    images = jnp.asarray(200 * random(1, 2, 2, 7), jnp.bfloat16)
    found = normalize_across_channels(images)
    wanted = normalize_across_channels(images.astype(jnp.float32)).astype(jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize('groups', [1, 2, 3])
@pytest.mark.parametrize(('stride', 'pad'), [(1, 2), (2, 0)])
def test_convolution_by_groups_is_that_of_xla_and_of_caffe(groups, stride, pad):
    images, kernel = random(2, 7, 8, 6), random(3, 3, 6 // groups, 12, seed=1)
    cotangent = None

    def convolve(function, images, kernel):
        padding = ((pad, pad), (pad, pad))
        options = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC'), 'feature_group_count': groups}
        return function(images, kernel, (stride, stride), padding, **options)

    results = []
    for function in (jax.lax.conv_general_dilated, convolution_by_groups):
        value, pull_back = jax.vjp(
            lambda *arguments, function=function: convolve(function, *arguments), images, kernel
        )
        cotangent = random(*value.shape, seed=2) if cotangent is None else cotangent
        results.append((value, *pull_back(cotangent)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)

    blobs = kernel.transpose(3, 2, 0, 1), np.zeros(12)
    wanted = of_each(caffe_layers.convolve, images, *blobs, stride, pad, groups)
    np.testing.assert_allclose(results[1][0], wanted, rtol=1e-4, atol=1e-4)
