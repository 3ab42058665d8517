"""The contract of quantisers, and what surgery makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dns_jax
from experiments.baselines.binary_connect import binary_connect
from experiments.baselines.bitwise import bitwise
from experiments.baselines.quantisers import Quantiser, map_kernels, quantised
from experiments.baselines.ternary import scaled_signs, ternary

KEY = jax.random.key(0)
QUANTISERS = {
    'binary': binary_connect,
    'stochastic': lambda: binary_connect(stochastic=True),
    'ternary': ternary,
    'signs': scaled_signs,
    'bitwise': lambda: bitwise(0.2),
}
each_quantiser = pytest.mark.parametrize('name', QUANTISERS)


def network():
    random = np.random.default_rng(2)
    return {
        'conv': {'kernel': jnp.float32(random.normal(size=(3, 3, 2, 4)))},
        'fc': {
            'kernel': jnp.float32(random.normal(size=(8, 6))),
            'bias': jnp.float32(random.normal(size=6)),
        },
    }


def masks_of(params):
    random = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf: (
            jnp.asarray(random.random(leaf.shape) < 0.5) if leaf.ndim > 1 else jnp.array(True)
        ),
        params,
    )


def loss(params, images):
    outputs = jnp.dot(images, params['fc']['kernel'])
    return jnp.sum(outputs**2) + jnp.sum(params['conv']['kernel'] ** 2)


@each_quantiser
def test_what_is_pruned_is_zero_and_biases_stay(name):
    params, quantiser = network(), QUANTISERS[name]()
    masks = masks_of(params)
    for rounded in (quantiser.quantise(params, masks, KEY), quantiser.finish(params, masks)):
        for layer in params:
            assert (rounded[layer]['kernel'][~masks[layer]['kernel']] == 0).all()
        np.testing.assert_array_equal(rounded['fc']['bias'], params['fc']['bias'])


@each_quantiser
def test_each_kernel_has_a_bit_and_zeros(name):
    params, quantiser = network(), QUANTISERS[name]()
    rounded = quantiser.quantise(params, masks_of(params), KEY)
    for layer in params:
        values = np.unique(np.abs(rounded[layer]['kernel']))
        assert len(values) == 2
        assert values[0] == 0


@each_quantiser
def test_a_mask_without_axes_keeps_all(name):
    params, quantiser = network(), QUANTISERS[name]()
    all_kept = jax.tree.map(lambda leaf: jnp.array(True), params)
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    for scalar, full in zip(
        jax.tree.leaves(quantiser.quantise(params, all_kept, KEY)),
        jax.tree.leaves(quantiser.quantise(params, ones, KEY)),
        strict=True,
    ):
        np.testing.assert_array_equal(scalar, full)


def test_the_gradient_is_that_at_the_quantised_weights_taken_back():
    params = network()
    masks, images = masks_of(params), jnp.float32(np.random.default_rng(4).normal(size=(5, 8)))

    def double(gradients, dense):
        return jax.tree.map(lambda gradient, weights: 2 * gradient + weights, gradients, dense)

    halve = Quantiser(
        lambda params, masks, key: map_kernels(lambda n, w, m: w / 2, params, masks),
        dns_jax.apply_masks,
        double,
    )
    value, gradients = quantised(dns_jax.masked_value_and_grad(loss), halve)(
        params, masks, images, key=KEY
    )
    kernel = np.where(masks['fc']['kernel'], params['fc']['kernel'] / 2, 0)
    outputs = images @ kernel
    halved = np.where(masks['conv']['kernel'], params['conv']['kernel'] / 2, 0)
    np.testing.assert_allclose(value, np.sum(outputs**2) + np.sum(halved**2), rtol=1e-5)
    np.testing.assert_allclose(
        gradients['fc']['kernel'], 4 * images.T @ outputs + params['fc']['kernel'], rtol=1e-5
    )


@each_quantiser
def test_surgery_prunes_and_splices_under_every_quantiser(name):
    quantiser = QUANTISERS[name]()
    params = network()
    optimizer = optax.chain(
        dns_jax.prune_to(density=0.3, steps=20), optax.sgd(0.05), quantiser.constrain
    )
    state = optimizer.init(params)
    value_and_grad = quantised(dns_jax.masked_value_and_grad(loss), quantiser)

    @jax.jit
    def step(params, state, images, key):
        masks = dns_jax.get_masks(state)
        _, gradients = value_and_grad(params, masks, images, key=key)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    random, returned = np.random.default_rng(5), 0
    for number in range(30):
        before = dns_jax.get_masks(state)
        images = jnp.float32(random.normal(size=(5, 8)))
        params, state = step(params, state, images, jax.random.fold_in(KEY, number))
        events = dns_jax.count_events(before, dns_jax.get_masks(state))
        returned += sum(int(np.sum(event.spliced)) for event in events.values())
    kept = dns_jax.count_kept(dns_jax.get_masks(state))
    assert sum(kept.values()) == round(0.3 * (72 + 48))
    assert returned


def test_trees_that_are_not_parallel_are_refused():
    with pytest.raises(ValueError, match='masks'):
        map_kernels(lambda number, weights, mask: weights, network(), {'fc': jnp.array(True)})
