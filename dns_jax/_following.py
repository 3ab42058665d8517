"""Rules by a number of connections at work: what layers share, and thresholds that keep it.

A `DensityRule` says how a number of connections is shared among layers, and finds the thresholds
at which h_k keeps it: anew, or from the last ones, which hardly move. Counts are exact
(`_counts`); magnitudes are compared in float32, as h_k compares them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dns_jax import _counts, _search
from dns_jax._counts import Count
from dns_jax.masks import discriminate
from dns_jax.thresholds import make_band
from dns_jax.typing import LayerArrays, Thresholds

TOLERANCE = 1 / 128
"""By what share of the number wanted a followed number may be off before the last update."""

_LARGEST = 3e38  # nearly infinite
_STEPS_BETWEEN_UNITS = 16  # at the most: then they are measured anew


class Share(NamedTuple):
    """How many connections some layers are to keep together, by one threshold."""

    layers: Sequence[str]
    wanted: Count


class Division(NamedTuple):
    """What is wanted of the layers of a rule at one step."""

    shares: Sequence[Share]
    floors: Mapping[str, Count]  #: by layer: what each keeps at least, if not nothing
    #: maps the last thresholds to what `|w|` is compared in, by layer, float32 scalars; None if 1
    measure_units: Callable[[Mapping[str, Thresholds]], Mapping[str, jax.Array]] | None


Divide = Callable[[LayerArrays, LayerArrays, Sequence[jax.Array]], list[Division]]
"""Maps weights, masks and some counts of steps to what is wanted of the layers at each of them."""

Wanted = Callable[[jax.Array, Mapping[str, int]], Count]
"""Maps the step, and how many connections each layer has, to how many to keep."""


@dataclasses.dataclass(frozen=True)
class DensityRule:
    """A threshold rule that keeps a number of connections, from `layer_density` and its like.

    Its methods take the weights by layer, their masks and the count of steps, an int32 scalar; then
    the last thresholds by layer, and whether the number must be met `exactly`, a bool scalar, or
    within `TOLERANCE`.
    """

    divide: Divide
    hysteresis: float
    changes: bool  #: whether the number changes with the step, or perhaps does

    def __call__(
        self, layers: LayerArrays, masks: LayerArrays, step: jax.Array
    ) -> dict[str, Thresholds]:
        """Finds the largest thresholds that keep what is wanted, in 31 passes over the weights."""
        nothing = dict.fromkeys(layers, Thresholds(jnp.float32(0), jnp.float32(0)))

        def find(excess_at, starts, aims):
            del aims
            return _search.bisect(excess_at, len(starts))

        return self._solve(layers, masks, step, nothing, jnp.array(True), find)

    def solve(
        self,
        layers: LayerArrays,
        masks: LayerArrays,
        step: jax.Array,
        last: Mapping[str, Thresholds],
        exactly: jax.Array,
    ) -> dict[str, Thresholds]:
        """Finds thresholds that keep what is wanted from the last ones, in a few passes."""
        return self._solve(layers, masks, step, last, exactly, _search.search)

    def follow(
        self,
        layers: LayerArrays,
        masks: LayerArrays,
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
        kept = {layer: _counts.count_all(leaves) for layer, leaves in masks.items()}
        division, following = self.divide(layers, masks, (step, step + 1))
        slack = jnp.where(exactly, 0.0, TOLERANCE)
        near = [step % _STEPS_BETWEEN_UNITS != 0] if division.measure_units else []
        near += _near(division, layers, kept, slack)
        factors = _factors(following, layers, kept)
        moved = {
            layer: Thresholds(*(factors[layer] * bound for bound in band))
            for layer, band in last.items()
        }
        return functools.reduce(jnp.logical_and, near), moved

    def _solve(self, layers, masks, step, last, exactly, find) -> dict[str, Thresholds]:
        """Finds the threshold of each share, and that of layers which it leaves too little of."""
        (division,) = self.divide(layers, masks, (step,))
        floors = _within_reach(division.floors, layers)
        slack = jnp.where(exactly, 0.0, TOLERANCE)
        division = division._replace(floors=floors)
        bands = self._solve_shares(division, layers, masks, last, slack, find)
        if not floors:
            return bands
        kept = _count_by_layer(layers, masks, bands)
        excess = {layer: _counts.minus(kept[layer], floors[layer]) for layer in bands}
        lacking = [count.high < 0 for count in excess.values()]
        return jax.lax.cond(
            functools.reduce(jnp.logical_or, lacking, jnp.array(False)),
            lambda: self._lift_to_floors(floors, layers, masks, last, bands, excess, find),
            lambda: bands,
        )

    def _solve_shares(self, division, layers, masks, last, slack, find) -> dict[str, Thresholds]:
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
            kept = _count_by_layer(layers, masks, bands_at(thresholds))
            kept |= {layer: _counts.maximum(kept[layer], floor) for layer, floor in floors.items()}
            return [
                _counts.minus(_counts.add([kept[layer] for layer in share.layers]), share.wanted)
                for share in shares
            ]

        # A layer at its floor has a smaller threshold than the others of its share.
        starts = [
            functools.reduce(
                jnp.maximum, (_middle(last[layer]) / units[layer] for layer in share.layers)
            )
            for share in shares
        ]
        aims = [_aim(share.wanted, share.layers, layers, slack) for share in shares]
        return bands_at(find(excess_at, starts, aims))

    def _lift_to_floors(
        self, floors, layers, masks, last, bands, excess, find
    ) -> dict[str, Thresholds]:
        """Finds a lower threshold of its own for each layer that lacks connections."""

        def excess_at(thresholds):
            own = [make_band(threshold, self.hysteresis) for threshold in thresholds]
            kept = _count_by_layer(layers, masks, dict(zip(bands, own, strict=True)))
            # Of the others nothing is wanted.
            return [
                jax.tree.map(
                    lambda part, lacks=excess[layer].high < 0: jnp.where(lacks, part, 0),
                    _counts.minus(kept[layer], floors[layer]),
                )
                for layer in bands
            ]

        aims = [_aim(floors[layer], [layer], layers) for layer in bands]
        found = find(excess_at, [_middle(last[layer]) for layer in bands], aims)
        return {
            layer: jax.tree.map(
                functools.partial(jnp.where, excess[layer].high < 0),
                make_band(threshold, self.hysteresis),
                bands[layer],
            )
            for layer, threshold in zip(bands, found, strict=True)
        }


def share_by_layer(density: Callable[[jax.Array], jax.Array]) -> Divide:
    """Lets every layer keep the same density, which is one of the step."""

    def divide(layers, masks, steps):
        del masks
        return [_each_by_itself(layers, dict.fromkeys(layers, density(step))) for step in steps]

    return divide


def share_by_axes(wanted: Wanted) -> Divide:
    """Lets layers share a number of connections as `global_density` says of `erk`."""

    def divide(layers, masks, steps):
        del masks
        sizes = _sizes(layers)
        shares = jnp.stack([_share(wanted(step, sizes), sizes) for step in steps])
        return [_each_by_itself(layers, own) for own in _erdos_renyi_kernel(layers, shares)]

    return divide


def share_by_units(wanted: Wanted, score: str = 'norm', floor: float = 0.05) -> Divide:
    """Lets layers share a number of connections as `global_density` says of `norm` and `rms`."""

    def divide(layers, masks, steps):
        sizes = _sizes(layers)

        def measure_units(last):
            units = {layer: _unit(layers[layer], masks[layer], score) for layer in layers}
            units = {
                layer: jnp.minimum(jnp.where(unit > 0, unit, 1.0), _LARGEST)
                for layer, unit in units.items()
            }
            return units if score == 'rms' else _settle(units, layers, masks, last)

        def divide_at(step):
            count = wanted(step, sizes)
            share = _share(count, sizes)
            floors = {layer: _floor(floor * share, size) for layer, size in sizes.items()}
            return Division([Share(list(layers), count)], floors, measure_units)

        return [divide_at(step) for step in steps]

    return divide


def _near(division: Division, layers, kept, slack) -> list[jax.Array]:
    """Says of each share whether its number is near what is wanted, and of all floors together."""
    near = []
    for share in division.shares:
        together = _counts.add([kept[layer] for layer in share.layers])
        excess = _counts.to_float(_counts.minus(together, share.wanted))
        near.append(jnp.abs(excess) <= slack * _counts.to_float(share.wanted))

    def reaches(floors):
        by_layer = (
            _counts.to_float(_counts.minus(kept[layer], floor)) >= -slack * _counts.to_float(floor)
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
        together = _counts.to_float(_counts.add([kept[layer] for layer in share.layers]))
        factor = _search.guess_factor(together, _aim(share.wanted, share.layers, layers))
        factors |= dict.fromkeys(share.layers, factor)
    for layer, floor in division.floors.items():
        number, aim = _counts.to_float(kept[layer]), _aim(floor, [layer], layers)
        to_floor = jnp.minimum(factors[layer], _search.guess_factor(number, aim))
        at_floor = jnp.abs(number - aim.wanted) <= 2 * TOLERANCE * aim.wanted
        factors[layer] = jnp.where(at_floor, to_floor, factors[layer])
    return factors


def _each_by_itself(layers, densities) -> Division:
    """Gives each layer what its own density says, in no unit."""
    wanted = {layer: _floor(densities[layer], _size(leaves)) for layer, leaves in layers.items()}
    return Division([Share([layer], count) for layer, count in wanted.items()], {}, None)


def _erdos_renyi_kernel(layers, densities: jax.Array) -> list[dict[str, jax.Array]]:
    """Finds the density of each layer for each density of all, of one axis, in one bisection."""
    sizes = _sizes(layers)
    kernels = {layer: max(leaves, key=jnp.size) for layer, leaves in layers.items()}
    axes = {layer: max(sum(kernel.shape), 1) for layer, kernel in kernels.items()}

    def kept_at(factor):
        return {layer: jnp.minimum(factor * axes[layer], float(sizes[layer])) for layer in layers}

    def halve(_, ends):
        middle = (ends[0] + ends[1]) / 2
        enough = sum(kept_at(middle).values()) >= densities * float(sum(sizes.values()))
        return jnp.where(enough, ends[0], middle), jnp.where(enough, middle, ends[1])

    largest = max(sizes[layer] / axes[layer] for layer in layers)
    ends = jnp.zeros_like(densities), jnp.full_like(densities, largest)
    kept = kept_at(jax.lax.fori_loop(0, 30, halve, ends)[1])
    return [
        {layer: kept[layer][index] / float(max(sizes[layer], 1)) for layer in layers}
        for index in range(len(densities))
    ]


def _unit(weights, masks, score) -> jax.Array:
    """The unit of a layer, 0 where all its weights are 0."""
    # A square may leave the range of float32 where the weight does not.
    scale = _search.range_scale(weights)
    magnitudes = [jnp.abs(leaf).astype(jnp.float32) / scale for leaf in weights]
    if score == 'rms':
        squares = sum((jnp.sum(jnp.square(leaf)) for leaf in magnitudes), jnp.float32(0))
        return scale * jnp.sqrt(squares / float(max(_size(weights), 1)))
    kept = zip(magnitudes, masks, strict=True)
    squares = (jnp.sum(jnp.square(leaf), where=mask) for leaf, mask in kept)
    # At least the largest weight, so that a layer of which nothing was kept comes back by it.
    largest = (jnp.max(leaf, initial=0.0) for leaf in magnitudes)
    return scale * functools.reduce(jnp.maximum, largest, jnp.sqrt(sum(squares, jnp.float32(0))))


def _settle(units, layers, masks, last) -> dict[str, jax.Array]:
    r"""Finds units near the last thresholds, by a step of Newton's towards t = τ·u.

    A layer keeps what is at least t, and u is the norm of that. Where t rises by 1 %, u falls by
    s %. So a step all the way to u is 1 + s times too far, and s may be 3 or more in the tails of
    magnitudes: two layers would take turns in having all. Without last thresholds, it is u.
    """
    settled, middles, logs, numbers = {}, {}, {}, {}
    for layer, unit in units.items():
        middle = _middle(last[layer])
        middles[layer] = jnp.where((middle > 0) & (middle <= _LARGEST), middle, unit)
        logs[layer] = jnp.log(middles[layer]) - jnp.log(unit)
        numbers[layer] = jnp.maximum(_counts.to_float(_counts.count_all(masks[layer])), 1.0)
    common = sum(numbers[layer] * logs[layer] for layer in units) / sum(numbers.values())
    for layer, unit in units.items():
        around = Thresholds(middles[layer] * 15 / 16, middles[layer] * 17 / 16)
        crossed = _counts.count_all([_is_within(leaf, around) for leaf in layers[layer]])
        # By how many percent their number falls where t rises by 1 %, then u.
        fall = _counts.to_float(crossed) / numbers[layer] * 8
        fall *= jnp.minimum(numbers[layer] * jnp.square(middles[layer] / unit), 1.0) / 2
        # Far away the fall may be another.
        step = jnp.clip((common - logs[layer]) / (1 + fall), -0.25, 0.25)
        settled[layer] = middles[layer] * jnp.exp(step)
    return settled


def _is_within(leaf: jax.Array, band: Thresholds) -> jax.Array:
    magnitude = jnp.abs(leaf).astype(jnp.float32)
    return (magnitude >= band.low) & (magnitude < band.high)


def _count_by_layer(layers, masks, bands) -> dict[str, Count]:
    """Counts what h_k keeps of each layer."""
    return {
        layer: _counts.count_all(
            [
                discriminate(leaf, mask, bands[layer])
                for leaf, mask in zip(leaves, masks[layer], strict=True)
            ]
        )
        for layer, leaves in layers.items()
    }


def _within_reach(floors, layers) -> dict[str, Count]:
    """Caps floors at the weights that are not zero: those that are tie, and all would be kept."""
    return {
        layer: _counts.minimum(floor, _counts.count_all([leaf != 0 for leaf in layers[layer]]))
        for layer, floor in floors.items()
    }


def _aim(wanted: Count, names: Sequence[str], layers, slack: Any = 0.0) -> _search.Aim:
    """Says what one threshold of some layers is to keep, give or take the share `slack`."""
    number = _counts.to_float(wanted)
    return _search.Aim(number, float(sum(_size(layers[layer]) for layer in names)), slack * number)


def _middle(band: Thresholds) -> jax.Array:
    return (band.low + band.high) / 2


def _size(leaves: Sequence[jax.Array]) -> int:
    return sum(leaf.size for leaf in leaves)


def _sizes(layers: LayerArrays) -> dict[str, int]:
    return {layer: _size(leaves) for layer, leaves in layers.items()}


def _share(count: Count, sizes: Mapping[str, int]) -> jax.Array:
    return _counts.to_float(count) / float(max(sum(sizes.values()), 1))


def _floor(share: jax.Array, size: int) -> Count:
    """At least one connection, of a layer that has any."""
    return _counts.from_share(share, size) if size else _counts.from_int(0)
