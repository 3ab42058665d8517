"""Rules by a number of connections at work: thresholds that keep it.

A `DensityRule` finds the thresholds at which h_k keeps what each layer is to have (`_sharing`):
anew, or from the last ones, which hardly move. Magnitudes are compared in float32, as h_k compares
them.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dns_jax._core import counts, search
from dns_jax._core.counts import Count
from dns_jax._sharing import Divide, Division, Layers, middle, single_weights
from dns_jax.thresholds import make_band
from dns_jax.typing import LayerArrays, Thresholds

TOLERANCE = 1 / 128
"""By what share of the number wanted a followed number may be off before the last update."""

_STEPS_BETWEEN_UNITS = 16  # at the most: then they are measured anew


@dataclasses.dataclass(frozen=True)
class DensityRule:
    """A threshold rule that keeps a number of connections, from `layer_density` and its like.

    Its methods take the layers and the count of steps, an int32 scalar; then the last thresholds by
    layer, and whether the number must be met `exactly`, a bool scalar, or within `TOLERANCE` or a
    group. Called as any rule is, it takes single weights.
    """

    divide: Divide
    hysteresis: float
    changes: bool  #: whether the number changes with the step, or perhaps does

    def __call__(
        self, layers: LayerArrays, masks: LayerArrays, step: jax.Array
    ) -> dict[str, Thresholds]:
        """Finds the largest thresholds that keep what is wanted, in 31 passes over the weights."""
        return self.find(single_weights(layers, masks), step)

    def find(self, layers: Layers, step: jax.Array) -> dict[str, Thresholds]:
        """Finds the largest thresholds that keep what is wanted, in 31 passes over the weights."""
        nothing = dict.fromkeys(layers, Thresholds(jnp.float32(0), jnp.float32(0)))

        def find(excess_at, starts, aims):
            del aims
            return search.bisect(excess_at, len(starts))

        return self._solve(layers, step, nothing, jnp.array(True), find)

    def solve(
        self,
        layers: Layers,
        step: jax.Array,
        last: Mapping[str, Thresholds],
        exactly: jax.Array,
    ) -> dict[str, Thresholds]:
        """Finds thresholds that keep what is wanted from the last ones, in a few passes."""
        return self._solve(layers, step, last, exactly, search.search)

    def follow(
        self,
        layers: Layers,
        step: jax.Array,
        last: Mapping[str, Thresholds],
        exactly: jax.Array,
    ) -> tuple[jax.Array, dict[str, Thresholds]]:
        """Judges the last thresholds by the masks that they made, and moves them for the next step.

        Returns:
          Whether the number is near what is wanted, and every layer at its floor or above, a bool
          scalar; False too at every 16th step where layers have units. And thresholds for the next
          step; one that keeps a layer at its floor goes on doing so.
        """
        kept = {name: layer.count(layer.masks) for name, layer in layers.items()}
        division, following = self._divide(layers, (step, step + 1))
        slack = jnp.where(exactly, 0.0, 1.0)
        near = [step % _STEPS_BETWEEN_UNITS != 0] if division.measure_units else []
        near += _near(division, layers, kept, slack)
        factors = _factors(following, layers, kept)
        moved = {
            layer: Thresholds(*(factors[layer] * bound for bound in band))
            for layer, band in last.items()
        }
        return functools.reduce(jnp.logical_and, near), moved

    def _divide(self, layers: Layers, steps: Sequence[jax.Array]) -> list[Division]:
        """Asks what is wanted, and wants no more than the limits let be kept."""
        if all(limit is None for layer in layers.values() for limit in layer.limits):
            return self.divide(layers, steps)
        allowed = {name: layer.allowed() for name, layer in layers.items()}

        def within_limits(share):
            together = counts.add([allowed[name] for name in share.layers])
            return share._replace(wanted=counts.minimum(share.wanted, together))

        return [
            division._replace(shares=[within_limits(share) for share in division.shares])
            for division in self.divide(layers, steps)
        ]

    def _solve(self, layers, step, last, exactly, find) -> dict[str, Thresholds]:
        """Finds the threshold of each share, and that of layers which it leaves too little of."""
        (division,) = self._divide(layers, (step,))
        floors = _within_reach(division.floors, layers)
        slack = jnp.where(exactly, 0.0, 1.0)
        division = division._replace(floors=floors)
        bands = self._solve_shares(division, layers, last, slack, find)
        if not floors:
            return bands
        kept = _count_by_layer(layers, bands)
        excess = {layer: counts.minus(kept[layer], floors[layer]) for layer in bands}
        lacking = [count.high < 0 for count in excess.values()]
        return jax.lax.cond(
            functools.reduce(jnp.logical_or, lacking, jnp.array(False)),
            lambda: self._lift_to_floors(floors, layers, last, bands, excess, find),
            lambda: bands,
        )

    def _solve_shares(self, division, layers, last, slack, find) -> dict[str, Thresholds]:
        """Finds one threshold for each share, in the units of its layers."""
        shares, floors, measure_units = division
        units: Mapping[str, Any] = (
            measure_units(last) if measure_units else dict.fromkeys(layers, 1.0)
        )

        def bands_at(thresholds):
            return {
                layer: make_band(threshold * units[layer], self.hysteresis)
                for share, threshold in zip(shares, thresholds, strict=True)
                for layer in share.layers
            }

        def excess_at(thresholds):
            kept = _count_by_layer(layers, bands_at(thresholds))
            kept |= {layer: counts.maximum(kept[layer], floor) for layer, floor in floors.items()}
            return [
                counts.minus(counts.add([kept[layer] for layer in share.layers]), share.wanted)
                for share in shares
            ]

        # A layer at its floor has a smaller threshold than the others of its share.
        starts = [
            functools.reduce(
                jnp.maximum, (middle(last[layer]) / units[layer] for layer in share.layers)
            )
            for share in shares
        ]
        aims = [_aim(share.wanted, share.layers, layers, slack) for share in shares]
        return bands_at(find(excess_at, starts, aims))

    def _lift_to_floors(self, floors, layers, last, bands, excess, find) -> dict[str, Thresholds]:
        """Finds a lower threshold of its own for each layer that lacks connections."""

        def excess_at(thresholds):
            own = [make_band(threshold, self.hysteresis) for threshold in thresholds]
            kept = _count_by_layer(layers, dict(zip(bands, own, strict=True)))
            # Of the others nothing is wanted.
            return [
                jax.tree.map(
                    lambda part, lacks=excess[layer].high < 0: jnp.where(lacks, part, 0),
                    counts.minus(kept[layer], floors[layer]),
                )
                for layer in bands
            ]

        aims = [_aim(floors[layer], [layer], layers) for layer in bands]
        found = find(excess_at, [middle(last[layer]) for layer in bands], aims)
        return {
            layer: jax.tree.map(
                functools.partial(jnp.where, excess[layer].high < 0),
                make_band(threshold, self.hysteresis),
                bands[layer],
            )
            for layer, threshold in zip(bands, found, strict=True)
        }


def _near(division: Division, layers, kept, slack) -> list[jax.Array]:
    """Says of each share whether its number is near what is wanted, and of all floors together."""
    near = []
    for share in division.shares:
        together = counts.add([kept[layer] for layer in share.layers])
        excess = counts.to_float(counts.minus(together, share.wanted))
        aim = _aim(share.wanted, share.layers, layers, slack)
        near.append((excess >= -aim.lack) & (excess <= aim.slack))

    def reaches(floors):
        by_layer = (
            counts.to_float(counts.minus(kept[layer], floor))
            >= -slack * TOLERANCE * counts.to_float(floor)
            for layer, floor in floors.items()
        )
        return functools.reduce(jnp.logical_and, by_layer, jnp.array(True))

    at_floors = jax.lax.cond(  # a pass over the weights, only where it may matter
        reaches(division.floors),
        lambda: jnp.array(True),
        lambda: reaches(_within_reach(division.floors, layers)),
    )
    return [*near, at_floors]


def _factors(division: Division, layers, kept) -> dict[str, jax.Array]:
    """Guesses by what factor the thresholds of each layer are to move."""
    factors = {}
    for share in division.shares:
        together = counts.to_float(counts.add([kept[layer] for layer in share.layers]))
        factor = search.guess_factor(together, _aim(share.wanted, share.layers, layers))
        factors |= dict.fromkeys(share.layers, factor)
    for layer, floor in division.floors.items():
        number, aim = counts.to_float(kept[layer]), _aim(floor, [layer], layers)
        to_floor = jnp.minimum(factors[layer], search.guess_factor(number, aim))
        at_floor = jnp.abs(number - aim.wanted) <= 2 * TOLERANCE * aim.wanted
        factors[layer] = jnp.where(at_floor, to_floor, factors[layer])
    return factors


def _count_by_layer(layers: Layers, bands) -> dict[str, Count]:
    """Counts what h_k keeps of each layer."""
    return {name: layer.count(layer.keep(bands[name])) for name, layer in layers.items()}


def _within_reach(floors, layers) -> dict[str, Count]:
    """Caps floors at the weights that are not zero: those that are tie, and all would be kept."""
    return {layer: counts.minimum(floor, layers[layer].reach()) for layer, floor in floors.items()}


def _aim(wanted: Count, names: Sequence[str], layers: Layers, slack: Any = 0.0) -> search.Aim:
    """Says what one threshold of some layers is to keep, give or take `slack` tolerances.

    A tolerance is a share of the number; what is too much may also be less than a group. What is
    too little may not, or a layer that is to keep less than a group would keep nothing.
    """
    number = counts.to_float(wanted)
    whole = float(sum(layers[layer].size for layer in names))
    group = max(members for name in names for members in layers[name].members())
    lack = slack * TOLERANCE * number
    return search.Aim(number, whole, jnp.maximum(lack, slack * float(group - 1)), lack)
