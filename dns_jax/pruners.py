"""The pruners that surgery is compared with.

Each is `surgery` without splicing under rules of its own, so it keeps the contract of that module:
updates pass through, the state is a `SurgeryState`, the masks are found in it. Pruned connections
never return, but for those of `regrow`. A pruner takes one number for every layer, or a table
`{pattern: number}` as `surgery` takes rules.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dns_jax import _counts
from dns_jax._checks import as_table, check_density, check_step, check_steps
from dns_jax._search import bisect
from dns_jax.densities import layer_density
from dns_jax.importance import chance, gradient
from dns_jax.layers import group_by_layer, is_kernel, map_leaves, parent_path
from dns_jax.masks import count_kept, discriminate
from dns_jax.schedules import polynomial_density, update_at
from dns_jax.stacking import restack, unstack
from dns_jax.thresholds import weight_std
from dns_jax.transformation import Surgery, surgery
from dns_jax.typing import (
    Importance,
    LayerOf,
    Masks,
    Rule,
    Schedule,
    TakesPart,
    ThresholdRule,
    Thresholds,
)


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


def regrow(
    density: float | Mapping[str, float],
    every: int,
    stop: int,
    key: jax.Array,
    drop: float | Schedule = 0.3,
    growth: Importance = gradient,
    initial: Importance = chance,
    density_rule: Callable[[float | Schedule], ThresholdRule] = layer_density,
    takes_part: TakesPart = is_kernel,
    layer_of: LayerOf = parent_path,
    stacked: Mapping[str, int] | None = None,
) -> Surgery:
    r"""Keeps the number of connections, and now and then exchanges the smallest for others.

    .. math::
      T_k \leftarrow S_k \cup \mathrm{largest}_{n}\left(|\text{growth}|, \overline{S_k}\right),
      \quad S_k = \mathrm{largest}_{|T_k| - n}(|W_k|, T_k), \quad n = \mathrm{round}(\alpha\,|T_k|)

    with α the share to drop. The first update prunes to the density by the initial importance.
    With growth by `importance.gradient` this is RigL, by `importance.chance` SET. Both let new
    connections start at zero: `dns_jax.sparse_training.train_kept` sees to that.

    Args:
      density: kept / all connections, in (0, 1].
      every: steps from one round to the next, at least 1; step 0 has none.
      stop: the first step without a round.
      key: as for `surgery`.
      drop: the share that is exchanged, in [0, 1], or a schedule of it. SET's is constant, RigL's
        falls as a cosine.
      growth: what says which connections to grow.
      initial: what says which to keep at first; for a trained network, pass `magnitude`.
      density_rule: makes the threshold rule of a density, `layer_density` or `global_density`.
      takes_part: as for `surgery`.
      layer_of: as for `surgery`.
      stacked: as for `surgery`.

    Returns:
      A transformation as of `surgery`. Connections that tie for the last place are all grown, those
      whose growth is 0 are not.

    Raises:
      ValueError: if `density`, `every`, `stop` or a number `drop` is out of range.
      As `surgery` does.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> params = {'kernel': jnp.array([0.2, -1.0, 4.0, -4.5])}
      >>> gradients = {'kernel': jnp.array([9.0, 1.0, 0.5, 0.1])}
      >>> pruner = regrow(0.5, 1, 9, jax.random.key(0), drop=0.5, initial=lambda key, w, g: w)
      >>> state = pruner.init(params)
      >>> for _ in range(2):
      ...     _, state = pruner.update(gradients, state, params)
      ...     print(state.masks['kernel'])
      [False False  True  True]
      [ True False False  True]

    Reference:
      Mocanu et al. 2018, Scalable training of artificial neural networks with adaptive sparse
      connectivity (SET); Evci et al. 2020, Rigging the lottery (RigL).
    """
    check_step('every', every, 1)
    check_step('stop', stop)
    if not callable(drop) and not 0 <= drop <= 1:
        raise ValueError(f'drop must be in [0, 1], but is {drop!r}')
    options: dict[str, Any] = {
        'takes_part': takes_part,
        'layer_of': layer_of,
        'stacked': stacked,
    }
    start = iterative(density, [0], key, density_rule, importance=initial, **options)

    def update_fn(updates, state: Any, params: Any = None, **extra_args):
        del extra_args
        count, before = state.count, state.masks
        pruned: Any = start.update(updates, state, params)[1]
        share = jnp.asarray(drop(count) if callable(drop) else drop, jnp.float32)

        def exchange():
            # By count: `surgery` uses ~count for the first importance, and its coins of this
            # count decide nothing.
            trees = params, before, updates
            weights, masks, gradients = unstack(stacked, *trees) if stacked else trees
            scores = growth(jax.random.fold_in(state.key, count), weights, gradients)
            masks = _exchange(share, scores, weights, masks, layer_of)
            return restack(stacked, params, masks) if stacked else masks

        masks = jax.lax.cond(
            (count > 0) & (count < stop) & (count % every == 0), exchange, lambda: pruned.masks
        )
        return updates, pruned._replace(masks=masks)

    return Surgery(start.init, update_fn)


def _density_table(density: float | Mapping[str, float]) -> dict[str, float]:
    table = as_table(density)
    for number in table.values():
        check_density('density', number)
    return table


def _exchange(share, scores, params, masks, layer_of) -> Masks:
    """Drops a share of every layer's connections, and grows as many by their scores."""
    kept = count_kept(masks, layer_of)
    wanted = {
        layer: count - jnp.round(share * jnp.float32(count)).astype(jnp.int32)
        for layer, count in kept.items()
    }
    magnitudes = jax.tree.map(
        lambda mask, leaf: jnp.where(mask, leaf, 0) if mask.ndim else mask, masks, params
    )
    survivors = jax.tree.map(jnp.logical_and, masks, _keep_largest(magnitudes, wanted, layer_of))
    # What survives by a tie takes the place of a new one.
    left = count_kept(survivors, layer_of)
    free = {layer: kept[layer] - left[layer] for layer in kept}
    candidates = jax.tree.map(
        lambda mask, leaf: jnp.where(mask, 0, leaf) if mask.ndim else mask, survivors, scores
    )
    grown = _keep_largest(candidates, free, layer_of)
    return jax.tree.map(
        lambda survivor, new, score: survivor | (new & (score != 0)) if new.ndim else survivor,
        survivors,
        grown,
        candidates,
    )


def _keep_largest(tree, wanted, layer_of) -> Masks:
    """Makes masks of the largest magnitudes: of each layer as many as wanted, and what ties."""
    thresholds = {}
    for layer, leaves in group_by_layer(tree, layer_of).items():
        least = _counts.from_array(jnp.maximum(jnp.int32(wanted[layer]), 1))

        def excess_at(found, leaves=leaves, least=least):
            kept = [jnp.abs(leaf).astype(jnp.float32) >= found[0] for leaf in leaves]
            return [_counts.minus(_counts.count_all(kept), least)]

        (thresholds[layer],) = bisect(excess_at, 1)

    def keep(path, leaf):
        if not leaf.ndim:
            return jnp.ones((), bool)
        layer = layer_of(path)
        band = Thresholds(thresholds[layer], thresholds[layer])
        return discriminate(leaf, jnp.array(True), band) & (wanted[layer] > 0)

    return map_leaves(keep, tree)
