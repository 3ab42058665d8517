"""What layers share of a number of connections, and in what units their weights are compared.

Owns the layers as h_k sees them, of single weights or of groups. Counts are exact (`_core.counts`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dns_jax._core import counts, search
from dns_jax._core.counts import Count
from dns_jax.masks import discriminate
from dns_jax.typing import LayerArrays, Thresholds

_LARGEST = 3e38  # nearly infinite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """The leaves of one layer that take part, as h_k sees them: single weights, or groups."""

    weights: Sequence[jax.Array]  #: or what stands for them, one number for each group
    masks: Sequence[jax.Array]  #: one bool for each group
    limits: Sequence[jax.Array | None]  #: which may be kept at all, by leaf; None if all may be
    #: of the leaves themselves
    shapes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={'static': True})

    @property
    def size(self) -> int:
        """How many connections there are, those in groups counted one by one."""
        return sum(map(math.prod, self.shapes))

    def members(self) -> list[int]:
        """Says for each leaf how many connections a group has."""
        return [
            math.prod(shape) // max(leaf.size, 1)
            for leaf, shape in zip(self.weights, self.shapes, strict=True)
        ]

    def count(self, kept: Sequence[jax.Array]) -> Count:
        """Counts the connections of the groups that are True."""
        if set(members := self.members()) <= {1}:
            return counts.count_all(kept)
        return counts.add(
            [
                counts.times(counts.count_all([leaf]), number)
                for leaf, number in zip(kept, members, strict=True)
            ]
        )

    def keep(self, band: Thresholds) -> list[jax.Array]:
        """Applies h_k, within the limits."""
        return [
            _within(limit, discriminate(leaf, mask, band))
            for leaf, mask, limit in zip(self.weights, self.masks, self.limits, strict=True)
        ]

    def allowed(self) -> Count:
        """Counts the connections that the limits let be kept."""
        return self.count(
            [
                _within(limit, jnp.ones_like(mask))
                for limit, mask in zip(self.limits, self.masks, strict=True)
            ]
        )

    def reach(self) -> Count:
        """Counts the connections that thresholds above 0 can keep."""
        alive = zip(self.limits, self.weights, strict=True)
        return self.count([_within(limit, leaf != 0) for limit, leaf in alive])


Layers = Mapping[str, Layer]
"""Layers by name."""


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


Divide = Callable[[Layers, Sequence[jax.Array]], list[Division]]
"""Maps layers and some counts of steps to what is wanted of the layers at each of them."""

Wanted = Callable[[jax.Array, Mapping[str, int]], Count]
"""Maps the step, and how many connections each layer has, to how many to keep."""


def single_weights(weights: LayerArrays, masks: LayerArrays) -> dict[str, Layer]:
    """Makes layers of weights that are pruned one by one."""
    return {
        name: Layer(leaves, masks[name], [None] * len(leaves), tuple(leaf.shape for leaf in leaves))
        for name, leaves in weights.items()
    }


def share_by_layer(density: Callable[[jax.Array], jax.Array]) -> Divide:
    """Lets every layer keep the same density, which is one of the step."""

    def divide(layers, steps):
        return [_each_by_itself(layers, dict.fromkeys(layers, density(step))) for step in steps]

    return divide


def share_by_axes(wanted: Wanted) -> Divide:
    """Lets layers share a number of connections as `global_density` says of `erk`."""

    def divide(layers, steps):
        sizes = _sizes(layers)
        shares = jnp.stack([_share(wanted(step, sizes), sizes) for step in steps])
        return [_each_by_itself(layers, own) for own in _erdos_renyi_kernel(layers, shares)]

    return divide


def share_by_units(wanted: Wanted, score: str = 'norm', floor: float = 0.05) -> Divide:
    """Lets layers share a number of connections as `global_density` says of `norm` and `rms`."""

    def divide(layers, steps):
        sizes = _sizes(layers)

        def measure_units(last):
            units = {name: _unit(layer, score) for name, layer in layers.items()}
            units = {
                layer: jnp.minimum(jnp.where(unit > 0, unit, 1.0), _LARGEST)
                for layer, unit in units.items()
            }
            return units if score == 'rms' else _settle(units, layers, last)

        def divide_at(step):
            count = wanted(step, sizes)
            share = _share(count, sizes)
            floors = {layer: _floor(floor * share, size) for layer, size in sizes.items()}
            return Division([Share(list(layers), count)], floors, measure_units)

        return [divide_at(step) for step in steps]

    return divide


def middle(band: Thresholds) -> jax.Array:
    """Gives the threshold that a band lies around."""
    return (band.low + band.high) / 2


def _each_by_itself(layers, densities) -> Division:
    """Gives each layer what its own density says, in no unit."""
    wanted = {name: _floor(densities[name], layer.size) for name, layer in layers.items()}
    return Division([Share([layer], count) for layer, count in wanted.items()], {}, None)


def _erdos_renyi_kernel(layers, densities: jax.Array) -> list[dict[str, jax.Array]]:
    """Finds the density of each layer for each density of all, of one axis, in one bisection."""
    sizes = _sizes(layers)
    kernels = {name: max(layer.shapes, key=math.prod) for name, layer in layers.items()}
    axes = {name: max(sum(shape), 1) for name, shape in kernels.items()}

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


def _unit(layer: Layer, score: str) -> jax.Array:
    """The unit of a layer, 0 where all its weights are 0."""
    # A square may leave the range of float32 where the weight does not.
    scale = search.range_scale(layer.weights)
    magnitudes = [jnp.abs(leaf).astype(jnp.float32) / scale for leaf in layer.weights]
    kept = layer.masks if score == 'norm' else [None] * len(magnitudes)
    squares = sum(
        (
            float(members) * jnp.sum(jnp.square(leaf), where=mask)
            for members, leaf, mask in zip(layer.members(), magnitudes, kept, strict=True)
        ),
        jnp.float32(0),
    )
    if score == 'rms':
        return scale * jnp.sqrt(squares / float(max(layer.size, 1)))
    # At least the largest weight, so that a layer of which nothing was kept comes back by it.
    largest = (jnp.max(leaf, initial=0.0) for leaf in magnitudes)
    return scale * functools.reduce(jnp.maximum, largest, jnp.sqrt(squares))


def _settle(units, layers, last) -> dict[str, jax.Array]:
    r"""Finds units near the last thresholds, by a step of Newton's towards t = τ·u.

    A layer keeps what is at least t, and u is the norm of that. Where t rises by 1 %, u falls by
    s %. So a step all the way to u is 1 + s times too far, and s may be 3 or more in the tails of
    magnitudes: two layers would take turns in having all. Without last thresholds, it is u.
    """
    settled, middles, logs, numbers = {}, {}, {}, {}
    for layer, unit in units.items():
        threshold, own = middle(last[layer]), layers[layer]
        middles[layer] = jnp.where((threshold > 0) & (threshold <= _LARGEST), threshold, unit)
        logs[layer] = jnp.log(middles[layer]) - jnp.log(unit)
        numbers[layer] = jnp.maximum(counts.to_float(own.count(own.masks)), 1.0)
    common = sum(numbers[layer] * logs[layer] for layer in units) / sum(numbers.values())
    for layer, unit in units.items():
        around = Thresholds(middles[layer] * 15 / 16, middles[layer] * 17 / 16)
        own = layers[layer]
        crossed = own.count([_is_within(leaf, around) for leaf in own.weights])
        # By how many percent their number falls where t rises by 1 %, then u.
        fall = counts.to_float(crossed) / numbers[layer] * 8
        fall *= jnp.minimum(numbers[layer] * jnp.square(middles[layer] / unit), 1.0) / 2
        # Far away the fall may be another.
        step = jnp.clip((common - logs[layer]) / (1 + fall), -0.25, 0.25)
        settled[layer] = middles[layer] * jnp.exp(step)
    return settled


def _is_within(leaf: jax.Array, band: Thresholds) -> jax.Array:
    magnitude = jnp.abs(leaf).astype(jnp.float32)
    return (magnitude >= band.low) & (magnitude < band.high)


def _within(limit: jax.Array | None, kept: jax.Array) -> jax.Array:
    return kept if limit is None else kept & limit


def _sizes(layers: Layers) -> dict[str, int]:
    return {name: layer.size for name, layer in layers.items()}


def _share(count: Count, sizes: Mapping[str, int]) -> jax.Array:
    return counts.to_float(count) / float(max(sum(sizes.values()), 1))


def _floor(share: jax.Array, size: int) -> Count:
    """At least one connection, of a layer that has any."""
    return counts.from_share(share, size) if size else counts.from_int(0)
