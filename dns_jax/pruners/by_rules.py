"""Pruners that are `surgery` under rules of their own.

So they keep the contract of `dns_jax.transformation`: updates pass through, the state is a
`SurgeryState`, the masks are found in it. A pruner takes one number for every layer, or a table
`{pattern: number}` as `surgery` takes rules.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dns_jax._core.checks import as_table, check_density, check_step, check_steps
from dns_jax.densities import layer_density
from dns_jax.schedules import polynomial_density, update_at
from dns_jax.structures import SINGLE_WEIGHTS, NofM, Structure
from dns_jax.thresholds import weight_std
from dns_jax.transformation import Surgery, surgery
from dns_jax.typing import Rule, Schedule, ThresholdRule


def han(
    c_rate: float | Mapping[str, float],
    rounds: Sequence[int],
    key: jax.Array,
    structure: Structure | Mapping[str, Structure] = SINGLE_WEIGHTS,
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
      structure: what is pruned together, as in a `Rule`. By groups s is the standard deviation of
        their importances, which are above zero and differ less than weights do.
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
        pattern: Rule(weight_std(c), probability, refresh_every=1, structure=structure)
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
    structure: Structure | Mapping[str, Structure] = SINGLE_WEIGHTS,
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
      structure: what is pruned together, as in a `Rule`.
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

        rules[pattern] = Rule(
            density_rule(schedule), probability, refresh_every=1, structure=structure
        )
    return surgery(rules, key, splicing=False, **options)


def gradual(
    density: float | Mapping[str, float],
    start: int,
    end: int,
    every: int,
    key: jax.Array,
    density_rule: Callable[[float | Schedule], ThresholdRule] = layer_density,
    structure: Structure | Mapping[str, Structure] = SINGLE_WEIGHTS,
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
      structure: what is pruned together, as in a `Rule`.
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
        pattern: Rule(density_rule(ramp), probability, refresh_every=1, structure=structure)
        for pattern, ramp in ramps.items()
    }
    return surgery(rules, key, splicing=False, **options)


def straight_through(
    density: float | Schedule | Mapping[str, float | Schedule],
    key: jax.Array,
    density_rule: Callable[..., ThresholdRule] = layer_density,
    structure: Structure | Mapping[str, Structure] = SINGLE_WEIGHTS,
    **options: Any,
) -> Surgery:
    r"""Chooses the masks anew at every step: the straight-through estimator on pruned weights.

    .. math::
      T_k \leftarrow [\,|W_k| \ge t_k\,], \quad
      W \leftarrow W - \gamma\,\nabla L(W \odot T)

    with t_k the threshold that keeps the density. Surgery's way to train, without its band and
    without its coin. `dns_jax.sparse_training.decay_pruned` makes it SR-STE.

    As everywhere here, the masks of the state are those of the weights one step before. The paper
    takes the gradient at those of the weights themselves; for that, ask for them first, as
    ``pruner.update(params, state, params)[1].masks``.

    Args:
      density: kept / all connections, in (0, 1], or a schedule of it, as in `dns_jax.schedules`.
      key: as for `surgery`; only a random importance uses it.
      density_rule: makes the threshold rule of a density, `layer_density` or `global_density`.
      structure: what is pruned together, as in a `Rule`.
      **options: `takes_part`, `layer_of`, `importance`, `masks` and `stacked` of `surgery`.

    Returns:
      A transformation as of `surgery`.

    Raises:
      ValueError: if `density` is a number outside (0, 1].
      As `surgery` does.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> pruner = straight_through(0.5, jax.random.key(0))
      >>> state = pruner.init({'kernel': jnp.zeros(4)})
      >>> for weights in ([0.2, -1.0, 4.0, -4.5], [5.0, -1.0, 4.0, -4.5]):
      ...     params = {'kernel': jnp.array(weights)}
      ...     _, state = pruner.update(params, state, params)
      ...     print(state.masks['kernel'])
      [False False  True  True]
      [ True False False  True]

    Reference:
      Bengio et al. 2013, Estimating or propagating gradients through stochastic neurons; Zhou et
      al. 2021, Learning N:M fine-grained structured sparse neural networks from scratch.
    """
    bandless = {
        pattern: dataclasses.replace(own, hysteresis=0.0) if isinstance(own, NofM) else own
        for pattern, own in as_table(structure).items()
    }
    rules = {
        # Thresholds that are followed may keep a little more or less.
        pattern: Rule(density_rule(wanted, hysteresis=0.0), refresh_every=1, structure=bandless)
        for pattern, wanted in as_table(density).items()
    }
    return surgery(rules, key, **options)


def ac_dc(
    density: float | Mapping[str, float],
    start: int,
    end: int,
    every: int,
    key: jax.Array,
    density_rule: Callable[[float | Schedule], ThresholdRule] = layer_density,
    structure: Structure | Mapping[str, Structure] = SINGLE_WEIGHTS,
    **options: Any,
) -> Surgery:
    r"""Alternates between a pruned and a dense network, and ends with a pruned one.

    .. math::
      d(i) = \begin{cases}
        1 & \text{if } i < \text{start} \\
        d & \text{if } i \ge \text{end}, \text{ or }
          \lfloor (i - \text{start}) / \text{every} \rfloor \text{ is even} \\
        1 & \text{otherwise}
      \end{cases}

    Where d(i) falls to d, the largest weights are kept and all others pruned; where it rises to 1,
    all connections return. Between, the masks are held. Pruned weights must be zero and not learn:
    `dns_jax.sparse_training.train_kept` sees to that. The authors also reset the momentum after
    each pruned phase; here that of pruned weights fades in it, as they have no gradient.

    Args:
      density: d, kept / all connections in the pruned phases, in (0, 1].
      start: the step at which the dense warm-up ends and the first pruned phase begins.
      end: the step from which on the network stays pruned.
      every: steps of each phase between, at least 1.
      key: as for `surgery`; only a random importance uses it.
      density_rule: makes the threshold rule of a density, `layer_density` or `global_density`.
      structure: what is pruned together, as in a `Rule`.
      **options: `takes_part`, `layer_of`, `importance` and `stacked` of `surgery`.

    Returns:
      A transformation as of `surgery`.

    Raises:
      ValueError: if `density` is outside (0, 1], or `start`, `end` or `every` is out of range.
      As `surgery` does.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> params = {'kernel': jnp.arange(1.0, 9.0)}
      >>> pruner = ac_dc(0.25, start=1, end=5, every=2, key=jax.random.key(0))
      >>> state = pruner.init(params)
      >>> for step in range(6):
      ...     _, state = pruner.update(params, state, params)
      ...     print(step, int(state.masks['kernel'].sum()))
      0 8
      1 2
      2 2
      3 8
      4 8
      5 2

    Reference:
      Peste et al. 2021, AC/DC: alternating compressed/decompressed training of deep neural
      networks, algorithm 1.
    """
    check_step('start', start)
    check_step('end', end, start + 1)
    check_step('every', every, 1)

    def is_pruned(step):
        in_turn = (step >= start) & ((step - start) // every % 2 == 0)
        return in_turn | (step >= end)

    def changes(step):
        return jnp.float32(is_pruned(step) != is_pruned(step - 1))

    rules = {}
    for pattern, pruned in _density_table(density).items():

        def schedule(step, pruned=pruned):
            return jnp.where(is_pruned(step), jnp.float32(pruned), jnp.float32(1))

        rules[pattern] = Rule(density_rule(schedule), changes, refresh_every=1, structure=structure)
    pruner = surgery(rules, key, **options)

    def update_fn(updates, state: Any, params: Any = None, **extra_args):
        result: Any = pruner.update(updates, state, params, **extra_args)
        updates, new = result
        # All return, N of M too, which keeps no more whatever the density is.
        is_dense = ~is_pruned(state.count)
        return updates, new._replace(masks=jax.tree.map(lambda mask: mask | is_dense, new.masks))

    return Surgery(pruner.init, update_fn)


def _density_table(density: float | Mapping[str, float]) -> dict[str, float]:
    table = as_table(density)
    for number in table.values():
        check_density('density', number)
    return table
