"""Rules at work: which layers follow them, and when they are asked for thresholds.

Owns no state: `surgery` carries the thresholds from step to step. Below, a `rule` is one that
`complete_rule` gave; `layers` are those under it, as h_k sees them; `count` is that of steps, an
int32 scalar; `bands` are the thresholds by layer. Rules work on groups: `group_masks` has the mask
of each, by the path of its leaf.
"""

import functools
import numbers
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dns_jax._core.checks import abridge, as_table, check_step
from dns_jax._core.loops import once_if
from dns_jax._following import DensityRule
from dns_jax._sharing import Layer, Layers
from dns_jax.importance import magnitude
from dns_jax.layers import has_axes, map_leaves, match_patterns, named_leaves
from dns_jax.masks import throw_coins
from dns_jax.stacking import slice_paths
from dns_jax.structures import SINGLE_WEIGHTS, NofM, Structure
from dns_jax.typing import (
    Importance,
    LayerOf,
    Masks,
    Params,
    Rule,
    TakesPart,
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
      ValueError: if a pattern matches no layer, no leaf takes part and one must, or groups do not
        divide a leaf.
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
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path, leaf in named_leaves(weights):
            if path in self.shapes:
                raise ValueError(f'two leaves of params have the path {path!r}')
            self.shapes[path] = jnp.shape(leaf)
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

        self.structures = dict.fromkeys(self.paths, SINGLE_WEIGHTS)
        for rule, names in self.rules:
            chosen = match_patterns(as_table(rule.structure), self.layers)
            for path in [path for name in names if name in chosen for path in self.layers[name]]:
                if len(self.shapes[path]) > 1:
                    self.structures[path] = chosen[self.paths[path]][1]
                    self.structures[path].check(path, self.shapes[path])

    def score_groups(self, weights) -> dict[str, jax.Array]:
        """Says how much each group of weights matters."""
        return {path: own.score(leaf) for path, own, leaf in self._under_rules(weights)}

    def gather_groups(self, masks) -> dict[str, jax.Array]:
        """Gives the masks of groups."""
        return {path: own.gather(mask) for path, own, mask in self._under_rules(masks)}

    def spread_groups(self, group_masks, masks):
        """Gives all weights the masks of their groups; what is under no rule stays."""
        own = self.structures

        def spread(path, mask):
            return own[path].spread(group_masks[path], mask) if path in own else mask

        return map_leaves(spread, masks)

    def _under_rules(self, tree) -> Iterator[tuple[str, Structure, jax.Array]]:
        for path, leaf in named_leaves(tree):
            if path in self.structures:
                yield path, self.structures[path], leaf

    def by_rule(self, scores, group_masks) -> Iterator[tuple[Rule, Layers]]:
        """Gives each rule with its layers."""

        def make_layer(paths):
            weights, masks = ([tree[path] for path in paths] for tree in (scores, group_masks))
            own = zip((self.structures[path] for path in paths), weights, masks, strict=True)
            limits = [structure.limit(leaf, mask) for structure, leaf, mask in own]
            return Layer(weights, masks, limits, tuple(self.shapes[path] for path in paths))

        for rule, names in self.rules:
            yield rule, {layer: make_layer(self.layers[layer]) for layer in names}

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
        for rule, layers in self.by_rule(self.score_groups(weights), self.gather_groups(masks)):
            compute = start_unknown if is_followed(rule) else compute_thresholds
            # What is jitted compiles in one.
            bands |= jax.jit(functools.partial(compute, rule.thresholds))(layers, count)
        return bands

    def is_due(self, count) -> jax.Array:
        """Says whether any layer may be updated at a step."""
        due = (sigma_at(rule, count)[0] > 0 for rule, _ in self.rules)
        return functools.reduce(jnp.logical_or, due, jnp.array(False))

    def operate(self, weights, key, count, masks, bands, splicing):
        """Updates thresholds and masks: an iteration of Algorithm 1 up to its optimizer."""
        # By count: XLA would score groups before the loop, where nothing may be due.
        weights, _ = jax.lax.optimization_barrier((weights, count))
        scores, groups = self.score_groups(weights), self.gather_groups(masks)
        for rule, layers in self.by_rule(scores, groups):
            bands = bands | ask(rule, layers, count, _of(layers, bands))
        groups = self._update(scores, key, count, groups, bands, splicing)
        if not any(is_followed(rule) for rule, _ in self.rules):
            return self.spread_groups(groups, masks), bands
        judged = [
            follow(rule, layers, count, _of(layers, bands))
            for rule, layers in self.by_rule(scores, groups)
        ]

        def correct_and_update(turn, carry):
            groups, following = carry
            corrected, rules = dict(bands), self.by_rule(scores, groups)
            for (wrong, _), (rule, layers) in zip(judged, rules, strict=True):
                own = correct(wrong, rule, layers, count + turn, _of(layers, bands))
                corrected |= own
                choose = functools.partial(jnp.where, wrong)
                following = following | jax.tree.map(choose, own, _of(layers, following))
            groups = self._update(scores, key, count + turn, groups, corrected, splicing)
            return groups, following

        moved = functools.reduce(operator.or_, (own for _, own in judged))
        any_wrong = functools.reduce(jnp.logical_or, (wrong for wrong, _ in judged))
        groups, bands = once_if(any_wrong, correct_and_update, (groups, moved))[1]
        return self.spread_groups(groups, masks), bands

    def _update(self, scores, key, count, group_masks, bands, splicing):
        """Applies h_k to the layers that have a threshold and whose coin says so."""
        chances, known = {}, {}
        for rule, layers in self.rules:
            chances |= dict.fromkeys(layers, sigma_at(rule, count)[0])
            if is_followed(rule):  # it has no thresholds before it is corrected
                known |= {layer: bands[layer].high >= 0 for layer in layers}
        coins = throw_coins(jax.random.fold_in(key, count), chances)
        coins |= {layer: coins[layer] & is_known for layer, is_known in known.items()}
        updated = {}
        for _, layers in self.by_rule(scores, group_masks):
            for name, layer in layers.items():
                for path, kept in zip(self.layers[name], layer.keep(bands[name]), strict=True):
                    mask = group_masks[path]
                    if not splicing:  # a threshold of 0 would let zeros in again
                        kept &= mask
                    updated[path] = jnp.where(coins[name], kept, mask)
        return updated


def having_mask(masks: Masks, stacked: Mapping[str, int]) -> TakesPart:
    """Makes the predicate of the leaves whose mask has axes, with all their slices."""
    paths = {
        name
        for path, mask in named_leaves(masks)
        if has_axes(path, mask)
        for name in slice_paths(stacked, path, mask)
    }
    return lambda path, leaf: path in paths


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
    structures = list(as_table(rule.structure).values())
    if not all(isinstance(structure, Structure) for structure in structures):
        raise TypeError(
            f'structure of {pattern!r} must be one of dns_jax.structures, or a table of them, but '
            f'is {rule.structure!r}'
        )
    if rule.thresholds is None and structures and all(isinstance(own, NofM) for own in structures):
        rule = rule._replace(thresholds=_no_thresholds)
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
    thresholds: Any = rule.thresholds
    by_density = isinstance(thresholds, DensityRule)
    if every is None and not by_density:
        every = 0
    if every is None and not splicing:
        every = 1  # what a threshold prunes too much would not come back
    if every is not None:
        check_step(f'refresh_every of {pattern!r}', every)
    if every == 0 and by_density and thresholds.changes:
        raise ValueError(
            f'refresh_every of {pattern!r} is 0, so its density would be read once, at init, and '
            'stay at the first value of its schedule; leave refresh_every out to follow the '
            'schedule'
        )
    by_order = rule.thresholds is _no_thresholds
    if every == 0 and importance is not magnitude and not by_order:
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


def ask(rule: Rule, layers: Layers, count, bands) -> dict[str, Thresholds]:
    """Asks a rule for thresholds, where it is not followed and that is due."""
    if not rule.refresh_every:
        return bands
    sigma, last = sigma_at(rule, count)
    due = last | ((count % rule.refresh_every == 0) & (sigma > 0))
    compute = functools.partial(compute_thresholds, rule.thresholds, layers, count)
    return jax.lax.cond(due, compute, lambda: bands)


def follow(rule: Rule, layers: Layers, count, bands) -> tuple[jax.Array, dict[str, Thresholds]]:
    """Judges thresholds by the masks that they made, and moves them for the next step.

    Returns:
      Whether they must be corrected now, a bool scalar, and the moved ones by layer. Thresholds
      stay where the rule is not followed.
    """
    if not is_followed(rule):
        return jnp.array(False), bands
    density: Any = rule.thresholds
    (sigma, last), (following, _) = (sigma_at(rule, when) for when in (count, count + 1))
    near, moved = density.follow(layers, count, bands, last)
    unknown = _unknown(bands)
    # Where a coin fails, what is kept says nothing of the thresholds.
    stay = unknown | (sigma < 1) | (following < 1)
    bands = jax.tree.map(lambda own, new: jnp.where(stay, own, new), bands, moved)
    return (sigma > 0) & (unknown | ~near), bands


def correct(wrong, rule: Rule, layers: Layers, count, bands) -> dict[str, Thresholds]:
    """Corrects the thresholds of a rule where `follow` said that they must be."""
    if not is_followed(rule):
        return bands
    density: Any = rule.thresholds
    exactly = sigma_at(rule, count)[1] | _unknown(bands)
    solve = functools.partial(density.solve, layers, count, bands, exactly)
    return jax.lax.cond(wrong, solve, lambda: bands)


def _unknown(bands) -> jax.Array:
    return functools.reduce(jnp.logical_or, (band.high < 0 for band in bands.values()))


def _of(layers, bands) -> dict[str, Thresholds]:
    return {layer: bands[layer] for layer in layers}


def compute_thresholds(rule: Any, layers: Layers, count) -> dict[str, Thresholds]:
    """Computes the bands of a rule's layers, and holds it to their names and type.

    Raises:
      ValueError: if the rule names other layers.
    """
    if isinstance(rule, DensityRule):
        return rule.find(layers, count)
    weights, masks = (
        {name: getattr(layer, field) for name, layer in layers.items()}
        for field in ('weights', 'masks')
    )
    bands = rule(weights, masks, count)
    if sorted(bands) != sorted(layers):
        raise ValueError(
            f'thresholds must name the layers {abridge(layers)}, but name {abridge(bands)}'
        )
    return {
        layer: Thresholds(jnp.float32(band.low), jnp.float32(band.high))
        for layer, band in bands.items()
    }


def start_unknown(rule: DensityRule, layers: Layers, count) -> dict[str, Thresholds]:
    """Starts a density at −1, no threshold yet, and lets it refuse what it cannot keep."""
    shapes = jax.eval_shape(rule.find, layers, count)
    return jax.tree.map(lambda bound: jnp.full(bound.shape, -1, bound.dtype), shapes)


def _no_thresholds(layers, masks, step) -> dict[str, Thresholds]:
    """Keeps all that a structure lets be kept."""
    del masks, step
    return {layer: Thresholds(jnp.float32(0), jnp.float32(0)) for layer in layers}
