"""Pruners that are `surgery` under rules of their own.

So they keep the contract of `dns_jax.transformation`: updates pass through, the state is a
`SurgeryState`, the masks are found in it. A pruner takes one number for every layer, or a table
`{pattern: number}` as `surgery` takes rules.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dns_jax._checks import as_table, check_density, check_step, check_steps
from dns_jax.densities import layer_density
from dns_jax.schedules import polynomial_density, update_at
from dns_jax.thresholds import weight_std
from dns_jax.transformation import Surgery, surgery
from dns_jax.typing import Rule, Schedule, ThresholdRule


def han(
    c_rate: float | Mapping[str, float],
    rounds: Sequence[int],
    key: jax.Array,
    **options: Any,
) -> Surgery:
    r"""Prunes in rounds what is below c standard deviations of its layer, and trains on between.

    .. math::
      T_k \leftarrow T_k \wedge (|W_k| \ge c\,s_k) \quad
      \text{with } s_k \text{ the standard deviation of } W_k \odot T_k

    Args:
      c_rate: c of `dns_jax.thresholds.weight_std`, over the connections that the layer still keeps.
      rounds: the steps at which it prunes.
      key: as for `surgery`; only a random importance uses it.
      **options: `takes_part`, `layer_of`, `importance`, `masks` and `stacked` of `surgery`.

    Returns:
      A transformation as of `surgery`.

    Raises:
      ValueError: if `rounds` is empty, or one is no step: a whole number that an int32 holds.
      As `surgery` and `weight_std` do.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> params = {'kernel': jnp.array([0.2, -1.0, 4.0, -4.0])}
      >>> pruner = han(0.5, rounds=[0], key=jax.random.key(0))
      >>> _, state = pruner.update(params, pruner.init(params), params)
      >>> state.masks['kernel']
      Array([False, False,  True,  True], dtype=bool)

    Reference:
      Han et al. 2015, Learning both weights and connections for efficient neural networks.
    """
    check_steps('rounds', rounds)
    probability = update_at(rounds)
    rules = {
        pattern: Rule(weight_std(c), probability, refresh_every=1)
        for pattern, c in as_table(c_rate).items()
    }
    return surgery(rules, key, splicing=False, **options)


def one_shot(
    density: float | Mapping[str, float], step: int, key: jax.Array, **options: Any
) -> Surgery:
    """Prunes once, to the density wanted: `iterative` with one round.

    Args:
      density: kept / all connections, in (0, 1].
      step: the step at which it prunes.
      key: as for `surgery`; only a random importance uses it.
      **options: those of `iterative`.

    Returns:
      A transformation as of `surgery`.

    Raises:
      ValueError: if `step` is not a whole number that an int32 holds.
      As `iterative` does.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> params = {'kernel': jnp.array([0.2, -1.0, 4.0, -4.5])}
      >>> pruner = one_shot(0.25, step=0, key=jax.random.key(0))
      >>> _, state = pruner.update(params, pruner.init(params), params)
      >>> state.masks['kernel']
      Array([False, False, False,  True], dtype=bool)
    """
    check_step('step', step)
    return iterative(density, [step], key, **options)


def iterative(
    density: float | Mapping[str, float],
    rounds: Sequence[int],
    key: jax.Array,
    density_rule: Callable[[float | Schedule], ThresholdRule] = layer_density,
    **options: Any,
) -> Surgery:
    r"""Prunes in rounds, by the same factor in each, and trains on between.

    .. math::
      d_i = d^{\,i / n} \quad \text{after round } i = 1 \ldots n

    The rounds are those of Han et al., with thresholds from a density in place of c.

    Args:
      density: d, kept / all connections in the end, in (0, 1].
      rounds: the steps at which it prunes, none twice.
      key: as for `surgery`; only a random importance uses it.
      density_rule: makes the threshold rule of a density, `layer_density` or `global_density`.
      **options: `takes_part`, `layer_of`, `importance`, `masks` and `stacked` of `surgery`.

    Returns:
      A transformation as of `surgery`.

    Raises:
      ValueError: if `density` is outside (0, 1], or `rounds` is empty, names a step twice, or
        what is no whole number that an int32 holds.
      As `surgery` does.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> params = {'kernel': jnp.array([0.2, -1.0, 4.0, -4.5])}
      >>> pruner = iterative(0.25, rounds=[0, 2], key=jax.random.key(0))
      >>> state = pruner.init(params)
      >>> for step in range(3):
      ...     _, state = pruner.update(params, state, params)
      ...     print(step, int(state.masks['kernel'].sum()))
      0 2
      1 2
      2 1

    Reference:
      Han et al. 2015, Learning both weights and connections for efficient neural networks, for the
      rounds.
    """
    check_steps('rounds', rounds)
    probability, steps = update_at(rounds), np.asarray(rounds, np.int32)
    if len(set(rounds)) < len(rounds):
        raise ValueError(f'rounds must not name a step twice, but is {list(rounds)!r}')
    rules = {}
    for pattern, final in _density_table(density).items():

        def schedule(step, final=final):
            done = jnp.sum(jnp.asarray(step) >= steps, dtype=jnp.float32)
            return jnp.float32(final) ** (done / len(steps))

        rules[pattern] = Rule(density_rule(schedule), probability, refresh_every=1)
    return surgery(rules, key, splicing=False, **options)


def gradual(
    density: float | Mapping[str, float],
    start: int,
    end: int,
    every: int,
    key: jax.Array,
    density_rule: Callable[[float | Schedule], ThresholdRule] = layer_density,
    **options: Any,
) -> Surgery:
    r"""Prunes again and again, along a cubic ramp of the density.

    .. math::
      d(i) = d + (1 - d)\left(1 - \frac{i - \text{start}}{\text{end} - \text{start}}\right)^3
      \quad \text{for start} \le i \le \text{end}

    Args:
      density: kept / all connections in the end, in (0, 1].
      start: the step at which the ramp leaves 1.
      end: the step at which it is done, and the last at which anything is pruned.
      every: steps from one pruning to the next, at least 1.
      key: as for `surgery`; only a random importance uses it.
      density_rule: makes the threshold rule of a density, `layer_density` or `global_density`.
      **options: `takes_part`, `layer_of`, `importance`, `masks` and `stacked` of `surgery`.

    Returns:
      A transformation as of `surgery`.

    Raises:
      ValueError: if `density` or `every` is out of range.
      As `surgery` and `polynomial_density` do.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> params = {'kernel': jnp.arange(1.0, 9.0)}
      >>> pruner = gradual(0.25, start=0, end=4, every=2, key=jax.random.key(0))
      >>> state = pruner.init(params)
      >>> for step in range(5):
      ...     _, state = pruner.update(params, state, params)
      ...     print(step, int(state.masks['kernel'].sum()))
      0 8
      1 8
      2 3
      3 3
      4 2

    Reference:
      Zhu and Gupta 2017, To prune, or not to prune.
    """
    check_step('every', every, 1)
    ramps = {
        pattern: polynomial_density(number, start, end)
        for pattern, number in _density_table(density).items()
    }
    probability = update_at([*range(start, end, every), end])
    rules = {
        pattern: Rule(density_rule(ramp), probability, refresh_every=1)
        for pattern, ramp in ramps.items()
    }
    return surgery(rules, key, splicing=False, **options)


def _density_table(density: float | Mapping[str, float]) -> dict[str, float]:
    table = as_table(density)
    for number in table.values():
        check_density('density', number)
    return table
