"""Regrowing against NumPy, from the words of the papers, on weights that wander."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruned_by_hand import expected, keep_largest, layer_arrays, masks_of
from wandering import ALL, HISTORY, KEY

import dns_jax
from dns_jax import importance, pruners


@pytest.mark.parametrize(('by', 'every'), [('gradient', 1), ('chance', 4)])
def test_regrow_exchanges_the_smallest_for_the_most_important(by, every):
    stop, density = 41, 0.4
    drop = lambda step: 0.5 * (1 - step / 50)  # noqa: E731
    growth = getattr(importance, by)
    pruner = pruners.regrow(
        density, every, stop, KEY, drop, growth, initial=importance.magnitude, **ALL
    )
    shares = []

    def prune(step, weights, gradients, masks):
        if step == 0:
            return keep_largest(weights, masks, {'fc1': density, 'fc2': density})
        if step % every or step >= stop:
            return masks
        scores = gradients
        if by == 'chance':
            scores = jax.device_get(growth(jax.random.fold_in(KEY, step), weights, gradients))
        new = {}
        for layer, (numbers, kept) in layer_arrays(weights, masks).items():
            scores_of_layer, _ = layer_arrays(scores, masks)[layer]
            count = kept.sum()
            dropped = int(np.round(np.float32(drop(step)) * np.float32(count)))
            order = np.argsort(np.where(kept, np.abs(numbers), -1))[::-1]
            mask = np.zeros_like(kept)
            mask[order[: count - dropped]] = True
            growable = np.argsort(np.where(mask, -1, np.abs(scores_of_layer)))[::-1]
            mask[growable[:dropped]] = True
            shares.append((mask & ~kept).sum() / count)
            leaves = sorted(masks[layer])
            parts = np.split(mask, np.cumsum([masks[layer][leaf].size for leaf in leaves])[:-1])
            new[layer] = {
                leaf: part.reshape(masks[layer][leaf].shape)
                for leaf, part in zip(leaves, parts, strict=True)
            }
        return new

    found, wanted = masks_of(pruner), expected(prune)
    for step, (one, other) in enumerate(zip(found, wanted, strict=True)):
        for mask, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(mask, right, err_msg=f'step {step}')
        assert dns_jax.count_kept(one) == {'fc1': 28, 'fc2': 16}
    assert len(shares) == 2 * (40 // every)
    assert max(shares) > 0.2
    assert np.mean(np.array(shares) > 0) > 0.7


def test_regrow_grows_nothing_of_no_importance():
    pruner = pruners.regrow(
        0.4, 1, 20, KEY, 0.5, growth=importance.magnitude, initial=importance.magnitude, **ALL
    )
    weights = {'fc1': jnp.arange(1.0, 51.0)}
    update = jax.jit(pruner.update)
    _, state = update(weights, pruner.init(weights), weights)
    left = dns_jax.apply_masks(weights, state.masks)
    _, state = update(weights, state, left)
    # What was dropped is all that has a magnitude, so it comes back.
    np.testing.assert_array_equal(state.masks['fc1'], left['fc1'] > 0)


def test_regrow_begins_at_random_unless_told():
    pruner = pruners.regrow(0.4, 10, 20, KEY, **ALL)
    counts, masks, update = [], [], jax.jit(pruner.update)
    for seed in range(2):
        weights, gradients = HISTORY[0]
        state = pruners.regrow(0.4, 10, 20, jax.random.key(seed), **ALL).init(weights)
        _, state = update(gradients, state, weights)
        counts.append(dns_jax.count_kept(state.masks))
        masks.append(state.masks['fc1']['kernel'])
    assert counts == [{'fc1': 28, 'fc2': 16}] * 2
    assert (masks[0] != masks[1]).any()


@pytest.mark.parametrize('drop', [0.0, 1.0])
def test_regrow_keeps_its_number_where_gradients_and_weights_are_zero(drop):
    """Behind dead units all gradients are zero, and new connections are at zero themselves."""
    pruner = pruners.regrow(0.4, 1, 20, KEY, drop, initial=importance.magnitude, **ALL)
    weights = {'fc1': jnp.arange(1.0, 51.0)}
    zeros = {'fc1': jnp.zeros(50)}
    update = jax.jit(pruner.update)
    _, state = update(zeros, pruner.init(weights), weights)
    first = np.array(state.masks['fc1'])
    _, state = update(zeros, state, weights)
    assert state.masks['fc1'].sum() == 20
    assert (np.array(state.masks['fc1']) == first).all() == (drop == 0)
    _, state = update(zeros, state, zeros)
    assert state.masks['fc1'].sum() == 20


def test_regrow_keeps_a_weight_that_is_not_a_number():
    """As surgery does: pruning it would hide that training broke."""
    pruner = pruners.regrow(0.75, 1, 9, KEY, drop=0.4, initial=importance.magnitude, **ALL)
    weights = {'fc1': jnp.array([jnp.nan, 1.0, 2.0, 3.0])}
    gradients = {'fc1': jnp.array([1e-9, 1.0, 2.0, 3.0])}
    state, update = pruner.init(weights), jax.jit(pruner.update)
    for _ in range(2):
        _, state = update(gradients, state, weights)
        np.testing.assert_array_equal(state.masks['fc1'], [True, False, True, True])


def test_under_n_of_m_each_m_grows_what_it_dropped():
    structure = dns_jax.NofM(2, 4)
    pruner = pruners.regrow(0.1, 1, 9, KEY, initial=importance.magnitude, structure=structure)
    random = np.random.default_rng(0)
    params = {'kernel': jnp.asarray(random.normal(size=(64, 20)), jnp.float32)}
    state, update, masks = pruner.init(params), jax.jit(pruner.update), []
    for _ in range(4):
        slopes = {'kernel': jnp.asarray(random.normal(size=(64, 20)), jnp.float32)}
        _, state = update(slopes, state, params)
        masks.append(np.asarray(state.masks['kernel']).reshape(16, 4, 20))
    for before, after in itertools.pairwise(masks):
        np.testing.assert_array_equal(before.sum(1), after.sum(1))
        assert (before != after).any()
    assert masks[-1].sum() == 128
