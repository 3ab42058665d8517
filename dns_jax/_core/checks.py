"""What arguments must be and what must be installed, and how messages say what is not so."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

_Value = TypeVar('_Value')
_DISTRIBUTION = 'dynamic-network-surgery'


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Says where a module comes from that is imported within and is not there.

    Args:
      extra: the extra of this distribution that has the module.

    Raises:
      ModuleNotFoundError: an ImportError that names the extra and the command for it.

    Example:
      >>> with needs_extra('sparse'):
      ...     import safetensors
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error.name} is missing, which comes with the extra {extra!r}: '
            f"pip install '{_DISTRIBUTION}[{extra}]'",
            name=error.name,
        ) from error


def check_step(name: str, step: float, least: int = 0) -> None:
    """Checks that a number is one that a count of steps, an int32, can reach.

    Raises:
      ValueError: if it is not whole, or not from `least` to 2**31 − 1.

    Example:
      >>> check_step('stop', 3_000_000_000)
      Traceback (most recent call last):
        ...
      ValueError: stop must be a whole number from 0 to 2147483647, but is 3000000000
    """
    if not (least <= step < 2**31 and step % 1 == 0):
        raise ValueError(
            f'{name} must be a whole number from {least} to {2**31 - 1}, but is {step!r}'
        )


def check_steps(name: str, steps: Sequence[float]) -> None:
    """Checks steps with `check_step`, and that there are any.

    Raises:
      ValueError: if there are none, or one of them is no step.

    Example:
      >>> check_steps('rounds', [])
      Traceback (most recent call last):
        ...
      ValueError: rounds must name at least one step, but is []
    """
    if not len(steps):
        raise ValueError(f'{name} must name at least one step, but is {steps!r}')
    for step in steps:
        check_step(name, step)


def check_density(name: str, density: float) -> None:
    """Checks a density.

    Raises:
      ValueError: if it is not in (0, 1].

    Example:
      >>> check_density('final', 0)
      Traceback (most recent call last):
        ...
      ValueError: final must be in (0, 1], but is 0
    """
    if not 0 < density <= 1:
        raise ValueError(f'{name} must be in (0, 1], but is {density!r}')


def check_hysteresis(hysteresis: float) -> None:
    """Checks the width of a band.

    Raises:
      ValueError: if it is not in [0, 1); at 1 a kept connection would never be pruned.

    Example:
      >>> check_hysteresis(1.0)
      Traceback (most recent call last):
        ...
      ValueError: hysteresis must be in [0, 1), but is 1.0
    """
    if not 0 <= hysteresis < 1:
        raise ValueError(f'hysteresis must be in [0, 1), but is {hysteresis!r}')


def as_table(values: Mapping[str, _Value] | _Value) -> dict[str, _Value]:
    """Makes a table for `match_patterns` of a value for all layers.

    Example:
      >>> as_table(0.5), as_table({'fc*': 0.1, '*': 0.5})
      ({'*': 0.5}, {'fc*': 0.1, '*': 0.5})
    """
    return dict(values) if isinstance(values, Mapping) else {'*': values}


def abridge(names: Iterable[str]) -> str:
    """Lists some names for a message; a network may have hundreds.

    Example:
      >>> abridge(['fc1', 'fc2'])
      "['fc1', 'fc2']"
    """
    names = list(names)
    if len(names) <= 8:
        return repr(names)
    return f'[{", ".join(map(repr, names[:8]))}, … {len(names)} in all]'
