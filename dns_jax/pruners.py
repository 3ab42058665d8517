"""The pruners that surgery is compared with: pruned connections never return.

Each is `surgery` without splicing under rules of its own, so it keeps the contract of that module:
updates pass through, the state is a `SurgeryState`, the masks are found in it. Where a pruner is
given one number it is for every layer, else a table `{pattern: number}` as of rules.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from dns_jax.schedules import polynomial_density, update_at
from dns_jax.surgery import Rule, surgery
from dns_jax.thresholds import layer_density, std
from dns_jax.typing import Schedule, ThresholdRule


def han(
    c_rate: float | Mapping[str, float],
    rounds: Sequence[int],
    key: jax.Array,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Prunes in rounds what is below c standard deviations of its layer, and trains on between.

    Args:
      c_rate: c of `dns_jax.thresholds.std`, over what a layer still has.
      rounds: the steps at which it prunes.
      key: as for `surgery`; of use to a random importance alone.
      **options: `takes_part`, `layer_of` and `importance` of `surgery`.

    Returns:
      A transformation as of `surgery`.

    Raises:
      As `surgery`, `std` and `update_at` do.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {'fc1': jnp.array([0.2, -1.0, 4.0, -4.0])}
      >>> pruner = han(0.5, rounds=[0], key=jax.random.key(0))
      >>> _, state = pruner.update(params, pruner.init(params), params)
      >>> state.masks['fc1']
      Array([False, False,  True,  True], dtype=bool)

    Reference:
      Han et al. 2015, Learning both weights and connections for efficient neural networks.
    """
    probability = update_at(rounds)
    rules = {pattern: Rule(std(c), probability, 1) for pattern, c in _table(c_rate).items()}
    return surgery(rules, key, splicing=False, **options)


def one_shot(
    density: float | Mapping[str, float],
    step: int,
    key: jax.Array,
    divide: Callable[[float | Schedule], ThresholdRule] = layer_density,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Prunes once, to the density wanted.

    Args:
      density: kept / all connections, in (0, 1].
      step: the step at which it prunes.
      key: as for `surgery`; of use to a random importance alone.
      divide: makes the threshold rule of a density, `layer_density` or `global_density`.
      **options: `takes_part`, `layer_of` and `importance` of `surgery`.

    Returns:
      A transformation as of `surgery`.

    Raises:
      As `surgery`, `divide` and `update_at` do.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {'fc1': jnp.array([0.2, -1.0, 4.0, -4.5])}
      >>> pruner = one_shot(0.25, step=0, key=jax.random.key(0))
      >>> _, state = pruner.update(params, pruner.init(params), params)
      >>> state.masks['fc1']
      Array([False, False, False,  True], dtype=bool)
    """
    probability = update_at([step])
    rules = {pattern: Rule(divide(d), probability, 1) for pattern, d in _table(density).items()}
    return surgery(rules, key, splicing=False, **options)


def gradual(
    density: float | Mapping[str, float],
    start: int,
    end: int,
    every: int,
    key: jax.Array,
    divide: Callable[[float | Schedule], ThresholdRule] = layer_density,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Prunes again and again, along a cubic ramp of the density.

    Args:
      density: kept / all connections in the end, in (0, 1].
      start: the step at which the ramp leaves 1.
      end: the step at which it is done, and the last at which anything is pruned.
      every: steps from one pruning to the next, at least 1.
      key: as for `surgery`; of use to a random importance alone.
      divide: makes the threshold rule of a density, `layer_density` or `global_density`.
      **options: `takes_part`, `layer_of` and `importance` of `surgery`.

    Returns:
      A transformation as of `surgery`.

    Raises:
      ValueError: if `every` is less than 1.
      As `surgery`, `divide` and `polynomial_density` do.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {'fc1': jnp.arange(1.0, 9.0)}
      >>> pruner = gradual(0.25, start=0, end=4, every=2, key=jax.random.key(0))
      >>> state = pruner.init(params)
      >>> for step in range(5):
      ...     _, state = pruner.update(params, state, params)
      ...     print(step, int(state.masks['fc1'].sum()))
      0 8
      1 8
      2 3
      3 3
      4 2

    Reference:
      Zhu and Gupta 2017, To prune, or not to prune.
    """
    if every < 1:
        raise ValueError(f'every must be at least 1, but is {every!r}')
    ramps = {
        pattern: polynomial_density(number, start, end)
        for pattern, number in _table(density).items()
    }
    probability = update_at([*range(start, end, every), end])
    rules = {pattern: Rule(divide(ramp), probability, 1) for pattern, ramp in ramps.items()}
    return surgery(rules, key, splicing=False, **options)


def _table(numbers: float | Mapping[str, float]) -> Mapping[str, float]:
    return numbers if isinstance(numbers, Mapping) else {'*': numbers}
