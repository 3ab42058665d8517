"""Functions of the step: σ(iter), densities, and the learning-rate policies of Caffe.

Each function returns a schedule in the sense of optax, `step -> value`. Caffe's policy `fixed`
is `optax.constant_schedule`.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dns_jax._core.checks import check_density, check_step, check_steps
from dns_jax.typing import Schedule

_LARGEST = float(np.finfo(np.float32).max)


def update_probability(
    gamma: float = 1e-4, power: float = 1.0, stop: int | None = None, start: int = 0
) -> Schedule:
    r"""The probability σ(iter) of updating the masks of a layer.

    .. math::
      \sigma(i) = (1 + \gamma\,(i - \text{start}))^{-\text{power}}
      \quad \text{for start} \le i < \text{stop, else } 0

    Args:
      gamma: how fast the updates grow rare, per step, at least 0.
      power: the exponent, at least 0; 0 updates at every step.
      stop: the first step without updates; None never stops.
      start: the first step with updates, at least 0; the decay counts from here.

    Returns:
      A schedule whose values are float32 scalars in [0, 1].

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> schedule = update_probability(gamma=0.01, stop=200)
      >>> [round(float(schedule(step)), 3) for step in (0, 100, 199, 200)]
      [1.0, 0.5, 0.334, 0.0]

    Reference:
      Guo et al. 2016, section 3.3; decay and stop as in the authors' Caffe layers.
    """
    check_finite('gamma', gamma, 0)
    check_finite('power', power, 0)
    check_step('start', start)
    if stop is not None:
        check_step('stop', stop, start)

    def schedule(step):
        step = jnp.asarray(step)
        active = step >= start
        if stop is not None:
            active &= step < stop
        decay = (1.0 + gamma * _float32(jnp.maximum(step - start, 0))) ** -power
        return jnp.where(active, decay, 0.0)

    return schedule


def update_at(steps: Sequence[int]) -> Schedule:
    """The probability 1 at some steps, and 0 at all others.

    Args:
      steps: those with an update.

    Returns:
      A schedule whose values are float32 scalars, 0 or 1.

    Raises:
      ValueError: if there are no steps, or one is not a whole number that an int32 holds.

    Example:
      >>> [float(update_at([10, 30])(step)) for step in (9, 10, 20, 30)]
      [0.0, 1.0, 0.0, 1.0]
    """
    check_steps('steps', steps)
    chosen = np.asarray(steps, np.int32)
    return lambda step: _float32(jnp.any(jnp.asarray(step) == chosen))


def polynomial_density(
    final: float, start: int, end: int, initial: float = 1.0, power: float = 3.0
) -> Schedule:
    r"""A density that falls along a polynomial, steeply at first.

    .. math::
      d(i) = \text{final} + (\text{initial} - \text{final})\,(1 - f)^{\text{power}}, \quad
      f = \mathrm{clip}\left(\frac{i - \text{start}}{\text{end} - \text{start}}, 0, 1\right)

    Args:
      final: the density from `end` on, in (0, 1].
      start: the step at which it leaves `initial`, at least 0.
      end: the step at which it reaches `final`, after `start`.
      initial: the density up to `start`, in (0, 1].
      power: the exponent, above 0.

    Returns:
      A schedule whose values are float32 scalars in (0, 1].

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> schedule = polynomial_density(0.1, start=100, end=200)
      >>> [round(float(schedule(step)), 4) for step in (100, 150, 200, 300)]
      [1.0, 0.2125, 0.1, 0.1]

    Reference:
      Zhu and Gupta 2017, To prune, or not to prune.
    """
    fraction = _ramp(final, start, end, initial)
    _check_power(power)
    return lambda step: final + (initial - final) * (1.0 - fraction(step)) ** power


def log_linear_density(final: float, start: int, end: int, initial: float = 1.0) -> Schedule:
    r"""A density that falls by the same factor at every step.

    .. math::
      d(i) = \text{initial}^{\,1 - f}\,\text{final}^{\,f}, \quad
      f = \mathrm{clip}\left(\frac{i - \text{start}}{\text{end} - \text{start}}, 0, 1\right)

    Args:
      final: the density from `end` on, in (0, 1].
      start: the step at which it leaves `initial`, at least 0.
      end: the step at which it reaches `final`, after `start`.
      initial: the density up to `start`, in (0, 1].

    Returns:
      A schedule whose values are float32 scalars in (0, 1].

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> schedule = log_linear_density(0.01, start=100, end=200)
      >>> [round(float(schedule(step)), 4) for step in (100, 150, 200, 300)]
      [1.0, 0.1, 0.01, 0.01]
    """
    fraction = _ramp(final, start, end, initial)
    return lambda step: initial * jnp.float32(final / initial) ** fraction(step)


def caffe_step(base: float, gamma: float, step_size: int) -> Schedule:
    """Caffe's policy `step`: base · gamma^⌊step / step_size⌋.

    Args:
      base: the learning rate at step 0.
      gamma: the factor at every `step_size` steps.
      step_size: steps between changes, at least 1.

    Returns:
      A schedule whose values are float32 scalars, the learning rate.

    Raises:
      ValueError: if `step_size` is out of range.

    Example:
      >>> [round(float(caffe_step(0.1, 0.5, 10)(step)), 4) for step in (9, 10, 20)]
      [0.1, 0.05, 0.025]

    Reference:
      Caffe, `SGDSolver::GetLearningRate`.
    """
    check_step('step_size', step_size, 1)
    # Integer division is exact, where a quotient of floats may round down one step too long.
    return lambda step: base * jnp.float32(gamma) ** _float32(jnp.asarray(step) // step_size)


def caffe_exp(base: float, gamma: float) -> Schedule:
    """Caffe's policy `exp`: base · gamma^step.

    Args:
      base: the learning rate at step 0.
      gamma: the factor at every step.

    Returns:
      A schedule whose values are float32 scalars, the learning rate.

    Example:
      >>> [round(float(caffe_exp(0.1, 0.5)(step)), 4) for step in (0, 1, 2)]
      [0.1, 0.05, 0.025]

    Reference:
      Caffe, `SGDSolver::GetLearningRate`.
    """
    return lambda step: base * jnp.float32(gamma) ** _float32(step)


def caffe_inv(base: float, gamma: float, power: float) -> Schedule:
    """Caffe's policy `inv`: base · (1 + gamma · step)^(−power).

    Args:
      base: the learning rate at step 0.
      gamma: how fast it falls, per step, at least 0.
      power: the exponent.

    Returns:
      A schedule whose values are float32 scalars, the learning rate.

    Raises:
      ValueError: if `gamma` is negative or not finite in float32.

    Example:
      >>> [round(float(caffe_inv(0.01, 1e-4, 0.75)(step)), 5) for step in (0, 10_000)]
      [0.01, 0.00595]

    Reference:
      Caffe, `SGDSolver::GetLearningRate`; the LeNets of Guo et al. 2016 use it.
    """
    check_finite('gamma', gamma, 0)
    return lambda step: base * (1.0 + gamma * _float32(step)) ** -power


def caffe_multistep(base: float, gamma: float, boundaries: Sequence[int]) -> Schedule:
    """Caffe's policy `multistep`: base · gamma^n with n the boundaries that step has reached.

    Args:
      base: the learning rate before the first boundary.
      gamma: the factor at every boundary.
      boundaries: steps at which the rate changes, ascending.

    Returns:
      A schedule whose values are float32 scalars, the learning rate.

    Raises:
      ValueError: if `boundaries` do not ascend, or one is not a whole number that an int32
        holds.

    Example:
      >>> schedule = caffe_multistep(0.1, 0.5, [10, 15])
      >>> [round(float(schedule(step)), 4) for step in (9, 10, 15)]
      [0.1, 0.05, 0.025]

    Reference:
      Caffe, `SGDSolver::GetLearningRate`.
    """
    for boundary in boundaries:
        check_step('boundaries', boundary)
    if list(boundaries) != sorted(boundaries):
        raise ValueError(f'boundaries must ascend, but are {list(boundaries)}')
    edges = jnp.asarray(boundaries, jnp.int32)
    return lambda step: base * jnp.float32(gamma) ** _float32(jnp.sum(jnp.asarray(step) >= edges))


def caffe_poly(base: float, power: float, steps: int) -> Schedule:
    """Caffe's policy `poly`: base · (1 − step / steps)^power, and 0 from `steps` on.

    Args:
      base: the learning rate at step 0.
      power: the exponent, above 0.
      steps: the step at which the rate reaches 0, at least 1.

    Returns:
      A schedule whose values are float32 scalars, the learning rate.

    Raises:
      ValueError: if `power` or `steps` is out of range.

    Example:
      >>> [round(float(caffe_poly(0.1, 2.0, 10)(step)), 4) for step in (0, 5, 10)]
      [0.1, 0.025, 0.0]

    Reference:
      Caffe, `SGDSolver::GetLearningRate`.
    """
    _check_power(power)
    check_step('steps', steps, 1)
    # From the steps left, so that the rate ends at an exact 0.
    return lambda step: (
        base * (_float32(jnp.maximum(steps - jnp.asarray(step), 0)) / steps) ** power
    )


def caffe_sigmoid(base: float, gamma: float, middle: int) -> Schedule:
    """Caffe's policy `sigmoid`: base / (1 + exp(−gamma · (step − middle))).

    Args:
      base: the learning rate far from `middle`.
      gamma: the slope, per step; negative lets the rate fall.
      middle: the step at which the rate is base / 2, at least 0.

    Returns:
      A schedule whose values are float32 scalars, the learning rate.

    Raises:
      ValueError: if `middle` is out of range.

    Example:
      >>> [round(float(caffe_sigmoid(0.1, -0.1, 50)(step)), 4) for step in (0, 50, 100)]
      [0.0993, 0.05, 0.0007]

    Reference:
      Caffe, `SGDSolver::GetLearningRate`.
    """
    check_step('middle', middle)
    return lambda step: base / (1.0 + jnp.exp(-gamma * _float32(jnp.asarray(step) - middle)))


def check_finite(name: str, number: float, least: float = -math.inf) -> None:
    """Checks that a number is finite in float32, in which schedules and thresholds are computed.

    Args:
      name: what the caller knows it by.
      number: what is checked.
      least: the smallest that will do.

    Raises:
      ValueError: if it is not a number, out of the range of float32, or below `least`.

    Example:
      >>> check_finite('gamma', 1e39, 0)
      Traceback (most recent call last):
        ...
      ValueError: gamma must be finite in float32 and at least 0, but is 1e+39
    """
    if not (number >= least and abs(number) <= _LARGEST):
        wanted = 'finite in float32' + (f' and at least {least}' if least > -math.inf else '')
        raise ValueError(f'{name} must be {wanted}, but is {number!r}')


def _ramp(final: float, start: int, end: int, initial: float) -> Schedule:
    """Makes the schedule of how much of a ramp is done, from 0 to 1."""
    for name, density in (('final', final), ('initial', initial)):
        check_density(name, density)
    check_step('start', start)
    check_step('end', end, start + 1)
    return lambda step: jnp.clip(_float32(jnp.asarray(step) - start) / (end - start), 0.0, 1.0)


def _check_power(power: float) -> None:
    if not 0 < power <= _LARGEST:
        raise ValueError(f'power must be finite in float32 and above 0, but is {power!r}')


def _float32(step) -> jax.Array:
    return jnp.asarray(step, jnp.float32)
