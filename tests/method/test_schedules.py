"""Tests of schedules, against formulas in Python's own floats."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dns_jax import (
    caffe_exp,
    caffe_inv,
    caffe_multistep,
    caffe_poly,
    caffe_sigmoid,
    caffe_step,
    log_linear_density,
    polynomial_density,
    update_at,
    update_probability,
)


def ramp(step, start, end):
    """How much of a ramp is done."""
    return min(max((step - start) / (end - start), 0), 1)


STEPS = [0, 1, 2, 9, 10, 11, 99, 100, 101, 999, 1000, 13_999, 14_000, 14_001]

CASES = {
    'σ': (update_probability(), lambda i: 1 / (1 + 1e-4 * i)),
    'σ stop': (
        update_probability(1e-4, 1.0, 14_000),
        lambda i: 1 / (1 + 1e-4 * i) if i < 14_000 else 0,
    ),
    'σ start': (
        update_probability(0.01, 0.5, 1000, 100),
        lambda i: 1 / math.sqrt(1 + 0.01 * (i - 100)) if 100 <= i < 1000 else 0,
    ),
    'σ never': (update_probability(stop=0), lambda i: 0),
    'σ one step': (update_probability(stop=11, start=10), lambda i: 1 if i == 10 else 0),
    'σ power 0': (update_probability(power=0), lambda i: 1),
    'σ gamma 0': (update_probability(gamma=0, power=3), lambda i: 1),
    'at steps': (update_at([0, 10, 999]), lambda i: i in (0, 10, 999)),
    'polynomial': (
        polynomial_density(0.05, 10, 1000),
        lambda i: 0.05 + 0.95 * (1 - ramp(i, 10, 1000)) ** 3,
    ),
    'polynomial from below 1': (
        polynomial_density(0.2, 0, 100, initial=0.7, power=0.5),
        lambda i: 0.2 + 0.5 * (1 - ramp(i, 0, 100)) ** 0.5,
    ),
    'polynomial of one step': (polynomial_density(1e-3, 10, 11), lambda i: 1 if i <= 10 else 1e-3),
    'log-linear': (log_linear_density(0.01, 9, 1000), lambda i: 0.01 ** ramp(i, 9, 1000)),
    'log-linear from below 1': (
        log_linear_density(0.001, 100, 14_000, initial=0.3),
        lambda i: math.exp(
            math.log(0.3) + ramp(i, 100, 14_000) * (math.log(0.001) - math.log(0.3))
        ),
    ),
    'log-linear of 1': (log_linear_density(1, 0, 1), lambda i: 1),
    'step': (caffe_step(0.1, 0.5, 10), lambda i: 0.1 * 0.5 ** (i // 10)),
    'exp': (caffe_exp(0.1, 0.99), lambda i: 0.1 * 0.99**i),
    'inv': (caffe_inv(0.01, 1e-4, 0.75), lambda i: 0.01 * (1 + 1e-4 * i) ** -0.75),
    'multistep': (
        caffe_multistep(0.1, 0.3, [10, 100, 100, 14_000]),
        lambda i: 0.1 * 0.3 ** ((i >= 10) + 2 * (i >= 100) + (i >= 14_000)),
    ),
    'multistep none': (caffe_multistep(0.1, 0.5, []), lambda i: 0.1),
    'poly': (caffe_poly(0.1, 1.5, 1000), lambda i: 0.1 * max(1 - i / 1000, 0) ** 1.5),
    'sigmoid': (caffe_sigmoid(0.1, -0.02, 500), lambda i: 0.1 / (1 + math.exp(0.02 * (i - 500)))),
    'sigmoid up': (caffe_sigmoid(0.1, 0.5, 10), lambda i: 0.1 / (1 + math.exp(-0.5 * (i - 10)))),
}


@pytest.mark.parametrize('how', ['python', 'jit', 'scan'])
@pytest.mark.parametrize(('schedule', 'formula'), CASES.values(), ids=CASES)
def test_formulas(schedule, formula, how):
    if how == 'python':
        got = [schedule(step) for step in STEPS]
    elif how == 'jit':
        jitted = jax.jit(schedule)
        got = [jitted(jnp.int32(step)) for step in STEPS]
    else:
        got = jax.lax.scan(lambda carry, step: (carry, schedule(step)), 0, jnp.array(STEPS))[1]
    want = [formula(step) for step in STEPS]
    # `poly` cancels as it comes near 0: there, an error of float32 beside the 0.1 of its start.
    np.testing.assert_allclose(np.array(got), want, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize('schedule', [case[0] for case in CASES.values()], ids=CASES)
def test_values_are_float32_scalars(schedule):
    value = jax.eval_shape(schedule, jnp.int32(3))
    assert (value.shape, value.dtype) == ((), jnp.float32)


def test_step_changes_exactly_at_multiples_for_all_sizes():
    sizes = np.arange(1, 51)
    schedules = [caffe_step(1.0, 0.5, int(size)) for size in sizes]
    together = jax.jit(jax.vmap(lambda step: jnp.stack([f(step) for f in schedules])))
    times = np.arange(1, 101)[:, None] * sizes
    for shift in (-1, 0):
        steps = np.unique(times + shift).astype(np.int32)
        # Powers of one half are exact, so equality it is, as far down as float32 is normal.
        changes = steps[:, None] // sizes
        np.testing.assert_array_equal(
            np.where(changes < 120, together(steps), 0), np.where(changes < 120, 0.5**changes, 0)
        )


def test_densities_never_leave_their_range():
    # A density of 1 must keep all, and the end of a ramp is the density that was asked for.
    steps = np.arange(0, 60, dtype=np.int32)
    finals = np.random.default_rng(0).uniform(1e-3, 1, 40)
    for factory in (polynomial_density, log_linear_density):
        schedules = [factory(float(final), 5, 50) for final in finals]
        together = jax.jit(
            jax.vmap(lambda step, all_=schedules: jnp.stack([f(step) for f in all_]))
        )
        densities = np.asarray(together(steps))
        assert densities.max() <= 1
        assert np.all(np.diff(densities, axis=0) <= 0)
        np.testing.assert_allclose(densities[:6], 1, rtol=1e-7)
        np.testing.assert_allclose(densities[50:], np.tile(finals, (10, 1)), rtol=3e-7)


def test_poly_ends_exactly_at_0_for_all_lengths():
    lengths = np.arange(1, 64)
    schedules = [caffe_poly(1.0, 0.5, int(length)) for length in lengths]
    together = jax.jit(lambda steps: jnp.stack([f(steps[i]) for i, f in enumerate(schedules)]))
    assert not np.any(together(lengths.astype(np.int32)))
    assert not np.any(together(lengths.astype(np.int32) + 1))
    np.testing.assert_allclose(together(lengths.astype(np.int32) - 1), lengths**-0.5, rtol=1e-4)


@pytest.mark.parametrize('first', [1, 7, 49, 1000, 2**24 + 1])
def test_boundaries_are_exact(first):
    # 2^24 + 1 is the first integer that float32 does not know.
    after = [
        (caffe_multistep(1.0, 0.5, [first]), 0.5),
        (caffe_step(1.0, 0.5, first), 0.5),
        (update_probability(gamma=0, stop=first), 0.0),
    ]
    for schedule, value in after:
        schedule = jax.jit(schedule)
        assert float(schedule(jnp.int32(first - 1))) == 1.0
        assert float(schedule(jnp.int32(first))) == value
    start = jax.jit(update_probability(start=first))
    assert float(start(jnp.int32(first - 1))) == 0.0
    assert float(start(jnp.int32(first))) == 1.0
    for factory, middle in [(polynomial_density, 0.25 + 0.75 / 8), (log_linear_density, 0.5)]:
        density = jax.jit(factory(0.25, first, first + 2))
        got = [density(jnp.int32(first + shift)) for shift in (-1, 0, 1, 2, 3)]
        np.testing.assert_allclose(got, [1, 1, middle, 0.25, 0.25], rtol=1e-6)


LAST = 2**31 - 1
LONGEST = {
    'σ stop': (update_probability(gamma=0, stop=LAST), 1.0),
    'σ start': (update_probability(start=LAST), 0.0),
    'at': (update_at([LAST]), 0.0),
    'polynomial': (polynomial_density(0.5, 0, LAST), 0.5 + 0.5 / 8),
    'log-linear': (log_linear_density(0.25, 0, LAST), 0.5),
    'step': (caffe_step(0.1, 0.5, LAST), 0.1),
    'multistep': (caffe_multistep(0.1, 0.5, [LAST]), 0.1),
    'poly': (caffe_poly(0.1, 1.0, LAST), 0.05),
    'sigmoid': (caffe_sigmoid(0.1, 1e-9, LAST), 0.1 / (1 + math.exp(1.073741824))),
}


@pytest.mark.parametrize(('schedule', 'value'), LONGEST.values(), ids=LONGEST)
def test_the_last_step_of_all_is_one(schedule, value):
    """An int32 counts so far and no further."""
    assert float(jax.jit(schedule)(jnp.int32(2**30))) == pytest.approx(value, rel=1e-5)
