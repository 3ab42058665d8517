"""The networks, in flax.linen, initialised as Caffe does.

Owns their layers and sizes; what is pruned in them is no concern of theirs.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from dns_jax.inference.chain import Convolution, Dense, Flatten, MaxPool, Relu, max_pool
from dns_jax.layers import is_kernel, named_leaves, parent_path
from experiments.baselines.low_rank_layers import LowRankConv, LowRankDense
from experiments.networks.image_layers import (
    convolution_by_groups,
    normalize_across_channels,
    pool_as_caffe,
)
from experiments.networks.inputs import Input, Tokens
from experiments.networks.language import STACKED as BLOCKS
from experiments.networks.language import Gpt
from experiments.networks.residual import ResNet

# Caffe's filler `xavier` is uniform in ±√(3 / fan-in).
_XAVIER = nn.initializers.variance_scaling(1.0, 'fan_in', 'uniform')

# Convolutions, and features of each.
_VGG_BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))

_FEWEST_COLUMNS = 32  # of a matrix; the first convolution of LeNet-5 has 5 in a row of its kernel


DropoutRates = Mapping[str, jax.Array]
"""The rate of dropout behind each fully connected layer; it takes random bits named `dropout`."""


Ranks = Mapping[str, int | None]
"""Of layers by name, hashable; those without one, or with None, are whole."""


class LeNet300(nn.Module):
    """LeNet-300-100: 784 pixels, two hidden layers, 266,610 parameters."""

    ranks: Ranks = FrozenDict()

    @nn.compact
    def __call__(self, images: jax.Array, dropout: DropoutRates | None = None) -> jax.Array:
        """Maps images (batch, 28, 28, 1) to logits (batch, 10)."""
        _check_ranks(self.ranks, 'fc1', 'fc2', 'fc3')
        hidden = images.reshape(images.shape[0], -1)
        hidden = nn.relu(_dense(300, 'fc1', self.ranks)(hidden))
        hidden = drop_out(self, hidden, dropout, 'fc1')
        hidden = nn.relu(_dense(100, 'fc2', self.ranks)(hidden))
        hidden = drop_out(self, hidden, dropout, 'fc2')
        return _dense(10, 'fc3', self.ranks)(hidden)


class LeNet5(nn.Module):
    """LeNet-5 as in Caffe, without activation after the convolutions: 431,080 parameters."""

    ranks: Ranks = FrozenDict()

    @nn.compact
    def __call__(self, images: jax.Array, dropout: DropoutRates | None = None) -> jax.Array:
        """Maps images (batch, 28, 28, 1) to logits (batch, 10)."""
        _check_ranks(self.ranks, 'conv1', 'conv2', 'fc1', 'fc2')
        hidden = max_pool(_convolution(20, 'conv1', self.ranks)(images), 2, axis=1)
        hidden = max_pool(_convolution(50, 'conv2', self.ranks)(hidden), 2, axis=1)
        hidden = hidden.reshape(hidden.shape[0], -1)
        hidden = nn.relu(_dense(500, 'fc1', self.ranks)(hidden))
        hidden = drop_out(self, hidden, dropout, 'fc1')
        return _dense(10, 'fc2', self.ranks)(hidden)


class AlexNet(nn.Module):
    """BVLC AlexNet of Caffe's model zoo, initialised as there: 60,965,224 parameters.

    A width other than 1 scales the number of units of every layer but the last, rounded to an even
    number for the two groups. The spread of a kernel above such a layer is divided by √width, so
    that activations keep their size.
    """

    classes: int = 1_000
    width: float = 1.0
    dtype: Any = jnp.float32  # to compute in; parameters and logits are float32

    @nn.compact
    def __call__(self, images: jax.Array, dropout: DropoutRates | None = None) -> jax.Array:
        """Maps images (batch, height, width, 3), 227 pixels a side or 39 and more, to logits.

        Args:
          images: from 0 to 255 less the mean of `INPUTS`, floating-point.
          dropout: the rates behind `fc6` and `fc7`.

        Returns:
          (batch, classes) float32.

        Raises:
          ValueError: if the images are too small, or the network has no width or classes.
        """
        _check(self, images, 39)
        hidden = nn.relu(
            self._convolution('conv1', 96, 11, 0.0, padding='VALID', strides=4)(images)
        )
        hidden = pool_as_caffe(normalize_across_channels(hidden), 3, 2)
        hidden = nn.relu(self._convolution('conv2', 256, 5, 0.1, groups=2)(hidden))
        hidden = pool_as_caffe(normalize_across_channels(hidden), 3, 2)
        hidden = nn.relu(self._convolution('conv3', 384, 3, 0.0)(hidden))
        hidden = nn.relu(self._convolution('conv4', 384, 3, 0.1, groups=2)(hidden))
        hidden = nn.relu(self._convolution('conv5', 256, 3, 0.1, groups=2)(hidden))
        hidden = pool_as_caffe(hidden, 3, 2)
        hidden = hidden.reshape(hidden.shape[0], -1)
        units = _scaled(4_096, self.width, 2)
        for name in ('fc6', 'fc7'):
            hidden = nn.relu(self._dense(name, units, 0.005, 0.1)(hidden))
            hidden = drop_out(self, hidden, dropout, name)
        return self._dense('fc8', self.classes, 0.01, 0.0)(hidden).astype(jnp.float32)

    def _convolution(
        self, name: str, features: int, size: int, bias: float, groups: int = 1, **options: Any
    ) -> nn.Conv:
        slow_with_groups = groups > 1 and jax.default_backend() == 'cpu'
        return nn.Conv(
            _scaled(features, self.width, 2),
            (size, size),
            feature_group_count=groups,
            # The first layer sees as many colours at any width.
            kernel_init=self._gaussian(0.01, 1.0 if name == 'conv1' else self.width),
            bias_init=nn.initializers.constant(bias),
            dtype=self.dtype,
            name=name,
            conv_general_dilated=convolution_by_groups if slow_with_groups else None,
            **options,
        )

    def _dense(self, name: str, units: int, spread: float, bias: float) -> nn.Dense:
        return nn.Dense(
            units,
            kernel_init=self._gaussian(spread, self.width),
            bias_init=nn.initializers.constant(bias),
            dtype=self.dtype,
            name=name,
        )

    def _gaussian(self, spread: float, width: float) -> nn.initializers.Initializer:
        return nn.initializers.normal(spread / math.sqrt(width))


class VGG16(nn.Module):
    """VGG-16, configuration D: 138,357,544 parameters.

    A width other than 1 scales the number of units of every layer but the last, rounded.
    """

    classes: int = 1_000
    width: float = 1.0
    dtype: Any = jnp.float32  # to compute in; parameters and logits are float32

    @nn.compact
    def __call__(self, images: jax.Array, dropout: DropoutRates | None = None) -> jax.Array:
        """Maps images (batch, height, width, 3), 224 pixels a side or any number, to logits.

        All else is as of `AlexNet`.

        Raises:
          ValueError: if the images have no pixels, or the network has no width or classes.
        """
        _check(self, images, 1)
        options = {'kernel_init': _XAVIER, 'dtype': self.dtype}
        hidden = images
        for block, (layers, features) in enumerate(_VGG_BLOCKS, start=1):
            for layer in range(1, layers + 1):
                name = f'conv{block}_{layer}'
                features_ = _scaled(features, self.width)
                hidden = nn.relu(nn.Conv(features_, (3, 3), name=name, **options)(hidden))
            hidden = pool_as_caffe(hidden, 2, 2)
        hidden = hidden.reshape(hidden.shape[0], -1)
        units = _scaled(4_096, self.width)
        for name in ('fc6', 'fc7'):
            hidden = nn.relu(nn.Dense(units, name=name, **options)(hidden))
            hidden = drop_out(self, hidden, dropout, name)
        return nn.Dense(self.classes, name='fc8', **options)(hidden).astype(jnp.float32)


NETWORKS = {
    **{'lenet300': LeNet300, 'lenet5': LeNet5, 'alexnet': AlexNet, 'vgg16': VGG16},
    **{'resnet': ResNet, 'gpt': Gpt},
}
# Nodes that hold many layers in one array, as the library's `stacked` has them.
STACKED = {'gpt': BLOCKS}
# XLA runs their convolutions many times slower inside a loop on CPU.
_SLOW_IN_LOOPS = {'resnet'}

MNIST_INPUT = Input((0.0,), 1 / 256, 28)
INPUTS = {
    'lenet300': MNIST_INPUT,
    'lenet5': MNIST_INPUT,
    'alexnet': Input((122.679, 116.669, 104.007), 1.0, 227),
    'vgg16': Input((123.68, 116.779, 103.939), 1.0, 224),
    'resnet': Input((125.3, 123.0, 113.9), 1 / 64, 32),  # the mean colour of CIFAR-10
    'gpt': Tokens(),
}

# The same as chains, without dropout, for what becomes of them after training.
CHAINS = {
    'lenet300': (Flatten(), Dense('fc1'), Relu(), Dense('fc2'), Relu(), Dense('fc3')),
    'lenet5': (
        *(Convolution('conv1'), MaxPool(2), Convolution('conv2'), MaxPool(2)),
        *(Flatten(), Dense('fc1'), Relu(), Dense('fc2')),
    ),
}


def shapes(network: nn.Module, shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
    """Returns the shapes of a network's parameters, by layer, without making them.

    Args:
      network: any.
      shape: of one example, height, width and channels of an image for instance.
      dtype: of what the network takes.
    """
    examples = jax.ShapeDtypeStruct((1, *shape), dtype)
    return jax.eval_shape(network.init, jax.random.key(0), examples)['params']


def inputs_of(name: str) -> Input | Tokens:
    """Says what a network takes; one that is not known takes MNIST's images."""
    return INPUTS.get(name, MNIST_INPUT)


def example_shape(name: str, network: Any) -> tuple[int, ...]:
    """Gives the shape of one example: an image, or as many characters as a network sees."""
    inputs = inputs_of(name)
    return (network.context,) if isinstance(inputs, Tokens) else inputs.image_shape


def is_slow_in_loops(name: str) -> bool:
    """Says whether each step is to be a call of its own, on this machine."""
    return name in _SLOW_IN_LOOPS and jax.default_backend() == 'cpu'


def describe(network: nn.Module) -> dict[str, int | float | bool]:
    """Returns the numbers that a network is made with, which its file holds as `options`."""
    values = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def count_positions(
    network: nn.Module, shape: Sequence[int], dtype: Any = jnp.float32
) -> dict[str, int]:
    """Counts at how many places of one example each layer applies its kernel.

    Returns:
      `{layer: height · width of its output}` for the convolutions, by the path of their kernel.

    Example:
      >>> count_positions(LeNet5(FrozenDict(conv1=4)), (28, 28, 1))
      {'conv1/first': 672, 'conv1/second': 576, 'conv2': 64}
    """
    examples = jax.ShapeDtypeStruct((1, *shape), dtype)
    _, variables = jax.eval_shape(
        lambda examples: network.init_with_output(
            jax.random.key(0), examples, capture_intermediates=True, mutable=True
        ),
        examples,
    )
    named = named_leaves(variables['params'])
    layers = {parent_path(path) for path, leaf in named if is_kernel(path, leaf)}
    return {
        layer: math.prod(output.shape[1:3])
        for path, output in named_leaves(variables['intermediates'])
        if (layer := path.removesuffix('/__call__/0')) in layers and output.ndim == 4
    }


def _check(network: AlexNet | VGG16, images: jax.Array, least: int) -> None:
    if not network.width > 0 or network.classes < 1:
        raise ValueError(
            f'width={network.width} must be above 0 and classes={network.classes} at least 1'
        )
    if images.ndim != 4 or min(images.shape[1:3]) < least:
        raise ValueError(
            f'images of shape {images.shape} must be (batch, height, width, channels) with a '
            f'height and width of at least {least} pixels'
        )


def _scaled(number: int, width: float, multiple: int = 1) -> int:
    """Finds the multiple next to number · width, at least one."""
    return max(1, round(number * width / multiple)) * multiple


def _check_ranks(ranks: Ranks, *layers: str) -> None:
    if unknown := sorted(ranks.keys() - {*layers}):
        raise ValueError(f'ranks must be of {", ".join(layers)}, but has {unknown}')


def _dense(features: int, name: str, ranks: Ranks) -> nn.Module:
    if (rank := ranks.get(name)) is not None:
        return LowRankDense(features, rank, name=name)
    return nn.Dense(features, kernel_init=_XAVIER, name=name)


def _convolution(features: int, name: str, ranks: Ranks) -> nn.Module:
    options = {'padding': 'VALID', 'conv_general_dilated': fast_convolution(), 'name': name}
    if (rank := ranks.get(name)) is not None:
        return LowRankConv(features, (5, 5), rank, **options)
    return nn.Conv(features, (5, 5), kernel_init=_XAVIER, **options)


def fast_convolution() -> Any:
    """Gives what a plain VALID convolution is computed by, None for what Flax does by itself."""
    # XLA runs convolutions inside a loop on CPU many times slower than outside of it.
    return convolution_by_products if jax.default_backend() == 'cpu' else None


def convolution_by_products(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """Convolves without padding or stride, as a sum of matrix products.

    One for each row of the kernel or, where a row is too thin for that to be fast, one for all.

    Stands in for `jax.lax.conv_general_dilated` in `flax.linen.Conv`.

    Args:
      images: (batch, height, width, channels).
      kernel: (kernel height, kernel width, channels, features).
      strides: must be ones.
      padding: must be 'VALID', or zeros.
      **options: the dilations, which must be ones; the layout, as given above; the precision.

    Returns:
      (batch, height − kernel height + 1, width − kernel width + 1, features).

    Raises:
      ValueError: if the convolution wanted is another.
    """
    dilations = (options.get(f'{side}_dilation') or (1, 1) for side in ('lhs', 'rhs'))
    ones = {tuple(strides), *map(tuple, dilations)} == {(1, 1)}
    unpadded = padding == 'VALID' or set(map(tuple, padding)) == {(0, 0)}
    if not ones or not unpadded or images.shape[-1] != kernel.shape[2]:
        raise ValueError(
            f'only a plain VALID convolution is at hand, not one of strides {tuple(strides)}, '
            f'padding {padding!r}, {images.shape[-1]} channels under a kernel of {kernel.shape}, '
            f'and {options}'
        )
    rows, columns, channels, features = kernel.shape
    height, width = images.shape[1] - rows + 1, images.shape[2] - columns + 1
    together = rows if columns * channels < _FEWEST_COLUMNS else 1
    # (batch, image height − together + 1, width, together · columns · channels)
    patches = jnp.concatenate(
        [
            images[:, row : images.shape[1] - together + 1 + row, column : column + width]
            for row in range(together)
            for column in range(columns)
        ],
        axis=-1,
    )
    # Flat matrices: XLA multiplies them in half the time of arrays with a batch of rows.
    products = [
        patches[:, row : row + height].reshape(-1, together * columns * channels)
        @ kernel[row : row + together].reshape(-1, features)
        for row in range(0, rows, together)
    ]
    return functools.reduce(jnp.add, products).reshape(-1, height, width, features)


def drop_out(
    module: nn.Module, hidden: jax.Array, dropout: DropoutRates | None, layer: str
) -> jax.Array:
    """Drops out units, at a rate that may be traced, as that of `flax.linen.Dropout` may not.

    Args:
      module: its random bits named `dropout` are used.
      hidden: what a layer gave.
      dropout: the rates; None leaves all as it is.
      layer: the name of the layer.

    Returns:
      An array like `hidden`.
    """
    if dropout is None:
        return hidden
    kept = 1 - dropout[layer]
    chosen = jax.random.bernoulli(module.make_rng('dropout'), kept, hidden.shape)
    return jnp.where(chosen, hidden / jnp.asarray(kept, hidden.dtype), 0)
