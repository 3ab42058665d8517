"""Tests of surgery: however it is run, the masks are the same, in one program."""

import collections

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from surgery_runs import DTYPES, REFRESHED, RULES, drift, masks_of_run, network, surgery, wander

from dns_jax import Rule, get_masks, global_density, masked_value_and_grad, update_probability


@pytest.mark.parametrize('dtype', DTYPES)
def test_all_ways_of_running_give_the_same_masks(dtype):
    params = network(dtype)
    masks = masks_of_run('jit', params)
    kept = [int(jnp.sum(leaf)) for leaf in jax.tree.leaves(masks)]
    assert all(0 < k < leaf.size for k, leaf in zip(kept, jax.tree.leaves(masks), strict=True))
    for how in ('scan', 'plain') if dtype == jnp.float32 else ('scan',):
        chex.assert_trees_all_equal(masks, masks_of_run(how, params))


@pytest.mark.parametrize(('rules', 'move'), [(RULES, drift), (REFRESHED, wander)])
def test_mesh_of_eight_devices(mesh, rules, move):
    params = network()
    spec = jax.sharding.PartitionSpec
    placed = jax.tree.map(
        lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, spec('x'))), params
    )
    whole, parts = (
        jax.device_get(masks_of_run('jit', tree, steps=8, rules=rules, move=move))
        for tree in (params, placed)
    )
    chex.assert_trees_all_equal(whole, parts)
    transform = surgery(rules, jax.random.key(4))
    state = transform.init(placed)
    update = jax.jit(transform.update)
    for _ in range(3):
        _, state = update(placed, state, placed)
        for mask, weights in zip(
            jax.tree.leaves(state.masks), jax.tree.leaves(placed), strict=True
        ):
            assert mask.sharding.is_equivalent_to(weights.sharding, weights.ndim)


@pytest.mark.parametrize(
    ('axis_type', 'axes'),
    [(jax.sharding.AxisType.Auto, ('x',)), (jax.sharding.AxisType.Explicit, (None, 'x'))],
)
def test_density_on_meshes_of_both_kinds(axis_type, axes):
    mesh = jax.make_mesh((8,), ('x',), (axis_type,), devices=jax.devices('cpu')[:8])
    rule = Rule(global_density(0.1), update_probability(power=0), 2)
    transform = surgery(rule, jax.random.key(0))
    weights = jax.random.normal(jax.random.key(1), (16, 24))
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, jax.NamedSharding(mesh, jax.P(*axes)))
        _, state = jax.jit(transform.update)(placed, transform.init(placed), placed)
        assert state.masks.sharding.is_equivalent_to(placed.sharding, 2)
    _, whole = transform.update(weights, transform.init(weights), weights)
    assert int(jnp.sum(whole.masks)) == 38
    chex.assert_trees_all_equal(jax.device_get(state.masks), jax.device_get(whole.masks))


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


@pytest.mark.parametrize('rules', [RULES, REFRESHED], ids=['asked once', 'refreshed'])
def test_step_is_traced_and_compiled_once_and_stays_on_the_device(rules):
    init, step = train_step(rules)
    params, images = network(), jnp.ones((4, 16))
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


PARAMS = {'fc1': {'kernel': jnp.ones((2, 2))}}
ONE = RULES['fc1']


def test_factory_may_be_used_again_after_its_state_was_donated():
    transform = surgery(ONE, jax.random.key(0))
    step = jax.jit(lambda state: transform.update(PARAMS, state, PARAMS)[1], donate_argnums=0)
    first = step(transform.init(PARAMS))
    second = step(transform.init(PARAMS))
    chex.assert_trees_all_equal(first.masks, second.masks)
