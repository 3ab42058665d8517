"""The contract that every transformation of masks keeps, whatever its rule."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transformations import (
    ACTIVE,
    TRANSFORMATIONS,
    TREES,
    all_transformations,
    array,
    before,
    each_transformation,
    gradients_at,
    linen,
    make,
    run,
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
    ],
)


@on_all_trees
def test_trees(name, tree):
    params = TREES[tree]()
    transform = make(name)
    state = transform.init(params)
    for again in range(2):
        masks = get_masks(state)
        assert jax.tree.structure(masks) == jax.tree.structure(params)
        for mask, leaf in zip(jax.tree.leaves(masks), jax.tree.leaves(params), strict=True):
            assert mask.dtype == bool
            assert mask.shape in (leaf.shape, ())
            # At the start, and for ever where the leaf takes no part, the mask says keep.
            assert (again and mask.ndim) or mask.all()
        chex.assert_trees_all_equal_shapes_and_dtypes(apply_masks(params, masks), params)
        updates, new = transform.update(params, state, params)
        chex.assert_trees_all_equal(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        state = new
    if name in ACTIVE:
        kept = [mask for mask in jax.tree.leaves(get_masks(state)) if mask.ndim]
        # σ is 1 at the first step, so there is no luck in this.
        assert not all(mask.all() for mask in kept)
        assert any(mask.any() for mask in kept)


@all_transformations
def test_a_state_holds_what_fine_tuning_dropout_and_cuts_read(name):
    state = make(name).init(linen())
    count, key = (optax.tree.get(state, field) for field in ('count', 'key'))
    assert (count.shape, count.dtype) == ((), jnp.int32)
    assert (key.shape, jnp.issubdtype(key.dtype, jax.dtypes.prng_key)) == ((), True)


@all_transformations
def test_updates_are_returned_unchanged(name):
    params = linen()
    transform = make(name)
    updates = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    returned, _ = transform.update(updates, transform.init(params), params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (updates, returned)), strict=True))


@all_transformations
def test_params_are_needed(name):
    params = linen()
    transform = make(name)
    with pytest.raises(ValueError, match='params'):
        transform.update(params, transform.init(params))


@each_transformation
def test_scan_over_steps_and_vmap_over_keys(name):
    params = linen()
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])

    def masks_of_run(key):
        # A scan holds the state to its structure, shapes and dtypes.
        optimizer = before(TRANSFORMATIONS[name](key))

        def step(carry, count):
            params, state = carry
            updates, state = optimizer.update(gradients_at(params, count), state, params)
            return (optax.apply_updates(params, updates), state), get_masks(state)

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(14))[1]

    together = jax.jit(jax.vmap(masks_of_run))(keys)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[0], together), whole_run(name)[2])
    if name in ACTIVE and name not in ('Han', 'iterative', 'RigL', 'straight-through'):
        # Other keys, other coins.
        assert any(jnp.any(leaf[0] != leaf[1]) for leaf in jax.tree.leaves(together))


@each_transformation
def test_state_is_stable_under_cond(name):
    params = linen()
    transform = make(name)
    state = transform.init(params)

    @jax.jit
    def maybe(flag):
        return jax.lax.cond(flag, lambda: transform.update(params, state, params)[1], lambda: state)

    chex.assert_trees_all_equal_shapes_and_dtypes(maybe(True), state)
    chex.assert_trees_all_equal(get_masks(maybe(False)), get_masks(state))
    updated = jax.tree.map(lambda leaf: leaf[0], whole_run(name)[2])
    chex.assert_trees_all_equal(get_masks(maybe(True)), updated)


@each_transformation
def test_extra_arguments_pass(name):
    params = linen()
    chain = optax.chain(make(name), optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    with jax.numpy_dtype_promotion('standard'):  # for the plateau
        updates, _ = chain.update(params, chain.init(params), params, value=jnp.float32(1.0))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    plain, _ = make(name).update(params, make(name).init(params), params, value=1.0, other='x')
    assert plain is params


@each_transformation
def test_same_masks_without_jit(name):
    _, _, masks = run(before(make(name)), linen(), 4, how=lambda step: step)
    whole = jax.tree.map(lambda leaf: leaf[:4], whole_run(name)[2])
    chex.assert_trees_all_equal(whole, masks)


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
    *whole, masks = whole_run(name)
    *half, first = run(before(make(name)), linen(), 6)  # the same key, the same masks
    # The process that resumes builds its own transformation, here even with another key: the
    # coins come from the state.
    weights, state = save(half)
    *end, last = run(before(make(name, seed=99)), weights, 8, state, first=6)
    chex.assert_trees_all_equal(whole, end)
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first, last)
    chex.assert_trees_all_equal(masks, joined)


@each_transformation
def test_one_trace_and_no_host_round_trip(name):
    params = linen()
    transform = make(name)
    traces = []

    @jax.jit
    def step(state, params):
        traces.append(1)
        return transform.update(params, state, params)[1]

    state = transform.init(params)
    text = step.lower(state, params).as_text()
    for _ in range(5):
        state = step(state, params)
    assert len(traces) == 1
    assert text.count('module @') == 1
    assert 'callback' not in text


@each_transformation
def test_init_can_be_traced_and_shaped(name):
    params = linen()
    transform = make(name)
    state = transform.init(params)
    shaped = jax.eval_shape(transform.init, params)
    assert jax.tree.structure(shaped) == jax.tree.structure(state)
    jitted = jax.jit(transform.init)(params)
    chex.assert_trees_all_equal(get_masks(jitted), get_masks(state))
    chex.assert_trees_all_equal_shapes_and_dtypes(jitted, state)


@each_transformation
def test_masks_inherit_sharding(name, mesh):
    params = {'fc1': {'kernel': array(16, 8), 'bias': array(8)}}
    whole_state = make(name).init(params)
    _, whole_state = make(name).update(params, whole_state, params)
    spread = jax.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
    params = jax.device_put(params, spread)
    state = make(name).init(params)
    _, new = jax.jit(make(name).update)(params, state, params)
    for masks in (get_masks(state), get_masks(new)):
        for mask in jax.tree.leaves(masks):
            assert mask.ndim == 0 or mask.sharding.is_equivalent_to(spread, mask.ndim)
    chex.assert_trees_all_equal(
        jax.device_get(get_masks(new)), jax.device_get(get_masks(whole_state))
    )
