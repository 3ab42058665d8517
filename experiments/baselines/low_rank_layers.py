"""Low-rank layers, and their parameters made of those of whole ones.

Each is two layers of flax.linen named `first` and `second`: they are trained, and pruned, as any.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from experiments.baselines.low_rank import count_parameters, factorise_kernel


def factorise(params: Any, ranks: Mapping[str, int | None]) -> dict[str, Any]:
    """Makes the parameters of low-rank layers of those of trained dense layers and convolutions.

    Args:
      params: `{layer: {'kernel': …, 'bias': …}}`.
      ranks: as of `choose_ranks`; a layer without one, or with None, stays as it is.

    Returns:
      `{layer: {'first': {'kernel': …}, 'second': {'kernel': …, 'bias': …}}}`.

    Raises:
      ValueError: if a layer has no kernel, or no such rank.

    Example:
      >>> import jax.numpy as jnp
      >>> jax.tree.map(jnp.shape, factorise({'fc': {'kernel': jnp.ones((6, 4))}}, {'fc': 1}))
      {'fc': {'first': {'kernel': (6, 1)}, 'second': {'kernel': (1, 4)}}}
    """
    found = dict(params)
    for layer, rank in ranks.items():
        if not isinstance(params.get(layer), Mapping) or 'kernel' not in params[layer]:
            raise ValueError(f'ranks must be of layers of params with kernels, not of {layer!r}')
        if rank is not None:
            first, second = factorise_kernel(params[layer]['kernel'], rank)
            second = {**params[layer], 'kernel': second}
            found[layer] = {'first': {'kernel': first}, 'second': second}
    return found


class LowRankDense(nn.Module):
    """A dense layer to K units, without bias and activation, and one from there.

    Args:
      features: units of the second.
      rank: K.

    Example:
      >>> import jax.numpy as jnp
      >>> outputs, variables = LowRankDense(10, rank=2).init_with_output(
      ...     jax.random.key(0), jnp.zeros((1, 100))
      ... )
      >>> outputs.shape, variables['params']['first']['kernel'].shape
      ((1, 10), (100, 2))

    Reference:
      Xue, Li and Gong 2013, Restructuring of deep neural network acoustic models with singular
      value decomposition.
    """

    features: int
    rank: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps (…, in) to (…, features).

        Raises:
          ValueError: if there is no such rank.
        """
        count_parameters((inputs.shape[-1], self.features), self.rank)  # which checks it
        hidden = nn.Dense(self.rank, use_bias=False, name='first')(inputs)
        return nn.Dense(self.features, name='second')(hidden)


class LowRankConv(nn.Module):
    """A vertical convolution to K channels, without bias and activation, and a horizontal one.

    To train it from scratch, put batch normalisation behind it, as the authors' networks have it.

    Args:
      features: channels of the second.
      kernel_size: height of the first, width of the second.
      rank: K.
      padding: as of `flax.linen.Conv`, by name.
      conv_general_dilated: as of `flax.linen.Conv`.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = LowRankConv(50, (5, 5), rank=4, padding='VALID')
      >>> layer.init_with_output(jax.random.key(0), jnp.zeros((1, 12, 12, 20)))[0].shape
      (1, 8, 8, 50)

    Reference:
      Tai et al. 2016, Convolutional neural networks with low-rank regularization, section 3.
    """

    features: int
    kernel_size: tuple[int, int]
    rank: int
    padding: str = 'SAME'
    conv_general_dilated: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps (batch, height, width, in) to (batch, …, …, features).

        Raises:
          ValueError: if there is no such rank.
        """
        height, width = self.kernel_size
        shape = height, width, images.shape[-1], self.features
        count_parameters(shape, self.rank)  # which checks it
        options = {'padding': self.padding, 'conv_general_dilated': self.conv_general_dilated}
        hidden = nn.Conv(self.rank, (height, 1), use_bias=False, name='first', **options)(images)
        return nn.Conv(self.features, (1, width), name='second', **options)(hidden)
