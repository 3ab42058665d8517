"""Why entries that nothing else needs had to stay.

Owns the search for them. A reduction such as a mean over features reads all of them, whatever is
wanted of its result. An entry that only such a primitive reads is dead but for it.
"""

import numpy as np

from dns_jax.inference._known import Region, is_empty, nowhere, union, whole
from dns_jax.inference._liveness import CONSTANT, Plan, Step

_ALL = 'is not followed, so all of its operands stay'
_ALONG = 'over an axis needs all entries along it, as in LayerNorm'


Reason = tuple[tuple[int, ...], int | None, tuple[int, ...], str, str]
"""The shape of a value, an axis, entries along it, the primitive that reads them, and why."""


def find_stayed(plan: Plan) -> list[Reason]:
    """Finds them, first equations first.

    Args:
      plan: the plan of a program.

    Returns:
      One for each axis of a value that has some; one, without axis and entries, for each operand of
      a primitive that is not followed.
    """
    stayed: list[Reason] = []
    free = {number: whole(plan.program.avals[number].shape) for number in plan.program.outputs}
    readers: dict[tuple[int, int], str] = {}  # of an axis, by a primitive that reads all along it
    for step in reversed(plan.steps):
        equation = step.call.equation
        wanted = [_look_at(plan, number, free, readers, stayed) for number in equation.results]
        if not step.rule:
            stayed += [
                (aval.shape, None, (), equation.primitive.name, _ALL)
                for number, aval in zip(equation.operands, step.call.operands, strict=True)
                if plan.kinds[number] != CONSTANT
            ]
            continue
        if not step.rule.is_elementwise:  # then an axis that nobody else reads is no other's
            wanted = [
                tuple(one if one.any() else other for one, other in zip(region, held, strict=True))
                for region, held in zip(wanted, step.held, strict=True)
            ]
        _ask(plan, step, wanted, free, readers)
    for number in plan.program.leaves:
        if number in free:
            _look_at(plan, number, free, readers, stayed)
    return stayed[::-1]


def _look_at(plan: Plan, number: int, free, readers, stayed: list[Reason]) -> Region:
    """Finds the entries of a value that stayed, and gives those that are wanted with them."""
    shape = plan.program.avals[number].shape
    held = plan.held.get(number, nowhere(shape))
    asked = free.get(number, nowhere(shape))
    wanted = []
    for axis, (own, others) in enumerate(zip(held, asked, strict=True)):
        dead = np.flatnonzero(own & ~others)
        if len(dead) and others.any():
            name = readers.get((number, axis))
            if name:
                units = tuple(map(int, dead))
                stayed.append((shape, axis, units, name, _ALONG))
            others = own
        wanted.append(own & others)
    return tuple(wanted)


def _ask(plan: Plan, step: Step, wanted, free, readers) -> None:
    """Asks of the operands what is wanted of the results, but nothing along axes read whole."""
    equation, rule = step.call.equation, step.rule
    if rule is None or (all(map(is_empty, wanted)) and not rule.is_elementwise):
        return
    asked = [list(region) for region in rule.asks(step.call, wanted)]
    for axis in rule.reads_all(step.call):
        asked[0][axis] = np.zeros_like(asked[0][axis])
        readers[equation.operands[0], axis] = equation.primitive.name
    for number, region, read in zip(equation.operands, asked, step.asked, strict=True):
        if plan.kinds[number] == CONSTANT or read is None:
            continue
        shape = plan.program.avals[number].shape
        # The plan knew the weights, and so asked for less.
        region = tuple(one & other for one, other in zip(region, read, strict=True))
        free[number] = union(free.get(number, nowhere(shape)), region)
        if rule.is_elementwise:
            for axis, (length, other) in enumerate(
                zip(shape, plan.program.avals[equation.results[0]].shape, strict=False)
            ):
                name = readers.get((equation.results[0], axis))
                if name and length == other and not wanted[0][axis].any():
                    readers.setdefault((number, axis), name)
