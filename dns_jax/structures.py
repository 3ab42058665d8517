"""What h_k decides together: single weights, blocks, units, or N of every M weights.

A structure is a property of a `Rule`. It cuts a leaf into groups, says how much each matters, and
spreads what h_k says of a group over its members. Leaves of one axis, such as biases, are pruned
weight by weight whatever the structure: an axis of them is no matrix to be cut.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dns_jax._core.checks import check_hysteresis

_PAIRWISE = 16  # up to this length, pairs are faster than a sort or a reduction
_TINY, _HUGE = 1e-24, 1e38  # sums of squares between them have lost nothing that counts


@dataclasses.dataclass(frozen=True)
class Structure:
    """Single weights, each decided by itself: a rule's structure where it has no other."""

    def check(self, path: str, shape: Sequence[int]) -> None:
        """Refuses a leaf whose shape the groups do not divide.

        Args:
          path: of the leaf.
          shape: of the leaf.

        Raises:
          ValueError: if they do not; it names leaf, axis and sizes.
        """

    def score(self, leaf: jax.Array) -> jax.Array:
        """Says how much each group matters, from how much its members do.

        Args:
          leaf: weights, or any importance of them.

        Returns:
          Numbers of which the magnitudes count, one for each group.
        """
        return leaf

    def gather(self, mask: jax.Array) -> jax.Array:
        """Gives the mask of each group: kept where any of its members is.

        Args:
          mask: of a leaf, bool.

        Returns:
          One bool for each group.
        """
        return mask

    def spread(self, kept: jax.Array, mask: jax.Array) -> jax.Array:
        """Gives all members of a group its mask.

        Args:
          kept: one bool for each group.
          mask: any mask of the leaf, for its shape and sharding.

        Returns:
          The mask of the leaf, bool.
        """
        del mask
        return kept

    def limit(self, scores: jax.Array, mask: jax.Array) -> jax.Array | None:
        """Says which entries may be kept at all, whatever the thresholds are.

        Args:
          scores: as `score` gives them.
          mask: as `gather` gives it.

        Returns:
          A bool for each entry, or None if all may be.
        """
        del scores, mask


SINGLE_WEIGHTS = Structure()
"""Each weight decided by itself."""


class _Groups(Structure):
    """Groups that have common sizes along the axes of a leaf, and one bit each."""

    pool: str

    def __post_init__(self):
        if self.pool not in _POOLS:
            raise ValueError(f'pool must be one of {sorted(_POOLS)}, but is {self.pool!r}')

    def _sizes(self, path: str, shape: Sequence[int]) -> Sequence[int]:
        """Says how long a group is along each axis of a leaf."""
        raise NotImplementedError

    def check(self, path, shape):
        for axis, (size, length) in enumerate(zip(self._sizes(path, shape), shape, strict=True)):
            if length % size:
                raise ValueError(
                    f'{self} must divide the axes of {path!r}, but axis {axis} of its shape '
                    f'{tuple(shape)} has {length} entries, in groups of {size}'
                )

    def score(self, leaf):
        cut, within = self._cut(leaf.shape)
        return _POOLS[self.pool](leaf.reshape(cut), within) if within else leaf

    def gather(self, mask):
        cut, within = self._cut(mask.shape)
        return _reduce(jnp.logical_or, jnp.any, mask.reshape(cut), within)

    def spread(self, kept, mask):
        cut, _ = self._cut(mask.shape)
        # By an operation on each entry, which keeps the sharding.
        return (kept & jnp.ones_like(mask.reshape(cut))).reshape(mask.shape)

    def _cut(self, shape) -> tuple[list[int], tuple[int, ...]]:
        """Splits axes into groups; gives the new shape and which axes lie within a group."""
        cut, within = [], []
        for length, size in zip(shape, self._sizes('', shape), strict=True):
            if 1 < size < length:
                cut.append(length // size)
            cut.append(size if size > 1 else length)
            if size > 1:
                within.append(len(cut) - 1)
        return cut, tuple(within)


@dataclasses.dataclass(frozen=True)
class Blocks(_Groups):
    r"""Blocks of a kernel, each pruned and spliced as a whole.

    .. math::
      |W_g| = \sqrt{\tfrac1{|g|} \sum_{i \in g} w_i^2}

    takes the place of `|w|` in h_k, in thresholds and in counts.

    Args:
      shape: how long a block is along the last axes of a leaf; −1 is all of an axis. Along the
        axes before them it has one entry.
      pool: how the members make the importance of a block: `rms` as above, `mean` or `max` of their
        magnitudes.

    Raises:
      ValueError: if a size is neither −1 nor at least 1, or `pool` is none of the three.

    Example:
      >>> import jax.numpy as jnp
      >>> weights = jnp.array([[3.0, 4.0, 0.0, 0.0], [3.0, 4.0, 0.0, 2.0]])
      >>> Blocks((2, 2), pool='mean').score(weights).ravel()
      Array([3.5, 0.5], dtype=float32)

    Reference:
      Gray et al. 2017, GPU kernels for block-sparse weights, for the pattern.
    """

    shape: tuple[int, ...]
    pool: str = 'rms'

    def __post_init__(self):
        super().__post_init__()
        if not self.shape or any(size != -1 and size < 1 for size in self.shape):
            raise ValueError(f'shape must have sizes of at least 1, or -1, but is {self.shape!r}')

    def _sizes(self, path, shape):
        """Says how long a block is along each axis of a leaf."""
        if len(self.shape) > len(shape):
            raise ValueError(f'{self} has more axes than {path!r}, whose shape is {tuple(shape)}')
        own = [1] * (len(shape) - len(self.shape)) + list(self.shape)
        return [length if size == -1 else size for size, length in zip(own, shape, strict=True)]


@dataclasses.dataclass(frozen=True)
class Units(_Groups):
    r"""All weights at one place of an axis: an output unit, an input unit, an attention head.

    Args:
      axis: which axis counts the units, or which axes do: −1 is the outputs of a kernel, −2 its
        inputs, (−2, −1) the filters between two channels.
      pool: as for `Blocks`.

    Raises:
      ValueError: if `pool` is none of the three.

    Example:
      >>> import jax.numpy as jnp
      >>> Units(axis=-1, pool='max').score(jnp.array([[3.0, 4.0], [1.0, -5.0]]))
      Array([[3., 5.]], dtype=float32)

    Reference:
      Wen et al. 2016, Learning structured sparsity in deep neural networks, for the pattern.
    """

    axis: int | tuple[int, ...] = -1
    pool: str = 'rms'

    def _sizes(self, path, shape):
        """Says how long a unit is along each axis of a leaf."""
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        if any(not -len(shape) <= axis < len(shape) for axis in axes):
            raise ValueError(f'{self} asks for an axis that {path!r} of shape {shape} has not')
        counted = {axis % len(shape) for axis in axes}
        return [1 if axis in counted else length for axis, length in enumerate(shape)]


@dataclasses.dataclass(frozen=True)
class NofM(Structure):
    r"""At most N of every M weights that follow each other along an axis: those that matter most.

    A kept weight gives way to a pruned one that is larger by more than the band,

    .. math::
      (1 - \eta)\,|w_\text{pruned}| > (1 + \eta)\,|w_\text{kept}|

    and equals are kept by position, the first ones, so that exactly N are let pass. Where the rule
    has thresholds, a weight must reach them besides; where they are None, exactly N are kept.

    Args:
      n: how many of a group are kept.
      m: how many weights a group has.
      axis: along which axis a group lies; −2 is the inputs of a kernel, along which hardware sums.
      hysteresis: half the relative width η of the band, in [0, 1).

    Raises:
      ValueError: if not 1 ≤ n ≤ m, or `hysteresis` is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> weights = jnp.array([[3.0], [-4.0], [1.0], [2.0]])
      >>> NofM(2, 4).limit(weights, jnp.ones_like(weights, bool)).ravel()
      Array([ True,  True, False, False], dtype=bool)

    Reference:
      Mishra et al. 2021, Accelerating sparse deep neural networks; Zhou et al. 2021, Learning N:M
      fine-grained structured sparse neural networks from scratch.
    """

    n: int
    m: int
    axis: int = -2
    hysteresis: float = 0.1

    def __post_init__(self):
        check_hysteresis(self.hysteresis)
        if not 1 <= self.n <= self.m:
            raise ValueError(f'n must be from 1 to m, but n is {self.n!r} and m is {self.m!r}')

    def check(self, path, shape) -> None:
        """Refuses a leaf that has not the axis, or whose axis M does not divide.

        Args:
          path: of the leaf.
          shape: of the leaf.

        Raises:
          ValueError: if it is such a leaf.
        """
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(f'{self} asks for an axis that {path!r} of shape {shape} has not')
        if (length := shape[self.axis]) % self.m:
            raise ValueError(
                f'{self} must divide axis {self.axis} of {path!r}, but its shape {tuple(shape)} '
                f'has {length} entries there'
            )

    def limit(self, scores, mask):
        """Says which weights are among the N of their M.

        Args:
          scores: weights, or any importance of them.
          mask: of the leaf, bool.

        Returns:
          A bool for each weight.
        """
        advantage = jnp.where(mask, 1 + self.hysteresis, 1 - self.hysteresis)
        # Nothing of the scores alone, which XLA would compute before the loop, and store.
        order = jnp.abs(scores.astype(jnp.float32) * advantage)
        # A pruned zero counts less than a kept one: without splicing, what is pruned is zero.
        order = jnp.where(mask | (order != 0), order, -1.0)
        return self.largest(order)

    def largest(self, order: jax.Array, as_many_as: jax.Array | None = None) -> jax.Array:
        """Finds the N largest of every M; of equals the first.

        Args:
          order: numbers, of the shape of a leaf.
          as_many_as: a mask of that shape; of each M as many are found as it keeps, in place of N.

        Returns:
          True at N of every M, bool.
        """
        # A NaN counts as above everything, as in h_k.
        order = jnp.where(jnp.isnan(order), jnp.inf, order)
        axis = self.axis % order.ndim
        groups = list(order.shape)
        groups[axis : axis + 1] = groups[axis] // self.m, self.m
        ranks = _rank(order.reshape(groups), axis + 1)
        most: Any = self.n
        if as_many_as is not None:
            most = as_many_as.reshape(groups).sum(axis + 1, keepdims=True)
        return (ranks < most).reshape(order.shape)


def _rank(order: jax.Array, axis: int) -> jax.Array:
    """Counts how many entries along an axis go before each: larger ones, and equals before it."""
    length = order.shape[axis]
    if length > _PAIRWISE:
        return jnp.argsort(jnp.argsort(-order, axis, stable=True), axis)
    entries = [jax.lax.index_in_dim(order, index, axis) for index in range(length)]
    ranks = [jnp.zeros_like(entry, jnp.int32) for entry in entries]
    for former, latter in itertools.combinations(range(length), 2):
        is_before = (entries[former] >= entries[latter]).astype(jnp.int32)
        ranks[latter] += is_before
        ranks[former] += 1 - is_before
    return jnp.concatenate(ranks, axis)


def _root_mean_square(leaf: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    leaf = leaf.astype(jnp.float32)
    squares = _reduce(jnp.add, jnp.sum, jnp.square(leaf), axes)
    members = _members(leaf, axes)
    # A square may leave the range of float32 where the weight does not.
    in_range = ((squares > _TINY) & (squares < _HUGE)).all()
    return jax.lax.cond(
        in_range,
        lambda: jnp.sqrt(squares / members),
        lambda: _scaled_root_mean_square(leaf, axes),
    )


def _scaled_root_mean_square(leaf: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Gives each group a scale of its own, in one more pass."""
    largest = _max(leaf, axes)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return scale * jnp.sqrt(_mean(jnp.square(leaf / scale), axes))


def _mean(leaf: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    magnitudes = jnp.abs(leaf).astype(jnp.float32)
    return _reduce(jnp.add, jnp.sum, magnitudes, axes) / _members(leaf, axes)


def _max(leaf: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return _reduce(jnp.maximum, jnp.max, jnp.abs(leaf).astype(jnp.float32), axes)


def _members(leaf: jax.Array, axes: tuple[int, ...]) -> float:
    return float(math.prod(leaf.shape[axis] for axis in axes))


def _reduce(pair: Any, whole: Any, leaf: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Reduces along axes: short ones pair by pair, for XLA is slow along them."""
    for axis in axes:
        is_sharded = jax.typeof(leaf).sharding.spec[axis] is not None  # which cannot be sliced
        if (length := leaf.shape[axis]) > _PAIRWISE or is_sharded:
            leaf = whole(leaf, axis, keepdims=True)
        else:
            entries = (jax.lax.slice_in_dim(leaf, at, at + 1, axis=axis) for at in range(length))
            leaf = functools.reduce(pair, entries)
    return leaf


_POOLS: dict[str, Callable[[jax.Array, tuple[int, ...]], jax.Array]] = {
    'rms': _root_mean_square,
    'mean': _mean,
    'max': _max,
}
