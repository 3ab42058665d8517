"""BinaryConnect against its algorithm 1, written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dns_jax
from experiments.baselines.binary_connect import binary_connect, glorot_limit
from experiments.baselines.quantisers import quantised

STEPS, RATE, LIMIT = 50, 0.02, np.sqrt(1.5 / 11)


def problem():
    random = np.random.default_rng(5)
    weights = random.normal(scale=0.3, size=(6, 5)).astype(np.float32)
    images = random.normal(size=(STEPS, 8, 6)).astype(np.float32)
    return weights, images, images @ random.normal(scale=0.5, size=(6, 5)).astype(np.float32)


def loss(params, images, labels):
    return jnp.sum((jnp.dot(images, params['kernel']) - labels) ** 2) / (2 * len(images))


def trained(quantiser):
    """Real weights after every step."""
    weights, images, labels = problem()
    params, masks = {'kernel': jnp.asarray(weights)}, {'kernel': jnp.array(True)}
    optimizer = optax.chain(optax.sgd(RATE), quantiser.constrain)
    state, course = optimizer.init(params), []
    value_and_grad = quantised(dns_jax.masked_value_and_grad(loss), quantiser)

    @jax.jit
    def step(params, state, key, *batch):
        _, gradients = value_and_grad(params, masks, *batch, key=key)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for number in range(STEPS):
        key = jax.random.key(number)
        params, state = step(params, state, key, images[number], labels[number])
        course.append(np.asarray(params['kernel']))
    return course


def test_50_steps_are_those_of_the_algorithm():
    weights, images, labels = problem()
    clipped = 0
    for own, image, label in zip(trained(binary_connect()), images, labels, strict=True):
        binary = np.where(weights >= 0, LIMIT, -LIMIT)
        gradient = image.T @ (image @ binary - label) / len(image)
        moved = weights - RATE * gradient
        weights = np.clip(moved, -LIMIT, LIMIT)
        clipped += (weights != moved).sum()
        np.testing.assert_allclose(own, weights, atol=1e-5)
    assert clipped > STEPS  # the bound matters here


def test_coins_are_thrown_by_the_hard_sigmoid():
    weights = jnp.array([[-2.0, -0.5, 0.0, 0.25, 2.0]]) * glorot_limit((1, 5))
    params, masks = {'kernel': weights}, {'kernel': jnp.array(True)}
    quantise = binary_connect(stochastic=True).quantise
    keys = jax.random.split(jax.random.key(1), 4_000)
    thrown = jax.vmap(lambda key: quantise(params, masks, key)['kernel'][0])(keys)
    assert set(np.unique(np.abs(thrown))) == {np.float32(glorot_limit((1, 5)))}
    shares = np.mean(np.asarray(thrown) > 0, axis=0)
    np.testing.assert_allclose(shares, [0, 0.25, 0.5, 0.625, 1], atol=0.03)


def test_coins_of_leaves_and_of_keys_differ():
    params = {name: {'kernel': jnp.zeros((20, 20))} for name in ('fc1', 'fc2')}
    masks = jax.tree.map(lambda leaf: jnp.array(True), params)
    quantise = binary_connect(stochastic=True).quantise
    one, other = (quantise(params, masks, jax.random.key(seed)) for seed in (0, 1))
    assert (one['fc1']['kernel'] != one['fc2']['kernel']).any()
    assert (one['fc1']['kernel'] != other['fc1']['kernel']).any()


def test_the_network_to_keep_is_binary_or_real():
    params, masks = {'kernel': jnp.array([[0.5, -0.2, 0.0]])}, {'kernel': jnp.array(True)}
    limit = np.float32(glorot_limit((1, 3)))
    kept = binary_connect().finish(params, masks)['kernel']
    np.testing.assert_array_equal(kept, [[limit, -limit, limit]])
    kept = binary_connect(stochastic=True).finish(params, masks)['kernel']
    np.testing.assert_array_equal(kept, params['kernel'])


@pytest.mark.parametrize(('shape', 'fans'), [((784, 300), 1084), ((5, 5, 20, 50), 25 * 70)])
def test_the_limit_is_glorots(shape, fans):
    assert glorot_limit(shape) == pytest.approx(np.sqrt(1.5 / fans))
