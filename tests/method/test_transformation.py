"""Tests of surgery: what one transformation does, step by step."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from surgery_runs import RULES, STEPS, drift, init_masks, network, surgery

from dns_jax import (
    Rule,
    Thresholds,
    apply_masks,
    get_masks,
    layer_density,
    masked_value_and_grad,
    update_masks,
    update_probability,
)


def test_state_at_the_start():
    params, key = network(), jax.random.key(4)
    state = surgery(RULES, key).init(params)
    assert (int(state.count), state.count.dtype, state.count.shape) == (0, jnp.int32, ())
    assert state.key == key
    chex.assert_trees_all_equal(state.masks, init_masks(params))
    for layer, c_rate, width in [('fc1', 0.2, 0.1), ('fc2', -0.3, 0.3)]:
        leaves = [np.ravel(leaf).astype(np.float64) for leaf in params[layer].values()]
        sizes = np.abs(np.concatenate(leaves))
        middle = sizes.mean() + c_rate * sizes.std()
        want = [(1 - width) * middle, (1 + width) * middle]
        np.testing.assert_allclose([*state.thresholds[layer]], want, rtol=1e-5)


jitted_drift = jax.jit(drift)


def test_one_step_is_update_masks_with_the_key_and_probability_of_the_count():
    params, key = network(), jax.random.key(4)
    transform = surgery(RULES, key)
    state, update = transform.init(params), jax.jit(transform.update)
    masks = state.masks
    for count in range(STEPS):
        moved = jitted_drift(params, jnp.int32(count))
        _, state = update(moved, state, moved)
        sigma = {'fc1': 1 / (1 + 0.1 * count), 'fc2': 1 / (1 + 0.5 * count) if count < 15 else 0.0}
        folded = jax.random.fold_in(key, count)
        masks = update_masks(folded, moved, masks, state.thresholds, sigma)
        chex.assert_trees_all_equal(state.masks, masks)
        assert int(state.count) == count + 1
        assert state.key == key


def test_coins_of_all_steps_are_independent():
    # At one step the layers, in one layer neighbouring steps; the masks are all on before each.
    steps, sigma = 20_000, {'a': 0.3, 'b': 0.6}
    params = {layer: {'w': jnp.zeros((1, 1))} for layer in sigma}
    table = {
        layer: Rule(
            lambda layers, masks, step: dict.fromkeys(layers, Thresholds(1.0, 2.0)),
            lambda step, probability=probability: probability,
        )
        for layer, probability in sigma.items()
    }
    transform = surgery(table, jax.random.key(8))
    start = transform.init(params)

    def pruned(count):
        _, state = transform.update(params, start._replace(count=count), params)
        return jnp.stack([~state.masks[layer]['w'][0, 0] for layer in sigma])

    coins = np.asarray(jax.jit(jax.vmap(pruned))(jnp.arange(steps)))

    def check(frequency, probability):
        assert abs(frequency - probability) < 4 * math.sqrt(probability / steps)

    check(coins[:, 0].mean(), 0.3)
    check(coins[:, 1].mean(), 0.6)
    check((coins[:, 0] & coins[:, 1]).mean(), 0.18)
    check((coins[1:, 0] & coins[:-1, 0]).mean(), 0.09)
    check((coins[1:, 1] & coins[:-1, 1]).mean(), 0.36)


def test_importance_has_another_key_at_every_step_and_none_of_a_coin():
    params, key, keys = network(), jax.random.key(4), []

    def importance(key, params, updates):
        keys.append(key)
        return params

    rule = Rule(layer_density(0.5), update_probability(power=0), refresh_every=1)
    transform = surgery(rule, key, importance=importance)
    state = transform.init(params)
    for _ in range(2):
        _, state = transform.update(params, state, params)
    keys += [jax.random.fold_in(key, count) for count in range(6)]  # those of the coins
    assert len({tuple(jax.random.key_data(each).tolist()) for each in keys}) == 2 + 6


def test_masks_follow_the_weights_of_the_gradient_not_the_updated_ones():
    always = Rule(
        lambda layers, masks, step: dict.fromkeys(layers, Thresholds(1.0, 1.0)),
        update_probability(power=0),
    )
    params, gradients = jnp.array([0.5, 2.0]), jnp.array([-10.0, 10.0])
    for order in (lambda *parts: parts, lambda *parts: reversed(parts)):
        optimizer = optax.chain(*order(surgery(always, jax.random.key(0)), optax.sgd(1.0)))
        _, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
        assert get_masks(state).tolist() == [False, True]


def test_empty_table_costs_nothing():
    params = network()
    transform = surgery({}, jax.random.key(0))
    state = transform.init(params)
    assert {leaf.shape for leaf in jax.tree.leaves(state.masks)} == {()}
    assert jax.make_jaxpr(apply_masks)(params, state.masks).jaxpr.eqns == []
    _, state = transform.update(params, state, params)
    assert all(bool(leaf) for leaf in jax.tree.leaves(state.masks))


def test_masked_value_and_grad():
    weights, mask = jnp.array([1.0, 5.0, -2.0]), jnp.array([True, False, True])
    images = jnp.array([2.0, 3.0, 1.0])

    def loss(weights, images, *, offset):
        value = jnp.sum(weights * images) ** 2 + offset
        return value, {'value': value}

    value, gradient = masked_value_and_grad(lambda *a, **k: loss(*a, **k)[0])(
        weights, mask, images, offset=7.0
    )
    # (2·1 − 1·2)² = 0 at W⊙T; shift it so that the gradient shows.
    assert float(value) == 7.0
    assert gradient.tolist() == [0.0, 0.0, 0.0]
    (value, aux), gradient = masked_value_and_grad(loss, has_aux=True)(
        weights + 1, mask, images, offset=7.0
    )
    # W⊙T = (2, 0, −1): the sum is 3, the derivative 2·3·x, also for the pruned weight.
    assert float(value) == float(aux['value']) == 16.0
    assert gradient.tolist() == [12.0, 18.0, 6.0]


def test_a_pruned_weight_learns_and_comes_back():
    always = Rule(
        lambda layers, masks, step: dict.fromkeys(layers, Thresholds(0.9, 1.1)),
        update_probability(power=0),
    )
    optimizer = optax.chain(surgery(always, jax.random.key(0)), optax.sgd(0.25))
    params = jnp.array([0.5])
    state = optimizer.init(params)
    value_and_grad = masked_value_and_grad(lambda weights: jnp.sum((weights - 2.0) ** 2) / 2)
    kept, values = [], []

    @jax.jit
    def step(params, state):
        value, gradient = value_and_grad(params, get_masks(state))
        updates, state = optimizer.update(gradient, state, params)
        return value, optax.apply_updates(params, updates), state

    for _ in range(6):
        value, params, state = step(params, state)
        values.append(float(value))
        kept.append(bool(get_masks(state)[0]))
    # 0.5 is below the band: pruned. At zero its gradient is −2, so it grows to 0.875, 1.375, 1.875.
    assert kept == [False, False, True, True, True, True]
    assert values[:4] == [1.125, 2.0, 2.0, 0.0078125]


PARAMS = {'fc1': {'kernel': jnp.ones((2, 2))}}
ONE = RULES['fc1']


@pytest.mark.parametrize(
    ('params', 'error', 'message'),
    [
        (None, ValueError, 'params'),
        ({'fc1': {'kernel': jnp.ones((2, 3))}}, ValueError, r"masks\['fc1/kernel'\].*\(2, 3\)"),
        ({'fc1': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}}, ValueError, "lack 'fc1/bias'"),
    ],
)
def test_bad_updates(params, error, message):
    transform = surgery(ONE, jax.random.key(0))
    state = transform.init(PARAMS)
    with pytest.raises(error, match=message):
        transform.update(PARAMS, state, params)
