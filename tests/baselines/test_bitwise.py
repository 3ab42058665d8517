"""Bitwise networks against what the paper says, written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dns_jax
from experiments.baselines.bitwise import BitwiseNetwork, bitwise, compressed, sign_unit
from experiments.baselines.quantisers import quantised

STEPS, UNITS, RATE = 50, 6, 0.5
LAYERS = ('fc1', 'fc2', 'fc3', 'fc4')
STAGES = {'first': compressed, 'bipolar': lambda: bitwise(0), 'ternary': lambda: bitwise(0.3)}


def network(stage):
    return BitwiseNetwork(signs=stage != 'first', units=UNITS)


def problem():
    random = np.random.default_rng(5)
    images = random.random((STEPS, 8, 2, 3, 1)).astype(np.float32)
    return images, random.integers(0, 10, (STEPS, 8)).astype(np.int32)


def sizes(kernel, zeros):
    """Signs, but 0 for the smallest magnitudes, by sorting them."""
    signs = np.where(kernel >= 0, 1, -1)
    order = np.argsort(np.abs(kernel), axis=None)
    signs.flat[order[: round(zeros * kernel.size)]] = 0
    return signs


def step_by_hand(kernels, images, labels, stage):
    """Forwards, backwards and an update, layer by layer."""
    signs, zeros = stage != 'first', {'ternary': 0.3}.get(stage, 0)
    weights = [sizes(kernel, zeros) if signs else np.tanh(kernel) for kernel in kernels]
    inputs, sums = [np.where(images.reshape(8, -1) >= 0.5, 1, -1)], []
    for number, weight in enumerate(weights):
        inputs[number] = np.c_[inputs[number], np.ones(8)]
        scale = 1 / np.sqrt(len(weight)) if signs else 1
        sums.append(scale * (inputs[number] @ weight))
        inputs.append(np.where(sums[-1] >= 0, 1, -1) if signs else np.tanh(sums[-1]))
    shares = np.exp(sums[-1]) / np.exp(sums[-1]).sum(1, keepdims=True)
    errors, updated = (shares - np.eye(10)[labels]) / 8, []
    for number in (3, 2, 1, 0):
        scale = 1 / np.sqrt(len(weights[number])) if signs else 1
        gradient = scale * inputs[number].T @ errors * (1 - np.tanh(kernels[number]) ** 2)
        updated.insert(0, kernels[number] - RATE * gradient)
        if number:
            slopes = 1 - np.tanh(sums[number - 1]) ** 2
            errors = scale * (errors @ weights[number].T)[:, :-1] * slopes
    return updated


@pytest.mark.parametrize('stage', STAGES)
def test_50_steps_are_those_of_numpy(stage):
    images, labels = problem()
    params = network(stage).init(jax.random.key(1), images[0])['params']
    masks, quantiser = jax.tree.map(lambda leaf: jnp.array(True), params), STAGES[stage]()

    def loss(params, images, labels):
        logits = network(stage).apply({'params': params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value_and_grad = quantised(dns_jax.masked_value_and_grad(loss), quantiser)

    @jax.jit
    def step(params, images, labels):
        _, gradients = value_and_grad(params, masks, images, labels, key=None)
        return jax.tree.map(lambda leaf, gradient: leaf - RATE * gradient, params, gradients)

    kernels = [np.float64(params[name]['kernel']) for name in LAYERS]
    before = kernels
    for image, label in zip(images, labels, strict=True):
        kernels = step_by_hand(kernels, image, label, stage)
        params = step(params, image, label)
        for name, kernel in zip(LAYERS, kernels, strict=True):
            np.testing.assert_allclose(params[name]['kernel'], kernel, atol=1e-5)
    for one, other in zip(before, kernels, strict=True):
        assert np.abs(one - other).max() > 0.05


@pytest.mark.parametrize('zeros', [0.0, 0.25, 0.9])
def test_the_smallest_of_what_is_kept_are_0(zeros):
    random = np.random.default_rng(7)
    weights = jnp.float32(random.normal(size=(40, 50)))
    mask = random.random(weights.shape) < 0.5
    for quantise in (bitwise(zeros).quantise, bitwise(zeros).finish):
        signs = np.asarray(quantise({'kernel': weights}, {'kernel': jnp.asarray(mask)})['kernel'])
        assert (signs[~mask] == 0).all()
        small = mask & (signs == 0)
        assert small.sum() == round(zeros * mask.sum())
        assert np.abs(weights)[small].max(initial=0) < np.abs(weights)[signs != 0].min()
        np.testing.assert_array_equal(signs[signs != 0], np.sign(weights)[signs != 0])


def test_a_kernel_of_which_nothing_is_kept_is_0():
    params, masks = {'kernel': jnp.ones((2, 3))}, {'kernel': jnp.zeros((2, 3), bool)}
    assert not bitwise(0.5).finish(params, masks)['kernel'].any()


def test_what_is_no_kernel_stays_and_learns_as_ever():
    params = {'kernel': jnp.ones((2, 3)), 'bias': jnp.array([0.3, -2.0, 0.0])}
    masks = jax.tree.map(lambda leaf: jnp.array(True), params)
    for quantiser in (compressed(), bitwise(0.3)):
        np.testing.assert_array_equal(quantiser.finish(params, masks)['bias'], params['bias'])
        pulled = quantiser.pull_back(params, params)
        np.testing.assert_array_equal(pulled['bias'], params['bias'])
        np.testing.assert_allclose(pulled['kernel'], 1 - np.tanh(1) ** 2, rtol=1e-5)


@pytest.mark.parametrize('zeros', [-0.1, 1, float('nan')])
def test_no_share_below_1_is_refused(zeros):
    with pytest.raises(ValueError, match='zeros must be from 0 to below 1, but is'):
        bitwise(zeros)


def test_a_sign_unit_has_the_derivative_of_tanh():
    sums = jnp.linspace(-3, 3, 13)
    np.testing.assert_array_equal(sign_unit(sums), np.where(sums >= 0, 1, -1))
    slopes = jax.vmap(jax.grad(sign_unit))(sums)
    np.testing.assert_allclose(slopes, 1 - np.tanh(sums) ** 2, rtol=1e-4)


def test_the_second_stage_adds_signs_up():
    images, _ = problem()
    module = network('bipolar')
    params = module.init(jax.random.key(1), images[0])['params']
    masks = jax.tree.map(lambda leaf: jnp.array(True), params)
    logits = module.apply({'params': bitwise(0).finish(params, masks)}, images[0])
    sums = np.asarray(logits) * np.sqrt(UNITS + 1)
    np.testing.assert_allclose(sums, np.round(sums), atol=1e-4)
    assert (np.round(sums) % 2 == 1).all()  # an odd number of signs never ties
