"""What must be said of a primitive so that it can be followed, and the ways parts of arrays go.

Owns the form of a rule. Of the three questions each rule answers, the first goes forward through a
program, the second backward, and the third forward again, on small arrays.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dns_jax.inference._known import Known, Region
from dns_jax.inference._program import Equation, evaluate


class Call(NamedTuple):
    """An equation, and what is known of its operands."""

    equation: Equation
    operands: Sequence[Any]  #: shape and dtype of each
    results: Sequence[Any]
    known: Sequence[Known]
    sums: Sequence[frozenset[int]]  #: of each operand, the axis along which it sums to 1, if any
    folds: bool  #: whether known parts of the operands may go into constants

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the primitive."""
        return self.equation.params


def _reads_none(call: Call) -> Sequence[int]:
    del call
    return ()


def _adds_nothing(call: Call, asked: Sequence[Region], held: Sequence[Region]) -> None:
    del call, asked, held


class Rule(NamedTuple):
    """How one primitive is followed."""

    #: says what is known of the results
    known: Callable[[Call], list[Known]]
    #: says what the operands must give for some regions of the results
    asks: Callable[[Call, Sequence[Region]], list[Region]]
    #: computes these regions from what the operands gave; the arguments are the call, the arrays,
    #: their regions, and the regions wanted
    run: Callable[[Call, Sequence[Any], Sequence[Region], Sequence[Region]], list[Any]]
    #: says what known parts, which were not asked for, add to the result; None is nothing
    fold: Callable[[Call, Sequence[Region], Sequence[Region]], np.ndarray | None] = _adds_nothing
    #: names the axes of the operand of which all is read, whatever is wanted
    reads_all: Callable[[Call], Sequence[int]] = _reads_none
    is_elementwise: bool = False


# What NumPy computes as JAX does, of these dtypes; it need not compile.
_IN_NUMPY: dict[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in ('exp', 'log', 'sqrt', 'square', 'tanh', 'log1p')},
    **{'add': np.add, 'sub': np.subtract, 'mul': np.multiply, 'neg': np.negative},
    **{'floating div': np.divide, 'max': np.maximum, 'min': np.minimum, 'abs': np.abs},
    **{'eq': np.equal, 'ne': np.not_equal, 'lt': np.less, 'le': np.less_equal},
    **{'gt': np.greater, 'ge': np.greater_equal},
}
_DTYPES = {np.dtype(name) for name in ('float32', 'float64', 'int32', 'int64')}


def compute(call: Call, operands: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Computes an equation on known numbers, also where others are traced."""
    name = call.equation.primitive.name
    dtypes = {operand.dtype for operand in operands}
    if name in ('stop_gradient', 'copy'):
        return list(operands)
    if name == 'div' and all(np.issubdtype(dtype, np.floating) for dtype in dtypes & _DTYPES):
        name = 'floating div'
    if name in _IN_NUMPY and dtypes <= _DTYPES:
        with np.errstate(all='ignore'):
            return [_IN_NUMPY[name](*operands)]
    with jax.ensure_compile_time_eval():
        results = evaluate(call.equation, [jnp.asarray(each) for each in operands])
        return [np.asarray(result) for result in results]


def take_regions(array: Any, given: Region, wanted: Region) -> Any:
    """Takes from an array that holds a region a smaller one."""
    for axis, (one, other) in enumerate(zip(given, wanted, strict=True)):
        if not np.array_equal(one, other):
            array = take(array, np.flatnonzero(other[one]), axis)
    return array


def take(array: Any, places: np.ndarray, axis: int) -> Any:
    """Takes entries along an axis; those that are evenly spaced need no gather."""
    if np.array_equal(places, np.arange(array.shape[axis])):
        return array
    steps = np.unique(np.diff(places))
    if len(places) and len(steps) <= 1 and (not len(steps) or steps[0] > 0):
        stride = int(steps[0]) if len(steps) else 1
        return lax.slice_in_dim(array, int(places[0]), int(places[-1]) + 1, stride, axis)
    return jnp.take(array, np.asarray(places, np.int32), axis=axis, mode='clip')


def arrange(array: Any, places: Sequence[np.ndarray], filler: Any) -> Any:
    """Puts entries of an array where they are wanted, and others in between.

    Args:
      array: the entries; None if none is wanted.
      places: for each axis, which of its entries goes where; -1 where it is another.
      filler: the other entries, for any axis at length 1 the same along it; a scalar will do.

    Returns:
      The new array.
    """
    shape = tuple(map(len, places))
    filler = jnp.asarray(filler)
    missing = np.zeros((1,) * len(places), bool)
    for axis, each in enumerate(places):
        if (each < 0).any():
            lengths = [len(each) if at == axis else 1 for at in range(len(places))]
            missing = missing | (each < 0).reshape(lengths)
        elif array is not None:
            array = take(array, each, axis)
    if array is None or missing.all():
        return jnp.broadcast_to(filler.reshape(filler.shape or (1,) * len(shape)), shape)
    if not missing.any():
        return array
    if filler.ndim == 0 and all(_is_run(each) for each in places):
        edges = [(int(np.argmax(each >= 0)), int(np.argmax(each[::-1] >= 0)), 0) for each in places]
        for axis, each in enumerate(places):
            if (each < 0).any():
                array = take(array, each[each >= 0], axis)
        return lax.pad(array, filler, edges)
    for axis, each in enumerate(places):
        if (each < 0).any():
            array = take(array, np.maximum(each, 0), axis)
    filler = jnp.broadcast_to(filler.reshape(filler.shape or (1,) * len(shape)), shape)
    return lax.select(jnp.broadcast_to(missing, shape), filler, array)


def _is_run(places: np.ndarray) -> bool:
    """Says whether the entries that are there follow each other without a gap."""
    there = np.flatnonzero(places >= 0)
    return len(there) > 0 and there[-1] - there[0] + 1 == len(there)
