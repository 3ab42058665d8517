"""Rules that give every layer its band (a_k, b_k).

A rule is a function of the weights of its layers and of the step; `surgery` says when it is
asked. All of it runs in float32 and under jit.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dns_jax.typing import ThresholdRule, Thresholds


class Statistics(NamedTuple):
    """Mean μ and standard deviation s of |w| over the non-zero weights of a layer."""

    mean: jax.Array  # shape=(), dtype=jnp.float32
    std: jax.Array  # shape=(), dtype=jnp.float32


def magnitude_statistics(weights: Sequence[jax.Array]) -> Statistics:
    r"""Computes mean and standard deviation of the magnitudes of a layer's weights.

    .. math::
      \mu = \tfrac1n \sum |w|, \quad s = \sqrt{\tfrac1n \sum (|w| - \mu)^2},
      \quad \text{over the } n \text{ weights with } w \ne 0

    Args:
      weights: the arrays of the layer, kernel and bias together, floating point.

    Returns:
      Mean and standard deviation, float32 scalars; both 0 for a layer of zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> mean, std = magnitude_statistics([jnp.array([1.0, -3.0]), jnp.array([0.0])])
      >>> float(mean), float(std)
      (2.0, 1.0)

    Reference:
      Guo et al. 2016, section 3.3; non-zero weights only as in the authors' Caffe layers.
    """
    magnitudes = [jnp.abs(leaf).astype(jnp.float32) for leaf in weights]
    nonzero = [leaf > 0 for leaf in magnitudes]
    count = sum(jnp.sum(chosen, dtype=jnp.float32) for chosen in nonzero)
    count = jnp.maximum(count, 1.0)
    mean = sum(jnp.sum(leaf) for leaf in magnitudes) / count
    squares = sum(
        jnp.sum(jnp.square(leaf - mean), where=chosen)
        for leaf, chosen in zip(magnitudes, nonzero, strict=True)
    )
    return Statistics(mean, jnp.sqrt(squares / count))


def mean_std(c_rate: float, hysteresis: float = 0.1) -> ThresholdRule:
    r"""Thresholds from the mean and standard deviation of the weights' magnitudes.

    .. math::
      t_k = \max(\mu_k + c\,s_k, 0), \quad a_k = (1 - \eta)\,t_k, \quad b_k = (1 + \eta)\,t_k

    Args:
      c_rate: the paper's c, in standard deviations; the larger, the fewer connections are kept.
      hysteresis: half the relative width η of the band, in [0, 1].

    Returns:
      A threshold rule; it ignores the step.

    Raises:
      ValueError: if `c_rate` is not finite or `hysteresis` is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> low, high = mean_std(c_rate=1.0)({'fc1': [jnp.array([1.0, 3.0])]}, 0)['fc1']
      >>> round(float(low), 4), round(float(high), 4)
      (2.7, 3.3)

    Reference:
      Guo et al. 2016, section 3.3; 0.9 and 1.1 as in the authors' Caffe layers.
    """
    if not math.isfinite(c_rate):
        raise ValueError(f'c_rate must be finite, but is {c_rate!r}')
    if not 0 <= hysteresis <= 1:
        raise ValueError(f'hysteresis must be in [0, 1], but is {hysteresis!r}')

    def rule(layers, step):
        del step
        thresholds = {}
        for layer, weights in layers.items():
            mean, std = magnitude_statistics(weights)
            middle = jnp.maximum(mean + c_rate * std, 0.0)
            thresholds[layer] = Thresholds((1 - hysteresis) * middle, (1 + hysteresis) * middle)
        return thresholds

    return rule
