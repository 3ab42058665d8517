"""Rules that give every layer its band (a_k, b_k), from the statistics of its weights.

A rule is a function of the weights and masks of its layers and of the step; `surgery` says when
it is asked. All of it runs in float32 and under jit. Rules by how many connections to keep are in
`densities`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dns_jax._core.checks import check_hysteresis
from dns_jax._core.search import range_scale
from dns_jax.schedules import check_finite
from dns_jax.typing import ThresholdRule, Thresholds


class Statistics(NamedTuple):
    """Mean μ and standard deviation s of `|w|` over the non-zero weights of a layer."""

    mean: jax.Array  #: shape=(), dtype=jnp.float32
    std: jax.Array  #: shape=(), dtype=jnp.float32


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
    return _nonzero_statistics([jnp.abs(leaf) for leaf in weights])


def mean_std(c_rate: float, hysteresis: float = 0.1) -> ThresholdRule:
    r"""Thresholds from the mean and standard deviation of the weights' magnitudes.

    .. math::
      t_k = \max(\mu_k + c\,s_k, 0), \quad a_k = (1 - \eta)\,t_k, \quad b_k = (1 + \eta)\,t_k

    Args:
      c_rate: the paper's c, in standard deviations; the larger, the fewer connections are kept.
      hysteresis: half the relative width η of the band, in [0, 1).

    Returns:
      A threshold rule; it ignores the masks and the step.

    Raises:
      ValueError: if `c_rate` is not finite in float32 or `hysteresis` is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> low, high = mean_std(c_rate=1.0)({'fc1': [jnp.array([1.0, 3.0])]}, {}, 0)['fc1']
      >>> round(float(low), 4), round(float(high), 4)
      (2.7, 3.3)

    Reference:
      Guo et al. 2016, section 3.3; 0.9 and 1.1 as in the authors' Caffe layers.
    """
    check_finite('c_rate', c_rate)
    check_hysteresis(hysteresis)

    def rule(layers, masks, step):
        del masks, step
        thresholds = {}
        for layer, weights in layers.items():
            statistics = magnitude_statistics(weights)
            middle = jnp.maximum(statistics.mean + c_rate * statistics.std, 0.0)
            thresholds[layer] = make_band(middle, hysteresis)
        return thresholds

    return rule


def weight_std(c_rate: float) -> ThresholdRule:
    r"""Thresholds from the standard deviation of the weights, without a band.

    .. math::
      a_k = b_k = c\,\sqrt{\tfrac1n \sum (w - \bar w)^2} \quad
      \text{over the } n \text{ weights with } w \ne 0

    Where pruned weights count as zero, as in a pruner without splicing, it is that of the kept
    ones; each round then prunes more at the same c.

    Args:
      c_rate: c, in standard deviations, at least 0; the larger, the fewer connections are kept.

    Returns:
      A threshold rule; it ignores the masks and the step.

    Raises:
      ValueError: if `c_rate` is negative or not finite in float32.

    Example:
      >>> import jax.numpy as jnp
      >>> band = weight_std(0.5)({'fc1': [jnp.array([3.0, -1.0, 0.0])]}, {}, 0)['fc1']
      >>> float(band.low), float(band.high)
      (1.0, 1.0)

    Reference:
      Han et al. 2015, Learning both weights and connections for efficient neural networks,
      section 3.
    """
    check_finite('c_rate', c_rate, 0)

    def rule(layers, masks, step):
        del masks, step
        return {
            layer: make_band(c_rate * _nonzero_statistics(weights).std, 0.0)
            for layer, weights in layers.items()
        }

    return rule


def make_band(middle: Any, hysteresis: float) -> Thresholds:
    """Makes the band around a threshold.

    Args:
      middle: t_k, a float32 scalar.
      hysteresis: half the relative width η.

    Returns:
      (1 − η)·t and (1 + η)·t.

    Example:
      >>> make_band(2.0, 0.5)
      Thresholds(low=1.0, high=3.0)
    """
    return Thresholds((1 - hysteresis) * middle, (1 + hysteresis) * middle)


def _nonzero_statistics(arrays: Sequence[jax.Array]) -> Statistics:
    """Mean and standard deviation over the non-zero entries of some arrays together."""
    scale = range_scale(arrays)
    wide = [array.astype(jnp.float32) / scale for array in arrays]
    count = jnp.maximum(
        sum((jnp.sum(array != 0, dtype=jnp.float32) for array in wide), jnp.float32(0)), 1.0
    )
    mean = sum(map(jnp.sum, wide), jnp.float32(0)) / count
    squares = sum(
        (jnp.sum(jnp.square(array - mean), where=array != 0) for array in wide), jnp.float32(0)
    )
    return Statistics(mean * scale, jnp.sqrt(squares / count) * scale)
