"""Computes a program by its plan, on arrays that hold what is needed alone."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from dns_jax.inference._known import Region, restrict, sizes, whole
from dns_jax.inference._liveness import Plan
from dns_jax.inference._program import evaluate
from dns_jax.inference._rule import arrange, take_regions


def replay(plan: Plan, leaves: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Computes the outputs.

    Args:
      plan: what to compute.
      leaves: the weights, with the entries that the plan holds of each.
      inputs: the leaves of the inputs, whole.

    Returns:
      The outputs, whole.
    """
    program = plan.program
    arrays = dict(zip((*program.leaves, *program.inputs), (*leaves, *inputs), strict=True))
    arrays |= {number: value for number, value in program.constants.items() if plan.kinds[number]}
    for step in plan.steps:
        operands = [
            None if region is None else _fetch(plan, arrays, number, region)
            for number, region in zip(step.call.equation.operands, step.asked, strict=True)
        ]
        results = _compute(step, operands)
        if step.added is not None:
            shape = results[0].shape
            added = jnp.broadcast_to(jnp.asarray(step.added, results[0].dtype), shape)
            results = [lax.add(results[0], added)]
        arrays.update(zip(step.call.equation.results, results, strict=True))
    return [
        _fetch(plan, arrays, number, whole(program.avals[number].shape))
        for number in program.outputs
    ]


def _compute(step, operands) -> list[Any]:
    if step.rule:
        return step.rule.run(step.call, operands, step.asked, step.held)
    results = evaluate(step.call.equation, operands)
    return [
        take_regions(result, whole(aval.shape), region)
        for result, aval, region in zip(results, step.call.results, step.held, strict=True)
    ]


def _fetch(plan: Plan, arrays, number: int, region: Region) -> Any:
    """Gives a region of a value; what was not computed is known."""
    held = plan.held.get(number)
    numbers = restrict(plan.known[number].numbers, region)
    if held is None:
        aval = plan.program.avals[number]
        return jnp.broadcast_to(jnp.asarray(numbers, aval.dtype), sizes(region))
    places = [
        np.where(own, np.cumsum(own) - 1, -1)[wanted]
        for own, wanted in zip(held, region, strict=True)
    ]
    if numbers.size and (numbers == numbers.flat[0]).all():
        numbers = numbers.flat[0]
    return arrange(arrays[number], places, numbers)
