"""Tests of training.divergence: what breaks training down is found, foreseen and calmed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dns_jax
from dns_jax import has_axes, is_kernel
from experiments.training import steps as train
from experiments.training.divergence import (
    Breakdown,
    after_setbacks,
    find_breakdown,
    find_emptied_layers,
)
from experiments.training.flags import Config
from experiments.training.plan import make_plan

PARAMS = {
    'fc1': {'kernel': jnp.array([[0.1, -0.9], [0.4, 0.2]]), 'bias': jnp.array([0.0, 3.0])},
    'fc2': {'kernel': jnp.array([[0.5], [-0.5]])},
}


def make_chunk(losses, **events):
    pairs = {layer: dns_jax.Events(*map(np.int32, pair)) for layer, pair in events.items()}
    return train.Chunk(np.float32(losses), pairs)


def broken(layer, leaf, value):
    params = jax.tree.map(jnp.copy, PARAMS)
    params[layer][leaf] = params[layer][leaf].at[-1].set(value)
    return params


@pytest.mark.parametrize(
    ('losses', 'expected'),
    [
        ([1.0], None),
        ([1.0, 2.0, 3e38], None),
        ([np.nan], 1),
        ([1.0, np.inf, np.nan], 2),
        ([1.0, 2.0, -np.inf], 3),
    ],
)
def test_the_first_loss_that_is_not_finite(losses, expected):
    found = find_breakdown(make_chunk(losses), {}, PARAMS)
    assert found == (expected and Breakdown(expected, 'the loss is not finite', False))


@pytest.mark.parametrize(
    ('pruned', 'spliced', 'expected'),
    [
        ([1, 1, 1], [0, 0, 0], None),
        ([2, 2, 0], [0, 0, 0], 2),
        ([4, 0, 0], [0, 3, 0], 1),
        ([2, 2, 0], [0, 1, 0], None),  # as many as there were, but not at once
        ([2, 2, 3], [0, 2, 1], 3),
    ],
)
def test_the_step_that_empties_a_layer(pruned, spliced, expected):
    chunk = make_chunk([1.0, 1.0, 1.0], fc1=(pruned, spliced), fc2=([0, 0, 0], [0, 0, 0]))
    found = find_breakdown(chunk, {'fc1': 4, 'fc2': 2}, PARAMS)
    assert found == (expected and Breakdown(expected, 'surgery has left nothing of fc1', True))


def test_what_came_first_is_told():
    emptied = {'fc1': ([0, 4, 0], [0, 0, 0])}
    for losses, step in (([np.nan, 1, 1], 1), ([1, 1, np.nan], 2)):
        found = find_breakdown(make_chunk(losses, **emptied), {'fc1': 4}, PARAMS)
        assert (found.step, found.emptied) == (step, step == 2)


@pytest.mark.parametrize('value', [np.nan, -np.inf])
def test_weights_that_the_last_step_broke_are_named(value):
    params = broken('fc2', 'kernel', value)
    assert find_breakdown(make_chunk([1.0, 1.0]), {}, params) == Breakdown(
        2, 'a weight of fc2 is not finite', False
    )
    params['fc1'] = broken('fc1', 'bias', value)['fc1']
    assert 'a weight of fc1, fc2 is' in find_breakdown(make_chunk([1.0]), {}, params).reason


def rule(thresholds, refresh_every=0, stop=100):
    return dns_jax.Rule(thresholds, dns_jax.update_probability(stop=stop), refresh_every)


def test_a_threshold_above_all_weights_is_foreseen():
    rules = {'fc1': rule(dns_jax.mean_std(9.0)), 'fc2': rule(dns_jax.mean_std(0.0, 0.1))}
    (found,) = find_emptied_layers(rules, PARAMS, has_axes)
    largest = np.abs([0.1, -0.9, 0.4, 0.2, 0.0, 3.0])
    low = 0.9 * (largest[largest > 0].mean() + 9 * largest[largest > 0].std())
    assert found.startswith(f'the threshold of fc1, {low:.4g}, lies above all its weights')
    assert 'the largest being 3: surgery would leave nothing of it' in found


def test_what_training_may_change_is_not_foretold():
    # Of eight connections one in the end: which layer has it is not known yet.
    ramp = dns_jax.polynomial_density(0.1, 0, 40)
    shared = rule(dns_jax.global_density(ramp), refresh_every=10)
    assert find_emptied_layers({'*': shared}, PARAMS, has_axes) == []


def test_what_takes_no_part_is_not_looked_at():
    params = {'fc1': {'kernel': jnp.zeros((2, 2)), 'bias': jnp.ones(2)}, 'fc2': PARAMS['fc2']}
    rules = {'*': rule(dns_jax.mean_std(0.0))}
    assert find_emptied_layers(rules, params, has_axes) == []
    assert find_emptied_layers(rules, params, is_kernel) == ['all weights of fc1 are zero']
    assert find_emptied_layers({'fc2': rules['*']}, params, is_kernel) == []


def masks_of(state):
    return dns_jax.get_masks(state)


@pytest.mark.parametrize('setbacks', [(), (False,), (False, False), (True,), (False, True)])
def test_after_setbacks_the_rate_is_halved_and_masks_may_stay(setbacks):
    surgery = dns_jax.surgery(rule(dns_jax.mean_std(0.0)), jax.random.key(0))
    sgd = dns_jax.caffe_sgd(lambda step: 0.1, 0.9, 1e-3)
    optimizer = optax.chain(surgery, sgd)
    state = optimizer.init(PARAMS)
    plain, after = optimizer.update(PARAMS, state, PARAMS)
    calmed = optax.chain(*after_setbacks(surgery, sgd, setbacks))
    calm, calm_after = calmed.update(PARAMS, state, PARAMS)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(calm), strict=True):
        np.testing.assert_array_equal(one * 0.5 ** len(setbacks), other)
    changed = any(not leaf.all() for leaf in jax.tree.leaves(masks_of(after)))
    assert changed
    expected = state if any(setbacks) else after
    jax.tree.map(np.testing.assert_array_equal, masks_of(calm_after), masks_of(expected))
    assert jax.tree.structure(calm_after) == jax.tree.structure(after)


@pytest.mark.parametrize('setbacks', [(False,), (True, False)])
def test_after_setbacks_what_set_prunes_is_zero(setbacks):
    rates = {'learning_rate': 'fixed:0.1', 'weight_decay': 0.0}
    fields = {'compression': 2.0, 'surgery_steps': 4, 'refresh_every': 1, **rates}
    config = Config('lenet300', pruner='set', **fields)
    phase = make_plan(config).surgery
    optimizer = phase.make_optimizer(PARAMS, setbacks)
    # As where training goes on from a checkpoint.
    params, state = PARAMS, phase.make_optimizer(PARAMS).init(PARAMS)
    update = jax.jit(optimizer.update)
    for _ in range(3):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
        pruned = dns_jax.apply_masks(params, masks_of(state))
        jax.tree.map(np.testing.assert_array_equal, params, pruned)
    assert 0 < sum(jnp.count_nonzero(leaf) for leaf in jax.tree.leaves(params)) < 8
