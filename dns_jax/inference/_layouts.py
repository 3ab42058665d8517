"""Rules of the primitives that give all entries another shape or order."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from dns_jax.inference._known import Known, Region, other_axes, sizes, spread, tidy
from dns_jax.inference._program import evaluate
from dns_jax.inference._rule import Call, Rule, take


def layout_rules() -> dict[str, Rule]:
    """Gives the rules by the names of their primitives."""
    return {
        'broadcast_in_dim': Rule(_broadcast_known, _broadcast_asks, _broadcast_run),
        'reshape': Rule(_reshape_known, _reshape_asks, _reshape_run),
        'rev': Rule(_moved(_rev), _rev_asks, _bound),
        'squeeze': Rule(_moved(_squeeze), _squeeze_asks, _bound),
        'transpose': Rule(_moved(_transpose), _transpose_asks, _bound),
    }


def _moved(move):
    """Says that what is known moves as the entries do."""

    def known(call: Call) -> list[Known]:
        (operand,) = call.known
        return [Known(*(move(call, part) for part in operand))]

    return known


def _bound(call: Call, operands, asked, held) -> list[Any]:
    del asked, held
    return evaluate(call.equation, operands)


def _transpose(call: Call, part: np.ndarray) -> np.ndarray:
    return part.transpose(call.params['permutation'])


def _transpose_asks(call: Call, held) -> list[Region]:
    asked = dict(zip(call.params['permutation'], held[0], strict=True))
    return [tuple(asked[axis] for axis in range(len(asked)))]


def _squeeze(call: Call, part: np.ndarray) -> np.ndarray:
    return part.squeeze(call.params['dimensions'])


def _squeeze_asks(call: Call, held) -> list[Region]:
    left = iter(held[0])
    return [
        tuple(
            np.ones(1, bool) if axis in call.params['dimensions'] else next(left)
            for axis in range(len(call.operands[0].shape))
        )
    ]


def _rev(call: Call, part: np.ndarray) -> np.ndarray:
    return np.flip(part, call.params['dimensions'])


def _rev_asks(call: Call, held) -> list[Region]:
    dimensions = call.params['dimensions']
    return [tuple(each[::-1] if axis in dimensions else each for axis, each in enumerate(held[0]))]


def _broadcast_known(call: Call) -> list[Known]:
    shape = [1] * len(call.results[0].shape)
    for axis, length in zip(
        call.params['broadcast_dimensions'], call.known[0].mask.shape, strict=True
    ):
        shape[axis] = length
    return [Known(*(part.reshape(shape) for part in call.known[0]))]


def _broadcast_asks(call: Call, held) -> list[Region]:
    shape, axes = call.operands[0].shape, call.params['broadcast_dimensions']
    return [
        tuple(
            held[0][axis] if length == len(held[0][axis]) else np.ones(1, bool)
            for length, axis in zip(shape, axes, strict=True)
        )
    ]


def _broadcast_run(call: Call, operands, asked, held) -> list[Any]:
    del asked
    return evaluate(call.equation, operands, shape=sizes(held[0]))


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[slice, slice]]:
    """Finds which neighbouring axes a reshape makes into which."""
    groups, left, right = [], 0, 0
    while left < len(before) or right < len(after):
        start, end = left, right
        left, right = min(left + 1, len(before)), min(right + 1, len(after))
        while (one := math.prod(before[start:left])) != (other := math.prod(after[end:right])):
            left, right = (left + 1, right) if one < other else (left, right + 1)
        groups.append((slice(start, left), slice(end, right)))
    return groups


def _grid(region: Region) -> np.ndarray:
    """The entries of a region, as one boolean array."""
    grid = np.ones((1,) * len(region), bool)
    for axis, chosen in enumerate(region):
        grid = grid & chosen.reshape([-1 if at == axis else 1 for at in range(len(region))])
    return grid


def _reshape_known(call: Call) -> list[Known]:
    before, after = call.operands[0].shape, call.results[0].shape
    known, shape = call.known[0], []
    for own, theirs in _groups(before, after):
        alike = all(size == 1 for size in known.mask.shape[own])
        shape += [1] * len(after[theirs]) if alike else after[theirs]
        if not alike:
            axes = range(len(before))[own]
            known = Known(*(spread(part, before, axes) for part in known))
    return [tidy(call.results[0], *(part.reshape(shape) for part in known))]


def _reshape_asks(call: Call, held) -> list[Region]:
    before, after = call.operands[0].shape, call.results[0].shape
    asked: list[Any] = []
    for own, theirs in _groups(before, after):
        if before[own] == after[theirs]:
            asked += held[0][theirs]
            continue
        grid = _grid(held[0][theirs]).reshape(before[own])
        for axis in range(grid.ndim):
            asked.append(grid.any(other_axes(grid.ndim, axis)))
    return [tuple(asked)]


def _reshape_run(call: Call, operands, asked, held) -> list[Any]:
    before, after = call.operands[0].shape, call.results[0].shape
    groups = _groups(before, after)
    given = [_grid(asked[0][own]).ravel() for own, _ in groups]
    array = lax.reshape(operands[0], [int(each.sum()) for each in given])
    for axis, (each, (_, theirs)) in enumerate(zip(given, groups, strict=True)):
        wanted = _grid(held[0][theirs]).ravel()
        array = take(array, np.flatnonzero(wanted[each]), axis)
    return [lax.reshape(array, sizes(held[0]))]
