"""The pruners against NumPy, from the words of their papers, on weights that wander."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruned_by_hand import cut, expected, keep_largest, layer_arrays, masks_of
from wandering import ALL, HISTORY, KEY

import dns_jax
from dns_jax import importance, pruners

ROUNDS = (3, 20, 21, 40)


def check(transform, prune):
    """Compares, and sees to it that there was something to compare."""
    found, wanted = masks_of(transform), expected(prune)
    for step, (one, other) in enumerate(zip(found, wanted, strict=True)):
        for mask, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(mask, right, err_msg=f'step {step}')
    kept = [sum(mask.sum() for mask in jax.tree.leaves(masks)) for masks in found]
    assert 0 < kept[-1] < 110
    assert all(later <= earlier for earlier, later in itertools.pairwise(kept))


C_RATES = {'fc1': 0.8, 'fc2': 0.3}


def test_han_prunes_by_the_deviation_of_what_is_left():
    def prune(step, weights, gradients, masks):
        if step not in ROUNDS:
            return masks
        thresholds = {
            layer: C_RATES[layer] * numbers[kept & (numbers != 0)].std()
            for layer, (numbers, kept) in layer_arrays(weights, masks).items()
        }
        return cut(weights, masks, thresholds)

    check(pruners.han(C_RATES, ROUNDS, KEY, **ALL), prune)


def test_one_shot_prunes_once():
    densities = {'fc1': 0.4, 'fc2': 0.15}

    def prune(step, weights, gradients, masks):
        return keep_largest(weights, masks, densities) if step == 7 else masks

    check(pruners.one_shot(densities, 7, KEY, **ALL), prune)


def test_iterative_prunes_by_the_same_factor_in_each_round():
    rounds, densities = (3, 20, 41), {'fc1': 0.125, 'fc2': 0.3}

    def prune(step, weights, gradients, masks):
        if step not in rounds:
            return masks
        share = (1 + rounds.index(step)) / 3
        return keep_largest(
            weights, masks, {layer: final**share for layer, final in densities.items()}
        )

    check(pruners.iterative(densities, rounds, KEY, **ALL), prune)


@pytest.mark.parametrize('by', [pytest.param('magnitude', marks=pytest.mark.slow), 'taylor'])
def test_gradual_prunes_along_the_cubic_ramp(by):
    start, end, every = 4, 33, 6

    def prune(step, weights, gradients, masks):
        if step < start or ((step - start) % every and step != end) or step > end:
            return masks
        left = (1 - (step - start) / (end - start)) ** 3
        densities = {'fc1': 0.1 + 0.9 * left, 'fc2': 0.3 + 0.7 * left}
        tree = weights
        if by == 'taylor':
            tree = jax.tree.map(lambda w, g: w * g, weights, gradients)
        return keep_largest(tree, masks, densities)

    pruner = pruners.gradual(
        {'fc1': 0.1, 'fc2': 0.3}, start, end, every, KEY, importance=getattr(importance, by), **ALL
    )
    check(pruner, prune)


def test_surgery_without_splicing():
    rules = dns_jax.Rule(dns_jax.mean_std(-0.5), dns_jax.update_probability(power=0))
    thresholds = {}

    def prune(step, weights, gradients, masks):
        if not step:
            for layer, (numbers, _) in layer_arrays(weights, masks).items():
                magnitudes = np.abs(numbers[numbers != 0])
                thresholds[layer] = 0.9 * (magnitudes.mean() - 0.5 * magnitudes.std())
        return cut(weights, masks, thresholds)

    check(dns_jax.surgery(rules, KEY, splicing=False, **ALL), prune)


def test_what_all_layers_share_is_divided_among_them():
    pruner = pruners.one_shot(0.2, 0, KEY, density_rule=dns_jax.global_density, **ALL)
    weights, gradients = HISTORY[0]
    # fc1 twice as large in every weight is no reason to prune fc2.
    larger = {'fc1': jax.tree.map(lambda leaf: 2 * leaf, weights['fc1']), 'fc2': weights['fc2']}
    counts, update = [], jax.jit(pruner.update)
    for tree in (weights, larger):
        _, state = update(gradients, pruner.init(tree), tree)
        counts.append(dns_jax.count_kept(state.masks))
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) == round(0.2 * 110)


def test_nothing_returns_at_a_threshold_of_zero():
    """A layer that is all zero but for what was pruned has a threshold of 0, which zeros reach."""
    pruner = pruners.han(0.0, rounds=[0, 1], key=KEY, **ALL)
    weights = {'fc1': jnp.array([1.0, 2.0])}
    state = pruner.init(weights)
    masks = {'fc1': jnp.array([True, False])}
    _, state = jax.jit(pruner.update)(weights, state._replace(masks=masks), weights)
    np.testing.assert_array_equal(state.masks['fc1'], [True, False])


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
