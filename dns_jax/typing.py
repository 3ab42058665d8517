"""The types that the modules of `dns_jax` share. Owns no behaviour."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import optax

from dns_jax.structures import SINGLE_WEIGHTS, Structure

Params = Any
"""Any pytree of floating-point arrays, the dense weights W."""

Role = Literal['kernel', 'bias', 'scale', 'embedding', 'statistic']
"""What a leaf is to its layer (`dns_jax.role`)."""

Masks = Any
"""A pytree parallel to the params: boolean arrays, True where a connection is kept.

A leaf that takes no part in surgery has a mask of shape `()`, always True, whatever the
shape of its weights: it broadcasts, and costs one byte.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMask:
    """A mask of one bit a weight: 8 along the last axis in each byte, the first the highest."""

    bits: jax.Array  #: shape=(…, ceil(length / 8)), dtype=jnp.uint8
    length: int = dataclasses.field(metadata={'static': True})  #: of the last axis of the mask


Schedule = optax.Schedule
"""Maps a step count, an int32 scalar that may be traced, to a scalar."""

LayerOf = Callable[[str], str]
"""Maps the path of a leaf to the name of the layer it belongs to."""

Importance = Callable[[jax.Array, Params, optax.Updates], Params]
"""Maps a PRNG key, the weights and their gradient to a tree like the weights.

The magnitudes of its numbers say how much the connections matter.
"""

TakesPart = Callable[[str, Any], bool]
"""Says of a leaf, by its path and itself, whether it takes part."""


class Thresholds(NamedTuple):
    """The band (a_k, b_k) of one layer, in the unit of its weights."""

    low: jax.Array  #: shape=(), dtype=jnp.float32
    high: jax.Array  #: shape=(), dtype=jnp.float32


LayerArrays = Mapping[str, Sequence[jax.Array]]
"""The arrays of some layers, by layer name; their weights, or the masks of these."""

ThresholdRule = Callable[[LayerArrays, LayerArrays, jax.Array], dict[str, Thresholds]]
"""Maps the weights of some layers, their masks and the step count to a band for each layer.

A rule sees all its layers at once, so that it may divide one budget among them, and the masks,
for what h_k keeps within a band depends on them.
"""


class Rule(NamedTuple):
    """How the layers of one group are operated on."""

    #: gives the band of each layer; None, where a structure decides alone (`NofM`)
    thresholds: ThresholdRule | None = None
    #: σ(iter), the chance of an update, one draw for each layer: a number in [0, 1] or a schedule
    update_probability: float | Schedule = 1.0
    #: steps from one asking of the thresholds to the next; 0 asks once, at init. By default
    #: densities are followed at every step, and all other rules asked once.
    refresh_every: int | None = None
    #: what is pruned and spliced together, in all layers or as a table by patterns of their names;
    #: layers that no pattern matches have single weights
    structure: Structure | Mapping[str, Structure] = SINGLE_WEIGHTS
