"""Counts of connections, exact beyond what an int32 holds, without 64-bit types.

A network may have billions of connections, and JAX counts in int32 unless told otherwise. Stands on
nothing; `masks` and the density rules count with it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_LARGE = 2**31  # what an int32 cannot count
_PIECE = 2**30


class Count(NamedTuple):
    """A whole number, high · 2^16 + low, below 2^46 in magnitude; below zero where `high` is."""

    high: jax.Array  #: shape=(), dtype=jnp.int32
    low: jax.Array  #: shape=(), dtype=jnp.int32, from 0 to 2^16 − 1


def count_all(masks: Sequence[jax.Array]) -> Count:
    """Counts the True entries of some boolean arrays together.

    Args:
      masks: bool, of any shapes; at most 2^15 arrays.

    Returns:
      The count.

    Example:
      >>> import jax.numpy as jnp
      >>> to_int(count_all([jnp.array([True, False]), jnp.array([True])]))
      2
    """
    counts = [count_true(piece) for mask in masks for piece in _pieces(mask)]
    stacked = jnp.stack([jnp.int32(0), *counts])
    return _carry((stacked >> 16).sum(dtype=jnp.int32), (stacked & 0xFFFF).sum(dtype=jnp.int32))


def count_true(mask: jax.Array) -> jax.Array:
    """Counts the True entries of one boolean array.

    Args:
      mask: bool, of any shape, of fewer than 2^31 entries.

    Returns:
      How many are True, an int32 scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> int(count_true(jnp.array([True, False, True])))
      2
    """
    if any(jax.typeof(mask).sharding.spec):
        return mask.sum(dtype=jnp.int32)  # explicitly sharded axes cannot be flattened
    # Sums of 128 at a time fit a byte, which XLA on CPU adds up five times faster than int32.
    whole = mask.size // 128 * 128
    flat = mask.reshape(-1).astype(jnp.uint8)
    blocks = flat[:whole].reshape(128, -1).sum(0, dtype=jnp.uint8)
    return blocks.sum(dtype=jnp.int32) + flat[whole:].sum(dtype=jnp.int32)


def from_int(number: int) -> Count:
    """Makes a count of a number that is known, at least 0.

    Example:
      >>> to_int(from_int(8_000_000_000))
      8000000000
    """
    return Count(jnp.int32(number >> 16), jnp.int32(number & 0xFFFF))


def from_array(number: jax.Array) -> Count:
    """Makes a count of a number that is traced, an int32 scalar of at least 0.

    Example:
      >>> import jax.numpy as jnp
      >>> to_int(from_array(jnp.int32(70_000)))
      70000
    """
    return Count(number >> 16, number & 0xFFFF)


def from_share(share: jax.Array, whole: int) -> Count:
    """Rounds a share of a whole to a count, at least 1 and at most all.

    Args:
      share: in [0, 1], a float32 scalar. Beyond a whole of 2^24 the product is rounded to a
        float32, by at most 6e-8 of it.
      whole: what it is a share of.

    Returns:
      The count.

    Example:
      >>> import jax.numpy as jnp
      >>> to_int(from_share(jnp.float32(0.25), 10))
      2
    """
    if whole < _LARGE:
        # The largest float32 that an int32 can be made of; all is asked for by name.
        number = jnp.minimum(jnp.round(share * whole), float(_LARGE - 128)).astype(jnp.int32)
        return from_array(jnp.where(share >= 1, whole, jnp.clip(number, 1, whole)))
    high = share * jnp.float32(whole / 2**16)
    count = _carry(jnp.floor(high).astype(jnp.int32), ((high % 1) * 2**16).astype(jnp.int32))
    return minimum(maximum(count, from_int(1)), from_int(whole))


def minus(count: Count, other: Count) -> Count:
    """Takes one count from another; `high` is negative where the other is the larger one.

    Example:
      >>> to_int(minus(from_int(3), from_int(5)))
      -2
    """
    return _carry(count.high - other.high, count.low - other.low)


def add(counts: Sequence[Count]) -> Count:
    """Adds up counts, at most 2^15 of them.

    Example:
      >>> to_int(add([from_int(4_000_000_000), from_int(4_000_000_000)]))
      8000000000
    """
    return _carry(
        jnp.stack([count.high for count in counts]).sum(dtype=jnp.int32),
        jnp.stack([count.low for count in counts]).sum(dtype=jnp.int32),
    )


def times(count: Count, number: int) -> Count:
    """Multiplies a count by a number that is known, at least 0.

    Example:
      >>> to_int(times(from_int(70_000), 70_000))
      4900000000
    """
    product = from_int(0)
    for digit in number.to_bytes(4, 'big'):  # to the base of 256, so that no product overflows
        shifted = _carry(product.high << 8, product.low << 8)
        product = _carry(shifted.high + count.high * digit, shifted.low + count.low * digit)
    return product


def maximum(count: Count, other: Count) -> Count:
    """Takes the larger of two counts.

    Example:
      >>> to_int(maximum(from_int(3), from_int(70_000)))
      70000
    """
    larger = minus(count, other).high >= 0
    return Count(jnp.where(larger, count.high, other.high), jnp.where(larger, count.low, other.low))


def minimum(count: Count, other: Count) -> Count:
    """Takes the smaller of two counts.

    Example:
      >>> to_int(minimum(from_int(3), from_int(70_000)))
      3
    """
    smaller = minus(other, count).high >= 0
    return Count(
        jnp.where(smaller, count.high, other.high), jnp.where(smaller, count.low, other.low)
    )


def to_float(count: Count) -> jax.Array:
    """Rounds a count to a float32.

    Example:
      >>> float(to_float(from_int(3)))
      3.0
    """
    return count.high.astype(jnp.float32) * 2**16 + count.low.astype(jnp.float32)


def to_int(count: Count) -> int:
    """Reads a count that is concrete.

    Example:
      >>> to_int(Count(1, 1))
      65537
    """
    return (int(count.high) << 16) + int(count.low)


def _carry(high: jax.Array, low: jax.Array) -> Count:
    return Count(high + (low >> 16), low & 0xFFFF)


def _pieces(mask: jax.Array) -> Sequence[jax.Array]:
    """Cuts an array that is too large for one int32 along its longest axis."""
    if mask.size < _LARGE:
        return [mask]
    axis = int(np.argmax(mask.shape))
    length = mask.shape[axis]
    step = max(1, length * _PIECE // mask.size)
    return [
        piece
        for start in range(0, length, step)
        for piece in _pieces(
            jax.lax.slice_in_dim(mask, start, min(start + step, length), axis=axis)
        )
    ]
