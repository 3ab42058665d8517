"""Chooses which units of a layer stay, without their activations: at random, or by weights."""

import numpy as np
from numpy.typing import ArrayLike

from experiments.baselines.determinantal import check_size


def choose_at_random(n: int, k: int, generator: np.random.Generator) -> np.ndarray:
    """Draws k of n units, each set of k as often as any other.

    Args:
      n: how many units there are.
      k: how many are chosen, from 1 to n.
      generator: the source of randomness.

    Returns:
      The units, sorted, shape=(k,), dtype=np.int64.

    Raises:
      ValueError: if `k` is out of range.

    Example:
      >>> import numpy as np
      >>> choose_at_random(3, 3, np.random.default_rng(0))
      array([0, 1, 2])

    Reference:
      Mariet and Sra 2016, Diversity networks: what they compare with.
    """
    check_size(k, n)
    return np.sort(generator.choice(n, k, replace=False))


def choose_by_importance(outgoing: ArrayLike, k: int) -> np.ndarray:
    """Finds the k units with the largest sum of absolute outgoing weights; of equals the first.

    Args:
      outgoing: the kernel of the next layer, shape=(n, next).
      k: how many are chosen, from 1 to n.

    Returns:
      The units, sorted, shape=(k,), dtype=np.int64.

    Raises:
      ValueError: if `k` is out of range.

    Example:
      >>> choose_by_importance([[1.0, 1.0], [0.5, 0.5], [0.0, -3.0]], 2)
      array([0, 2])

    Reference:
      He et al. 2014, Reshaping deep neural network for fast decoding by node-pruning, `onorm`.
    """
    importances = np.abs(np.asarray(outgoing, np.float64)).sum(1)
    check_size(k, len(importances))
    return np.sort(np.argsort(-importances, kind='stable')[:k])
