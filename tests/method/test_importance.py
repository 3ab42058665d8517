"""Tests of importance: by other numbers than magnitudes, and by chance."""

import jax
import jax.numpy as jnp
import numpy as np
from pruned_by_hand import expected, keep_largest, masks_of
from wandering import ALL, HISTORY, KEY, STEPS

import dns_jax
from dns_jax import importance, pruners


def test_surgery_may_go_by_another_importance():
    """With splicing the numbers of pruned connections count, and they return."""
    rule = dns_jax.Rule(dns_jax.layer_density(0.3, 0.0), dns_jax.update_probability(power=0), 1)
    found = masks_of(dns_jax.surgery(rule, KEY, importance=importance.taylor, **ALL))

    def prune(step, weights, gradients, masks):
        tree = jax.tree.map(lambda w, g: w * g, weights, gradients)
        everything = jax.tree.map(np.ones_like, masks)
        return keep_largest(tree, everything, {'fc1': 0.3, 'fc2': 0.3})

    for one, other in zip(found, expected(prune), strict=True):
        for mask, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(mask, right)


def test_chance_knows_nothing_of_the_weights():
    pruner = pruners.one_shot(0.3, 0, KEY, importance=importance.chance, **ALL)
    weights, gradients = HISTORY[0]
    update, start = jax.jit(pruner.update), pruner.init(weights)
    _, state = update(gradients, start, weights)
    _, other = update(gradients, start, jax.tree.map(lambda leaf: 10 * leaf + 1, weights))
    for one, two in zip(*map(jax.tree.leaves, (state.masks, other.masks)), strict=True):
        np.testing.assert_array_equal(one, two)
    assert dns_jax.count_kept(state.masks) == {'fc1': 21, 'fc2': 12}
    _, again = update(gradients, start._replace(key=jax.random.key(1)), weights)
    assert not (again.masks['fc1']['kernel'] == state.masks['fc1']['kernel']).all()


def test_chance_draws_anew_at_every_step_and_leaf():
    key = jax.random.key(3)
    numbers = importance.chance(key, {'a': jnp.zeros(9), 'b': jnp.zeros(9)}, {})
    assert not (numbers['a'] == numbers['b']).any()
    assert all(((leaf > 0) & (leaf <= 1)).all() for leaf in numbers.values())
    rule = dns_jax.Rule(dns_jax.layer_density(0.3, 0.0), dns_jax.update_probability(power=0), 1)
    masks = masks_of(dns_jax.surgery(rule, KEY, importance=importance.chance, **ALL))
    assert len({mask['fc1']['kernel'].tobytes() for mask in masks}) == STEPS
