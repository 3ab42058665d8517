"""What surgery saved: parameters, multiply-adds and bytes, per layer and in total."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dns_jax._core.checks import abridge
from dns_jax._core.counts import count_all, to_int
from dns_jax._trees import check_parallel
from dns_jax.layers import group_by_layer, named_leaves, parent_path, role
from dns_jax.typing import LayerOf, Masks, Params

_INDEX_BYTES = 4  # a flat uint32 index


class Size(NamedTuple):
    """The size of one layer, or of a network, before and after surgery."""

    parameters: int  #: weights and biases
    kept: int  #: those whose mask is True, or that have none
    multiply_adds: int  #: of the dense network, for one example
    kept_multiply_adds: int  #: of the kept weights, for one example
    bytes: int  #: of the dense parameters in their own dtype
    kept_bytes: int  #: of the kept, in their dtype, with a uint32 index beside each that has a mask

    @property
    def density(self) -> float:
        """Kept parameters / parameters; 1 where there are none.

        Example:
          >>> Size(100, 25, 100, 25, 400, 200).density
          0.25
        """
        return self.kept / self.parameters if self.parameters else 1.0

    @property
    def compression(self) -> float:
        """Parameters / kept parameters, infinite where none is kept.

        Example:
          >>> Size(100, 25, 100, 25, 400, 200).compression
          4.0
        """
        return self.parameters / self.kept if self.kept else math.inf


class Sizes(NamedTuple):
    """The sizes of all layers, by name, and of the network."""

    layers: dict[str, Size]
    total: Size


def measure_sizes(
    params: Params,
    masks: Masks,
    positions: Mapping[str, int] | None = None,
    layer_of: LayerOf = parent_path,
) -> Sizes:
    r"""Measures a network under its masks; one with stacked layers after `unstack`, if by layer.

    A weight of a kernel costs one multiply-add at each position where the kernel is applied:
    output height × width for a convolution, 1 for a fully connected layer. All other leaves
    (`dns_jax.role`) are parameters, but cost no multiplication.

    .. math::
      \text{multiply-adds} = \sum_k \text{positions}_k\,|W_k|, \quad
      \text{kept multiply-adds} = \sum_k \text{positions}_k\,|T_k|
      \quad \text{over the kernels } W_k \text{ and their masks } T_k

    Args:
      params: dense weights, concrete arrays.
      masks: the parallel masks.
      positions: `{layer name: positions per example}`; 1 where a layer is not named.
      layer_of: maps the path of a leaf to the name of its layer.

    Returns:
      Sizes per layer and in total.

    Raises:
      ValueError: if the trees do not match or are empty, or `positions` names an unknown layer.
      TypeError: if a mask is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {'fc1': {'kernel': jnp.ones((4, 2)), 'bias': jnp.ones(2)}}
      >>> masks = {'fc1': {'kernel': jnp.eye(4, 2, dtype=bool), 'bias': jnp.array([True, False])}}
      >>> total = measure_sizes(params, masks).total
      >>> total.parameters, total.kept, total.compression, total.kept_multiply_adds
      (10, 3, 3.3333333333333335, 2)
    """
    masks = check_parallel(params, masks)
    if not jax.tree.leaves(params):
        raise ValueError(f'params must have at least one leaf, but is {params!r}')
    positions = dict(positions or {})
    weights_of: dict[str, list[tuple[bool, Any]]] = {}
    for path, leaf in named_leaves(params):
        weights_of.setdefault(layer_of(path), []).append((role(path, leaf) == 'kernel', leaf))
    weights_of = dict(sorted(weights_of.items()))
    masks_of = group_by_layer(masks, layer_of, lambda path, leaf: True)
    if unknown := sorted(positions.keys() - weights_of.keys()):
        raise ValueError(
            f'positions names {abridge(unknown)}; the layers are {abridge(weights_of)}'
        )
    layers = {
        layer: _measure_layer(weights_of[layer], masks_of[layer], positions.get(layer, 1))
        for layer in weights_of
    }
    total = Size(*(sum(column) for column in zip(*layers.values(), strict=True)))
    return Sizes(layers, total)


def _measure_layer(weights, masks, positions) -> Size:
    size = Size(0, 0, 0, 0, 0, 0)
    for (is_kernel, leaf), mask in zip(weights, masks, strict=True):
        kept = to_int(count_all([mask])) if jnp.ndim(mask) else jnp.size(leaf)
        applied = positions if is_kernel else 0
        itemsize = jnp.result_type(leaf).itemsize
        index_bytes = _INDEX_BYTES if jnp.ndim(mask) else 0
        leaf_size = Size(
            parameters=jnp.size(leaf),
            kept=kept,
            multiply_adds=applied * jnp.size(leaf),
            kept_multiply_adds=applied * kept,
            bytes=itemsize * jnp.size(leaf),
            kept_bytes=(itemsize + index_bytes) * kept,
        )
        size = Size(*map(sum, zip(size, leaf_size, strict=True)))
    return size
