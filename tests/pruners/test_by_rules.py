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


@pytest.mark.parametrize('by', ['magnitude', 'taylor'])
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
    counts = []
    for tree in (weights, larger):
        _, state = pruner.update(gradients, pruner.init(tree), tree)
        counts.append(dns_jax.count_kept(state.masks))
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) == round(0.2 * 110)


def test_nothing_returns_at_a_threshold_of_zero():
    """A layer that is all zero but for what was pruned has a threshold of 0, which zeros reach."""
    pruner = pruners.han(0.0, rounds=[0, 1], key=KEY, **ALL)
    weights = {'fc1': jnp.array([1.0, 2.0])}
    state = pruner.init(weights)
    masks = {'fc1': jnp.array([True, False])}
    _, state = pruner.update(weights, state._replace(masks=masks), weights)
    np.testing.assert_array_equal(state.masks['fc1'], [True, False])


def test_straight_through_has_no_band_under_n_of_m_either():
    pruner = pruners.straight_through(0.5, KEY, structure=dns_jax.NofM(1, 2))
    state = pruner.init({'kernel': jnp.ones((2, 1))})
    for second in (1.0, 2.2):
        params = {'kernel': jnp.array([[2.0], [second]])}
        _, state = pruner.update(params, state, params)
    np.testing.assert_array_equal(state.masks['kernel'], [[False], [True]])
