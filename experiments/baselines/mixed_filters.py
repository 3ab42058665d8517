"""Convolutions whose filters have several shapes, side by side, for networks trained from scratch.

Owns what such a layer computes and how it starts; it is trained, and pruned, as any other.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp


class MixedFilters(nn.Module):
    r"""Horizontal, vertical and some whole filters, whose outputs are concatenated, or mixed.

    Groups of d normal filters of height h and width w start as one layer, not each by itself, so
    that a gradient keeps its variance on its way back:

    .. math::
      \frac{1}{2} \hat{n} \, \mathrm{Var}(w) = 1, \quad
      \hat{n} = \sum_g h_g w_g d_g, \quad \mathrm{std}(w) = \sqrt{\frac{2}{\hat{n}}}

    The half is that of the ReLU behind the layer. With mixing there is none before the 1×1
    convolution, so the groups start without the half, with √(1 / n̂); the 1×1 convolution, with the
    ReLU behind it, with √(2 / features).

    Args:
      horizontal: number of filters of 1 × width.
      vertical: number of filters of height × 1.
      full: number of filters of height × width.
      kernel_size: height and width.
      features: of a 1×1 convolution on top; None leaves it out.
      padding: 'SAME' or 'VALID', as of a convolution with filters of height × width alone.
      conv_general_dilated: as of `flax.linen.Conv`.

    Example:
      >>> layer = MixedFilters(horizontal=8, vertical=8, full=4, kernel_size=(5, 5), features=20)
      >>> images = jnp.zeros((1, 28, 28, 1))
      >>> outputs, variables = layer.init_with_output(jax.random.key(0), images)
      >>> outputs.shape, sorted(variables['params'])
      ((1, 28, 28, 20), ['full', 'horizontal', 'mixing', 'vertical'])

    Reference:
      Ioannou et al. 2016, Training CNNs with low-rank filters for efficient image classification,
      sections 3 and 4. Their equation is for a ReLU behind all groups; the start with mixing
      follows from its derivation.
    """

    horizontal: int
    vertical: int
    full: int
    kernel_size: tuple[int, int]
    features: int | None = None
    padding: str = 'SAME'
    conv_general_dilated: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps (batch, height, width, in) to (batch, …, …, all filters, or features).

        Raises:
          ValueError: if a field is out of range, or the images are smaller than the filters.
        """
        self._check_fields()
        height, width = self.kernel_size
        rows, columns = self.kernel_size if self.padding == 'VALID' else (1, 1)
        if images.ndim != 4 or images.shape[1] < rows or images.shape[2] < columns:
            raise ValueError(
                'images must be (batch, height, width, channels) with at least '
                f'{rows} × {columns} pixels, but are {images.shape}'
            )
        if self.padding == 'SAME':
            edges = [((size - 1) // 2, size // 2) for size in self.kernel_size]
            images = jnp.pad(images, [(0, 0), *edges, (0, 0)])
        groups = {
            'horizontal': (1, width, self.horizontal),
            'vertical': (height, 1, self.vertical),
            'full': (height, width, self.full),
        }
        outgoing = sum(math.prod(group) for group in groups.values())
        mixed = self.features is not None
        outputs = [
            # A bias below a linear layer adds nothing.
            self._convolution(name, group, (1 if mixed else 2) / outgoing, use_bias=not mixed)(
                _middle(images, height - group[0], width - group[1])
            )
            for name, group in groups.items()
            if group[2]
        ]
        hidden = jnp.concatenate(outputs, axis=-1)
        if self.features is None:
            return hidden
        return self._convolution('mixing', (1, 1, self.features), 2 / self.features)(hidden)

    def _convolution(
        self, name: str, group: tuple[int, int, int], variance: float, use_bias: bool = True
    ) -> nn.Conv:
        *window, features = group
        return nn.Conv(
            features,
            window,
            padding='VALID',
            use_bias=use_bias,
            kernel_init=nn.initializers.normal(math.sqrt(variance)),
            conv_general_dilated=self.conv_general_dilated,
            name=name,
        )

    def _check_fields(self) -> None:
        for name in ('horizontal', 'vertical', 'full'):
            number = getattr(self, name)
            if number < 0:
                raise ValueError(f'{name} must be a number of filters, 0 or more, but is {number}')
        if not self.horizontal + self.vertical + self.full:
            raise ValueError('filters of some shape must be there, at least one, but all are 0')
        if min(self.kernel_size) < 1:
            raise ValueError(f'kernel_size must be at least 1 × 1, but is {self.kernel_size}')
        if self.features is not None and self.features < 1:
            raise ValueError(f'features must be at least 1 or None, but is {self.features}')
        if self.padding not in ('SAME', 'VALID'):
            raise ValueError(f"padding must be 'SAME' or 'VALID', but is {self.padding!r}")


def _middle(images: jax.Array, rows: int, columns: int) -> jax.Array:
    """Leaves out the rows and columns that smaller filters do not see, half of them at each end."""
    bottom, right = images.shape[1] - rows + rows // 2, images.shape[2] - columns + columns // 2
    return images[:, rows // 2 : bottom, columns // 2 : right]
