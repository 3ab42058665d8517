"""Ten thousand steps of surgery on thirty million weights, in memory that does not grow."""

import gc

import jax
import jax.numpy as jnp
import optax
import psutil
import pytest

import dns_jax

STEPS, STEPS_PER_CALL = 10_000, 100
SHAPES = {'fc1': (5_000, 4_000), 'fc2': (4_000, 2_000), 'fc3': (2_000, 1_000)}


def make_calls():
    """Makes the state and the compiled call that takes it some steps on."""
    rule = dns_jax.Rule(dns_jax.mean_std(0.5), dns_jax.update_probability())
    optimizer = optax.chain(dns_jax.surgery(rule, jax.random.key(0)), optax.sgd(0.1))
    keys = jax.random.split(jax.random.key(1), len(SHAPES))
    params = {
        layer: {'kernel': jax.random.normal(key, shape), 'bias': jnp.zeros(shape[1])}
        for key, (layer, shape) in zip(keys, SHAPES.items(), strict=True)
    }

    def step(carry, _):
        params, state = carry
        masks = dns_jax.get_masks(state)
        # The gradient of half the sum of squares at W⊙T, with another sign at every other step.
        sign = 1.0 - 2.0 * (optax.tree.get(state, 'count') % 2).astype(jnp.float32)
        gradients = optax.tree.scale(sign, dns_jax.apply_masks(params, masks))
        updates, state = optimizer.update(gradients, state, params)
        events = dns_jax.count_events(masks, dns_jax.get_masks(state))
        return (optax.apply_updates(params, updates), state), events['fc1'].pruned

    take = jax.jit(lambda carry: jax.lax.scan(step, carry, length=STEPS_PER_CALL), donate_argnums=0)
    return (params, optimizer.init(params)), take


@pytest.mark.slow
def test_memory_does_not_grow(compat):
    row = f'{STEPS:,} steps of surgery on 30 million weights'
    compat('load', row)
    carry, take = make_calls()
    weights = sum(leaf.size for leaf in jax.tree.leaves(carry[0]))
    assert weights > 30_000_000
    buffers, resident, pruned = [], [], 0
    for _ in range(STEPS // STEPS_PER_CALL):
        carry, events = take(carry)
        pruned += int(events.sum())
        del events
        gc.collect()
        buffers.append((len(jax.live_arrays()), sum(array.nbytes for array in jax.live_arrays())))
        resident.append(psutil.Process().memory_info().rss / 2**20)
    assert int(optax.tree.get(carry[1], 'count')) == STEPS
    assert pruned, 'masks that stay as they are show little'
    # After ten calls everything is compiled and every pool is filled.
    assert set(buffers[1:]) == {buffers[1]}
    growth = max(resident[50:]) - max(resident[10:50])
    compat(
        'load',
        row,
        f'{buffers[1][0]} live buffers at all times; resident memory {resident[-1]:,.0f} MiB, '
        f'{growth:+,.0f} MiB from the first half to the second',
    )
    assert growth < 8
