"""Finds thresholds at which a wanted number of connections is kept, exact to the last bit.

What is kept falls as a threshold rises, and the bits of floats that are not negative, read as
integers, have the order of the floats. So a threshold is found in its bits: by bisection, or from
one that is near. Owns no layers and no rules.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dns_jax import counts
from dns_jax.counts import Count

_INFINITY = 0x7F800000  # as bits
_STRIDE = 1 << 17  # in bits: 0.8 to 1.6 % of a threshold

Excess = Callable[[list[jax.Array]], list[Count]]
"""Maps thresholds, float32 scalars, to how many more than wanted each of them keeps."""


def bisect(excess_at: Excess, number: int) -> list[jax.Array]:
    """Finds the largest thresholds that keep enough, in 31 passes.

    Args:
      excess_at: falls as the thresholds rise, and is not negative at 0.
      number: of thresholds.

    Returns:
      The thresholds, float32 scalars; the largest float where any is enough.

    Example:
      >>> import jax.numpy as jnp
      >>> weights = jnp.array([1.0, 3.0, 2.0])
      >>> excess = lambda t: [counts.minus(counts.count_all([weights >= t[0]]), counts.from_int(2))]
      >>> bisect(excess, 1)
      [Array(2., dtype=float32)]
    """

    def try_bit(done, bits):
        candidate = bits | (1 << (30 - done))
        enough = (_excess_of_bits(excess_at, candidate).high >= 0) & (candidate < _INFINITY)
        return jnp.where(enough, candidate, bits)

    return _as_floats(jax.lax.fori_loop(0, 31, try_bit, jnp.zeros(number, jnp.int32)))


class _Bracket(NamedTuple):
    """Where the thresholds lie, all as bits, with the excess at both ends as floats."""

    passes: jax.Array
    candidate: jax.Array
    low: jax.Array  # enough is kept
    high: jax.Array  # too little is kept
    low_excess: jax.Array
    high_excess: jax.Array
    done: jax.Array


def search(excess_at: Excess, starts: Sequence[jax.Array]) -> list[jax.Array]:
    """Finds thresholds that keep what is wanted from others that are near, in a few passes.

    Widens a bracket from the starts, then closes it by interpolation and bisection in turns.

    Args:
      excess_at: as for `bisect`.
      starts: where to begin; 0 where nothing is known.

    Returns:
      Thresholds that keep the number wanted, float32 scalars; where weights tie, the largest that
      keeps enough.

    Example:
      >>> import jax.numpy as jnp
      >>> weights = jnp.array([1.0, 3.0, 2.0])
      >>> excess = lambda t: [counts.minus(counts.count_all([weights >= t[0]]), counts.from_int(2))]
      >>> (threshold,) = search(excess, [jnp.float32(0.5)])
      >>> 1 < float(threshold) <= 2
      True
    """
    bits = jax.lax.bitcast_convert_type(jnp.stack(list(starts)), jnp.int32)
    bits = jnp.where((bits > 0) & (bits < _INFINITY), bits, _INFINITY // 2)

    def narrow(bracket):
        passes, candidate = bracket.passes, bracket.candidate
        number = counts.to_float(_excess_of_bits(excess_at, candidate))
        enough = number >= 0
        low = jnp.where(enough, candidate, bracket.low)
        high = jnp.where(enough, bracket.high, candidate)
        low_excess = jnp.where(enough, number, bracket.low_excess)
        high_excess = jnp.where(enough, bracket.high_excess, number)
        # Four times as far in every pass, so that some ten reach any float.
        stride = jnp.left_shift(_STRIDE, jnp.minimum(2 * passes, 12))
        wider = candidate + jnp.where(
            enough, jnp.minimum(stride, high - candidate), -jnp.minimum(stride, candidate - low)
        )
        part = low_excess / (low_excess - high_excess)
        part = jnp.where(passes % 4 == 3, 0.5, part) * (high - low).astype(jnp.float32)
        between = low + jnp.clip(part, 1.0, 2.0**30).astype(jnp.int32)
        bracketed = (low > 0) & (high < _INFINITY)
        following = jnp.clip(jnp.where(bracketed, between, wider), low + 1, high - 1)
        done = (number == 0) | (high - low <= 1)
        new = following, low, high, low_excess, high_excess, done
        # What is done stays, while others are searched for.
        kept = (jnp.where(bracket.done, *pair) for pair in zip(bracket[1:], new, strict=True))
        return _Bracket(passes + 1, *kept)

    some = jnp.ones(bits.shape, jnp.float32)
    bracket = _Bracket(
        jnp.int32(0),
        candidate=bits,
        low=jnp.zeros_like(bits),
        high=jnp.full_like(bits, _INFINITY),
        low_excess=some,
        high_excess=-some,
        done=jnp.zeros(bits.shape, bool),
    )
    return _as_floats(jax.lax.while_loop(lambda state: ~state.done.all(), narrow, bracket).low)


def _as_floats(bits: jax.Array) -> list[jax.Array]:
    return list(jax.lax.bitcast_convert_type(bits, jnp.float32))


def _excess_of_bits(excess_at: Excess, bits: jax.Array) -> Count:
    return jax.tree.map(lambda *parts: jnp.stack(parts), *excess_at(_as_floats(bits)))
