r"""Rules of products of matrices and of convolutions: sums of products over shared axes.

A term of such a sum need not be computed where one factor is known to be 0, nor where both are
known; those of the second kind go into a constant,

.. math::
  \sum_{k} x_k w_k = \sum_{k \in E} x_k w_k + \sum_{k \notin E} x_k w_k .
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dns_jax.inference._known import (
    Known,
    Region,
    exact,
    nothing,
    other_axes,
    restrict,
    spread,
    tidy,
    whole,
    widen,
)
from dns_jax.inference._program import evaluate
from dns_jax.inference._rule import Call, Rule, take_regions


def contraction_rules() -> dict[str, Rule]:
    """Gives the rules by the names of their primitives."""
    return {
        'dot_general': Rule(_dot_known, _dot_asks, _dot_run, fold=_dot_fold),
        'conv_general_dilated': Rule(_conv_known, _conv_asks, _conv_run, fold=_conv_fold),
    }


class _Side(NamedTuple):
    """One operand of a product as (batch, free, contracted), each of the three one axis."""

    open: np.ndarray  # whether it may be other than 0
    unknown: np.ndarray
    numbers: np.ndarray  # float64, 0 where unknown


def _finite(known: Known) -> Known:
    """Takes infinities for unknown: times 0 they are not 0."""
    finite = np.isfinite(known.numbers)
    return Known(known.mask & finite, np.where(finite, known.numbers, np.zeros_like(known.numbers)))


def _axes(call: Call, side: int) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """The batch, free and contracted axes of an operand."""
    contracted, batch = (each[side] for each in call.params['dimension_numbers'])
    count = len(call.operands[side].shape)
    return batch, [a for a in range(count) if a not in (*contracted, *batch)], contracted


def _sides(call: Call, regions: Sequence[Region] | None = None) -> tuple[list[_Side], list[int]]:
    """Brings both operands into one form, and says the shape that their product has."""
    parts = []
    for side, known in enumerate(map(_finite, call.known)):
        arrays = [~known.zero, ~known.mask, known.numbers]
        batch, free, contracted = _axes(call, side)
        arrays = [spread(each, call.operands[side].shape, contracted) for each in arrays]
        if regions:
            arrays = [restrict(each, regions[side]) for each in arrays]
        order = (*batch, *free, *contracted)
        parts.append([each.transpose(order) for each in arrays])
    count = len(_axes(call, 0)[0])
    batch_shape = np.broadcast_shapes(*(part[0].shape[:count] for part in parts))
    sides, shape = [], list(batch_shape)
    for side, part in enumerate(parts):
        free = len(_axes(call, side)[1])
        lengths = part[0].shape[count : count + free]
        shape += lengths
        arrays = [
            np.broadcast_to(each, (*batch_shape, *each.shape[count:])).reshape(
                math.prod(batch_shape), math.prod(lengths), -1
            )
            for each in part
        ]
        sides.append(_Side(arrays[0], arrays[1], widen(arrays[2])))
    return sides, shape


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return left @ right.swapaxes(1, 2)


def _dot_known(call: Call) -> list[Known]:
    if all(not known.mask.any() for known in call.known):
        return [nothing(call.results[0])]
    (left, right), shape = _sides(call)
    one, other = left.unknown.astype(np.float32), right.unknown.astype(np.float32)
    # A sum is known unless it has a term that may be other than 0 and has an unknown factor.
    unknown = _product(one, right.open.astype(np.float32)) + _product(
        left.open.astype(np.float32), other
    )
    mask, numbers = unknown == 0, _product(left.numbers, right.numbers)
    if call.sums[0] or call.sums[1]:
        mean, mean_numbers = _means(call, left, right)
        mask, numbers = mask | mean, np.where(mean, mean_numbers, numbers)
    return [tidy(call.results[0], mask.reshape(shape), numbers.reshape(shape))]


def _means(call: Call, left: _Side, right: _Side) -> tuple[np.ndarray, np.ndarray]:
    """Finds means, by weights that sum to 1, of what is the same known number all along."""
    mask, numbers = np.zeros((), bool), np.zeros(())
    for side, (weights, meant) in enumerate(((left, right), (right, left))):
        if set(_axes(call, side)[2]) != call.sums[side]:
            continue
        first = meant.numbers[..., :1]
        alike = (~meant.unknown & (meant.numbers == first)).all(2)
        found = [np.where(alike, first[..., 0], 0), alike]
        shape = len(left.open), left.open.shape[1], right.open.shape[1]
        found = [np.broadcast_to(np.expand_dims(each, 2 - 1 + side), shape) for each in found]
        del weights
        mask, numbers = mask | found[1], np.where(found[1], found[0], numbers)
    return mask, numbers


def _dot_asks(call: Call, held) -> list[Region]:
    batch, free, _ = _axes(call, 0)
    middle = len(batch) + len(free)
    frees = held[0][len(batch) : middle], held[0][middle:]
    regions = []
    for side in (0, 1):
        region = list(whole(call.operands[side].shape))
        own_batch, own_free, _ = _axes(call, side)
        for axis, chosen in zip(
            (*own_batch, *own_free), (*held[0][: len(batch)], *frees[side]), strict=True
        ):
            region[axis] = chosen
        regions.append(region)
    (left, right), _ = _sides(call, [tuple(region) for region in regions])
    opens = [side.open.any(1) for side in (left, right)]
    if call.folds:
        needed = (left.unknown.any(1) & opens[1]) | (opens[0] & right.unknown.any(1))
    else:
        needed = opens[0] & opens[1]
    lengths = [call.operands[0].shape[axis] for axis in _axes(call, 0)[2]]
    needed = needed.any(0).reshape(lengths)
    if not needed.any():  # one at least, so that no array is empty
        needed = np.arange(needed.size).reshape(needed.shape) == 0
    for axis in range(needed.ndim):
        along = needed.any(other_axes(needed.ndim, axis))
        for side, region in enumerate(regions):
            region[_axes(call, side)[2][axis]] = along
    return [tuple(region) for region in regions]


def _dot_fold(call: Call, asked, held) -> np.ndarray | None:
    if not call.folds:
        return None
    contracted = _axes(call, 0)[2]
    inside = functools.reduce(np.multiply.outer, [asked[0][axis] for axis in contracted], True)
    (left, right), shape = _sides(call)
    left_out = np.where(np.ravel(inside), 0, left.numbers)
    if not left_out.any():
        return None
    added = _product(left_out, right.numbers).reshape(shape).astype(call.results[0].dtype)
    return restrict(added, held[0]) if added.any() else None


def _dot_run(call: Call, operands, asked, held) -> list[Any]:
    del asked, held
    return evaluate(call.equation, operands)


class _Filters(NamedTuple):
    """The kernel of a convolution as (groups, units, channels), taps taken together."""

    open: np.ndarray  # whether any tap may be other than 0
    unknown: np.ndarray


def _spec(call: Call) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """The axes of operand, kernel and result: batch, channels and the others, or units first."""
    return call.params['dimension_numbers']


def _grouped(call: Call) -> _Filters:
    """Looks at the kernel, the groups of units apart."""
    spec, groups = _spec(call)[1], call.params['feature_group_count']
    known = _finite(call.known[1])
    parts = []
    for part in (~known.zero, ~known.mask):
        part = spread(part, call.operands[1].shape, spec[:2]).transpose(spec)
        part = part.any(other_axes(part.ndim, 0, 1))
        parts.append(part.reshape(groups, -1, call.operands[1].shape[spec[1]]))
    return _Filters(*parts)


def _channels(call: Call) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Says which channels may be other than 0 somewhere, which are unknown there, and numbers."""
    known, axis = _finite(call.known[0]), _spec(call)[0][1]
    groups, length = call.params['feature_group_count'], call.operands[0].shape[axis]
    others = other_axes(known.mask.ndim, axis)
    open_, unknown = (
        np.broadcast_to(part.any(others), length).reshape(groups, -1)
        for part in (~known.zero, ~known.mask)
    )
    return open_, unknown, known.numbers


def _terms(call: Call, filters: _Filters) -> np.ndarray:
    """Which terms (group, unit, channel) must be computed."""
    open_, unknown, _ = _channels(call)
    if not call.folds:
        return filters.open & open_[:, None]
    return (filters.open & unknown[:, None]) | (filters.unknown & open_[:, None])


def _conv_known(call: Call) -> list[Known]:
    if call.params['batch_group_count'] != 1:
        return [nothing(call.results[0])]
    known = ~_terms(call._replace(folds=True), _grouped(call)).any(2).ravel()
    if not known.any():
        return [nothing(call.results[0])]
    axis, ndim = _spec(call)[2][1], len(call.results[0].shape)
    mask = known.reshape([-1 if each == axis else 1 for each in range(ndim)])
    numbers = _convolve(call, np.ones(call.operands[0].shape[_spec(call)[0][1]], bool))
    return [tidy(call.results[0], mask, np.zeros((), np.float32) if numbers is None else numbers)]


def _convolve(call: Call, channels: np.ndarray) -> np.ndarray | None:
    """Convolves what is known of some channels; None if that is 0. At borders it sees padding."""
    lhs, rhs, _ = _spec(call)
    numbers, weights = _finite(call.known[0]).numbers, _finite(call.known[1]).numbers
    chosen = channels.reshape([-1 if axis == lhs[1] else 1 for axis in range(numbers.ndim)])
    numbers = np.where(chosen, numbers, np.zeros((), numbers.dtype))
    if not numbers.any():
        return None
    numbers = spread(numbers, call.operands[0].shape, lhs[1:])
    weights = spread(weights, call.operands[1].shape, rhs)
    with jax.ensure_compile_time_eval():
        wide = [jnp.asarray(each, jnp.float32) for each in (numbers, weights)]
        (result,) = evaluate(
            call.equation, wide, preferred_element_type=None, precision=lax.Precision.HIGHEST
        )
        result = np.asarray(result)
    return result if result.any() else None


def _conv_asks(call: Call, held) -> list[Region]:
    (lhs, rhs, out), groups = _spec(call), call.params['feature_group_count']
    regions = [list(whole(each.shape)) for each in call.operands]
    if call.params['batch_group_count'] != 1:
        return [tuple(region) for region in regions]
    regions[0][lhs[0]] = held[0][out[0]]
    units = held[0][out[1]].reshape(groups, -1)
    terms = _terms(call, _grouped(call)) & units[:, :, None]
    # Groups stay alike: each that is there has as many units and channels as the others.
    present, of_group, channels = units.any(1), units.any(0), terms.any((0, 1))
    if not channels.any():
        channels = np.arange(len(channels)) == 0
    regions[0][lhs[1]] = np.outer(present, channels).ravel()
    regions[1][rhs[0]] = np.outer(present, of_group).ravel()
    regions[1][rhs[1]] = channels
    return [tuple(region) for region in regions]


def _conv_fold(call: Call, asked, held) -> np.ndarray | None:
    if not call.folds or call.params['batch_group_count'] != 1:
        return None
    left_out = ~asked[0][_spec(call)[0][1]]
    numbers = _convolve(call, left_out) if left_out.any() else None
    if numbers is None:
        return None
    added = exact(numbers, call.results[0]).numbers  # at length 1 where all along an axis is alike
    return restrict(added, held[0])


def _conv_run(call: Call, operands, asked, held) -> list[Any]:
    lhs, rhs, out = _spec(call)
    if call.params['batch_group_count'] != 1:
        (result,) = evaluate(call.equation, operands)
        return [take_regions(result, whole(call.results[0].shape), held[0])]
    groups = int(asked[0][lhs[1]].sum()) // int(asked[1][rhs[1]].sum())
    (result,) = evaluate(call.equation, operands, feature_group_count=groups)
    given = list(whole(call.results[0].shape))
    given[out[0]], given[out[1]] = held[0][out[0]], asked[1][rhs[0]]
    return [take_regions(result, tuple(given), held[0])]
