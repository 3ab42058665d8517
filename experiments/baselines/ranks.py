"""Ranks of low-rank factors: one budget of parameters, shared among layers."""

import math
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from dns_jax.layers import named_leaves
from experiments.baselines.low_rank import count_parameters, decompose


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
      >>> import jax.numpy as jnp
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


def _options(kernel: jax.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lists the ranks that make a kernel smaller, then 0 for none: sizes, and squares kept."""
    squares = np.cumsum(decompose(kernel)[1] ** 2)
    whole, one = count_parameters(kernel.shape, None), count_parameters(kernel.shape, 1)
    ranks = np.append(np.arange(1, (whole - 1) // one + 1), 0)
    return ranks, np.append(ranks[:-1] * one, whole), squares[ranks - 1]  # rank 0 keeps all
