"""The contract that every transformation of masks keeps in the company of others, in optax."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from transformations import (
    all_transformations,
    before,
    each_active,
    gradients_at,
    linen,
    make,
    run,
    whole_run,
)

from dns_jax import get_masks

COMPANY = {
    'after sgd': lambda transform: optax.chain(optax.sgd(0.1), transform),
    'apply_if_finite': lambda transform: optax.apply_if_finite(before(transform), 3),
    'inject_hyperparams': lambda transform: optax.inject_hyperparams(
        lambda rate: optax.chain(transform, optax.sgd(rate))
    )(rate=0.1),
    'MultiSteps of 1': lambda transform: optax.MultiSteps(before(transform), 1),
    'partition': lambda transform: optax.partition(
        {'all': before(transform)}, lambda tree: jax.tree.map(lambda _: 'all', tree)
    ),
    'masked': lambda transform: optax.chain(
        optax.masked(transform, lambda tree: jax.tree.map(lambda _: True, tree)), optax.sgd(0.1)
    ),
    'nested': lambda transform: optax.named_chain(
        ('a', before(transform)), ('b', optax.identity())
    ),
}


@pytest.mark.parametrize('company', COMPANY)
@all_transformations
@pytest.mark.slow
def test_masks_do_not_depend_on_company(name, company):
    weights, _, masks = whole_run(name)
    # MultiSteps and its like mix int32 and float32 inside optax.
    with jax.numpy_dtype_promotion('standard'):
        other_weights, _, other = run(COMPANY[company](make(name)), linen())
    chex.assert_trees_all_equal(masks, other)
    chex.assert_trees_all_close(weights, other_weights, atol=1e-6)


@all_transformations
@pytest.mark.slow
def test_optimizer_does_not_see_the_transformation(name):
    params = linen()
    for optimizer in (optax.adam(0.01), optax.sgd(0.1, 0.9)):
        alone, state = params, optimizer.init(params)
        with jax.numpy_dtype_promotion('standard'):
            together, _, _ = run(optax.chain(make(name), optimizer), params, 5)
            for count in range(5):
                gradients = gradients_at(alone, jnp.int32(count))
                updates, state = optimizer.update(gradients, state, alone)
                alone = optax.apply_updates(alone, updates)
        chex.assert_trees_all_close(alone, together, atol=1e-6)


@each_active
def test_multi_steps_update_the_masks_once_for_each_real_step(name):
    params = linen()
    optimizer = optax.MultiSteps(before(make(name)), 3)
    state = optimizer.init(params)
    counts = []
    with jax.numpy_dtype_promotion('standard'):
        update = jax.jit(optimizer.update)
        for _ in range(7):
            _, state = update(params, state, params)
            counts.append(int(optax.tree.get(state.inner_opt_state, 'count')))
    assert counts == [0, 0, 1, 1, 1, 2, 2]


@each_active
def test_apply_if_finite_keeps_the_masks_of_a_bad_step(name):
    params = linen()
    optimizer = optax.apply_if_finite(before(make(name)), 3)
    state = optimizer.init(params)
    bad = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    update = jax.jit(optimizer.update)
    _, skipped = update(bad, state, params)
    chex.assert_trees_all_equal(get_masks(skipped), get_masks(state))
    _, done = update(params, state, params)
    assert not all(mask.all() for mask in jax.tree.leaves(get_masks(done)))


@pytest.mark.parametrize('how', ['partition', 'masked'])
@each_active
def test_part_of_a_network(name, how):
    params = linen()['params']
    chosen = {'conv1': False, 'fc1': True}
    if how == 'masked':
        optimizer = optax.masked(make(name), chosen)
    else:
        labels = {layer: 'on' if on else 'off' for layer, on in chosen.items()}
        optimizer = optax.partition({'on': make(name), 'off': optax.identity()}, labels)
    state = optimizer.init(params)
    updates, state = jax.jit(optimizer.update)(params, state, params)
    chex.assert_trees_all_equal(updates, params)
    masks = get_masks(state)
    # Outside there is no mask; inside all is as if there were nothing else.
    assert jax.tree.leaves(masks['conv1']) == []
    part = {'fc1': params['fc1']}
    alone = make(name)
    _, alone_state = alone.update(part, alone.init(part), part)
    chex.assert_trees_all_equal(masks['fc1'], alone_state.masks['fc1'])
