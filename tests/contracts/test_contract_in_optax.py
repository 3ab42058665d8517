"""The contract that every transformation of masks keeps in the company of others, in optax."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from transformations import (
    before,
    each_active,
    linen,
    make,
)

from dns_jax import get_masks


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
