"""Pruners that train in a way of their own, against NumPy: weights and masks of every step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dns_jax import get_masks, global_density, masked_value_and_grad, pruners
from dns_jax.sparse_training import decay_pruned, train_kept

STEPS, RATE, MOMENTUM = 50, 0.05, 0.5
KEY = jax.random.key(0)


def problem():
    """Linear regression on one batch a step, of a kernel with 30 weights."""
    random = np.random.default_rng(5)
    weights = random.normal(size=(6, 5)).astype(np.float32)
    images = random.normal(size=(STEPS, 8, 6)).astype(np.float32)
    return weights, images, images @ random.normal(size=(6, 5)).astype(np.float32)


def gradient(weights, images, labels):
    """Of the mean squared error, summed over outputs and halved."""
    return images.T @ (images @ weights - labels) / len(images)


def largest(weights, count):
    return np.abs(weights) >= np.sort(np.abs(weights), axis=None)[-count]


def train(pruner, chain, masks_first):
    """Trains by the library: weights and masks after each step."""
    weights, images, labels = problem()

    def loss(params, images, labels):
        return jnp.sum((jnp.dot(images, params['kernel']) - labels) ** 2) / (2 * len(images))

    value_and_grad = masked_value_and_grad(loss)

    @jax.jit
    def step(params, state, images, labels):
        masks = get_masks(state)
        if masks_first:
            masks = pruner.update(params, state[0], params)[1].masks
        _, gradients = value_and_grad(params, masks, images, labels)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    optimizer = chain(pruner, optax.sgd(RATE, MOMENTUM))
    params = {'kernel': jnp.asarray(weights)}
    state, seen = optimizer.init(params), []
    for batch in zip(images, labels, strict=True):
        params, state = step(params, state, *batch)
        seen.append(jax.device_get((params['kernel'], get_masks(state)['kernel'])))
    return seen


def compare(found, wanted):
    for step, ((weights, mask), (right, right_mask)) in enumerate(zip(found, wanted, strict=True)):
        np.testing.assert_array_equal(mask, right_mask, err_msg=f'step {step}')
        np.testing.assert_allclose(weights, right, atol=1e-5, err_msg=f'step {step}')


def straight_through_by_hand(decay, masks_first):
    """Zhou et al.: W ← W − γ(g(W̃) + λ(1 − E) ⊙ W), W̃ the pruned weights."""
    weights, images, labels = problem()
    weights, velocity = weights.astype(np.float64), np.zeros(weights.shape)
    before, seen = np.ones(weights.shape, bool), []
    for batch in zip(images, labels, strict=True):
        mask = largest(weights, 9)
        slope = gradient(weights * (mask if masks_first else before), *batch)
        velocity = MOMENTUM * velocity + slope + decay * ~mask * weights
        weights = weights - RATE * velocity
        seen.append((weights, mask))
        before = mask
    return seen


@pytest.mark.parametrize('masks_first', [True, False])
@pytest.mark.parametrize('decay', [0, 0.5])
def test_straight_through_and_its_decay(decay, masks_first):
    chain = (lambda *both: decay_pruned(*both, rate=decay)) if decay else optax.chain
    found = train(pruners.straight_through(0.3, KEY), chain, masks_first)
    wanted = straight_through_by_hand(decay, masks_first)
    compare(found, wanted)
    masks = [mask for _, mask in wanted]
    assert sum((~old & new).sum() for old, new in itertools.pairwise(masks)) > 5


def test_the_decay_of_the_paper_is_two_ten_thousandths():
    weights = {'kernel': jnp.array([1.0, -2.0, 3.0])}
    optimizer = decay_pruned(pruners.straight_through(1 / 3, KEY), optax.identity())
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, weights), optimizer.init(weights), weights
    )
    np.testing.assert_allclose(updates['kernel'], [2e-4, -4e-4, 0])


def test_straight_through_keeps_exactly_what_is_wanted():
    """Thresholds that are followed would be off by up to one in 128."""
    pruner = pruners.straight_through(0.5, KEY)
    weights = {'kernel': jax.random.normal(KEY, (40, 50))}
    state, update = pruner.init(weights), jax.jit(pruner.update)
    for step in range(5):
        weights = jax.tree.map(lambda leaf, step=step: leaf + 0.05 * jnp.sin(leaf * step), weights)
        _, state = update(weights, state, weights)
        assert state.masks['kernel'].sum() == 1000


def ac_dc_by_hand(start, end, every):
    """Peste et al., algorithm 1: phases that keep the largest, and phases that train all."""
    weights, images, labels = problem()
    weights, velocity = weights.astype(np.float64), np.zeros(weights.shape)
    mask, seen, phase = np.ones(weights.shape, bool), [], 'dense'
    for step, batch in enumerate(zip(images, labels, strict=True)):
        before = phase
        if step < start:
            phase = 'dense'
        elif step >= end:
            phase = 'sparse'
        elif (step - start) % every == 0:
            phase = 'dense' if before == 'sparse' else 'sparse'
        if phase == 'dense':
            mask = np.ones(weights.shape, bool)
        elif before == 'dense':
            mask = largest(weights, 9)
        weights = weights * mask
        velocity = MOMENTUM * velocity + gradient(weights, *batch) * mask
        weights = (weights - RATE * velocity) * mask
        seen.append((weights, mask))
    return seen


@pytest.mark.parametrize(
    ('start', 'end', 'every', 'changes'),
    [(20, 40, 6, 5), (0, 20, 5, 4), (4, 30, 12, 3), (3, 9, 50, 1)],
)
def test_ac_dc_alternates(start, end, every, changes):
    found = train(pruners.ac_dc(0.3, start, end, every, KEY), train_kept, masks_first=True)
    wanted = ac_dc_by_hand(start, end, every)
    compare(found, wanted)
    kept = [int(mask.sum()) for _, mask in wanted]
    assert (set(kept), kept[-1]) == ({9, 30}, 9)
    assert sum(one != other for one, other in itertools.pairwise(kept)) == changes


def test_all_connections_return_whatever_divides_them():
    """Pruned weights are zero then, and a layer may have no others."""
    pruner = pruners.ac_dc(0.25, 0, 9, 1, KEY, global_density)
    weights = {'a': {'kernel': jnp.zeros((2, 4))}, 'b': {'kernel': jnp.arange(8.0).reshape(2, 4)}}
    state = pruner.init(weights)
    for wanted in (4, 16):
        _, state = pruner.update(weights, state, weights)
        kept = sum(int(mask.sum()) for mask in jax.tree.leaves(state.masks))
        assert kept >= wanted
    assert kept == 16
