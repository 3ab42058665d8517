"""Tests of baselines.low_rank_layers: low-rank layers against whole ones, and under surgery."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dns_jax
from experiments.baselines.low_rank_layers import LowRankConv, LowRankDense, factorise
from experiments.networks.models import convolution_by_products


def random(shape, seed=0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def layer_of(*shape) -> Any:
    return {'kernel': random(shape), 'bias': random(shape[-1:], 1)}


def output_of(layer, params, inputs) -> Any:
    return layer.apply({'params': params}, inputs)


@pytest.mark.parametrize('padding', ['SAME', 'VALID'])
@pytest.mark.parametrize(('height', 'width'), [(3, 3), (2, 5)])
def test_a_convolution_of_full_rank_is_exact(height, width, padding):
    params = {'conv': layer_of(height, width, 3, 4)}
    images, rank = random((2, 8, 7, 3), 2), min(height * 3, width * 4)
    whole = nn.Conv(4, (height, width), padding=padding)
    low_rank = LowRankConv(4, (height, width), rank, padding)
    expected = output_of(whole, params['conv'], images)
    found = output_of(low_rank, factorise(params, {'conv': rank})['conv'], images)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('units', 'features'), [(7, 5), (4, 9)])
def test_a_dense_layer_of_full_rank_is_exact(units, features):
    params = {'fc': layer_of(units, features)}
    inputs, rank = random((6, units), 2), min(units, features)
    expected = output_of(nn.Dense(features), params['fc'], inputs)
    low_rank = LowRankDense(features, rank)
    found = output_of(low_rank, factorise(params, {'fc': rank})['fc'], inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_layer_of_low_rank_computes_with_the_nearest_kernel():
    params = {'fc': layer_of(7, 5)}
    left, values, right = np.linalg.svd(params['fc']['kernel'])
    inputs = random((6, 7), 2)
    expected = inputs @ (left[:, :2] * values[:2] @ right[:2]) + params['fc']['bias']
    found = output_of(LowRankDense(5, 2), factorise(params, {'fc': 2})['fc'], inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_convolution_may_be_computed_as_in_lenet5():
    asked = []

    def convolve(images, kernel, *arguments, **options):
        asked.append(kernel.shape)
        return convolution_by_products(images, kernel, *arguments, **options)

    images = random((2, 8, 8, 3))
    expected, variables = LowRankConv(4, (3, 5), 2, 'VALID').init_with_output(
        jax.random.key(0), images
    )
    found = output_of(LowRankConv(4, (3, 5), 2, 'VALID', convolve), variables['params'], images)
    assert asked == [(3, 1, 3, 2), (1, 5, 2, 4)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_layers_have_the_parameters_of_factorise():
    params: dict[str, Any] = {'conv': layer_of(3, 3, 2, 4), 'fc1': layer_of(9, 7)}
    params |= {'fc2': layer_of(7, 5), 'fc3': layer_of(5, 2), 'temperature': np.float32(1)}
    found = factorise(params, {'conv': 3, 'fc1': 2, 'fc2': None})
    inputs = {'conv': jnp.zeros((1, 5, 5, 2)), 'fc1': jnp.zeros((1, 9))}
    for name, layer in {'conv': LowRankConv(4, (3, 3), 3), 'fc1': LowRankDense(7, 2)}.items():
        own = jax.eval_shape(layer.init, jax.random.key(0), inputs[name])['params']
        assert jax.tree.map(jnp.shape, found[name]) == jax.tree.map(jnp.shape, own)
        np.testing.assert_array_equal(found[name]['second']['bias'], params[name]['bias'])
    assert all(found[name] is params[name] for name in ('fc2', 'fc3', 'temperature'))
    assert params.keys() == found.keys()
    assert 'kernel' in params['conv']  # it makes a new tree


def test_surgery_prunes_both_factors():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, images):
            hidden = nn.relu(LowRankConv(4, (3, 3), 3, name='conv')(images))
            return LowRankDense(5, 2, name='fc')(hidden.reshape(len(images), -1))

    images, labels = random((8, 4, 4, 2)), jnp.arange(8) % 5
    params = Network().init(jax.random.key(0), images)['params']
    optimizer = optax.chain(dns_jax.prune_to(density=0.5, steps=5), optax.sgd(0.1))
    state = optimizer.init(params)

    def loss(params):
        logits = output_of(Network(), params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state):
        masks = dns_jax.get_masks(state)
        value, gradients = dns_jax.masked_value_and_grad(loss)(params, masks)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(8):
        params, state, value = step(params, state)
        losses.append(float(value))
    masks = dns_jax.get_masks(state)
    kernels = {
        f'{layer}/{part}': masks[layer][part]['kernel']
        for layer in ('conv', 'fc')
        for part in ('first', 'second')
    }
    assert sum(map(np.sum, kernels.values())) == sum(map(np.size, kernels.values())) // 2
    assert all(0.2 < np.mean(mask) < 0.8 for mask in kernels.values())
    assert dns_jax.measure_sizes(params, masks).layers.keys() == kernels.keys()
    assert losses[-1] < losses[0]


PARAMS = {'fc': {'kernel': np.ones((9, 5))}, 'temperature': np.float32(1)}


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: factorise(PARAMS, {'fc3': 1}), "ranks must be of layers .*not of 'fc3'"),
        (lambda: factorise(PARAMS, {'temperature': 1}), "ranks .*not of 'temperature'"),
        (lambda: factorise(PARAMS, {'fc': 6}), 'rank must be from 1 to 5 .*but is 6'),
        (
            lambda: LowRankDense(5, 6).init(jax.random.key(0), jnp.zeros((1, 9))),
            'rank must be from 1 to 5 .*but is 6',
        ),
        (
            lambda: LowRankConv(5, (2, 2), 0).init(jax.random.key(0), jnp.zeros((1, 4, 4, 3))),
            'rank must be from 1 to 6 .*but is 0',
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
