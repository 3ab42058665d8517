"""The table of primitives that can be followed, and the rules of those that go entry by entry."""

from typing import Any

import numpy as np

from dns_jax.inference._contractions import contraction_rules
from dns_jax.inference._known import Known, Region, nothing, tidy
from dns_jax.inference._layouts import layout_rules
from dns_jax.inference._program import evaluate
from dns_jax.inference._reductions import reduction_rules
from dns_jax.inference._rule import Call, Rule, compute
from dns_jax.inference._slices import slice_rules

_ONE_OPERAND = (
    *('abs', 'acos', 'acosh', 'asin', 'asinh', 'atan', 'atanh', 'cbrt', 'ceil', 'conj', 'copy'),
    *('convert_element_type', 'copy_p', 'cos', 'cosh', 'digamma', 'erf', 'erf_inv', 'erfc', 'exp'),
    *('exp2', 'expm1', 'floor', 'imag', 'integer_pow', 'is_finite', 'lgamma', 'log', 'log1p'),
    *('logistic', 'name', 'neg', 'not', 'real', 'reduce_precision', 'round', 'rsqrt', 'sign'),
    *('sin', 'sinh', 'sqrt', 'square', 'stop_gradient', 'tan', 'tanh', 'population_count'),
)
_MORE_OPERANDS = (
    *('add', 'add_any', 'and', 'atan2', 'clamp', 'complex', 'div', 'eq', 'ge', 'gt', 'le', 'lt'),
    *('max', 'min', 'ne', 'nextafter', 'or', 'pow', 'rem', 'shift_left', 'sub', 'xor'),
    *('shift_right_arithmetic', 'shift_right_logical'),
)


def _aligned(call: Call) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Gives what is known of all operands as many axes: scalars are the same along all."""
    ndim = len(call.results[0].shape)
    masks, numbers = [], []
    for known in call.known:
        shape = known.mask.shape or (1,) * ndim
        masks.append(known.mask.reshape(shape))
        numbers.append(known.numbers.reshape(shape))
    return masks, numbers


def _known(call: Call) -> list[Known]:
    masks, numbers = _aligned(call)
    mask = np.ones((), bool)
    for each in masks:
        mask = mask & each
    if not mask.any():
        return [nothing(call.results[0])]
    shape = np.broadcast_shapes(*(each.shape for each in numbers))
    (result,) = compute(call, [np.broadcast_to(each, shape) for each in numbers])
    return [tidy(call.results[0], mask, result)]


def _product_known(call: Call) -> list[Known]:
    """A product is known to be 0 where one factor is."""
    (known,) = _known(call)
    masks, numbers = _aligned(call)
    zero = np.zeros((), bool)
    for mask, number in zip(masks, numbers, strict=True):
        zero = zero | (mask & (number == 0))
    zero = zero & ~known.mask
    if not zero.any():
        return [known]
    return [tidy(call.results[0], zero | known.mask, known.numbers)]


def _select_known(call: Call) -> list[Known]:
    """A choice is known where what is chosen is, or where all that may be chosen is alike."""
    (which, *_), (choice, *cases) = masks, numbers = _aligned(call)
    index = choice.astype(int)
    alike = np.ones((), bool)
    for mask, number in zip(masks[1:], cases, strict=True):
        alike = alike & mask & (number == cases[0])
    mask, result = alike, cases[0]
    for place, (case_mask, number) in enumerate(zip(masks[1:], numbers[1:], strict=True)):
        chosen = which & (index == place)
        mask = np.where(chosen, case_mask, mask)
        result = np.where(chosen, number, result)
    return [tidy(call.results[0], mask, result)]


def _asks(call: Call, held) -> list[Region]:
    shape = call.results[0].shape
    return [
        tuple(
            chosen if length == own else np.ones(1, bool)
            for own, length, chosen in zip(operand.shape, shape, held[0], strict=False)
        )
        for operand in call.operands
    ]


def _run(call: Call, operands, asked, held) -> list[Any]:
    del asked, held
    return evaluate(call.equation, operands)


_ELEMENTWISE = Rule(_known, _asks, _run, is_elementwise=True)

RULES: dict[str, Rule] = {
    **dict.fromkeys((*_ONE_OPERAND, *_MORE_OPERANDS), _ELEMENTWISE),
    'mul': _ELEMENTWISE._replace(known=_product_known),
    'select_n': _ELEMENTWISE._replace(known=_select_known),
    **layout_rules(),
    **slice_rules(),
    **reduction_rules(),
    **contraction_rules(),
}
"""The rules by the names of their primitives; others are not followed."""
