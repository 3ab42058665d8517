"""Ternary weights against every threshold there is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dns_jax
from experiments.baselines.quantisers import quantised
from experiments.baselines.ternary import find_step, scaled_signs, ternary


def squared_error(weights, step):
    rounded = np.where(np.abs(weights) >= step / 2, np.sign(weights) * step, 0)
    return np.sum((rounded - weights) ** 2)


def best_step(weights):
    """The mean of the largest n magnitudes, for the best n."""
    magnitudes = np.sort(np.abs(weights.astype(np.float64)), axis=None)[::-1]
    steps = np.cumsum(magnitudes) / np.arange(1, len(magnitudes) + 1)
    return min(steps, key=lambda step: squared_error(weights, step))


@pytest.mark.parametrize('kind', ['normal', 'laplace', 'uniform'])
def test_no_other_step_has_a_smaller_error(kind):
    weights = getattr(np.random.default_rng(1), kind)(size=(30, 20)).astype(np.float32)
    step = float(find_step(jnp.asarray(weights), jnp.ones(weights.shape, bool)))
    assert squared_error(weights, step) <= squared_error(weights, best_step(weights)) * 1.001


def test_weights_that_are_masked_do_not_count():
    weights = np.random.default_rng(2).normal(size=(30, 20)).astype(np.float32)
    mask = np.random.default_rng(3).random((30, 20)) < 0.4
    step = find_step(jnp.asarray(weights), jnp.asarray(mask))
    alone = find_step(jnp.asarray(weights[mask]), jnp.ones(mask.sum(), bool))
    np.testing.assert_allclose(step, alone, rtol=1e-5)
    assert find_step(jnp.asarray(weights), jnp.zeros(mask.shape, bool)) == 0


def test_50_steps_are_those_of_numpy():
    random = np.random.default_rng(5)
    weights = random.normal(size=(6, 5)).astype(np.float32)
    images = random.normal(size=(50, 8, 6)).astype(np.float32)
    labels = images @ random.normal(size=(6, 5)).astype(np.float32)
    params, masks = {'kernel': jnp.asarray(weights)}, {'kernel': jnp.array(True)}
    optimizer = optax.sgd(0.05)

    def loss(params, images, labels):
        return jnp.sum((jnp.dot(images, params['kernel']) - labels) ** 2) / (2 * len(images))

    value_and_grad = quantised(dns_jax.masked_value_and_grad(loss), ternary())

    @jax.jit
    def step(params, *batch):
        _, gradients = value_and_grad(params, masks, *batch, key=None)
        updates, _ = optimizer.update(gradients, optimizer.init(params))
        return optax.apply_updates(params, updates)

    zeros = 0
    for image, label in zip(images, labels, strict=True):
        size = np.abs(weights).mean()
        for _ in range(16):
            size = np.abs(weights[np.abs(weights) >= size / 2]).mean()
        rounded = np.where(np.abs(weights) >= size / 2, np.sign(weights) * size, 0)
        weights = weights - 0.05 * image.T @ (image @ rounded - label) / len(image)
        zeros += (rounded == 0).sum()
        params = step(params, image, label)
        np.testing.assert_allclose(params['kernel'], weights, atol=1e-5)
    assert 0 < zeros < 50 * 30


def test_signs_have_the_mean_magnitude_of_what_is_kept():
    weights = np.random.default_rng(7).normal(size=(2, 3, 4, 5)).astype(np.float32)
    mask = np.random.default_rng(8).random(weights.shape) < 0.3
    signs = scaled_signs().finish({'kernel': jnp.asarray(weights)}, {'kernel': jnp.asarray(mask)})
    wanted = np.where(mask, np.sign(weights) * np.abs(weights[mask]).mean(), 0)
    np.testing.assert_allclose(signs['kernel'], wanted, rtol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_narrow_weights_stay_narrow(dtype):
    weights = jnp.array([[0.1, -1.0, 1.2]], dtype)
    for quantiser in (ternary(), scaled_signs()):
        kept = jax.jit(quantiser.finish)({'kernel': weights}, {'kernel': jnp.array(True)})
        assert kept['kernel'].dtype == dtype
