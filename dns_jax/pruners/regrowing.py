"""The pruner that exchanges connections for others: RigL and SET.

It keeps the contract of `dns_jax.transformation`, as those of `by_rules` do.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dns_jax._core import counts
from dns_jax._core.checks import check_step
from dns_jax._core.search import bisect
from dns_jax._rules import LayersByRule, having_mask
from dns_jax.densities import layer_density
from dns_jax.importance import chance, gradient
from dns_jax.layers import (
    group_by_layer,
    is_kernel,
    map_leaves,
    parent_path,
)
from dns_jax.masks import count_kept, discriminate
from dns_jax.pruners.by_rules import iterative
from dns_jax.stacking import restack, unstack
from dns_jax.structures import SINGLE_WEIGHTS, NofM, Structure
from dns_jax.transformation import Surgery
from dns_jax.typing import (
    Importance,
    LayerOf,
    Rule,
    Schedule,
    TakesPart,
    ThresholdRule,
    Thresholds,
)


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
    structure: Structure | Mapping[str, Structure] = SINGLE_WEIGHTS,
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
      structure: what is dropped and grown together, as in a `Rule`. Under N of M each M grows what
        it dropped, so that n is not of all the layer but of each.

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
    start = iterative(density, [0], key, density_rule, structure, importance=initial, **options)

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
            rules = {'*': Rule(structure=structure)}
            groups = LayersByRule(
                rules, having_mask(masks, {}), layer_of, weights, may_be_empty=True
            )
            exchanged = _exchange(
                share,
                groups.score_groups(scores),
                groups.score_groups(weights),
                groups.gather_groups(masks),
                groups.structures,
                layer_of,
            )
            masks = groups.spread_groups(exchanged, masks)
            return restack(stacked, params, masks) if stacked else masks

        masks = jax.lax.cond(
            (count > 0) & (count < stop) & (count % every == 0), exchange, lambda: pruned.masks
        )
        return updates, pruned._replace(masks=masks)

    return Surgery(start.init, update_fn)


def _exchange(share, scores, weights, masks, structures, layer_of) -> dict[str, jax.Array]:
    """Drops a share of every layer's groups, and grows as many by their scores; all by path."""
    kept = count_kept(masks, layer_of)
    wanted = {
        layer: count - jnp.round(share * jnp.float32(count)).astype(jnp.int32)
        for layer, count in kept.items()
    }
    magnitudes = jax.tree.map(lambda mask, leaf: jnp.where(mask, leaf, 0), masks, weights)
    survivors = jax.tree.map(jnp.logical_and, masks, _keep_largest(magnitudes, wanted, layer_of))
    # What survives by a tie takes the place of a new one.
    left = count_kept(survivors, layer_of)
    free = {layer: kept[layer] - left[layer] for layer in kept}
    candidates = jax.tree.map(lambda mask, leaf: jnp.where(mask, 0, leaf), survivors, scores)
    grown = _keep_largest(candidates, free, layer_of)
    for path, structure in structures.items():
        if isinstance(structure, NofM):
            order = jnp.where(survivors[path], jnp.inf, jnp.abs(candidates[path]))
            grown[path] = structure.largest(order, masks[path])
    return {path: survivors[path] | (new & (candidates[path] != 0)) for path, new in grown.items()}


def _keep_largest(tree, wanted, layer_of) -> dict[str, jax.Array]:
    """Makes masks of the largest magnitudes: of each layer as many as wanted, and what ties."""
    thresholds = {}
    for layer, leaves in group_by_layer(tree, layer_of).items():
        least = counts.from_array(jnp.maximum(jnp.int32(wanted[layer]), 1))

        def excess_at(found, leaves=leaves, least=least):
            kept = [jnp.abs(leaf).astype(jnp.float32) >= found[0] for leaf in leaves]
            return [counts.minus(counts.count_all(kept), least)]

        (thresholds[layer],) = bisect(excess_at, 1)

    def keep(path, leaf):
        layer = layer_of(path)
        band = Thresholds(thresholds[layer], thresholds[layer])
        return discriminate(leaf, jnp.array(True), band) & (wanted[layer] > 0)

    return map_leaves(keep, tree)
