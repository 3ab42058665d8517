"""Which entries of each value of a program are needed, and which are known.

Owns the analysis. Forward it finds what is known, whatever the inputs are; backward what the
outputs need and is not known. It changes nothing: `_replay` computes by what it finds.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dns_jax.inference._known import (
    Known,
    Region,
    exact,
    is_empty,
    known_slices,
    nothing,
    nowhere,
    spread,
    union,
    whole,
)
from dns_jax.inference._primitives import RULES
from dns_jax.inference._program import Equation, Program, as_numpy
from dns_jax.inference._rule import Call, Rule, compute

CONSTANT, WEIGHT, ACTIVATION = range(3)  # depends on nothing, on params alone, on inputs


class Step(NamedTuple):
    """One equation that must be computed."""

    call: Call
    rule: Rule | None  # None where the primitive is not followed
    asked: list[Region | None]  # of the operands; None where one is not read
    held: list[Region]  # of the results
    added: np.ndarray | None  # to the first result


class Plan(NamedTuple):
    """What of a program must be computed, and with which entries."""

    program: Program
    kinds: list[int]
    known: list[Known]
    held: dict[int, Region]  # the entries of each value that are computed, or given
    steps: list[Step]


def analyze(program: Program, leaves: Sequence[np.ndarray]) -> Plan:
    """Finds what must be computed.

    Args:
      program: the program.
      leaves: the masked weights.

    Returns:
      The plan. It forgets what the weights are.
    """
    kinds, known, sums = _look_forward(program, leaves)
    needed = {number: whole(program.avals[number].shape) for number in program.outputs}
    held, steps = {}, []
    for equation in reversed(program.equations):
        regions = [
            _hold(kinds[number], known[number], needed.get(number), program.avals[number])
            for number in equation.results
        ]
        if all(region is None for region in regions):
            continue
        held |= {
            number: region
            for number, region in zip(equation.results, regions, strict=True)
            if region is not None
        }
        regions = [
            nowhere(program.avals[number].shape) if region is None else region
            for number, region in zip(equation.results, regions, strict=True)
        ]
        call, rule = _call(program, equation, kinds, known, sums), _rule(program, equation)
        asked = rule.asks(call, regions) if rule else [whole(each.shape) for each in call.operands]
        added = rule.fold(call, asked, regions) if rule else None
        read = [None if rule and is_empty(region) else region for region in asked]
        for number, region in zip(equation.operands, read, strict=True):
            if region is not None:
                before = needed.get(number, nowhere(program.avals[number].shape))
                needed[number] = union(before, region)
        steps.append(Step(_forget(call, kinds), rule, read, regions, added))
    for number in program.leaves:
        held[number] = needed.get(number, nowhere(program.avals[number].shape))
        if kinds[number] == ACTIVATION:  # a key of random numbers
            held[number] = whole(program.avals[number].shape)
    for number in (*program.inputs, *program.constants):
        if kinds[number] == ACTIVATION:
            held[number] = whole(program.avals[number].shape)
    known = [
        nothing(aval) if kind == WEIGHT else each
        for aval, kind, each in zip(program.avals, kinds, known, strict=True)
    ]
    return Plan(program, kinds, known, held, steps[::-1])


def _look_forward(program: Program, leaves):
    """Finds what each value depends on, what is known of it, and along which axis it sums to 1."""
    count = len(program.avals)
    kinds, known = [ACTIVATION] * count, [nothing(aval) for aval in program.avals]
    for number, value in program.constants.items():
        if not _has_numbers(program.avals[number]) or isinstance(value, Tracer):
            continue
        kinds[number] = CONSTANT
        known[number] = exact(as_numpy(value, program.avals[number]), program.avals[number])
    for number, leaf in zip(program.leaves, leaves, strict=True):
        if _has_numbers(program.avals[number]):
            aval = program.avals[number]
            kinds[number], known[number] = WEIGHT, exact(leaf.astype(aval.dtype), aval)
    sums: list[frozenset[int]] = [frozenset()] * count
    makers: dict[int, Equation] = {}
    for equation in program.equations:
        call, rule = _call(program, equation, kinds, known, sums), _rule(program, equation)
        kind = max((kinds[number] for number in equation.operands), default=CONSTANT)
        if not all(map(_has_numbers, call.results)):
            kind = ACTIVATION
        found = rule.known(call) if rule else [nothing(aval) for aval in call.results]
        if kind != ACTIVATION and not all(each.mask.all() for each in found):
            found = _compute_whole(call)
        for number, each in zip(equation.results, found, strict=True):
            kinds[number], known[number] = kind, each
            makers[number] = equation
        sums[equation.results[0]] = _sum_to_one(program, equation, makers, sums)
    return kinds, known, sums


def _hold(kind: int, known: Known, needed: Region | None, aval: Any) -> Region | None:
    """What must be computed of a value: what is needed, unless it is known without weights."""
    if needed is None or kind == CONSTANT or (aval.shape == () and known.mask and kind != WEIGHT):
        return None
    if kind == ACTIVATION:
        slices = known_slices(known, needed)
        needed = tuple(one & ~other for one, other in zip(needed, slices, strict=True))
    return None if is_empty(needed) else needed


def _call(program: Program, equation: Equation, kinds, known, sums) -> Call:
    return Call(
        equation,
        [program.avals[number] for number in equation.operands],
        [program.avals[number] for number in equation.results],
        [known[number] for number in equation.operands],
        [sums[number] for number in equation.operands],
        any(kinds[number] == ACTIVATION for number in equation.operands),
    )


def _rule(program: Program, equation: Equation) -> Rule | None:
    """Looks up a rule; arrays without entries have none."""
    numbers = (*equation.operands, *equation.results)
    if any(0 in program.avals[number].shape for number in numbers):
        return None
    return RULES.get(equation.primitive.name)


def _forget(call: Call, kinds) -> Call:
    """Keeps of weights only what a slice may begin at, so that a plan stays small."""
    known = [
        each if kinds[number] != WEIGHT or each.mask.size == 1 else nothing(aval)
        for number, each, aval in zip(
            call.equation.operands, call.known, call.operands, strict=True
        )
    ]
    return call._replace(known=known)


def _compute_whole(call: Call) -> list[Known]:
    numbers = [
        spread(known.numbers, aval.shape, range(len(aval.shape)))
        for known, aval in zip(call.known, call.operands, strict=True)
    ]
    return [exact(*pair) for pair in zip(compute(call, numbers), call.results, strict=True)]


def _has_numbers(aval: Any) -> bool:
    return hasattr(aval, 'shape') and not jnp.issubdtype(aval.dtype, jax.dtypes.extended)


def _sum_to_one(program: Program, equation: Equation, makers, sums) -> frozenset[int]:
    """Knows the last step of a softmax: a value divided by its own sum along an axis."""
    first = equation.operands[0] if equation.operands else -1
    if not jnp.issubdtype(program.avals[equation.results[0]].dtype, jnp.floating):
        return frozenset()  # whole numbers do not sum to 1 any more
    match equation.primitive.name:
        case 'transpose':
            places = {axis: place for place, axis in enumerate(equation.params['permutation'])}
            return frozenset(places[axis] for axis in sums[first])
        case 'convert_element_type' | 'stop_gradient' | 'copy':
            return sums[first]
        case 'div':
            made = makers.get(equation.operands[1])
            if made is None or made.primitive.name not in ('broadcast_in_dim', 'reshape'):
                return frozenset()
            total = makers.get(made.operands[0])
            if total is None or total.primitive.name != 'reduce_sum' or total.operands[0] != first:
                return frozenset()
            axes, shape = total.params['axes'], program.avals[first].shape
            kept = [1 if axis in axes else length for axis, length in enumerate(shape)]
            others = tuple(axis for axis in range(len(shape)) if axis not in axes)
            in_place = made.params.get('broadcast_dimensions', others) == others
            same = in_place and list(program.avals[made.results[0]].shape) == kept
            return frozenset(axes) if same else frozenset()
    return frozenset()
