"""The contract that every transformation of masks keeps, whatever its rule."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from situations import slow_but
from transformations import (
    ACTIVE,
    BRIEFLY,
    COINLESS,
    TRANSFORMATIONS,
    TREES,
    UNFIT,
    array,
    before,
    each_transformation,
    gradients_at,
    linen,
    make,
    run,
    started,
    whole_run,
)

from dns_jax import apply_masks, get_masks

# All in half precision, which the other tests have not, one on every tree, and one on odd ones.
EVERYWHERE = {'surgery': TREES, 'a density over all': ('bare array', 'module with None', 'float16')}
on_all_trees = pytest.mark.parametrize(
    ('name', 'tree'),
    [
        (name, tree)
        if tree == 'bfloat16' or tree in EVERYWHERE.get(name, ())
        else pytest.param(name, tree, marks=pytest.mark.slow)
        for name, tree in itertools.product(TRANSFORMATIONS, TREES)
        if tree not in UNFIT.get(name, ())
    ],
)


@on_all_trees
def test_trees(name, tree):
    params = TREES[tree]()
    transform = make(name)
    state, update = transform.init(params), jax.jit(transform.update)
    # What fine-tuning, dropout and cuts read.
    count, key = (optax.tree.get(state, field) for field in ('count', 'key'))
    assert (count.shape, count.dtype) == ((), jnp.int32)
    assert (key.shape, jnp.issubdtype(key.dtype, jax.dtypes.prng_key)) == ((), True)
    with pytest.raises(ValueError, match='params'):
        transform.update(params, state)
    for again in range(2):
        masks = get_masks(state)
        assert jax.tree.structure(masks) == jax.tree.structure(params)
        for mask, leaf in zip(jax.tree.leaves(masks), jax.tree.leaves(params), strict=True):
            assert mask.dtype == bool
            assert mask.shape in (leaf.shape, ())
            # At the start, and for ever where the leaf takes no part, the mask says keep.
            assert (again and mask.ndim) or mask.all()
        updates, new = update(params, state, params)
        chex.assert_trees_all_equal(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        state = new
    masked = jax.eval_shape(apply_masks, params, get_masks(state))
    chex.assert_trees_all_equal_shapes_and_dtypes(masked, params)
    if name in ACTIVE:
        kept = [mask for mask in jax.tree.leaves(get_masks(state)) if mask.ndim]
        # σ is 1 at the first step, so there is no luck in this.
        assert not all(mask.all() for mask in kept)
        assert any(mask.any() for mask in kept)


# What is followed goes one way, with coins as without.
@pytest.mark.parametrize(
    'name', slow_but(TRANSFORMATIONS, *(name for name in BRIEFLY if name != 'prune_to'))
)
def test_scan_over_steps_and_vmap_over_keys(name):
    params = linen()
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])

    def masks_of_run(key):
        # A scan, as a cond, holds the state to its structure, shapes and dtypes.
        optimizer = before(TRANSFORMATIONS[name](key))

        def step(carry, count):
            params, state = carry
            updates, state = optimizer.update(gradients_at(params, count), state, params)
            return (optax.apply_updates(params, updates), state), get_masks(state)

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(14))[1]

    together = jax.device_get(jax.jit(jax.vmap(masks_of_run))(keys))
    for count, (*_, masks) in enumerate(whole_run(name)):
        chex.assert_trees_all_equal(
            jax.tree.map(lambda leaf, at=count: leaf[0, at], together), masks
        )
    if name in ACTIVE and name not in COINLESS:  # other keys, other coins
        assert any(np.any(leaf[0] != leaf[1]) for leaf in jax.tree.leaves(together))


@pytest.mark.parametrize(
    'name', slow_but(TRANSFORMATIONS, *(name for name in BRIEFLY if 'followed' not in name))
)
def test_without_jit_the_same_masks_and_updates_that_are_not_touched(name):
    (transform, state), params = started(name), linen()
    for count in range(2):  # each compiles anew
        updates = gradients_at(params, count)
        same, state = transform.update(updates, state, params, value=1.0, other='x')
        assert same is updates
        params, _, masks = whole_run(name)[count]
        chex.assert_trees_all_equal(get_masks(state), masks)


def save(tree):
    """To NumPy and back, as a checkpoint does it."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    saved = jax.tree.map(
        lambda leaf: jax.device_get(jax.random.key_data(leaf) if is_key(leaf) else leaf), tree
    )
    assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(saved))
    return jax.tree.map(
        lambda leaf, like: (
            jax.random.wrap_key_data(jax.device_put(leaf)) if is_key(like) else jax.device_put(leaf)
        ),
        saved,
        tree,
    )


@each_transformation
def test_resumed_run_continues_equally(name):
    # The process that resumes builds its own transformation, here even with another key: the
    # coins come from the state.
    weights, state = save(whole_run(name)[5][:2])
    resumed = run(before(make(name, seed=99)), weights, 8, state, first=6)
    chex.assert_trees_all_equal(resumed, whole_run(name)[6:])


@each_transformation
def test_init_can_be_traced(name):
    transform, state = started(name)
    jitted = jax.jit(transform.init)(linen())
    chex.assert_trees_all_equal(get_masks(jitted), get_masks(state))
    chex.assert_trees_all_equal_shapes_and_dtypes(jitted, state)


# How the others go shows on the meshes of test_devices.
@pytest.mark.parametrize('name', slow_but(TRANSFORMATIONS, 'RigL'))
def test_masks_inherit_sharding(name, mesh):
    params = {'fc1': {'kernel': array(16, 8), 'bias': array(8)}}
    transform = make(name)
    update = jax.jit(transform.update)
    _, whole_state = update(params, transform.init(params), params)
    spread = jax.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
    params = jax.device_put(params, spread)
    state = transform.init(params)
    _, new = update(params, state, params)
    for masks in (get_masks(state), get_masks(new)):
        for mask in jax.tree.leaves(masks):
            assert mask.ndim == 0 or mask.sharding.is_equivalent_to(spread, mask.ndim)
    chex.assert_trees_all_equal(
        jax.device_get(get_masks(new)), jax.device_get(get_masks(whole_state))
    )
