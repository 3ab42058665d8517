"""Rules that give every layer its band (a_k, b_k) by how many connections are to be kept."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dns_jax._core import counts
from dns_jax._core.checks import check_density, check_hysteresis
from dns_jax._following import DensityRule
from dns_jax._sharing import share_by_axes, share_by_layer, share_by_units
from dns_jax.typing import Schedule, ThresholdRule


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
      A threshold rule. Surgery follows it at every step (`Rule.refresh_every`).

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
    check_hysteresis(hysteresis)
    return DensityRule(share_by_layer(schedule), hysteresis, callable(density))


def global_density(
    density: float | Schedule, score: str = 'norm', hysteresis: float = 0.1, floor: float = 0.05
) -> ThresholdRule:
    r"""Thresholds that keep a share of all layers together, and divide it among them.

    .. math::
      t_k = \tau\,u_k, \quad \tau = \max \{ \tau : \sum_k |h_k(W_k, T_k)| \ge
      \mathrm{round}(d \sum_k n_k) \}

    A layer's weights are compared in its own unit u_k, by `score`:

    - `norm`: the Euclidean norm of W_k⊙T_k, or the largest `|W_k|` where that is more. A weight
      counts by its share in what its layer computes with; LAMP's score, but for the weights kept
      now in place of those at least as large.
    - `rms`: the root mean square of W_k.
    - `erk`: no unit. Layers get connections in proportion to the sum of their kernel's axes
      (Erdős-Rényi kernel), at most all, and each keeps its largest.

    By `norm` and `rms` a layer keeps at least one connection and the share `floor`·d of them, if as
    many are not zero, by a lower threshold of its own; what it keeps so is counted in d, and the
    others keep less. Counted and found as by `layer_density`.

    Args:
      density: kept / all connections, in (0, 1], or a schedule of it, as in
        `dns_jax.schedules`.
      score: `norm`, `rms` or `erk`.
      hysteresis: half the relative width η of the band, in [0, 1).
      floor: of an equal share, what every layer keeps at least, in [0, 1].

    Returns:
      A threshold rule. Surgery follows it at every step (`Rule.refresh_every`).

    Raises:
      ValueError: if `density` is a number outside (0, 1], `score` is none of the three,
        `hysteresis` is outside [0, 1) or `floor` outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> weights = {'a': [jnp.array([3.0, 1.0])], 'b': [jnp.array([30.0, 40.0])]}
      >>> masks = {'a': [jnp.ones(2, bool)], 'b': [jnp.ones(2, bool)]}
      >>> bands = global_density(0.5)(weights, masks, 0)
      >>> {layer: round(float(band.low), 3) for layer, band in bands.items()}
      {'a': 3.0, 'b': 40.0}

    Reference:
      Lee et al. 2021, Layer-adaptive sparsity for the magnitude-based pruning (LAMP); Evci et
      al. 2020, Rigging the lottery (ERK).
    """
    schedule = _density_schedule(density)
    check_hysteresis(hysteresis)
    if score not in ('norm', 'rms', 'erk'):
        raise ValueError(f"score must be 'norm', 'rms' or 'erk', but is {score!r}")
    if not 0 <= floor <= 1:
        raise ValueError(f'floor must be in [0, 1], but is {floor!r}')

    def wanted(step, sizes):
        return counts.from_share(schedule(step), sum(sizes.values()))

    divide = share_by_axes(wanted) if score == 'erk' else share_by_units(wanted, score, floor)
    return DensityRule(divide, hysteresis, callable(density))


def _density_schedule(density: float | Schedule) -> Callable[[jax.Array], jax.Array]:
    if callable(density):
        return lambda step: jnp.asarray(density(step), jnp.float32)
    check_density('density', density)
    return lambda step: jnp.float32(density)
