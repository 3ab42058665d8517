"""The contract that every transformation of masks keeps in the company of others, in optax."""

import chex
import jax
import optax
from transformations import (
    each_active,
    linen,
    make,
)

from dns_jax import get_masks


# Other wrappers see only that a state is one of surgery: test_wrappers has them.
@each_active
def test_part_of_a_network(name):
    params = linen()['params']
    chosen = {'conv1': False, 'fc1': True}
    optimizer = optax.masked(make(name), chosen)
    state = optimizer.init(params)
    updates, state = jax.jit(optimizer.update)(params, state, params)
    chex.assert_trees_all_equal(updates, params)
    masks = get_masks(state)
    # Outside there is no mask; inside all is as if there were nothing else.
    assert jax.tree.leaves(masks['conv1']) == []
    part = {'fc1': params['fc1']}
    alone = make(name)
    _, alone_state = jax.jit(alone.update)(part, alone.init(part), part)
    chex.assert_trees_all_equal(masks['fc1'], alone_state.masks['fc1'])
