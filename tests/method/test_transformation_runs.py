"""Tests of surgery: however it is run, the masks are the same, in one program."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from situations import slow_but
from surgery_runs import DTYPES, REFRESHED, RULES, drift, masks_of_run, network, surgery, wander

from dns_jax import get_masks, masked_value_and_grad


@pytest.mark.parametrize('dtype', slow_but(DTYPES, jnp.float32, jnp.bfloat16))
def test_all_ways_of_running_give_the_same_masks(dtype):
    params = network(dtype)
    masks = jax.device_get(masks_of_run('jit', params))
    kept = [np.sum(leaf) for leaf in jax.tree.leaves(masks)]
    assert all(0 < k < leaf.size for k, leaf in zip(kept, jax.tree.leaves(masks), strict=True))
    chex.assert_trees_all_equal(masks, jax.device_get(masks_of_run('scan', params)))
    if dtype == jnp.float32:
        first = jax.device_get(masks_of_run('plain', params, steps=3))
        chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[:3], masks), first)


@pytest.mark.parametrize(('rules', 'move'), [(RULES, drift), (REFRESHED, wander)])
def test_mesh_of_eight_devices(mesh, rules, move):
    params = network()
    placed = jax.device_put(params, jax.NamedSharding(mesh, jax.P('x')))
    transform = surgery(rules, jax.random.key(4))

    @jax.jit
    def step(state, params):
        moved = move(params, state.count)
        return transform.update(moved, state, moved)[1]

    whole, parts = transform.init(params), transform.init(placed)
    for _ in range(8):
        whole, parts = step(whole, params), step(parts, placed)
        for mask, other, weights in zip(
            *map(jax.tree.leaves, (parts.masks, whole.masks, placed)), strict=True
        ):
            assert mask.sharding.is_equivalent_to(weights.sharding, weights.ndim)
            np.testing.assert_array_equal(mask, other)


def train_step(rules):
    optimizer = optax.chain(surgery(rules, jax.random.key(4)), optax.sgd(0.1, 0.9))

    def loss(params, images):
        for layer in ('fc1', 'fc2'):
            images = jnp.tanh(images @ params[layer]['kernel'] + params[layer]['bias'][None])
        return jnp.mean(images**2)

    value_and_grad = masked_value_and_grad(loss)

    def step(params, state, images):
        value, gradients = value_and_grad(params, get_masks(state), images)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return optimizer.init, step


def test_step_is_traced_and_compiled_once_and_stays_on_the_device():
    init, step = train_step(REFRESHED)
    params, images = jax.tree.map(jnp.asarray, network()), jnp.ones((4, 16))
    state = init(params)
    traces, compiled = [], collections.Counter()

    @jax.jit
    def counted(*arguments):
        traces.append(1)
        return step(*arguments)

    def listen(event, duration, **extra):
        del duration, extra
        compiled[event] += 1

    jax.block_until_ready((params, state, images))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with jax.transfer_guard('disallow'):
            for _ in range(30):
                params, state, _ = counted(params, state, images)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(traces) == 1
    # One program in all: nothing is run beside it, at the first step or at a later one.
    assert compiled['/jax/core/compile/backend_compile_duration'] == 1
    assert int(optax.tree.get(state, 'count')) == 30
