"""Rules of reductions, pooling and cumulative sums: entries along some axes come together."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dns_jax.inference._known import (
    Known,
    Region,
    nothing,
    other_axes,
    restrict,
    spread,
    tidy,
    widen,
)
from dns_jax.inference._program import evaluate
from dns_jax.inference._rule import Call, Rule, compute, take_regions

_REDUCTIONS = ('max', 'min', 'prod', 'and', 'or', 'xor')
_POOLS = ('reduce_window_max', 'reduce_window_min', 'reduce_window_sum')
_CUMULATIVE = ('cumsum', 'cumprod', 'cummax', 'cummin', 'cumlogsumexp')


def reduction_rules() -> dict[str, Rule]:
    """Gives the rules by the names of their primitives."""
    reduction = Rule(_known(_reduced), _asks, _run, reads_all=_reduced)
    names = ['argmax', 'argmin', *(f'reduce_{name}' for name in _REDUCTIONS)]
    total = reduction._replace(asks=_sum_asks, fold=_sum_fold)
    window = Rule(_known(_pooled), _along_asks(_pooled), _along_run(_pooled))
    along = Rule(_known(_cumulated), _along_asks(_cumulated), _along_run(_cumulated))
    return {
        **dict.fromkeys(names, reduction),
        'reduce_sum': total,
        **dict.fromkeys(_POOLS, window),
        **dict.fromkeys(_CUMULATIVE, along._replace(reads_all=_cumulated)),
    }


def _reduced(call: Call) -> Sequence[int]:
    return call.params['axes']


def _cumulated(call: Call) -> Sequence[int]:
    return (call.params['axis'],)


def _pooled(call: Call) -> Sequence[int]:
    """The axes along which windows lie, or padding."""
    names = ('window_dimensions', 'window_strides', 'base_dilation', 'window_dilation')
    settings = zip(*(call.params[name] for name in names), call.params['padding'], strict=True)
    return [axis for axis, each in enumerate(settings) if each != (1, 1, 1, 1, (0, 0))]


def _known(axes_of: Callable[[Call], Sequence[int]]) -> Callable[[Call], list[Known]]:
    """Says that a result is known where all that may come together is."""

    def known(call: Call) -> list[Known]:
        axes, shape = axes_of(call), call.operands[0].shape
        together: Any = tuple(axes)
        mask = call.known[0].mask.all(together, keepdims=True)
        if not mask.any():
            return [nothing(aval) for aval in call.results]
        (numbers,) = compute(call, [spread(call.known[0].numbers, shape, axes)])
        if axes_of is _reduced:
            mask = mask.all(together)
        return [tidy(call.results[0], mask, numbers)]

    return known


def _asks(call: Call, held) -> list[Region]:
    left = iter(held[0])
    axes = _reduced(call)
    return [
        tuple(
            np.ones(length, bool) if axis in axes else next(left)
            for axis, length in enumerate(call.operands[0].shape)
        )
    ]


def _sum_asks(call: Call, held) -> list[Region]:
    """Leaves out what is known along the axes; at least one entry is summed."""
    (asked,) = _asks(call, held)
    known, asked = call.known[0], list(asked)
    mask = known.mask if call.folds else known.zero
    # What is known along one axis is left out there; along two, either is left out by itself.
    for axis in _reduced(call):
        region = (*asked[:axis], np.ones_like(asked[axis]), *asked[axis + 1 :])
        known_all = restrict(mask, region).all(other_axes(mask.ndim, axis))
        open_ = ~np.broadcast_to(known_all, asked[axis].shape)
        if not open_.any():
            open_ = np.arange(len(open_)) == 0
        asked[axis] = open_
    return [tuple(asked)]


def _sum_fold(call: Call, asked, held) -> np.ndarray | None:
    axes, shape = _reduced(call), call.operands[0].shape
    numbers = spread(call.known[0].numbers, shape, axes)
    if not call.folds or not numbers.any():
        return None
    inside = np.ones((), bool)
    for axis in axes:
        lengths = [-1 if at == axis else 1 for at in range(len(shape))]
        inside = inside & asked[0][axis].reshape(lengths)
    left_out = np.where(inside, np.zeros((), numbers.dtype), numbers)
    if not left_out.any():
        return None
    total = widen(left_out).sum(tuple(axes)).astype(numbers.dtype)
    return restrict(total, held[0])


def _run(call: Call, operands, asked, held) -> list[Any]:
    del asked, held
    return evaluate(call.equation, operands)


def _along_asks(axes_of):
    def asks(call: Call, held) -> list[Region]:
        shape, axes = call.operands[0].shape, axes_of(call)
        asked = [
            np.ones(shape[axis], bool) if axis in axes else each
            for axis, each in enumerate(held[0])
        ]
        # Initial values and the like are scalars.
        return [tuple(asked), *(() for _ in call.operands[1:])]

    return asks


def _along_run(axes_of):
    def run(call: Call, operands, asked, held) -> list[Any]:
        del asked
        (result,) = evaluate(call.equation, operands)
        axes = axes_of(call)
        given = tuple(
            np.ones_like(each) if axis in axes else each for axis, each in enumerate(held[0])
        )
        return [take_regions(result, given, held[0])]

    return run
