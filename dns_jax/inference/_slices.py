"""Rules of the primitives that pick entries, or put those of several arrays together."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from dns_jax.inference._known import Known, Region, nothing, restrict, spread, tidy, whole
from dns_jax.inference._program import evaluate
from dns_jax.inference._rule import Call, Rule, arrange, take_regions


def slice_rules() -> dict[str, Rule]:
    """Gives the rules by the names of their primitives."""
    some = Rule(_slice_known, _slice_asks, _slice_run)
    return {
        'concatenate': Rule(_concatenate_known, _concatenate_asks, _concatenate_run),
        'dynamic_slice': some,
        'gather': Rule(_gather_known, _gather_asks, _gather_run),
        'pad': Rule(_pad_known, _pad_asks, _pad_run),
        'slice': some,
        'split': Rule(_split_known, _split_asks, _split_run),
    }


def _sliced(call: Call) -> list[slice] | None:
    """The slice along each axis; None where it is not known where they begin."""
    if call.equation.primitive.name == 'slice':
        strides = call.params['strides'] or (1,) * len(call.operands[0].shape)
        ends = call.params['start_indices'], call.params['limit_indices']
        return [slice(*each) for each in zip(*ends, strides, strict=True)]
    starts = call.known[1 : 1 + len(call.operands[0].shape)]
    slices = []
    lengths = call.operands[0].shape, call.params['slice_sizes']
    for start, length, size in zip(starts, *lengths, strict=True):
        if length == size:  # then it can begin nowhere else
            slices.append(slice(0, length))
        elif start.mask.all():
            begin = int(np.clip(start.numbers, 0, length - size))
            slices.append(slice(begin, begin + size))
        else:
            return None
    return slices


def _slice_known(call: Call) -> list[Known]:
    slices, operand = _sliced(call), call.known[0]
    if slices is None:
        return [nothing(call.results[0])]
    shape = call.operands[0].shape
    taken = tuple(
        part if size == length else slice(None)
        for part, size, length in zip(slices, operand.mask.shape, shape, strict=True)
    )
    return [tidy(call.results[0], *(part[taken] for part in operand))]


def _slice_asks(call: Call, held) -> list[Region]:
    slices, asked = _sliced(call), []
    starts = [()] * (len(call.operands) - 1)
    for axis, length in enumerate(call.operands[0].shape):
        chosen = np.zeros(length, bool)
        if slices:
            chosen[slices[axis]] = held[0][axis]
        else:
            same = length == len(held[0][axis])
            chosen[:] = held[0][axis] if same else True
        asked.append(chosen)
    return [tuple(asked), *starts]


def _slice_run(call: Call, operands, asked, held) -> list[Any]:
    if _sliced(call) is not None:
        return [operands[0]]
    given = [
        int(own.sum()) if len(own) == length else length
        for own, length in zip(asked[0], call.params['slice_sizes'], strict=True)
    ]
    (result,) = evaluate(call.equation, operands, slice_sizes=tuple(given))
    passed = [
        wanted if len(own) == len(wanted) else np.ones_like(wanted)
        for own, wanted in zip(asked[0], held[0], strict=True)
    ]
    return [take_regions(result, tuple(passed), held[0])]


def _parts(arrays: Sequence[Any], axis: int) -> list[slice]:
    """Where each of some arrays lies along an axis of them together."""
    ends = np.cumsum([0, *(each.shape[axis] for each in arrays)]).tolist()
    return [slice(*each) for each in itertools.pairwise(ends)]


def _concatenate_known(call: Call) -> list[Known]:
    axis = call.params['dimension']
    parts = []
    for operand, known in zip(call.operands, call.known, strict=True):
        parts.append([spread(part, operand.shape, (axis,)) for part in known])
    joined = []
    for pieces in zip(*parts, strict=True):
        shape = np.maximum.reduce([piece.shape for piece in pieces])
        shapes = [[*shape[:axis], piece.shape[axis], *shape[axis + 1 :]] for piece in pieces]
        pieces = [np.broadcast_to(*each) for each in zip(pieces, shapes, strict=True)]
        joined.append(np.concatenate(pieces, axis))
    return [tidy(call.results[0], *joined)]


def _concatenate_asks(call: Call, held) -> list[Region]:
    axis = call.params['dimension']
    return [
        (*held[0][:axis], held[0][axis][part], *held[0][axis + 1 :])
        for part in _parts(call.operands, axis)
    ]


def _concatenate_run(call: Call, operands, asked, held) -> list[Any]:
    del asked, held
    return [
        lax.concatenate([each for each in operands if each is not None], call.params['dimension'])
    ]


def _split_known(call: Call) -> list[Known]:
    axis, operand = call.params['axis'], call.known[0]
    if operand.mask.shape[axis] == 1:
        return [operand for _ in call.results]
    before = (slice(None),) * axis
    return [
        tidy(aval, *(each[*before, part] for each in operand))
        for part, aval in zip(_parts(call.results, axis), call.results, strict=True)
    ]


def _split_asks(call: Call, held) -> list[Region]:
    axis = call.params['axis']
    along = np.concatenate([region[axis] for region in held])
    asked = [
        along if at == axis else np.logical_or.reduce([region[at] for region in held])
        for at in range(len(held[0]))
    ]
    return [tuple(asked)]


def _split_run(call: Call, operands, asked, held) -> list[Any]:
    axis, results = call.params['axis'], []
    for part, wanted in zip(_parts(call.results, axis), held, strict=True):
        own = np.zeros_like(asked[0][axis])
        own[part] = wanted[axis]
        region = (*wanted[:axis], own, *wanted[axis + 1 :])
        results.append(take_regions(operands[0], asked[0], region))
    return results


def _sources(call: Call) -> list[np.ndarray]:
    """For each axis of a padded value, which entry of the operand is there; -1 for padding."""
    sources = []
    widths = call.operands[0].shape, call.results[0].shape, call.params['padding_config']
    for length, padded, (low, _, interior) in zip(*widths, strict=True):
        places = low + np.arange(length) * (interior + 1)
        inside = (places >= 0) & (places < padded)
        source = np.full(padded, -1)
        source[places[inside]] = np.flatnonzero(inside)
        sources.append(source)
    return sources


def _pad_known(call: Call) -> list[Known]:
    operand, filler = call.known
    sources, shape = _sources(call), call.operands[0].shape
    moved = [
        axis
        for axis, source in enumerate(sources)
        if not np.array_equal(source, np.arange(shape[axis]))
    ]
    parts, missing = [spread(part, shape, moved) for part in operand], np.zeros((), bool)
    for axis in moved:
        parts = [np.take(part, np.maximum(sources[axis], 0), axis) for part in parts]
        lengths = [-1 if at == axis else 1 for at in range(len(shape))]
        missing = missing | (sources[axis] < 0).reshape(lengths)
    fillers = [filler.mask, filler.numbers]
    return [tidy(call.results[0], *map(lambda f, p: np.where(missing, f, p), fillers, parts))]


def _pad_asks(call: Call, held) -> list[Region]:
    asked = []
    for length, source, wanted in zip(call.operands[0].shape, _sources(call), held[0], strict=True):
        chosen = np.zeros(length, bool)
        read = source[wanted]
        chosen[read[read >= 0]] = True
        asked.append(chosen)
    return [tuple(asked), ()]


def _pad_run(call: Call, operands, asked, held) -> list[Any]:
    places = []
    for given, source, wanted in zip(asked[0], _sources(call), held[0], strict=True):
        rank = np.cumsum(given) - 1
        read = source[wanted]
        places.append(np.where(read < 0, -1, rank[np.maximum(read, 0)]) if len(rank) else read)
    return [arrange(operands[0], places, operands[1])]


def _passed(call: Call) -> dict[int, int]:
    """The axes that a gather takes whole, and where in its result they are."""
    numbers, lengths = call.params['dimension_numbers'], call.params['slice_sizes']
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    left = [axis for axis in range(len(lengths)) if axis not in gone]
    shape = call.operands[0].shape
    return {
        axis: place
        for axis, place in zip(left, numbers.offset_dims, strict=True)
        if lengths[axis] == shape[axis]
    }


def _picked(call: Call) -> tuple[int, np.ndarray] | None:
    """Which entries a gather picks, along one axis; None if that depends on the inputs."""
    numbers, picks = call.params['dimension_numbers'], call.known[1]
    if len(numbers.collapsed_slice_dims) != 1 or numbers.operand_batching_dims:
        return None
    (axis,), length = numbers.collapsed_slice_dims, len(call.operands[0].shape)
    if numbers.start_index_map != (axis,) or len(_passed(call)) != length - 1:
        return None
    inside = (picks.numbers >= 0) & (picks.numbers < call.operands[0].shape[axis])
    if not (picks.mask.all() and inside.all()):
        return None
    shape = call.operands[1].shape
    return axis, spread(picks.numbers, shape, range(len(shape))).astype(np.int32)


def _places(call: Call) -> list[int]:
    """The axes of the result of a gather that come from its indices."""
    offsets = call.params['dimension_numbers'].offset_dims
    return [axis for axis in range(len(call.results[0].shape)) if axis not in offsets]


def _gather_known(call: Call) -> list[Known]:
    known, passed = call.known[0], _passed(call)
    if picked := _picked(call):
        axis, picks = picked
        places = _places(call)
        parts = [
            np.moveaxis(
                np.take(spread(part, call.operands[0].shape, (axis,)), picks[..., 0], axis),
                range(axis, axis + len(places)),
                places,
            )
            for part in known
        ]
        return [tidy(call.results[0], *parts)]
    others = tuple(axis for axis in range(known.mask.ndim) if axis not in passed)
    first = known.numbers[
        tuple(slice(1) if axis in others else slice(None) for axis in range(known.mask.ndim))
    ]
    mask = (known.mask & (known.numbers == first)).all(others, keepdims=True)
    shape = [1] * len(call.results[0].shape)
    for axis, place in passed.items():
        shape[place] = mask.shape[axis]
    return [tidy(call.results[0], mask.reshape(shape), first.reshape(shape))]


def _gather_asks(call: Call, held) -> list[Region]:
    asked = list(whole(call.operands[0].shape))
    for axis, place in _passed(call).items():
        asked[axis] = held[0][place]
    if picked := _picked(call):
        axis, picks = picked
        wanted = restrict(picks, (*(held[0][place] for place in _places(call)), np.ones(1, bool)))
        asked[axis] = np.isin(np.arange(len(asked[axis])), wanted)
    return [tuple(asked), whole(call.operands[1].shape)]


def _gather_run(call: Call, operands, asked, held) -> list[Any]:
    lengths, given = list(call.params['slice_sizes']), list(whole(call.results[0].shape))
    for axis, place in _passed(call).items():
        lengths[axis] = int(asked[0][axis].sum())
        given[place] = held[0][place]
    if picked := _picked(call):
        axis, picks = picked
        rank = np.cumsum(asked[0][axis]) - 1
        places = np.maximum(rank[picks], 0)  # some that nobody wants are not there
        operands = [operands[0], jnp.asarray(places, operands[1].dtype)]
    (result,) = evaluate(call.equation, operands, slice_sizes=tuple(lengths))
    return [take_regions(result, tuple(given), held[0])]
