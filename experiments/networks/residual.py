"""The residual networks for small colour images, in flax.linen.

Owns their layers and sizes; what is pruned in them is no concern of theirs.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_STAGES = (16, 32, 64)  # features of each; every one but the first halves the sides of the image

_HE = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')


class ResNet(nn.Module):
    """The residual network for CIFAR-10, with 6n + 2 layers: ResNet-20 has 269,722 parameters.

    Each of its blocks has two convolutions under BatchNorm, without biases, and a shortcut without
    parameters (option A). A width other than 1 scales the features of every layer but the last,
    rounded.

    Running statistics are in the collection `batch_stats`. With momentum 0 they are those of the
    last batch alone: `network.clone(momentum=0.0)` reads them.

    On CPU no step of training belongs inside `jax.lax.scan`: there XLA's convolutions make it take
    more than ten times as long.

    Reference:
      He, Zhang, Ren and Sun, Deep residual learning for image recognition, 2015, section 4.2.
    """

    depth: int = 20  # layers with a kernel
    classes: int = 10
    width: float = 1.0
    dtype: Any = jnp.float32  # to compute in; parameters, statistics and logits are float32
    momentum: float = 0.9  # what the running statistics keep of themselves at a step

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, 3), 32 pixels a side or any number, to logits.

        Args:
          images: floating-point.
          train: normalises by the statistics of the batch, which must then be mutable; else by the
            running ones.

        Returns:
          (batch, classes) float32.

        Raises:
          ValueError: if the depth is no 6n + 2, the network has no width or classes, or the images
            have no pixels.
        """
        self._check(images)
        options = {'dtype': self.dtype, 'momentum': self.momentum}
        first, *_ = features = [max(1, round(each * self.width)) for each in _STAGES]
        hidden = _convolution('conv1', first, 1, self.dtype)(images)
        hidden = nn.relu(_norm('norm1', train, **options)(hidden))
        for stage, channels in enumerate(features, start=1):
            for block in range(1, (self.depth - 2) // 6 + 1):
                stride = 2 if stage > 1 and block == 1 else 1
                name = f'block{stage}_{block}'
                hidden = _Block(channels, stride, **options, name=name)(hidden, train)
        head = nn.Dense(self.classes, kernel_init=_HE, dtype=self.dtype, name='head')
        return head(hidden.mean((1, 2))).astype(jnp.float32)

    def _check(self, images: jax.Array) -> None:
        if self.depth < 8 or self.depth % 6 != 2:
            raise ValueError(f'depth={self.depth} must be 6n + 2 with n of at least 1')
        if not self.width > 0 or self.classes < 1:
            raise ValueError(
                f'width={self.width} must be above 0 and classes={self.classes} at least 1'
            )
        if images.ndim != 4 or min(images.shape[1:3]) < 1:
            raise ValueError(
                f'images of shape {images.shape} must be (batch, height, width, channels) with a '
                f'height and width of at least 1 pixel'
            )


class _Block(nn.Module):
    features: int
    stride: int
    dtype: Any
    momentum: float

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        options = {'dtype': self.dtype, 'momentum': self.momentum}
        hidden = _convolution('conv1', self.features, self.stride, self.dtype)(images)
        hidden = nn.relu(_norm('norm1', train, **options)(hidden))
        hidden = _convolution('conv2', self.features, 1, self.dtype)(hidden)
        hidden = _norm('norm2', train, **options)(hidden)
        return nn.relu(hidden + shortcut(images, self.features, self.stride))


def shortcut(images: jax.Array, features: int, stride: int) -> jax.Array:
    """Passes images by a block: option A of the paper, which has no parameters.

    Args:
      images: (batch, height, width, channels).
      features: at least as many as channels; those beyond are zero.
      stride: only each such row and column is kept, from the first.

    Returns:
      (batch, ⌈height / stride⌉, ⌈width / stride⌉, features).
    """
    beyond = features - images.shape[-1]
    return jnp.pad(images[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, beyond)))


def _convolution(name: str, features: int, stride: int, dtype: Any) -> nn.Conv:
    # One pixel around the image, as in the paper: kernels are centred where the shortcut reads,
    # which 'SAME' would not do under a stride.
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=1,
        use_bias=False,
        kernel_init=_HE,
        dtype=dtype,
        name=name,
    )


def _norm(name: str, train: bool, dtype: Any, momentum: float) -> nn.BatchNorm:
    return nn.BatchNorm(not train, momentum=momentum, dtype=dtype, name=name)
