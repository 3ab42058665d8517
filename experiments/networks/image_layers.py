"""The layers of Caffe's networks for colour images that flax.linen has not, or not as Caffe has.

Owns what each computes; which network uses them is no concern of theirs. All images are (batch,
height, width, channels).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

_NEIGHBOURS = 5  # channels, the own one in the middle
_ALPHA = 1e-4


def pool_as_caffe(images: jax.Array, size: int, stride: int) -> jax.Array:
    """Takes the maximum over windows, the last of which may reach over the lower or right border.

    The rows are pooled, then the columns, over strided slices: on CPU with their gradient this
    takes a tenth of the time of a windowed reduction. A gradient is shared where maxima are equal.

    Args:
      images: floating-point.
      size: of a side of the window, in pixels.
      stride: from one window to the next, in pixels, at most the size.

    Returns:
      An array of the same dtype. A side of n pixels becomes one of ⌈(n − size) / stride⌉ + 1.

    Reference:
      Caffe, `pooling_layer.cpp`.
    """
    for axis in (1, 2):
        length = images.shape[axis]
        windows = math.ceil((length - size) / stride) + 1
        beyond = (windows - 1) * stride + size - length
        padding = [(0, beyond if other == axis else 0) for other in range(images.ndim)]
        padded = jnp.pad(images, padding, constant_values=-jnp.inf) if beyond else images
        last = (windows - 1) * stride
        slices = [
            jax.lax.slice_in_dim(padded, start, start + last + 1, stride, axis)
            for start in range(size)
        ]
        images = functools.reduce(jnp.maximum, slices)
    return images


def normalize_across_channels(images: jax.Array) -> jax.Array:
    """Divides each activation by (1 + α / 5 · Σ a²)^0.75, over it and the two channels beside it.

    At the first and last channels the sum has fewer terms; it is divided by 5 all the same, and
    α = 1e-4, all as in Caffe's layer LRN. It is computed in float32.

    Reference:
      Krizhevsky, Sutskever and Hinton, ImageNet classification with deep convolutional neural
      networks, 2012, section 3.3; Caffe, `lrn_layer.cpp`.
    """
    # The fastest on CPU among shifted, cumulated and windowed sums and products with a band.
    sums = jax.lax.reduce_window(
        jnp.square(images.astype(jnp.float32)),
        0.0,
        jax.lax.add,
        (1, 1, 1, _NEIGHBOURS),
        (1, 1, 1, 1),
        'SAME',
    )
    root = jax.lax.rsqrt(1 + _ALPHA / _NEIGHBOURS * sums)
    # A power of −0.75 by roots: with `pow` the whole takes three times as long on CPU.
    factors = root * jnp.sqrt(root)
    return (images.astype(jnp.float32) * factors).astype(images.dtype)


def convolution_by_groups(
    images: jax.Array,
    kernel: jax.Array,
    *arguments: Any,
    feature_group_count: int = 1,
    **options: Any,
) -> jax.Array:
    """Convolves each group of channels with its part of the kernel, by a convolution of its own.

    Stands in for `jax.lax.conv_general_dilated` in `flax.linen.Conv` on CPU, where XLA takes 7 to
    15 times as long for one convolution with groups and its gradients.

    Args:
      images: the groups lie one after the other in the channels.
      kernel: (kernel height, kernel width, channels / groups, features), the groups one after the
        other in the features.
      *arguments: as for `jax.lax.conv_general_dilated`.
      feature_group_count: the number of groups.
      **options: as for `jax.lax.conv_general_dilated`.

    Returns:
      (batch, …, features).
    """
    groups = zip(
        jnp.split(images, feature_group_count, axis=-1),
        jnp.split(kernel, feature_group_count, axis=-1),
        strict=True,
    )
    parts = [jax.lax.conv_general_dilated(*group, *arguments, **options) for group in groups]
    return jnp.concatenate(parts, axis=-1)
