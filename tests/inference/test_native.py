"""Tests of inference.native: the kernel's sums, and that it touches nothing beyond its inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dns_jax.inference import native
from dns_jax.inference.native import Taps, sum_weighted_slices

needs_kernel = pytest.mark.skipif(
    bool(native.build_failure()), reason=f'no kernel: {native.build_failure()}'
)


def expected(inputs, taps, biases, rows, stride, width):
    outputs = np.zeros((len(biases), rows, width, inputs.shape[1]))
    for output, bias in enumerate(biases):
        for row in range(rows):
            outputs[output, row] = bias
            for k in range(taps.starts[output], taps.starts[output + 1]):
                begin = taps.positions[k] + row * stride
                outputs[output, row] += taps.values[k] * inputs[begin : begin + width]
    return outputs


@needs_kernel
@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 64, 65, 100]),
    *(st.integers(0, 4), st.integers(1, 3), st.integers(0, 9), st.integers(1, 30)),
)
def test_sums(seed, batch, outputs, rows, stride, width):
    random = np.random.default_rng(seed)
    reach = (rows - 1) * stride + width
    inputs = random.normal(size=(reach + 20, batch)).astype(np.float32)
    counts = random.choice([0, 1, 3, 4, 5, 40], outputs)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    positions = random.integers(0, 21, starts[-1]).astype(np.int32)
    taps = Taps(starts, positions, random.normal(size=starts[-1]).astype(np.float32))
    biases = random.normal(size=outputs).astype(np.float32)
    found = sum_weighted_slices(jnp.asarray(inputs), taps, jnp.asarray(biases), rows, stride, width)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(
        found, expected(inputs, taps, biases, rows, stride, width), rtol=1e-5, atol=1e-5
    )


TAPS = Taps(np.int32([0, 1, 2]), np.int32([0, 3]), np.float32([1, 1]))
GOOD = {'inputs': jnp.ones((5, 2)), 'taps': TAPS, 'biases': jnp.zeros(2)}
GOOD |= {'rows': 1, 'stride': 1, 'width': 2}


@needs_kernel
@pytest.mark.parametrize(
    ('changed', 'error', 'match'),
    [
        ({'inputs': jnp.ones((5, 2), jnp.bfloat16)}, TypeError, 'inputs must be float32'),
        ({'inputs': jnp.ones(5)}, ValueError, 'inputs must have 2 axes'),
        ({'inputs': jnp.ones((4, 2))}, ValueError, 'do not lie within 4'),
        ({'biases': jnp.zeros(3)}, ValueError, '3 starts, 2 positions and 2 values for 3 biases'),
        ({'biases': jnp.zeros(2, int)}, TypeError, 'biases must be float32'),
        ({'rows': 2}, ValueError, '2 rows of width 2 with a stride of 1'),
        ({'rows': 0}, ValueError, '0 rows'),
        ({'width': 0}, ValueError, 'width 0'),
        ({'stride': -1}, ValueError, 'stride of -1'),
        ({'taps': TAPS._replace(positions=np.int32([-1, 3]))}, ValueError, 'do not lie within'),
        ({'taps': TAPS._replace(positions=np.int32([0, 4]))}, ValueError, 'do not lie within'),
        ({'taps': TAPS._replace(positions=np.int64([0, 3]))}, TypeError, 'positions must be int32'),
        ({'taps': TAPS._replace(positions=np.int32([0, 2**31 - 1]))}, ValueError, 'do not lie'),
        ({'taps': TAPS._replace(starts=np.int32([0, 2**31 - 1, -2]))}, ValueError, 'must ascend'),
        ({'taps': TAPS._replace(values=np.float32([1]))}, ValueError, 'and 1 values'),
        ({'taps': TAPS._replace(starts=np.int32([0, 3, 2]))}, ValueError, 'must ascend'),
        ({'taps': TAPS._replace(starts=np.int32([1, 1, 2]))}, ValueError, 'must ascend'),
        ({'taps': TAPS._replace(starts=np.int32([0, 1, 3]))}, ValueError, 'must ascend'),
    ],
)
def test_nothing_beyond_the_inputs_is_read(changed, error, match):
    sum_weighted_slices(**GOOD)
    with pytest.raises(error, match=match):
        sum_weighted_slices(**{**GOOD, **changed})


@needs_kernel
def test_under_jit():
    run = jax.jit(lambda x: sum_weighted_slices(x, TAPS, jnp.zeros(2), 1, 1, 2))
    np.testing.assert_array_equal(run(jnp.ones((5, 2))), np.ones((2, 1, 2, 2), np.float32))


@pytest.mark.parametrize(
    ('compiler', 'reason'), [('no-such-compiler', 'No such file'), ('false -x', "['false', '-x']")]
)
def test_without_a_compiler(monkeypatch, compiler, reason):
    monkeypatch.setenv('CXX', compiler)
    failure = native.build_failure.__wrapped__()
    assert 'cannot be built by' in failure
    assert reason in failure
    monkeypatch.setattr(native, 'build_failure', lambda: failure)
    with pytest.raises(RuntimeError, match='cannot be built by'):
        sum_weighted_slices(**GOOD)


def test_kernel_is_for_cpu(monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert 'is for CPU, but JAX runs on gpu' in native.build_failure.__wrapped__()
