"""The traced program of a function: one flat list of equations on numbered values.

Owns the tracing. Bodies of `jit`, `custom_jvp_call`, `custom_vjp_call` and `remat` are put in the
place of their calls, so that what reads a program meets no calls of these kinds.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal

# The calls that compute what their one body computes, and where their parameters have it.
_CALLS = {
    **dict.fromkeys(('jit', 'pjit', 'closed_call', 'core_call', 'call'), ('jaxpr', 'call_jaxpr')),
    **dict.fromkeys(('remat', 'remat2', 'checkpoint'), ('jaxpr',)),
    **dict.fromkeys(('custom_jvp_call', 'custom_vjp_call'), ('call_jaxpr', 'fun_jaxpr', 'jaxpr')),
}


class Equation(NamedTuple):
    """One call of a primitive; values are given by their numbers."""

    primitive: Any
    params: dict[str, Any]
    operands: tuple[int, ...]
    results: tuple[int, ...]


class Program(NamedTuple):
    """What a function computes for operands of given shapes and dtypes."""

    equations: list[Equation]
    avals: list[Any]  #: shape and dtype of each value
    leaves: tuple[int, ...]  #: the values that are the leaves of the params
    inputs: tuple[int, ...]  #: those that are the leaves of the inputs
    outputs: tuple[int, ...]
    constants: dict[int, Any]  #: literals, and arrays that the function closes over
    structure: Any  #: of the outputs, a tree


def trace(apply: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> Program:
    """Traces a function of params and inputs.

    Args:
      apply: the function.
      params: any pytree; only shapes and dtypes are looked at, as with the inputs.
      inputs: its other arguments.

    Returns:
      The program.

    Raises:
      ValueError: if the function has side effects, such as prints.

    Example:
      >>> import jax, numpy as np
      >>> program = trace(lambda w, x: jax.nn.relu(x @ w), np.ones((3, 2)), [np.ones(3)])
      >>> [equation.primitive.name for equation in program.equations]
      ['dot_general', 'max']
    """
    closed, shapes = jax.make_jaxpr(apply, return_shape=True)(params, *inputs)
    if closed.effects:
        raise ValueError(f'apply must have no side effects, but has {closed.effects}')
    program = Program([], [], (), (), (), {}, jax.tree.structure(shapes))
    arguments = tuple(_add(program, variable.aval) for variable in closed.jaxpr.invars)
    outputs = _inline(program, closed.jaxpr, closed.consts, arguments)
    count = len(jax.tree.leaves(params))
    return program._replace(
        leaves=arguments[:count], inputs=arguments[count:], outputs=tuple(outputs)
    )


def evaluate(equation: Equation, operands: Sequence[Any], **changed: Any) -> list[Any]:
    """Computes the results of an equation, with some of its parameters changed."""
    params = equation.primitive.get_bind_params({**equation.params, **changed})
    results = equation.primitive.bind(*operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def _add(program: Program, aval: Any) -> int:
    program.avals.append(aval)
    return len(program.avals) - 1


def _inline(program: Program, jaxpr: Any, constants: Sequence[Any], arguments) -> list[int]:
    """Adds the equations of a body, and says which values its results are."""
    number_of = dict(zip(jaxpr.invars, arguments, strict=True))
    for variable, value in zip(jaxpr.constvars, constants, strict=True):
        number_of[variable] = _constant(program, variable.aval, value)

    def number(atom):
        return _constant(program, atom.aval, atom.val) if _literal(atom) else number_of[atom]

    for equation in jaxpr.eqns:
        operands = tuple(map(number, equation.invars))
        if body := _body(equation):
            results = _inline(program, *body, operands)
        else:
            results = tuple(_add(program, variable.aval) for variable in equation.outvars)
            program.equations.append(
                Equation(equation.primitive, equation.params, operands, results)
            )
        number_of.update(zip(equation.outvars, results, strict=True))
    return [number(atom) for atom in jaxpr.outvars]


def _constant(program: Program, aval: Any, value: Any) -> int:
    number = _add(program, aval)
    program.constants[number] = value
    return number


def _literal(atom: Any) -> bool:
    return isinstance(atom, Literal)


def _body(equation: Any) -> tuple[Any, Sequence[Any]] | None:
    """The body of a call and the constants of it, or None of what is no such call."""
    for name in _CALLS.get(equation.primitive.name, ()):
        body = equation.params.get(name)
        if body is not None:
            return (body.jaxpr, body.consts) if hasattr(body, 'consts') else (body, ())
    return None


def as_numpy(value: Any, aval: Any) -> np.ndarray:
    """A constant as NumPy array of the dtype that the program gives it."""
    return np.asarray(value, aval.dtype)
