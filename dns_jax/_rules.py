"""Rules at work: which layers follow them, and when they are asked for thresholds.

Owns no state: `surgery` carries the thresholds from step to step. Below, a `rule` is one that
`complete_rule` gave; `weights` is what its thresholds are compared with and `masks` theirs, both
lists of arrays by layer; `count` is that of steps, an int32 scalar; `bands` are the thresholds by
layer.
"""

import functools
import numbers
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dns_jax._checks import abridge, check_step
from dns_jax._following import DensityRule
from dns_jax.importance import magnitude
from dns_jax.layers import has_axes, map_leaves, match_patterns, named_leaves
from dns_jax.masks import discriminate, throw_coins
from dns_jax.stacking import slice_paths
from dns_jax.typing import (
    Importance,
    LayerArrays,
    LayerOf,
    Params,
    Rule,
    TakesPart,
    ThresholdRule,
    Thresholds,
)


class LayersByRule:
    """Which layers follow which rule, and which leaves they have.

    Args:
      table: `{pattern: rule}`.
      takes_part: which leaves take part.
      layer_of: which leaves form one layer.
      weights: a tree of the leaves.
      may_be_empty: whether no leaf need take part.

    Raises:
      ValueError: if a pattern matches no layer, or no leaf takes part and one must.
    """

    def __init__(
        self,
        table: Mapping[str, Rule],
        takes_part: TakesPart,
        layer_of: LayerOf,
        weights: Params,
        may_be_empty: bool,
    ):
        paths: dict[str, list[str]] = {}
        seen: set[str] = set()
        for path, leaf in named_leaves(weights):
            if path in seen:
                raise ValueError(f'two leaves of params have the path {path!r}')
            seen.add(path)
            if 0 not in jnp.shape(leaf) and takes_part(path, leaf):
                paths.setdefault(layer_of(path), []).append(path)
        if table and not paths and not may_be_empty:
            names = abridge(path for path, _ in named_leaves(weights))
            raise ValueError(
                f'no leaf of params takes part, of {names}; takes_part=dns_jax.has_axes takes all '
                'that have axes'
            )
        self.layers = dict(sorted(paths.items()))
        matches = match_patterns(table, self.layers)
        self.rules = [
            (rule, [layer for layer, (own, _) in matches.items() if own == pattern])
            for pattern, rule in table.items()
        ]
        # Of the leaves under a rule, the layer of each.
        self.paths = {path: layer for layer in matches for path in self.layers[layer]}

    def arrays(self, weights, masks) -> Iterator[tuple[Rule, LayerArrays, LayerArrays]]:
        """Gives each rule with the weights and the masks of its layers."""
        weights, masks = dict(named_leaves(weights)), dict(named_leaves(masks))
        for rule, layers in self.rules:
            yield (
                rule,
                {layer: [weights[path] for path in self.layers[layer]] for layer in layers},
                {layer: [masks[path] for path in self.layers[layer]] for layer in layers},
            )

    def check_state(self, masks, thresholds, stacked) -> None:
        """Refuses a state that was made under other rules, another `takes_part` or `layer_of`."""
        own, theirs = set(self.paths.values()), set(thresholds)
        if own != theirs:
            raise ValueError(
                'the layers must be those of the state, but only the state has '
                f'{sorted(theirs - own)[:3]}, and only rules, takes_part and layer_of give '
                f'{sorted(own - theirs)[:3]}; to continue from the masks of the state, give them '
                'to surgery(masks=…)'
            )
        taking_part = {path for paths in self.layers.values() for path in paths}
        for path, mask in named_leaves(masks):
            slices = slice_paths(stacked or {}, path, mask) if jnp.ndim(mask) else [path]
            by_state, by_rules = has_axes(path, mask), not self.paths.keys().isdisjoint(slices)
            if by_rules > by_state or by_state > (not taking_part.isdisjoint(slices)):
                raise ValueError(
                    f'{path!r} takes part only by the {"state" if by_state else "rules"}; to '
                    'continue from the masks of the state, give them to surgery(masks=…)'
                )

    def start(self, weights, masks, count) -> dict[str, Thresholds]:
        """Asks all rules for thresholds; a followed density begins anew in the first update."""
        bands = {}
        for rule, seen, kept in self.arrays(weights, masks):
            compute = start_unknown if is_followed(rule) else compute_thresholds
            # What is jitted compiles in one.
            bands |= jax.jit(functools.partial(compute, rule.thresholds))(seen, kept, count)
        return bands

    def is_due(self, count) -> jax.Array:
        """Says whether any layer may be updated at a step."""
        due = (sigma_at(rule, count)[0] > 0 for rule, _ in self.rules)
        return functools.reduce(jnp.logical_or, due, jnp.array(False))

    def operate(self, weights, key, count, masks, bands, splicing):
        """Updates thresholds and masks: an iteration of Algorithm 1 up to its optimizer."""
        for rule, seen, kept in self.arrays(weights, masks):
            bands = bands | ask(rule, seen, kept, count, _of(seen, bands))
        masks = self._update(weights, key, count, masks, bands, splicing)
        if not any(is_followed(rule) for rule, _ in self.rules):
            return masks, bands
        judged = [
            follow(rule, seen, kept, count, _of(seen, bands))
            for rule, seen, kept in self.arrays(weights, masks)
        ]

        def correct_and_update(turn, carry):
            masks, following = carry
            corrected, rules = dict(bands), self.arrays(weights, masks)
            for (wrong, _), (rule, seen, kept) in zip(judged, rules, strict=True):
                own = correct(wrong, rule, seen, kept, count + turn, _of(seen, bands))
                corrected |= own
                choose = functools.partial(jnp.where, wrong)
                following = following | jax.tree.map(choose, own, _of(seen, following))
            masks = self._update(weights, key, count + turn, masks, corrected, splicing)
            return masks, following

        moved = functools.reduce(operator.or_, (own for _, own in judged))
        any_wrong = functools.reduce(jnp.logical_or, (wrong for wrong, _ in judged))
        return once_if(any_wrong, correct_and_update, (masks, moved))[1]

    def _update(self, weights, key, count, masks, bands, splicing):
        """Applies h_k to the layers that have a threshold and whose coin says so."""
        chances, known = {}, {}
        for rule, layers in self.rules:
            chances |= dict.fromkeys(layers, sigma_at(rule, count)[0])
            if is_followed(rule):  # it has no thresholds before it is corrected
                known |= {layer: bands[layer].high >= 0 for layer in layers}
        coins = throw_coins(jax.random.fold_in(key, count), chances)
        coins |= {layer: coins[layer] & is_known for layer, is_known in known.items()}
        weights = dict(named_leaves(weights))

        def of_leaf(path, mask):
            if path not in self.paths:
                return mask
            layer = self.paths[path]
            new = discriminate(weights[path], mask, bands[layer])
            if not splicing:  # a threshold of 0 would let zeros in again
                new &= mask
            return jnp.where(coins[layer], new, mask)

        return map_leaves(of_leaf, masks)


def once_if(
    due: jax.Array, step: Callable[[jax.Array, Any], Any], carry: Any
) -> tuple[jax.Array, Any]:
    """Takes a step or none, as a loop of one turn or none.

    Not by a cond, for which XLA copies what is carried even where nothing is due.

    Args:
      due: whether the step is taken.
      step: of the number of the turn, always 0, and the carry. XLA does not know the turn: what
        depends on it is not computed before the loop, where nothing may be due.
      carry: what the step changes.

    Returns:
      How many turns there were, and the carry.
    """
    return jax.lax.while_loop(
        lambda state: state[0] < due.astype(jnp.int32),
        lambda state: (state[0] + 1, step(*state)),
        (jnp.int32(0), carry),
    )


def complete_rule(pattern: str, rule: Any, importance: Importance, splicing: bool) -> Rule:
    """Checks a rule of the table and completes what it leaves open.

    Args:
      pattern: whose rule it is.
      rule: what should be a rule.
      importance: of the surgery.
      splicing: of the surgery.

    Returns:
      The rule with σ a schedule and `refresh_every` settled: None where a density is followed.

    Raises:
      TypeError: if it is no rule, or σ neither a number nor callable.
      ValueError: if a number is out of range, or the rule would never prune what it says.
    """
    if not isinstance(rule, Rule):
        raise TypeError(f'the rule of {pattern!r} must be a dns_jax.Rule, but is {rule!r}')
    sigma, every = rule.update_probability, rule.refresh_every
    if not callable(rule.thresholds):
        raise TypeError(
            f'thresholds of {pattern!r} must be a rule, as dns_jax.mean_std(c_rate) makes one, but '
            f'is {rule.thresholds!r}'
        )
    if not callable(sigma):
        is_number = isinstance(sigma, (numbers.Real, jax.Array)) and jnp.ndim(sigma) == 0
        if not is_number or not 0 <= sigma <= 1:
            raise (ValueError if is_number else TypeError)(
                f'update_probability of {pattern!r} must be a number in [0, 1] or a schedule, but '
                f'is {sigma!r}'
            )
        rule = rule._replace(update_probability=lambda step, number=float(sigma): number)
    by_density = isinstance(rule.thresholds, DensityRule)
    if every is None and not by_density:
        every = 0
    if every is None and not splicing:
        every = 1  # what a threshold prunes too much would not come back
    if every is not None:
        check_step(f'refresh_every of {pattern!r}', every)
    if every == 0 and by_density and rule.thresholds.changes:
        raise ValueError(
            f'refresh_every of {pattern!r} is 0, so its density would be read once, at init, and '
            'stay at the first value of its schedule; leave refresh_every out to follow the '
            'schedule'
        )
    if every == 0 and importance is not magnitude:
        raise ValueError(
            f'refresh_every of {pattern!r} must be at least 1 for thresholds by '
            f'importance={importance!r}, which is not known at the start, but is 0'
        )
    return rule._replace(refresh_every=every)


def sigma_at(rule: Rule, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gives σ of a step, and whether it is the last update: by density that is certain.

    Returns:
      σ, a float32 scalar, and a bool scalar.
    """
    sigma: Any = rule.update_probability
    now, then = (jnp.asarray(sigma(step), jnp.float32) for step in (count, count + 1))
    last = (now > 0) & (then <= 0)
    if isinstance(rule.thresholds, DensityRule):
        now = jnp.where(last, 1.0, now)
    return now, last


def is_followed(rule: Rule) -> bool:
    """Says whether a rule is a density that is followed at every step."""
    return rule.refresh_every is None


def ask(rule: Rule, weights, masks, count, bands) -> dict[str, Thresholds]:
    """Asks a rule for thresholds, where it is not followed and that is due."""
    if not rule.refresh_every:
        return bands
    sigma, last = sigma_at(rule, count)
    due = last | ((count % rule.refresh_every == 0) & (sigma > 0))
    compute = functools.partial(compute_thresholds, rule.thresholds, weights, masks, count)
    return jax.lax.cond(due, compute, lambda: bands)


def follow(rule: Rule, weights, masks, count, bands) -> tuple[jax.Array, dict[str, Thresholds]]:
    """Judges thresholds by the masks that they made, and moves them for the next step.

    Returns:
      Whether they must be corrected now, a bool scalar, and the moved ones by layer. Thresholds
      stay where the rule is not followed.
    """
    if not is_followed(rule):
        return jnp.array(False), bands
    density: Any = rule.thresholds
    (sigma, last), (following, _) = (sigma_at(rule, when) for when in (count, count + 1))
    near, moved = density.follow(weights, masks, count, bands, last)
    unknown = _unknown(bands)
    # Where a coin fails, what is kept says nothing of the thresholds.
    stay = unknown | (sigma < 1) | (following < 1)
    bands = jax.tree.map(lambda own, new: jnp.where(stay, own, new), bands, moved)
    return (sigma > 0) & (unknown | ~near), bands


def correct(wrong, rule: Rule, weights, masks, count, bands) -> dict[str, Thresholds]:
    """Corrects the thresholds of a rule where `follow` said that they must be."""
    if not is_followed(rule):
        return bands
    density: Any = rule.thresholds
    exactly = sigma_at(rule, count)[1] | _unknown(bands)
    solve = functools.partial(density.solve, weights, masks, count, bands, exactly)
    return jax.lax.cond(wrong, solve, lambda: bands)


def _unknown(bands) -> jax.Array:
    return functools.reduce(jnp.logical_or, (band.high < 0 for band in bands.values()))


def _of(layers, bands) -> dict[str, Thresholds]:
    return {layer: bands[layer] for layer in layers}


def compute_thresholds(rule: ThresholdRule, weights, masks, count) -> dict[str, Thresholds]:
    """Computes the bands of a rule's layers, and holds it to their names and type.

    Raises:
      ValueError: if the rule names other layers.
    """
    bands = rule(weights, masks, count)
    if sorted(bands) != sorted(weights):
        raise ValueError(
            f'thresholds must name the layers {abridge(weights)}, but name {abridge(bands)}'
        )
    return {
        layer: Thresholds(jnp.float32(band.low), jnp.float32(band.high))
        for layer, band in bands.items()
    }


def start_unknown(rule: ThresholdRule, weights, masks, count) -> dict[str, Thresholds]:
    """Starts a density at −1, no threshold yet, and lets it refuse what it cannot keep."""
    shapes = jax.eval_shape(rule, weights, masks, count)
    return jax.tree.map(lambda bound: jnp.full(bound.shape, -1, bound.dtype), shapes)
