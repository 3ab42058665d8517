"""Finds thresholds at which a wanted number of connections is kept.

What is kept falls as a threshold rises, and the bits of floats that are not negative, read as
integers, have the order of the floats. So a threshold is found in its bits: by bisection, exact
to the last, or from one that is near. Owns no layers and no rules.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dns_jax._core import counts
from dns_jax._core.counts import Count

_INFINITY = 0x7F800000  # as bits

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
      >>> two = counts.from_int(2)
      >>> excess = lambda t: [counts.minus(counts.count_all([weights >= t[0]]), two)]
      >>> bisect(excess, 1)
      [Array(2., dtype=float32)]
    """

    def try_bit(done, bits):
        candidate = bits | (1 << (30 - done))
        enough = (_excess_of_bits(excess_at, candidate).high >= 0) & (candidate < _INFINITY)
        return jnp.where(enough, candidate, bits)

    return _as_floats(jax.lax.fori_loop(0, 31, try_bit, jnp.zeros(number, jnp.int32)))


class Aim(NamedTuple):
    """How many connections one threshold is to keep."""

    wanted: jax.Array  #: shape=(), dtype=jnp.float32
    whole: jax.typing.ArrayLike  #: how many there are
    slack: jax.typing.ArrayLike  #: how many more may be kept
    lack: jax.Array | float = 0.0  #: how many fewer


def guess_factor(kept: jax.Array, aim: Aim) -> jax.Array:
    r"""Says by what factor a threshold is to move, to keep what is wanted.

    .. math::
      \frac{\ln(\text{wanted} / \text{whole})}{\ln(\text{kept} / \text{whole})}

    which is right where magnitudes have an exponential distribution.

    Args:
      kept: how many it keeps now, a float32.
      aim: how many it is to keep.

    Returns:
      The factor, from 1/2 to 2, a float32; 1 where as many are kept as wanted.

    Example:
      >>> import jax.numpy as jnp
      >>> float(guess_factor(jnp.float32(50), Aim(jnp.float32(25), 100, 0)))
      2.0
    """
    # Neither is 0 or all, so that no logarithm is infinite or 0.
    kept, wanted = (jnp.clip(number / aim.whole, 1e-9, 1 - 1e-6) for number in (kept, aim.wanted))
    return jnp.clip(jnp.log(wanted) / jnp.log(kept), 0.5, 2.0)


class _Bracket(NamedTuple):
    """Where the thresholds lie, all as bits, with ln(kept / wanted) at both ends."""

    passes: jax.Array
    candidate: jax.Array
    low: jax.Array  # enough is kept
    high: jax.Array  # too little is kept
    above: jax.Array
    below: jax.Array
    enough: jax.Array  # at the last candidate
    found: jax.Array
    done: jax.Array


def search(excess_at: Excess, starts: Sequence[jax.Array], aims: Sequence[Aim]) -> list[jax.Array]:
    """Finds thresholds that keep what is wanted from others that are near, in a few passes.

    Goes from the starts by `guess_factor`, ever farther, to where there is enough below and too
    little above, and closes in by interpolation and bisection in turns.

    Args:
      excess_at: as for `bisect`.
      starts: where to begin; 0 where nothing is known.
      aims: what is wanted of each.

    Returns:
      Thresholds that keep the number wanted, but for the slack, float32 scalars; where weights
      tie, the largest that keeps enough.

    Example:
      >>> import jax.numpy as jnp
      >>> weights = jnp.array([1.0, 3.0, 2.0])
      >>> two = counts.from_int(2)
      >>> excess = lambda t: [counts.minus(counts.count_all([weights >= t[0]]), two)]
      >>> (threshold,) = search(excess, [jnp.float32(0.5)], [Aim(jnp.float32(2), 3, 0)])
      >>> 1 < float(threshold) <= 2
      True
    """
    aim = jax.tree.map(lambda *parts: jnp.stack([jnp.float32(part) for part in parts]), *aims)
    bits = _as_bits(jnp.stack(list(starts)))
    bits = jnp.where((bits > 0) & (bits < _INFINITY), bits, _INFINITY // 2)

    def narrow(bracket):
        passes, candidate = bracket.passes, bracket.candidate
        number = jnp.stack([counts.to_float(excess) for excess in excess_at(_as_floats(candidate))])
        enough = number >= 0
        low = jnp.where(enough, candidate, bracket.low)
        high = jnp.where(enough, bracket.high, candidate)
        height = jnp.log(jnp.maximum(number + aim.wanted, 0.5) / aim.wanted)
        # An end that stays counts half in the next interpolation, lest it stay for ever.
        stays = jnp.where(enough == bracket.enough, 0.5, 1.0)
        above = jnp.where(enough, height, bracket.above * stays)
        below = jnp.where(enough, bracket.below * stays, height)
        # Twice as far in every pass, and at least by a stride, so that some ten reach any float.
        octaves = jnp.abs(jnp.log2(guess_factor(number + aim.wanted, aim)))
        octaves = jnp.left_shift(1, jnp.minimum(passes, 6)).astype(jnp.float32) * octaves
        stride = jnp.left_shift(1, jnp.minimum(4 * passes, 28))
        stride = jnp.maximum(stride, (octaves * 2.0**23).astype(jnp.int32))
        wider = jnp.where(
            enough,
            candidate + jnp.minimum(stride, high - candidate),
            candidate - jnp.minimum(stride, candidate - low),
        )
        part = above / (above - below)
        part = jnp.where(passes % 4 == 3, 0.5, part) * (high - low).astype(jnp.float32)
        between = low + jnp.clip(part, 1.0, 2.0**30).astype(jnp.int32)
        bracketed = (low > 0) & (high < _INFINITY)
        following = jnp.clip(jnp.where(bracketed, between, wider), low + 1, high - 1)
        near, closed = (number >= -aim.lack) & (number <= aim.slack), high - low <= 1
        found = jnp.where(near, candidate, low)
        new = following, low, high, above, below, enough, found, near | closed
        # What is done stays, while others are searched for.
        kept = (jnp.where(bracket.done, *pair) for pair in zip(bracket[1:], new, strict=True))
        return _Bracket(passes + 1, *kept)

    unknown = jnp.zeros(bits.shape, jnp.float32)
    bracket = _Bracket(
        jnp.int32(0),
        candidate=bits,
        low=jnp.zeros_like(bits),
        high=jnp.full_like(bits, _INFINITY),
        above=unknown,
        below=unknown,
        enough=jnp.zeros(bits.shape, bool),
        found=bits,
        done=jnp.zeros(bits.shape, bool),
    )
    bracket = jax.lax.while_loop(lambda state: ~state.done.all(), narrow, bracket)
    return _as_floats(bracket.found)


def range_scale(arrays: Sequence[jax.Array]) -> jax.Array:
    """Finds the power of two that the largest magnitude is about as large as.

    Squares and sums of what is divided by it stay within float32, with the same bits.

    Args:
      arrays: floating point.

    Returns:
      A float32 scalar from 2^−126 to 2^126.

    Example:
      >>> import jax.numpy as jnp
      >>> float(range_scale([jnp.array([0.0, -5.0])]))
      8.0
    """
    largest = jnp.float32(0)
    for array in arrays:
        if array.size:
            largest = jnp.maximum(largest, jnp.max(jnp.abs(array)).astype(jnp.float32))
    # By the bits of the exponent: jnp.frexp and jnp.ldexp make infinities on their way.
    exponent = (jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23) + 1
    return jax.lax.bitcast_convert_type(jnp.clip(exponent, 1, 253) << 23, jnp.float32)


def _as_bits(thresholds: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(thresholds, jnp.int32)


def _as_floats(bits: jax.Array) -> list[jax.Array]:
    return list(jax.lax.bitcast_convert_type(bits, jnp.float32))


def _excess_of_bits(excess_at: Excess, bits: jax.Array) -> Count:
    return jax.tree.map(lambda *parts: jnp.stack(parts), *excess_at(_as_floats(bits)))
