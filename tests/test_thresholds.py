"""Tests of dns_jax.thresholds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dns_jax import magnitude_statistics, mean_std

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@given(
    kernel=hnp.arrays(np.float32, (4, 3), elements=st.integers(-9, 9).map(lambda n: n / 8)),
    bias=hnp.arrays(np.float32, (3,), elements=st.integers(-9, 9).map(lambda n: n / 8)),
)
def test_statistics_are_those_of_the_nonzero_magnitudes(kernel, bias):
    chosen = np.abs(np.concatenate([kernel.ravel(), bias]).astype(np.float64))
    chosen = chosen[chosen > 0]
    mean, std = magnitude_statistics([jnp.asarray(kernel), jnp.asarray(bias)])
    if chosen.size:
        np.testing.assert_allclose([mean, std], [chosen.mean(), chosen.std()], atol=1e-6)
    else:
        assert (float(mean), float(std)) == (0.0, 0.0)


@pytest.mark.parametrize('dtype', DTYPES)
def test_statistics_in_float32_for_all_dtypes(dtype):
    # A sum of 60,000 does not fit float16, and stalls at 256 in bfloat16.
    weights = jnp.where(jnp.arange(80_000) % 4 == 0, 0.5, -1.5).astype(dtype)
    mean, std = jax.jit(magnitude_statistics)([weights])
    assert mean.dtype == std.dtype == jnp.float32
    assert mean.shape == std.shape == ()
    np.testing.assert_allclose(mean, 1.25, rtol=1e-5)
    np.testing.assert_allclose(std, np.sqrt(0.1875), rtol=1e-5)


def test_statistics_of_a_large_mean_do_not_cancel():
    # The mean of squares less the square of the mean would lose all its digits here.
    random = np.random.default_rng(0)
    weights = (1000 + random.normal(size=5000)).astype(np.float32)
    _, std = magnitude_statistics([jnp.asarray(weights)])
    np.testing.assert_allclose(std, weights.astype(np.float64).std(), rtol=1e-3)


@pytest.mark.parametrize('hysteresis', [0.0, 0.1, 0.25, 1.0])
@pytest.mark.parametrize('c_rate', [-5.0, -1.0, 0.0, 0.5, 3])
def test_mean_std(c_rate, hysteresis):
    weights = {'a': [jnp.array([[1.0, -3.0]]), jnp.array([0.0])], 'b': [jnp.array([-0.5, 0.5])]}
    bands = mean_std(c_rate, hysteresis)(weights, {}, jnp.int32(7))
    assert list(bands) == ['a', 'b']
    for layer, mean, std in [('a', 2.0, 1.0), ('b', 0.5, 0.0)]:
        middle = max(mean + c_rate * std, 0)
        want = [(1 - hysteresis) * middle, (1 + hysteresis) * middle]
        np.testing.assert_allclose([*bands[layer]], want, rtol=1e-6)
        assert bands[layer].low.dtype == bands[layer].high.dtype == jnp.float32
        assert bands[layer].low.shape == bands[layer].high.shape == ()


def test_hysteresis_of_the_paper_is_the_default():
    low, high = mean_std(0.0)({'a': [jnp.array([1.0])]}, {}, 0)['a']
    np.testing.assert_allclose([low, high], [0.9, 1.1], rtol=1e-6)


def test_layer_of_zeros_has_an_empty_band():
    low, high = mean_std(2.0)({'a': [jnp.zeros((2, 2))]}, {}, 0)['a']
    assert (float(low), float(high)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'c_rate': float('nan')}, 'c_rate must be finite, but is nan'),
        ({'c_rate': float('inf')}, 'c_rate must be finite, but is inf'),
        ({'c_rate': -float('inf')}, 'c_rate must be finite, but is -inf'),
        ({'c_rate': 1.0, 'hysteresis': 2}, r'hysteresis must be in \[0, 1\], but is 2'),
        ({'c_rate': 1.0, 'hysteresis': -0.1}, r'hysteresis must be in \[0, 1\], but is -0.1'),
        ({'c_rate': 1.0, 'hysteresis': float('nan')}, r'hysteresis .* is nan'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mean_std(**arguments)
