"""What stands in a flag: numbers per layer, steps or shares of them, learning-rate policies."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import optax

import dns_jax
from dns_jax.schedules import check_finite

T = TypeVar('T')


def parse_table(
    text: str, number: Callable[[str], T] = float, wanted: str = 'NUMBER'
) -> dict[str, T]:
    """Reads numbers per layer, such as `conv*:2,fc1:4`; a lone number is for every layer.

    Args:
      text: `PATTERN:NUMBER` entries with commas between; the first that matches a layer counts.
      number: reads a number, as `float` does, or what else stands there.
      wanted: what stands there, for the message.

    Returns:
      `{pattern: number}` in the order of the text.

    Raises:
      ValueError: if an entry has another form, or a pattern stands twice.
    """
    table: dict[str, T] = {}
    for entry in filter(None, text.split(',')):
        pattern, colon, digits = entry.rpartition(':')
        if (pattern or '*') in table:
            raise ValueError(f'pattern {pattern!r} stands twice in {text!r}')
        try:
            if colon and not pattern:
                raise ValueError('there is no pattern')
            table[pattern or '*'] = number(digits)
        except ValueError as error:
            raise ValueError(f'{entry!r} in {text!r} is not PATTERN:{wanted}') from error
    return table


def parse_numbers(flag: str, text: str, least: float, most: float = math.inf) -> list[float]:
    """Reads finite numbers with commas between, such as `2,4.5`.

    Args:
      flag: the name of the flag, for the message.
      text: the numbers, one at least.
      least: the smallest that there may be.
      most: the largest.

    Raises:
      ValueError: if there is anything else.
    """
    try:
        numbers = [float(number) for number in text.split(',')]
    except ValueError:
        numbers = [math.nan]
    if not all(least <= number <= most and math.isfinite(number) for number in numbers):
        bounds = f'from {least:g}' + ('' if math.isinf(most) else f' to {most:g}')
        raise ValueError(f'--{flag} must be finite numbers {bounds}, with commas, but has {text!r}')
    return numbers


def check_distinct(flag: str, values: Sequence[Any]) -> None:
    """Refuses values that would be worked on twice, and count as more seeds.

    Raises:
      ValueError: if one is there twice.
    """
    if twice := sorted({f'{value}' for value in values if values.count(value) > 1}):
        raise ValueError(f'--{flag} names {", ".join(twice)} twice')


def parse_structure(text: str) -> dns_jax.Structure:
    """Reads what is pruned together: `units`, `inputs`, a block as `4x4`, or N of M as `2of4`.

    Args:
      text: the structure; −1 in a block is all of an axis.

    Returns:
      The structure.

    Raises:
      ValueError: if it is none of them, or has sizes that cannot be.
    """
    if text in ('units', 'inputs'):
        return dns_jax.Units(-1 if text == 'units' else -2)
    if 'of' in text:
        n, m = text.split('of')
        return dns_jax.NofM(int(n), int(m))
    return dns_jax.Blocks(tuple(map(int, text.split('x'))))


def parse_step(text: str, steps: int) -> int:
    """Reads a step, such as `12000`, or a share of all steps, such as `80%`.

    Returns:
      The step, rounded to a whole one.

    Raises:
      ValueError: if the text is neither.
    """
    try:
        return round(float(text[:-1]) / 100 * steps) if text.endswith('%') else int(text)
    except (ValueError, OverflowError) as error:
        raise ValueError(f'{text!r} must be a step or a share of the steps, as 80% is') from error


def _warm_cosine(base: float, warm_up: float, share: float, steps: int) -> dns_jax.Schedule:
    """Rises to the base in some steps, then falls as half a cosine to a share of it at the end."""
    # A phase that is shorter than its warm-up has at least one step to fall in.
    warm_up, steps = min(int(warm_up), max(steps - 1, 0)), max(steps, 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, base, warm_up, steps, share * base)
    # As a float: optax divides the count, which strict promotion of dtypes refuses.
    return lambda step: schedule(jnp.float32(step))


_POLICIES = {
    'fixed': (optax.constant_schedule, ('BASE',)),
    'exp': (dns_jax.caffe_exp, ('BASE', 'GAMMA')),
    'inv': (dns_jax.caffe_inv, ('BASE', 'GAMMA', 'POWER')),
    'poly': (dns_jax.caffe_poly, ('BASE', 'POWER')),
    'step': (dns_jax.caffe_step, ('BASE', 'GAMMA', 'STEPS')),
    'cosine': (_warm_cosine, ('BASE', 'STEPS', 'SHARE')),
}


def parse_learning_rate(text: str, steps: int) -> dns_jax.Schedule:
    """Reads a learning-rate policy, such as `inv:0.01,1e-4,0.75` or `poly:0.04,1`.

    Args:
      text: `POLICY:NUMBERS`; the numbers are base, gamma and power, as far as the policy has them.
      steps: the length of the phase, at whose end `poly` reaches 0, and `cosine` its share.

    Raises:
      ValueError: if the policy is unknown or its numbers are not as wanted.
    """
    name, _, numbers = text.partition(':')
    if name not in _POLICIES:
        raise ValueError(f'{text!r} must begin with one of {", ".join(_POLICIES)} and a colon')
    policy, wanted = _POLICIES[name]
    try:
        values = [float(number) for number in numbers.split(',')]
        for value in values:
            check_finite(text, value, 0)
    except ValueError:
        values = []
    if len(values) != len(wanted):
        raise ValueError(
            f'{text!r} must be {name}:{",".join(wanted)}, numbers of 0 or more, finite in float32'
        )
    if name == 'step':
        if values[-1] < 1 or values[-1] % 1:
            raise ValueError(f'{text!r} must end in a whole number of steps, at least 1')
        values[-1] = int(values[-1])
    if name == 'cosine' and (values[1] % 1 or values[2] > 1):
        raise ValueError(f'{text!r} must have a whole number of steps, and a share of at most 1')
    return policy(*values, *([steps] if name in ('poly', 'cosine') else []))


def scale_learning_rate(text: str, factor: float) -> str:
    """Multiplies the base of a learning-rate policy, and rounds it to four digits.

    Raises:
      ValueError: as `parse_learning_rate` does.
    """
    parse_learning_rate(text, steps=1)
    policy, _, numbers = text.partition(':')
    base, *others = numbers.split(',')
    return f'{policy}:{",".join([f"{float(base) * factor:.4g}", *others])}'
