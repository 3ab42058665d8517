"""Rules that give every layer its band (a_k, b_k) by how many connections are to be kept.

A `DensityRule` says how a number of connections is divided among layers, and finds the thresholds
at which h_k keeps it: anew, or from the last ones, which hardly move. Counts are exact
(`counts`); magnitudes are compared in float32, as h_k compares them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dns_jax import _counts, _search
from dns_jax._checks import check_hysteresis
from dns_jax._counts import Count
from dns_jax._search import range_scale
from dns_jax.masks import discriminate
from dns_jax.thresholds import make_band
from dns_jax.typing import LayerArrays, Schedule, Thresholds

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


Divide = Callable[[LayerArrays, LayerArrays, jax.Array], Division]
"""Maps weights, masks and the step count to what is wanted of the layers."""


@dataclasses.dataclass(frozen=True)
class DensityRule:
    """A threshold rule that keeps a number of connections, from `layer_density` and its like."""

    divide: Divide
    hysteresis: float
    changes: bool  #: whether the number changes with the step, or perhaps does

    def __call__(
        self, layers: LayerArrays, masks: LayerArrays, step: jax.Array
    ) -> dict[str, Thresholds]:
        """Finds the largest thresholds that keep what is wanted, in 31 passes over the weights."""
        nothing = dict.fromkeys(layers, Thresholds(jnp.float32(0), jnp.float32(0)))

        return self._solve(
            layers,
            masks,
            step,
            nothing,
            jnp.array(True),
            lambda excess_at, starts, aims: _search.bisect(excess_at, len(starts)),
        )

    def follow(
        self,
        layers: LayerArrays,
        masks: LayerArrays,
        step: jax.Array,
        last: Mapping[str, Thresholds],
        exactly: jax.Array,
    ) -> tuple[jax.Array, dict[str, Thresholds]]:
        """Judges the last thresholds by what they kept, and moves them for the next step.

        Args:
          layers: the weights.
          masks: their masks, updated by the last thresholds.
          step: the count of steps, an int32 scalar.
          last: the last thresholds by layer.
          exactly: whether the number must be met, a bool scalar.

        Returns:
          Whether the number is near what is wanted, and every layer at its floor or above, by
          `TOLERANCE`, a bool scalar; False too at every 16th step where layers have units. And
          thresholds for the next step; one that keeps a layer at its floor goes on doing so.
        """
        kept = {layer: _counts.count_all(leaves) for layer, leaves in masks.items()}
        division, following = (self.divide(layers, masks, when) for when in (step, step + 1))
        slack = jnp.where(exactly, 0.0, TOLERANCE)
        near = [step % _STEPS_BETWEEN_UNITS != 0] if division.measure_units else []
        for share in division.shares:
            together = _counts.add([kept[layer] for layer in share.layers])
            excess = _counts.to_float(_counts.minus(together, share.wanted))
            near.append(jnp.abs(excess) <= slack * _counts.to_float(share.wanted))

        def reaches(floors):
            by_layer = (
                _counts.to_float(_counts.minus(kept[layer], floor))
                >= -slack * _counts.to_float(floor)
                for layer, floor in floors.items()
            )
            return functools.reduce(jnp.logical_and, by_layer, jnp.array(True))

        near.append(
            jax.lax.cond(  # a pass over the weights, only where it may matter
                reaches(division.floors),
                lambda: jnp.array(True),
                lambda: reaches(_within_reach(division.floors, layers)),
            )
        )
        factors = {}
        for share in following.shares:
            together = _counts.to_float(_counts.add([kept[layer] for layer in share.layers]))
            factor = _search.guess_factor(together, _aim(share.wanted, share.layers, layers))
            factors |= dict.fromkeys(share.layers, factor)
        for layer, floor in following.floors.items():
            number, aim = _counts.to_float(kept[layer]), _aim(floor, [layer], layers)
            to_floor = jnp.minimum(factors[layer], _search.guess_factor(number, aim))
            at_floor = jnp.abs(number - aim.wanted) <= 2 * TOLERANCE * aim.wanted
            factors[layer] = jnp.where(at_floor, to_floor, factors[layer])
        moved = {
            layer: Thresholds(*(factors[layer] * bound for bound in band))
            for layer, band in last.items()
        }
        return functools.reduce(jnp.logical_and, near), moved

    def solve(
        self,
        layers: LayerArrays,
        masks: LayerArrays,
        step: jax.Array,
        last: Mapping[str, Thresholds],
        exactly: jax.Array,
    ) -> dict[str, Thresholds]:
        """Finds thresholds that keep what is wanted from the last ones, in a few passes.

        Args:
          layers: the weights.
          masks: their masks.
          step: the count of steps, an int32 scalar.
          last: thresholds that are near.
          exactly: whether the number must be met, a bool scalar; else within `TOLERANCE`.

        Returns:
          The thresholds by layer.
        """
        return self._solve(layers, masks, step, last, exactly, _search.search)

    def _solve(self, layers, masks, step, last, exactly, find) -> dict[str, Thresholds]:
        """Finds the threshold of each share, and that of layers which it leaves too little of."""
        shares, floors, measure_units = self.divide(layers, masks, step)
        floors = _within_reach(floors, layers)
        slack = jnp.where(exactly, 0.0, TOLERANCE)
        units: Mapping[str, Any] = (
            measure_units(last) if measure_units else dict.fromkeys(layers, 1.0)
        )

        def bands_at(thresholds):
            return {
                layer: make_band(threshold * units[layer], self.hysteresis)
                for share, threshold in zip(shares, thresholds, strict=True)
                for layer in share.layers
            }

        def excess_of_shares(thresholds):
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
        bands = bands_at(find(excess_of_shares, starts, aims))
        if not floors:
            return bands
        kept = _count_by_layer(layers, masks, bands)
        excess = {layer: _counts.minus(kept[layer], floors[layer]) for layer in bands}

        def lift_to_floors():
            def excess_of_layers(thresholds):
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
            found = find(excess_of_layers, [_middle(last[layer]) for layer in bands], aims)
            return {
                layer: jax.tree.map(
                    functools.partial(jnp.where, excess[layer].high < 0),
                    make_band(threshold, self.hysteresis),
                    bands[layer],
                )
                for layer, threshold in zip(bands, found, strict=True)
            }

        lacking = [count.high < 0 for count in excess.values()]
        any_lacking = functools.reduce(jnp.logical_or, lacking, jnp.array(False))
        return jax.lax.cond(any_lacking, lift_to_floors, lambda: bands)


def layer_density(density: float | Schedule, hysteresis: float = 0.1) -> DensityRule:
    r"""Thresholds that keep the same share of every layer.

    .. math::
      t_k = \max \{ t : |h_k(W_k, T_k)| \ge \mathrm{round}(d\,n_k) \}, \quad
      a_k = (1 - \eta)\,t_k, \quad b_k = (1 + \eta)\,t_k

    with `|h_k|` the connections that h_k keeps and n_k all those of the layer. The band is part of
    the count, so an update with these thresholds keeps exactly the wanted number, at least one,
    unless weights tie for the last place to the last bit of a float32: then all of them are
    kept. The threshold is found by bisection over those bits, exact to the last: 31 passes over
    weights and masks, without a sort or a copy. Beyond 2^24 connections d·n itself is rounded to
    a float32, by at most 6e-8 of it.

    Args:
      density: kept / all connections, in (0, 1], or a schedule of it, as in
        `dns_jax.schedules`.
      hysteresis: half the relative width η of the band, in [0, 1).

    Returns:
      A threshold rule. Surgery follows it at every step (`Rule.refresh_every`).

    Raises:
      ValueError: if `density` is a number outside (0, 1] or `hysteresis` is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> weights, masks = {'fc1': [jnp.array([1.0, -3.0, 2.0, 0.5])]}, {'fc1': [jnp.ones(4, bool)]}
      >>> low, high = layer_density(0.5)(weights, masks, 0)['fc1']
      >>> round(float(low), 4), round(float(high), 4)
      (2.0, 2.4444)
    """
    schedule = _density_schedule(density)
    check_hysteresis(hysteresis)

    def divide(layers, masks, step):
        del masks
        return _each_by_itself(layers, dict.fromkeys(layers, schedule(step)))

    return DensityRule(divide, hysteresis, callable(density))


def global_density(
    density: float | Schedule, score: str = 'norm', hysteresis: float = 0.1, floor: float = 0.05
) -> DensityRule:
    r"""Thresholds that keep a share of all layers together, and divide it among them.

    .. math::
      t_k = \tau\,u_k, \quad \tau = \max \{ \tau : \sum_k |h_k(W_k, T_k)| \ge
      \mathrm{round}(d \sum_k n_k) \}

    A layer's weights are compared in its own unit u_k, by `score`:

    - `norm`: the Euclidean norm of W_k⊙T_k, or the largest `|W_k|` where that is more. A weight
      counts by its share in what its layer computes with; LAMP's score, but for the weights kept
      now in place of those at least as large.
    - `rms`: the root mean square of W_k.
    - `erk`: no unit. Layers get connections in proportion to the sum of their kernel's axes
      (Erdős-Rényi kernel), at most all, and each keeps its largest.

    By `norm` and `rms` a layer keeps at least one connection and the share `floor`·d of them, if as
    many are not zero, by a lower threshold of its own; what it keeps so is counted in d, and the
    others keep less. Counted and found as by `layer_density`.

    Args:
      density: kept / all connections, in (0, 1], or a schedule of it, as in
        `dns_jax.schedules`.
      score: `norm`, `rms` or `erk`.
      hysteresis: half the relative width η of the band, in [0, 1).
      floor: of an equal share, what every layer keeps at least, in [0, 1].

    Returns:
      A threshold rule. Surgery follows it at every step (`Rule.refresh_every`).

    Raises:
      ValueError: if `density` is a number outside (0, 1], `score` is none of the three,
        `hysteresis` is outside [0, 1) or `floor` outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> weights = {'a': [jnp.array([3.0, 1.0])], 'b': [jnp.array([30.0, 40.0])]}
      >>> masks = {'a': [jnp.ones(2, bool)], 'b': [jnp.ones(2, bool)]}
      >>> bands = global_density(0.5)(weights, masks, 0)
      >>> {layer: round(float(band.low), 3) for layer, band in bands.items()}
      {'a': 3.0, 'b': 40.0}

    Reference:
      Lee et al. 2021, Layer-adaptive sparsity for the magnitude-based pruning (LAMP); Evci et
      al. 2020, Rigging the lottery (ERK).
    """
    schedule = _density_schedule(density)

    def wanted(step, sizes):
        return _counts.from_share(schedule(step), sum(sizes.values()))

    return divide_among_layers(wanted, callable(density), score, hysteresis, floor)


def divide_among_layers(
    wanted: Callable[[jax.Array, Mapping[str, int]], Count],
    changes: bool,
    score: str = 'norm',
    hysteresis: float = 0.1,
    floor: float = 0.05,
) -> DensityRule:
    """Makes the rule of `global_density` for a number of connections in place of a density.

    Args:
      wanted: maps the step, and how many connections each layer has, to how many to keep.
      changes: whether it depends on the step.
      score: as for `global_density`.
      hysteresis: as for `global_density`.
      floor: as for `global_density`.

    Returns:
      A threshold rule.

    Raises:
      ValueError: as `global_density` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from dns_jax import _counts
      >>> rule = divide_among_layers(lambda step, sizes: _counts.from_int(1), False, hysteresis=0.0)
      >>> weights, masks = {'fc': [jnp.array([1.0, -3.0])]}, {'fc': [jnp.ones(2, bool)]}
      >>> float(rule(weights, masks, 0)['fc'].low)
      3.0
    """
    check_hysteresis(hysteresis)
    if score not in ('norm', 'rms', 'erk'):
        raise ValueError(f"score must be 'norm', 'rms' or 'erk', but is {score!r}")
    if not 0 <= floor <= 1:
        raise ValueError(f'floor must be in [0, 1], but is {floor!r}')

    def divide(layers, masks, step):
        sizes = {layer: _size(leaves) for layer, leaves in layers.items()}
        count = wanted(step, sizes)
        share = _counts.to_float(count) / float(max(sum(sizes.values()), 1))
        if score == 'erk':
            return _each_by_itself(layers, _erdos_renyi_kernel(layers, share))
        floors = {layer: _floor(floor * share, size) for layer, size in sizes.items()}

        def measure_units(last):
            units = {layer: _unit(layers[layer], masks[layer], score) for layer in layers}
            units = {
                layer: jnp.minimum(jnp.where(unit > 0, unit, 1.0), _LARGEST)
                for layer, unit in units.items()
            }
            return units if score == 'rms' else _settle(units, layers, masks, last)

        return Division([Share(list(layers), count)], floors, measure_units)

    return DensityRule(divide, hysteresis, changes)


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


def _middle(band: Thresholds) -> jax.Array:
    return (band.low + band.high) / 2


def _size(leaves: Sequence[jax.Array]) -> int:
    return sum(leaf.size for leaf in leaves)


def _floor(share: jax.Array, size: int) -> Count:
    """At least one connection, of a layer that has any."""
    return _counts.from_share(share, size) if size else _counts.from_int(0)


def _density_schedule(density: float | Schedule) -> Callable[[jax.Array], jax.Array]:
    if callable(density):
        return lambda step: jnp.asarray(density(step), jnp.float32)
    if not 0 < density <= 1:
        raise ValueError(f'density must be in (0, 1], but is {density!r}')
    return lambda step: jnp.float32(density)


def _each_by_itself(layers, densities) -> Division:
    """Gives each layer what its own density says, in no unit."""
    wanted = {layer: _floor(densities[layer], _size(leaves)) for layer, leaves in layers.items()}
    return Division(
        [Share([layer], count) for layer, count in wanted.items()],
        {},
        None,
    )


def _erdos_renyi_kernel(layers, density):
    sizes = {layer: _size(leaves) for layer, leaves in layers.items()}
    kernels = {layer: max(leaves, key=jnp.size) for layer, leaves in layers.items()}
    axes = {layer: max(sum(kernel.shape), 1) for layer, kernel in kernels.items()}

    def kept_at(factor):
        return {layer: jnp.minimum(factor * axes[layer], float(sizes[layer])) for layer in layers}

    def halve(_, ends):
        middle = (ends[0] + ends[1]) / 2
        enough = sum(kept_at(middle).values()) >= density * float(sum(sizes.values()))
        return jnp.where(enough, ends[0], middle), jnp.where(enough, middle, ends[1])

    ends = jnp.float32(0), jnp.float32(max(sizes[layer] / axes[layer] for layer in layers))
    kept = kept_at(jax.lax.fori_loop(0, 30, halve, ends)[1])
    return {layer: kept[layer] / float(max(sizes[layer], 1)) for layer in layers}


def _unit(weights, masks, score) -> jax.Array:
    """The unit of a layer, 0 where all its weights are 0."""
    # A square may leave the range of float32 where the weight does not.
    scale = range_scale(weights)
    magnitudes = [jnp.abs(leaf).astype(jnp.float32) / scale for leaf in weights]
    if score == 'rms':
        squares = sum((jnp.sum(jnp.square(leaf)) for leaf in magnitudes), jnp.float32(0))
        return scale * jnp.sqrt(squares / float(max(_size(weights), 1)))
    kept = zip(magnitudes, masks, strict=True)
    squares = (jnp.sum(jnp.square(leaf), where=mask) for leaf, mask in kept)
    # At least the largest weight, so that a layer of which nothing was kept comes back by it.
    largest = (jnp.max(leaf, initial=0.0) for leaf in magnitudes)
    return scale * functools.reduce(jnp.maximum, largest, jnp.sqrt(sum(squares, jnp.float32(0))))
