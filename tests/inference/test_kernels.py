"""Tests of inference.kernels: what programs of layers read, and which layers they are not for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import SMALL_CHAIN as CHAIN
from networks import SMALL_PARAMS as PARAMS
from networks import forward

from dns_jax.inference.chain import Convolution, Dense, Flatten, MaxPool, Relu, Select
from dns_jax.inference.kernels import MAX_KEPT_WEIGHTS, Unsuitable
from dns_jax.inference.runners import choose_kinds, jax_runner, scipy_runner


@pytest.mark.parametrize('batch', [1, 3])
def test_sparse_runner_is_differentiable_in_its_inputs(batch):
    images = jax.random.normal(jax.random.key(0), (batch, 4, 4, 1))
    gradients = []
    for kind in ('dense', 'sparse'):
        runner = jax_runner(CHAIN, PARAMS, (4, 4, 1), {'a': kind, 'b': kind})
        gradients.append(jax.grad(lambda x, runner=runner: jnp.sum(runner(x) ** 2))(images))
    assert jnp.any(gradients[0] != 0)
    np.testing.assert_allclose(*gradients, atol=1e-5)


def test_sparse_runner_reads_kept_weights_alone():
    """The program of a sparse layer has no array of the size of its kernel."""
    params = {'fc': {'kernel': np.eye(333, dtype=np.float32), 'bias': np.zeros(333, np.float32)}}
    runner = jax_runner((Dense('fc'),), params, (333,), {'fc': 'sparse'})
    for batch in (1, 2):
        text = str(jax.make_jaxpr(runner)(jnp.ones((batch, 333))))
        assert '333,333]' not in text


def test_scipy_runner_calls_no_jax(monkeypatch):
    chain = (Convolution('a', 'SAME'), Relu(), MaxPool(2), Flatten(), Select((0, 2)), Dense('b'))
    params = {'a': PARAMS['a'], 'b': {'kernel': np.eye(2, 3), 'bias': np.ones(3)}}
    images = np.ones((2, 4, 4, 1), np.float32)
    for kind in ('dense', 'sparse'):
        runner = scipy_runner(chain, params, (4, 4, 1), {'a': kind, 'b': kind})
        with monkeypatch.context() as patch:
            for name, value in vars(jnp).items():
                if callable(value) and not isinstance(value, type) and not name.startswith('_'):
                    patch.setattr(jnp, name, None)
            outputs = runner(images)
        assert type(outputs) is np.ndarray
        expected = np.stack([forward(chain, params, image) for image in images])
        np.testing.assert_allclose(outputs, expected, atol=1e-6)


MANY = {'a': {'kernel': np.ones((1, 1, MAX_KEPT_WEIGHTS + 1, 1)), 'bias': np.ones(1)}}


TOO_MANY = [(jax_runner, 1, f'keeps {MAX_KEPT_WEIGHTS + 1} weights')]
TOO_MANY += [(scipy_runner, 64, 'makes 16781312')]


@pytest.mark.parametrize(('make_runner', 'side', 'match'), TOO_MANY)
def test_convolution_of_too_many_weights(make_runner, side, match):
    shape = (side, side, MAX_KEPT_WEIGHTS + 1)
    with pytest.raises(Unsuitable, match=match):
        make_runner((Convolution('a'),), MANY, shape, {'a': 'sparse'})


def test_what_a_layer_is_not_for_is_not_chosen():
    chain, shape = (Convolution('a'),), (1, 1, MAX_KEPT_WEIGHTS + 1)
    choice = choose_kinds(jax_runner, ['sparse'], chain, MANY, shape, 1, turns=1)
    assert choice.kinds == {'a': 'dense'}
