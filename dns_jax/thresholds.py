"""Rules that give every layer its band (a_k, b_k).

A rule is a function of the weights and masks of its layers and of the step; `surgery` says when
it is asked. All of it runs in float32 and under jit. Stands on `masks`, whose h_k it counts with,
and on `schedules`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dns_jax.masks import count_true, discriminate
from dns_jax.schedules import check_finite
from dns_jax.typing import Schedule, ThresholdRule, Thresholds


class Statistics(NamedTuple):
    """Mean μ and standard deviation s of `|w|` over the non-zero weights of a layer."""

    mean: jax.Array  #: shape=(), dtype=jnp.float32
    std: jax.Array  #: shape=(), dtype=jnp.float32


class Group(NamedTuple):
    """Connections that share one threshold, in a unit of their own."""

    unit: jax.typing.ArrayLike  #: float32 scalar: the layer's u_k
    weights: Sequence[jax.Array]  #: floating point
    masks: Sequence[jax.Array]  #: bool, of their shapes


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
    _check_hysteresis(hysteresis)

    def rule(layers, masks, step):
        del masks, step
        thresholds = {}
        for layer, weights in layers.items():
            statistics = magnitude_statistics(weights)
            middle = jnp.maximum(statistics.mean + c_rate * statistics.std, 0.0)
            thresholds[layer] = _band(middle, hysteresis)
        return thresholds

    return rule


def std(c_rate: float) -> ThresholdRule:
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
      >>> band = std(0.5)({'fc1': [jnp.array([3.0, -1.0, 0.0])]}, {}, 0)['fc1']
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
            layer: _band(c_rate * _nonzero_statistics(weights).std, 0.0)
            for layer, weights in layers.items()
        }

    return rule


def layer_density(density: float | Schedule, hysteresis: float = 0.1) -> ThresholdRule:
    r"""Thresholds that keep the same share of every layer.

    .. math::
      t_k = \max \{ t : |h_k(W_k, T_k)| \ge \mathrm{round}(d\,n_k) \}, \quad
      a_k = (1 - \eta)\,t_k, \quad b_k = (1 + \eta)\,t_k

    with `|h_k|` the connections that h_k keeps and n_k all those of the layer. The band is part of
    the count, so an update with these thresholds keeps exactly the wanted number, at least one,
    unless weights tie for the last place to the last bit of a float32: then all of them are
    kept. The threshold is found by bisection over those bits, exact to the last: 31 passes over
    weights and masks, without a sort or a copy. Beyond 2^24 connections d·n itself is rounded to
    a float32, by at most 6e-8 of it.

    Args:
      density: kept / all connections, in (0, 1], or a schedule of it, as in
        `dns_jax.schedules`.
      hysteresis: half the relative width η of the band, in [0, 1).

    Returns:
      A threshold rule, to be refreshed as weights move (`Rule.refresh_every`).

    Raises:
      ValueError: if `density` is a number outside (0, 1] or `hysteresis` is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> weights, masks = {'fc1': [jnp.array([1.0, -3.0, 2.0, 0.5])]}, {'fc1': [jnp.ones(4, bool)]}
      >>> low, high = layer_density(0.5)(weights, masks, 0)['fc1']
      >>> round(float(low), 4), round(float(high), 4)
      (2.0, 2.4444)
    """
    schedule = _density_schedule(density)
    _check_hysteresis(hysteresis)

    def rule(layers, masks, step):
        return _each_by_itself(layers, masks, dict.fromkeys(layers, schedule(step)), hysteresis)

    return rule


def global_density(
    density: float | Schedule, score: str = 'norm', hysteresis: float = 0.1
) -> ThresholdRule:
    r"""Thresholds that keep a share of all layers together, and divide it among them.

    .. math::
      t_k = \tau\,u_k, \quad \tau = \max \{ \tau : \textstyle\sum_k |h_k(W_k, T_k)| \ge
      \mathrm{round}(d \sum_k n_k) \}

    A layer's weights are compared in its own unit u_k, by `score`:

    - `norm`: the Euclidean norm of W_k⊙T_k, or the largest `|W_k|` where that is more. A weight
      counts by its share in what its layer computes with; LAMP's score, but for the weights kept
      now in place of those at least as large.
    - `rms`: the root mean square of W_k.
    - `erk`: no unit. Layers get connections in proportion to the sum of their kernel's axes
      (Erdős-Rényi kernel), at most all, and each keeps its largest.

    Counted and found as by `layer_density`.

    Args:
      density: kept / all connections, in (0, 1], or a schedule of it, as in
        `dns_jax.schedules`.
      score: `norm`, `rms` or `erk`.
      hysteresis: half the relative width η of the band, in [0, 1).

    Returns:
      A threshold rule, to be refreshed as weights move (`Rule.refresh_every`).

    Raises:
      ValueError: if `density` is a number outside (0, 1], `score` is none of the three or
        `hysteresis` is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> weights = {'a': [jnp.array([3.0, 1.0])], 'b': [jnp.array([30.0, 40.0])]}
      >>> masks = {'a': [jnp.ones(2, bool)], 'b': [jnp.ones(2, bool)]}
      >>> bands = global_density(0.5)(weights, masks, 0)
      >>> {layer: round(float(band.low), 3) for layer, band in bands.items()}
      {'a': 2.53, 'b': 40.0}

    Reference:
      Lee et al. 2021, Layer-adaptive sparsity for the magnitude-based pruning (LAMP); Evci et
      al. 2020, Rigging the lottery (ERK).
    """
    schedule = _density_schedule(density)
    _check_hysteresis(hysteresis)
    if score not in ('norm', 'rms', 'erk'):
        raise ValueError(f"score must be 'norm', 'rms' or 'erk', but is {score!r}")

    def rule(layers, masks, step):
        share = schedule(step)
        if score == 'erk':
            shares = _erdos_renyi_kernel(layers, share)
            return _each_by_itself(layers, masks, shares, hysteresis)
        units = {layer: _unit(layers[layer], masks[layer], score) for layer in layers}
        groups = [Group(units[layer], layers[layer], masks[layer]) for layer in layers]
        ratio = largest_threshold(groups, _wanted(groups, share), hysteresis)
        return {layer: _band(ratio * units[layer], hysteresis) for layer in layers}

    return rule


def largest_threshold(
    groups: Sequence[Group], wanted: jax.typing.ArrayLike, hysteresis: float
) -> jax.Array:
    """Finds the largest threshold, in the groups' units, at which h_k keeps enough connections.

    Args:
      groups: what shares the threshold.
      wanted: how many connections to keep at least, from 1 to all, an int32 scalar.
      hysteresis: half the relative width of the band.

    Returns:
      The threshold, a float32 scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> group = Group(1.0, [jnp.array([1.0, -3.0, 2.0])], [jnp.ones(3, bool)])
      >>> float(largest_threshold([group], 2, hysteresis=0.0))
      2.0
    """

    def as_float(bits):
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def try_bit(done, bits):
        # As integers, the bits of numbers that are not negative have the order of the numbers.
        candidate = bits | (1 << (30 - done))
        kept = jnp.int32(0)
        for unit, weights, masks in groups:
            band = _band(as_float(candidate) * unit, hysteresis)
            for leaf, mask in zip(weights, masks, strict=True):
                kept += count_true(discriminate(leaf, mask, band))
        return jnp.where(kept >= wanted, candidate, bits)

    return as_float(jax.lax.fori_loop(0, 31, try_bit, jnp.int32(0)))


def _nonzero_statistics(arrays: Sequence[jax.Array]) -> Statistics:
    """Mean and standard deviation over the non-zero entries of some arrays together."""
    wide = [array.astype(jnp.float32) for array in arrays]
    count = jnp.maximum(sum(jnp.sum(array != 0, dtype=jnp.float32) for array in wide), 1.0)
    mean = sum(map(jnp.sum, wide)) / count
    squares = sum(jnp.sum(jnp.square(array - mean), where=array != 0) for array in wide)
    return Statistics(mean, jnp.sqrt(squares / count))


def _check_hysteresis(hysteresis: float) -> None:
    # At 1 a kept connection would never be pruned, and no threshold reach a density.
    if not 0 <= hysteresis < 1:
        raise ValueError(f'hysteresis must be in [0, 1), but is {hysteresis!r}')


def _band(middle, hysteresis) -> Thresholds:
    return Thresholds((1 - hysteresis) * middle, (1 + hysteresis) * middle)


def _density_schedule(density: float | Schedule) -> Schedule:
    if callable(density):
        return lambda step: jnp.asarray(density(step), jnp.float32)
    if not 0 < density <= 1:
        raise ValueError(f'density must be in (0, 1], but is {density!r}')
    return lambda step: jnp.float32(density)


def _each_by_itself(layers, masks, shares, hysteresis) -> dict[str, Thresholds]:
    """Gives each layer the band that keeps its own share."""
    bands = {}
    for layer, share in shares.items():
        groups = [Group(1.0, layers[layer], masks[layer])]
        middle = largest_threshold(groups, _wanted(groups, share), hysteresis)
        bands[layer] = _band(middle, hysteresis)
    return bands


def _wanted(groups: Sequence[Group], density: jax.typing.ArrayLike) -> jax.Array:
    """How many of the groups' connections a density keeps, at least one."""
    total = sum(leaf.size for group in groups for leaf in group.weights)
    return jnp.clip(jnp.round(density * total).astype(jnp.int32), 1, total)


def _erdos_renyi_kernel(layers, density):
    sizes = {layer: sum(leaf.size for leaf in leaves) for layer, leaves in layers.items()}
    kernels = {layer: max(leaves, key=jnp.size) for layer, leaves in layers.items()}
    axes = {layer: sum(kernel.shape) for layer, kernel in kernels.items()}

    def kept_at(factor):
        return {layer: jnp.minimum(factor * axes[layer], sizes[layer]) for layer in layers}

    def halve(_, ends):
        middle = (ends[0] + ends[1]) / 2
        enough = sum(kept_at(middle).values()) >= density * sum(sizes.values())
        return jnp.where(enough, ends[0], middle), jnp.where(enough, middle, ends[1])

    ends = jnp.float32(0), jnp.float32(max(sizes[layer] / axes[layer] for layer in layers))
    kept = kept_at(jax.lax.fori_loop(0, 30, halve, ends)[1])
    return {layer: kept[layer] / sizes[layer] for layer in layers}


def _unit(weights, masks, score):
    magnitudes = [jnp.abs(leaf).astype(jnp.float32) for leaf in weights]
    if score == 'rms':
        squares = sum(jnp.sum(jnp.square(leaf)) for leaf in magnitudes)
        unit = jnp.sqrt(squares / sum(leaf.size for leaf in weights))
    else:
        kept = zip(magnitudes, masks, strict=True)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf), where=mask) for leaf, mask in kept))
        # At least the largest weight, so that a layer of which nothing was kept comes back by it.
        unit = functools.reduce(jnp.maximum, map(jnp.max, magnitudes), norm)
    return jnp.maximum(unit, 1e-30)  # a layer of zeros has the smallest scores, not none
