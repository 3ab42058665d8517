"""Low-rank factors of trained kernels, by singular values, and the ranks that a budget allows.

Owns numbers alone; `low_rank_layers` makes layers of them.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dns_jax.layers import named_leaves


def factorise_kernel(kernel: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    r"""Splits a kernel into the two that come nearest to it, of all pairs of that rank.

    .. math::
      W_{(c,y),(x,n)} \approx \sum_{k=1}^{K} U_{(c,y),k} \sqrt{\sigma_k} \cdot
      \sqrt{\sigma_k} V_{(x,n),k}

    Args:
      kernel: (in, out), or (height, width, in, out) of a convolution without groups.
      rank: K, from 1 to the smaller side of the matrix (in · height) × (width · out).

    Returns:
      (in, K) and (K, out), or (height, 1, in, K) and (1, width, K, out), of the kernel's dtype.

    Raises:
      ValueError: if the kernel has other axes, or there is no such rank.

    Example:
      >>> first, second = factorise_kernel(jnp.ones((5, 3, 2, 4)), 1)
      >>> first.shape, second.shape
      ((5, 1, 2, 1), (1, 3, 1, 4))

    Reference:
      Tai et al. 2016, Convolutional neural networks with low-rank regularization, theorem 1.
    """
    count_parameters(kernel.shape, rank)  # which checks both
    left, values, right = _decompose(kernel)
    roots = np.sqrt(values[:rank])
    first, second = left[:, :rank] * roots, roots[:, None] * right[:rank]
    if kernel.ndim == 4:
        height, width, channels, features = kernel.shape
        first = first.reshape(channels, height, 1, rank).transpose(1, 2, 0, 3)
        second = second.reshape(rank, 1, width, features).transpose(1, 2, 0, 3)
    return jnp.asarray(first, kernel.dtype), jnp.asarray(second, kernel.dtype)


def count_parameters(shape: Sequence[int], rank: int | None) -> int:
    """Counts the entries of a kernel's factors, or of the kernel where the rank is None.

    Args:
      shape: of the kernel, as of `factorise_kernel`.
      rank: K, or None.

    Returns:
      K · (in · height + width · out), or in · height · width · out.

    Raises:
      ValueError: as `factorise_kernel`.

    Example:
      >>> count_parameters((784, 300), 10), count_parameters((5, 5, 20, 50), None)
      (10840, 25000)
    """
    rows, columns = _sides(shape)
    most = min(rows, columns)
    if rank is None:
        return rows * columns
    if rank not in range(1, most + 1):
        raise ValueError(f'rank must be from 1 to {most} for shape {tuple(shape)}, but is {rank!r}')
    return rank * (rows + columns)


def count_fewest(params: Any, layers: Collection[str]) -> int:
    """Counts the parameters of a network whose layers have the ranks that make it smallest.

    Args:
      params: as of `choose_ranks`; only shapes are looked at.
      layers: those that may be factorised.

    Raises:
      ValueError: if a layer has no kernel.

    Example:
      >>> count_fewest({'fc': {'kernel': np.ones((6, 4)), 'bias': np.ones(4)}}, ['fc'])
      14
    """
    leaves = dict(named_leaves(params))
    if lacking := [layer for layer in layers if f'{layer}/kernel' not in leaves]:
        raise ValueError(f'layers must have a kernel in params, but {lacking} have none')
    saved = 0
    for shape in (leaves[f'{layer}/kernel'].shape for layer in layers):
        saved += max(0, math.prod(shape) - count_parameters(shape, 1))
    return sum(math.prod(leaf.shape) for leaf in leaves.values()) - saved


def choose_ranks(params: Any, budget: int, layers: Collection[str]) -> dict[str, int | None]:
    r"""Shares a budget among layers so that the sum of squared singular values kept is largest.

    .. math::
      \max_{K} \sum_l \sum_{i \le K_l} \sigma_{l,i}^2

    The rule is ours. The maximum is exact, and takes a second for LeNet-5. A layer that factors
    would make no smaller stays as it is, and keeps all.

    Args:
      params: `{layer: {'kernel': …}}`, trained.
      budget: parameters that the network may have, with its biases and all other layers.
      layers: those that may be factorised.

    Returns:
      `{layer: rank}`, None for one that stays.

    Raises:
      ValueError: if a layer has no kernel, or the budget is too small for any ranks.

    Example:
      >>> params = {f'fc{scale}': {'kernel': scale * jnp.eye(4)} for scale in (1, 2)}
      >>> choose_ranks(params, 24, ['fc1', 'fc2'])
      {'fc1': 1, 'fc2': None}
    """
    if not budget >= (least := count_fewest(params, layers)):
        raise ValueError(f'budget must be at least {least} parameters, but is {budget!r}')
    leaves = dict(named_leaves(params))
    options = [_options(leaves[f'{layer}/kernel']) for layer in layers]
    others = sum(map(np.size, leaves.values())) - sum(sizes[-1] for _, sizes, _ in options)
    chosen, spent, kept = np.zeros((1, 0), int), np.array([others]), np.zeros(1)
    for ranks, sizes, squares in options:
        spent = np.add.outer(spent, sizes).ravel()
        kept = np.add.outer(kept, squares).ravel()
        order = np.lexsort((-kept, spent))
        # What costs more than another and keeps no more is in no best choice.
        gains = np.diff(np.maximum.accumulate(kept[order]), prepend=-1)
        order = order[(gains > 0) & (spent[order] <= budget)]
        before, option = np.divmod(order, len(ranks))
        chosen = np.column_stack([chosen[before], ranks[option]])
        spent, kept = spent[order], kept[order]
    return {layer: int(rank) or None for layer, rank in zip(layers, chosen[-1], strict=True)}


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) not in (2, 4):
        raise ValueError(f'shape of a kernel must have 2 or 4 axes, but is {tuple(shape)}')
    height, width, channels, features = (1, 1, *shape)[-4:]
    return channels * height, width * features


def _decompose(kernel: jax.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds U, σ and Vᵀ of the matrix of a kernel."""
    matrix = np.asarray(kernel).astype(np.float64)
    matrix = matrix.transpose(2, 0, 1, 3) if matrix.ndim == 4 else matrix
    return np.linalg.svd(matrix.reshape(_sides(kernel.shape)), full_matrices=False)


def _options(kernel: jax.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lists the ranks that make a kernel smaller, then 0 for none: sizes, and squares kept."""
    squares = np.cumsum(_decompose(kernel)[1] ** 2)
    whole, one = count_parameters(kernel.shape, None), count_parameters(kernel.shape, 1)
    ranks = np.append(np.arange(1, (whole - 1) // one + 1), 0)
    return ranks, np.append(ranks[:-1] * one, whole), squares[ranks - 1]  # rank 0 keeps all
