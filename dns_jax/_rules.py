"""Rules at work: which layers follow them, and when they are asked for thresholds.

Owns no state: `surgery` carries the thresholds from step to step.
"""

import functools
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dns_jax.densities import DensityRule
from dns_jax.importance import magnitude
from dns_jax.layers import abridge, map_leaves, match_patterns, named_leaves
from dns_jax.masks import discriminate
from dns_jax.roles import has_axes
from dns_jax.schedules import check_step
from dns_jax.stacking import slice_paths
from dns_jax.typing import (
    Importance,
    LayerOf,
    Params,
    Rule,
    TakesPart,
    ThresholdRule,
    Thresholds,
)


class Plan:
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
        self.patterns = {
            pattern: [layer for layer, (own, _) in matches.items() if own == pattern]
            for pattern in table
        }
        # Of the leaves under a rule, the layer of each.
        self.paths = {path: layer for layer in matches for path in self.layers[layer]}

    def arrays(self, weights, masks):
        """Gives for each pattern the weights and the masks of its layers."""
        weights, masks = dict(named_leaves(weights)), dict(named_leaves(masks))
        for pattern, layers in self.patterns.items():
            yield (
                pattern,
                {layer: [weights[path] for path in self.layers[layer]] for layer in layers},
                {layer: [masks[path] for path in self.layers[layer]] for layer in layers},
            )

    def check_state(self, masks, thresholds, stacked) -> None:
        """Refuses a state that was made under other rules, another `takes_part` or `layer_of`."""
        if set(self.paths.values()) != set(thresholds):
            raise ValueError(
                f'the state has thresholds of the layers {abridge(sorted(thresholds))}, but by '
                'rules, takes_part and layer_of they are '
                f'{abridge(sorted(set(self.paths.values())))}; to go on from its masks under '
                'others, give them to surgery(masks=…)'
            )
        taking_part = {path for paths in self.layers.values() for path in paths}
        for path, mask in named_leaves(masks):
            slices = slice_paths(stacked or {}, path, mask) if jnp.ndim(mask) else [path]
            by_state, by_rules = has_axes(path, mask), not self.paths.keys().isdisjoint(slices)
            if by_rules > by_state or by_state > (not taking_part.isdisjoint(slices)):
                raise ValueError(
                    f'{path!r} takes part by {"the rules" if by_rules else "the state"} alone; to '
                    'go on from its masks, give them to surgery(masks=…)'
                )

    def update(self, weights, masks, bands, coins, splicing):
        """Applies h_k to the layers that have a band and whose coin says so."""
        weights = dict(named_leaves(weights))

        def of_leaf(path, mask):
            layer = self.paths.get(path)
            if layer not in bands:
                return mask
            new = discriminate(weights[path], mask, bands[layer])
            if not splicing:  # a threshold of 0 would let zeros in again
                new &= mask
            return jnp.where(coins[layer], new, mask)

        return map_leaves(of_leaf, masks)


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
            f'refresh_every of {pattern!r} is 0, so its density would be asked once, at init, and '
            'stay at the first value of its schedule; leave refresh_every out to follow it'
        )
    if every == 0 and importance is not magnitude:
        raise ValueError(
            f'refresh_every of {pattern!r} must be at least 1 for thresholds by '
            f'importance={importance!r}, which is not known at the start, but is 0'
        )
    return rule._replace(refresh_every=every)


def chance(rule: Rule, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gives σ of a step, and whether it is the last update: by density that is certain.

    Args:
      rule: completed.
      count: of steps, an int32 scalar.

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
    """Says whether a rule is a density that is followed at every step.

    Args:
      rule: completed.

    Returns:
      True if so.
    """
    return rule.refresh_every is None


def ask(rule: Rule, weights, masks, count, bands) -> dict[str, Thresholds]:
    """Asks a rule for thresholds where that is due; those of a followed density follow.

    Args:
      rule: completed.
      weights: by layer, what its thresholds are compared with.
      masks: of these.
      count: of steps, an int32 scalar.
      bands: the last thresholds by layer.

    Returns:
      The thresholds by layer.
    """
    sigma, last = chance(rule, count)
    if is_followed(rule):
        density: Any = rule.thresholds
        # Where a coin failed, the number kept says nothing of the thresholds.
        sure = (sigma >= 1) & (functools.reduce(jnp.minimum, [b.high for b in bands.values()]) >= 0)
        followed = density.follow(weights, masks, count, bands)
        return jax.tree.map(functools.partial(jnp.where, sure), followed, bands)
    if not rule.refresh_every:
        return bands
    due = last | ((count % rule.refresh_every == 0) & (sigma > 0))
    compute = functools.partial(compute_thresholds, rule.thresholds, weights, masks, count)
    return jax.lax.cond(due, compute, lambda: bands)


def correct(rule: Rule, weights, masks, count, bands) -> tuple[jax.Array, dict[str, Thresholds]]:
    """Corrects thresholds of a density that is followed, where they kept another number.

    Args:
      rule: completed.
      weights: by layer, what its thresholds are compared with.
      masks: of these, updated by the last thresholds.
      count: of steps, an int32 scalar.
      bands: the last thresholds by layer.

    Returns:
      Whether they were wrong, a bool scalar, and the thresholds by layer.
    """
    density: Any = rule.thresholds
    sigma, last = chance(rule, count)
    unknown = functools.reduce(jnp.logical_or, (band.high < 0 for band in bands.values()))
    wrong = (sigma > 0) & (unknown | ~density.is_near(weights, masks, count, last))
    solve = functools.partial(density.solve, weights, masks, count, bands, last | unknown)
    return wrong, jax.lax.cond(wrong, solve, lambda: bands)


def compute_thresholds(rule: ThresholdRule, weights, masks, count) -> dict[str, Thresholds]:
    """Computes the bands of a rule's layers, and holds it to their names and type.

    Args:
      rule: of thresholds.
      weights: by layer.
      masks: of these.
      count: of steps, an int32 scalar.

    Returns:
      The thresholds by layer, float32 scalars.

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
