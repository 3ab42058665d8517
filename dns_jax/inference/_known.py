"""What is known of a value whatever the inputs are: entries that are always one number.

Owns the form of this knowledge. It has the axes of the value, each at its length or, where all
entries along it are alike, at length 1. A region is one boolean array for each axis: which entries
along it are meant.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Region = tuple[np.ndarray, ...]
"""Some entries along each axis of a value."""


class Known(NamedTuple):
    """Which entries of a value are known; both arrays are of one shape, axes of length 1 spread."""

    mask: np.ndarray  #: bool
    numbers: np.ndarray  #: of the dtype of the value, 0 where nothing is known

    @property
    def zero(self) -> np.ndarray:
        """Which entries are known to be 0."""
        return self.mask & (self.numbers == 0)


def nothing(aval: Any) -> Known:
    """Says that no entry is known."""
    shape = (1,) * len(aval.shape)
    # Keys of random numbers have no NumPy array; of what is not known the dtype plays no part.
    dtype = bool if jnp.issubdtype(aval.dtype, jax.dtypes.extended) else aval.dtype
    return Known(np.zeros(shape, bool), np.zeros(shape, dtype))


def tidy(aval: Any, mask: Any, numbers: Any) -> Known:
    """Makes knowledge of a value, axes along which all is alike at length 1.

    Example:
      >>> import jax, numpy as np
      >>> aval = jax.ShapeDtypeStruct((2, 3), np.float32)
      >>> tidy(aval, np.array([[True, True, False]] * 2), np.array([[1, 2, 3]] * 2)).numbers
      array([[1., 2., 0.]], dtype=float32)
    """
    mask = np.asarray(mask)
    if not mask.any() or jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return nothing(aval)
    mask, numbers = np.broadcast_arrays(mask, np.asarray(numbers, aval.dtype))
    if not mask.all():
        numbers = np.where(mask, numbers, np.zeros((), numbers.dtype))
    for axis, length in enumerate(mask.shape):
        first = (slice(None),) * axis + (slice(1),)
        if length > 1 and all((part == part[first]).all() for part in (mask, numbers)):
            mask, numbers = mask[first], numbers[first]
    return Known(mask, numbers)


def exact(array: np.ndarray, aval: Any) -> Known:
    """Says that a value is wholly known."""
    return tidy(aval, np.ones((1,) * array.ndim, bool), array)


def widen(numbers: np.ndarray) -> np.ndarray:
    """Gives numbers the widest dtype of their kind, to sum them in."""
    if np.issubdtype(numbers.dtype, np.complexfloating):
        return numbers.astype(np.complex128)
    return numbers.astype(np.int64 if np.issubdtype(numbers.dtype, np.integer) else np.float64)


def spread(part: np.ndarray, shape: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    """Gives some axes their full length."""
    lengths = [shape[axis] if axis in axes else size for axis, size in enumerate(part.shape)]
    return np.broadcast_to(part, lengths)


def restrict(part: np.ndarray, region: Region) -> np.ndarray:
    """Takes a region, of the axes that are at their length."""
    for axis, chosen in enumerate(region):
        if part.shape[axis] == len(chosen) and not chosen.all():
            part = np.compress(chosen, part, axis)
    return part


def known_slices(known: Known, region: Region) -> Region:
    """Finds along each axis the entries all of which, within a region, are known."""
    found = []
    for axis, chosen in enumerate(region):
        column = (*region[:axis], np.ones_like(chosen), *region[axis + 1 :])
        alike = restrict(known.mask, column).all(other_axes(len(region), axis))
        found.append(np.broadcast_to(alike, chosen.shape))
    return tuple(found)


def other_axes(ndim: int, *axes: int) -> Any:
    """All axes but some."""
    return tuple(axis for axis in range(ndim) if axis not in axes)


def whole(shape: Sequence[int]) -> Region:
    """Means all entries."""
    return tuple(np.ones(length, bool) for length in shape)


def nowhere(shape: Sequence[int]) -> Region:
    """Means no entry."""
    return tuple(np.zeros(length, bool) for length in shape)


def union(first: Region, second: Region) -> Region:
    """Means what one of two regions means, along each axis."""
    return tuple(one | other for one, other in zip(first, second, strict=True))


def is_empty(region: Region) -> bool:
    """Says whether a region has no entry."""
    return not all(chosen.any() for chosen in region)


def sizes(region: Region) -> tuple[int, ...]:
    """How many entries there are along each axis."""
    return tuple(int(np.count_nonzero(chosen)) for chosen in region)
