"""Tests of sparse_training: what is trained beside a pruner, and how dropout falls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from wandering import ALL, HISTORY, KEY

import dns_jax
from dns_jax import importance, pruners, sparse_training


def test_train_kept_trains_nothing_else():
    pruner = pruners.regrow(0.4, 2, 20, KEY, 0.5, initial=importance.magnitude, **ALL)
    optimizer = sparse_training.train_kept(pruner, optax.sgd(0.2, momentum=0.5))
    weights = HISTORY[0][0]
    state = optimizer.init(weights)
    update, velocity = jax.jit(optimizer.update), jax.tree.map(np.zeros_like, weights)
    expected_weights, grown = weights, 0
    before = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), weights)
    for _, gradients in HISTORY[:9]:
        updates, state = update(gradients, state, weights)
        masks = jax.device_get(dns_jax.get_masks(state))
        velocity = jax.tree.map(lambda v, g, m: 0.5 * v + g * m, velocity, gradients, masks)
        expected_weights = jax.tree.map(
            lambda w, v, m: (w - np.float32(0.2) * v) * m, expected_weights, velocity, masks
        )
        new = jax.tree.map(lambda m, old: m & ~old, masks, before)
        for at_zero, leaf in zip(*map(jax.tree.leaves, (new, weights)), strict=True):
            assert (leaf[at_zero] == 0).all()
            grown += at_zero.sum()
        before = masks
        weights = optax.apply_updates(weights, updates)
        for one, other in zip(*map(jax.tree.leaves, (weights, expected_weights)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
        pruned = jax.tree.map(lambda leaf, mask: leaf[~mask], weights, masks)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(pruned))
    assert grown > 10


def test_dropout_falls_with_the_root_of_the_density():
    masks = {'fc1': {'kernel': jnp.arange(8).reshape(4, 2) < 1, 'bias': jnp.array([True, False])}}
    rates = sparse_training.scale_dropout(0.5, {**masks, 'fc2': jnp.ones((), bool)})
    assert list(rates) == ['fc1']
    assert float(rates['fc1']) == pytest.approx(0.5 * np.sqrt(2 / 10))


def test_train_kept_needs_masks_and_weights():
    weights = {'fc1': jnp.ones(3)}
    optimizer = sparse_training.train_kept(optax.identity(), optax.sgd(0.1))
    with pytest.raises(ValueError, match='the state has no masks'):
        optimizer.update(weights, optimizer.init(weights), weights)
    optimizer = sparse_training.train_kept(pruners.one_shot(0.5, 0, KEY, **ALL), optax.sgd(0.1))
    with pytest.raises(ValueError, match='surgery needs the weights'):
        optimizer.update(weights, optimizer.init(weights))


def limited(gradient, mask):
    largest = np.abs(gradient[mask]).max()
    return np.where(mask, gradient, np.clip(gradient, -largest, largest))


def test_pruned_weights_learn_slower_and_their_moments_are_those_of_their_gradient():
    pruner = pruners.one_shot(0.5, 0, KEY, **ALL)
    optimizer = sparse_training.slow_pruned(pruner, optax.sgd(0.1, momentum=0.5), share=0.25)
    weights = jax.tree.map(jnp.asarray, HISTORY[0][0])
    state, plain = optimizer.init(weights), optax.sgd(0.1, momentum=0.5)
    whole_state = plain.init(weights)
    for _, gradients in HISTORY[:3]:
        # The gradient was taken at the masks of before.
        seen = jax.tree.map(limited, gradients, jax.device_get(dns_jax.get_masks(state)))
        updates, state = optimizer.update(gradients, state, weights)
        whole, whole_state = plain.update(seen, whole_state, weights)
        masks = dns_jax.get_masks(state)
        for found, full, mask in zip(*map(jax.tree.leaves, (updates, whole, masks)), strict=True):
            np.testing.assert_allclose(found, np.where(mask, full, 0.25 * full), rtol=1e-6)
            assert 0 < mask.sum() < mask.size
        weights = optax.apply_updates(weights, updates)


def test_what_returns_has_no_velocity_of_gradients_that_were_too_large():
    optimizer = sparse_training.slow_pruned(
        dns_jax.freeze({'kernel': jnp.array([True, False])}), optax.sgd(0.1, momentum=0.9)
    )
    weights = {'kernel': jnp.ones(2)}
    state = optimizer.init(weights)
    for _ in range(20):
        _, state = optimizer.update({'kernel': jnp.array([1.0, 300.0])}, state, weights)
    pruned, momentum = state
    back = pruned._replace(masks={'kernel': jnp.array([True, True])}), momentum
    updates, _ = optimizer.update({'kernel': jnp.ones(2)}, back, weights)
    assert updates['kernel'][1] == updates['kernel'][0]


@pytest.mark.parametrize(
    ('kept', 'pruned', 'found'),
    [
        ([0.1, -0.3], [7.0, -0.2], [0.3, -0.2]),
        ([0.0, 0.0], [7.0, -0.2], [7.0, -0.2]),  # else a layer that is lost would stay so
        ([np.nan, 0.1], [7.0, -0.2], [7.0, -0.2]),
    ],
)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_no_pruned_weight_has_a_larger_gradient_than_the_kept_ones(kept, pruned, found, dtype):
    masks = {'fc': jnp.array([True, True, False, False]), 'dense': jnp.ones((), bool)}
    optimizer = sparse_training.slow_pruned(dns_jax.freeze(masks), optax.sgd(1.0), share=0.5)
    weights = {'fc': jnp.ones(4, dtype), 'dense': jnp.ones(2, dtype)}
    gradients = {'fc': jnp.array([*kept, *pruned], dtype), 'dense': jnp.array([9.0, 9.0], dtype)}
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(weights), weights)
    assert updates['fc'].dtype == dtype
    np.testing.assert_allclose(np.float32(updates['fc'][2:]), -0.5 * np.array(found), rtol=1e-2)
    np.testing.assert_array_equal(np.float32(updates['fc'][:2]), -np.float32(gradients['fc'][:2]))
    assert updates['dense'].tolist() == [-9.0, -9.0]


def test_a_channel_without_inputs_before_a_batch_norm_does_not_explode():
    inputs = jax.random.normal(jax.random.key(0), (64, 8))
    labels = inputs[:, :4] * inputs[:, 4:]
    weights = {'kernel': 0.3 * jax.random.normal(jax.random.key(1), (8, 4))}
    masks = {'kernel': jnp.ones((8, 4), bool).at[:, 1].set(False)}

    def loss(params):
        hidden = inputs @ params['kernel']
        middle, variance = (of(0, keepdims=True) for of in (hidden.mean, hidden.var))
        normed = (hidden - middle) * jax.lax.rsqrt(variance + 1e-5)
        return jnp.mean((normed - labels) ** 2)

    def largest(chain):
        optimizer, params = chain(dns_jax.freeze(masks), optax.sgd(0.1, momentum=0.9)), weights
        state = optimizer.init(params)
        for _ in range(20):
            gradients = jax.grad(loss)(dns_jax.apply_masks(params, masks))
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.abs(params['kernel'] - weights['kernel']).max()

    assert largest(optax.chain) > 20 * largest(sparse_training.slow_pruned)
