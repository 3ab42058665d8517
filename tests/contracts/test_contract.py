"""The contract that every transformation of masks keeps, whatever its rule.

A new pruner is one more entry in TRANSFORMATIONS: a function of a key that returns the optax
transformation. It is asked to work on every tree of TREES, so its patterns must match any.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dns_jax import (
    Rule,
    apply_masks,
    get_masks,
    global_density,
    has_axes,
    importance,
    layer_density,
    log_linear_density,
    mean_std,
    polynomial_density,
    prune_to,
    pruners,
    surgery,
    update_probability,
)

SIGMA = update_probability(gamma=0.3, stop=12)
RULE = Rule(mean_std(0.2), SIGMA)
BY_LAYER = Rule(layer_density(polynomial_density(0.2, 0, 9, initial=0.8)), SIGMA, refresh_every=3)
GLOBAL = Rule(global_density(log_linear_density(0.1, 2, 10, initial=0.7)), SIGMA, refresh_every=2)
FOLLOWED = GLOBAL._replace(refresh_every=None)


def one_layer(path):
    del path
    return 'all'


ALL = {'takes_part': has_axes}  # biases too
TRANSFORMATIONS = {
    'surgery': lambda key: surgery(RULE, key, **ALL),
    'surgery of kernels as one': lambda key: surgery({'*': RULE}, key, layer_of=one_layer),
    'surgery of nothing': lambda key: surgery({}, key),
    'a density per layer': lambda key: surgery({'*': BY_LAYER}, key, **ALL),
    'a density over all': lambda key: surgery(GLOBAL, key, **ALL),
    'a density that is followed': lambda key: surgery(FOLLOWED, key, **ALL),
    'prune_to': lambda key: prune_to(density=0.2, steps=12, key=key),
    'surgery without splicing': lambda key: surgery(RULE, key, splicing=False, **ALL),
    'Han': lambda key: pruners.han(0.3, [0, 3, 9], key, **ALL),
    'iterative': lambda key: pruners.iterative(
        0.3, [0, 5], key, importance=importance.taylor, **ALL
    ),
    'SET': lambda key: pruners.regrow(0.3, 3, 9, key, growth=importance.chance, **ALL),
    'RigL': lambda key: pruners.regrow(0.3, 2, 9, key, 0.5, initial=importance.magnitude, **ALL),
    'gradual': lambda key: pruners.gradual(0.2, 0, 9, 3, key, importance=importance.chance, **ALL),
}
# Those that change masks at the first step.
ACTIVE = [
    name for name in TRANSFORMATIONS if name not in ('surgery of nothing', 'prune_to', 'gradual')
]


class Dense(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A module filtered to its arrays, as Equinox does it: None where there was no array."""

    kernel: jax.Array
    bias: jax.Array | None
    inner: Any


def array(*shape, dtype=jnp.float32):
    values = np.random.default_rng(sum(shape)).normal(size=shape)
    return jnp.asarray(values, dtype)


def linen():
    layers = {
        'conv1': {'kernel': array(3, 3, 1, 4), 'bias': array(4)},
        'fc1': {'kernel': array(8, 6), 'bias': array(6)},
    }
    return {'params': layers}


def nnx_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv1 = nnx.Conv(1, 4, (3, 3), rngs=rngs)
            self.fc1 = nnx.Linear(8, 6, rngs=rngs)

    return nnx.state(Net(nnx.Rngs(0)), nnx.Param)


TREES = {
    'linen': linen,
    'tuples': lambda: ((array(4, 3), array(3)), (array(3, 2), array(2))),
    'bare array': lambda: array(6, 5),
    'nnx.State': nnx_state,
    'nnx pure dict': lambda: nnx.to_pure_dict(nnx_state()),
    'named tuple': lambda: {'fc1': Dense(array(8, 6), array(6))},
    'module with None': lambda: Module(array(4, 4), None, [Module(array(5, 4), array(4), None)]),
    'scalar beside': lambda: {'fc1': {'kernel': array(8, 6)}, 'temperature': jnp.ones(())},
    'bfloat16': lambda: optax.tree.cast(linen(), jnp.bfloat16),
    'float16': lambda: optax.tree.cast(linen(), jnp.float16),
}

each_transformation = pytest.mark.parametrize('name', TRANSFORMATIONS)
each_active = pytest.mark.parametrize('name', ACTIVE)


def make(name, seed=0):
    return TRANSFORMATIONS[name](jax.random.key(seed))


def gradients_at(params, count):
    """Some gradients, another sign at every step, so that weights go to and fro."""
    sign = jnp.where(count % 2 == 0, 1.0, -1.0)
    return jax.tree.map(lambda leaf: (leaf * sign).astype(leaf.dtype), params)


def run(optimizer, params, steps=14, state=None, first=0, how=jax.jit):
    """Trains for some steps.

    Returns the params and the state at the end, and the masks after every step.
    """

    def step(params, state, count):
        updates, state = optimizer.update(gradients_at(params, count), state, params)
        return optax.apply_updates(params, updates), state

    step, seen = how(step), []
    state = optimizer.init(params) if state is None else state
    for count in range(first, first + steps):
        params, state = step(params, state, jnp.int32(count))
        seen.append(get_masks(state))
    return params, state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)


def before(transform):
    return optax.chain(transform, optax.sgd(0.1))


@functools.cache
def whole_run(name):
    """What others are compared with."""
    return run(before(make(name)), linen())


@pytest.mark.parametrize('tree', TREES)
@each_transformation
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


@each_transformation
def test_a_state_holds_what_fine_tuning_dropout_and_cuts_read(name):
    state = make(name).init(linen())
    count, key = (optax.tree.get(state, field) for field in ('count', 'key'))
    assert (count.shape, count.dtype) == ((), jnp.int32)
    assert (key.shape, jnp.issubdtype(key.dtype, jax.dtypes.prng_key)) == ((), True)


@each_transformation
def test_updates_are_returned_unchanged(name):
    params = linen()
    transform = make(name)
    updates = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    returned, _ = transform.update(updates, transform.init(params), params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (updates, returned)), strict=True))


@each_transformation
def test_params_are_needed(name):
    params = linen()
    transform = make(name)
    with pytest.raises(ValueError, match='params'):
        transform.update(params, transform.init(params))


@each_transformation
def test_scan_over_steps_and_vmap_over_keys(name):
    params = linen()
    keys = jax.random.split(jax.random.key(1), 2)

    def masks_of_run(key):
        # A scan holds the state to its structure, shapes and dtypes.
        optimizer = before(TRANSFORMATIONS[name](key))

        def step(carry, count):
            params, state = carry
            updates, state = optimizer.update(gradients_at(params, count), state, params)
            return (optax.apply_updates(params, updates), state), get_masks(state)

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(14))[1]

    together = jax.jit(jax.vmap(masks_of_run))(keys)
    for at, key in enumerate(keys):
        _, _, alone = run(before(TRANSFORMATIONS[name](key)), params)
        chex.assert_trees_all_equal(jax.tree.map(lambda leaf, at=at: leaf[at], together), alone)
    if name in ACTIVE and name not in ('Han', 'iterative', 'RigL'):  # other keys, other coins
        assert any(jnp.any(leaf != leaf[:1]) for leaf in jax.tree.leaves(together))


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
    updated = jax.jit(transform.update)(params, state, params)[1]
    chex.assert_trees_all_equal(get_masks(maybe(True)), get_masks(updated))


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
def test_same_key_same_masks(name):
    _, _, again = run(before(make(name)), linen())
    chex.assert_trees_all_equal(whole_run(name)[2], again)


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
    *half, first = run(before(make(name)), linen(), 6)
    # The process that resumes builds its own transformation, here even with another key: the
    # coins come from the state.
    weights, state = save(half)
    *end, last = run(before(make(name, seed=99)), weights, 8, state, first=6)
    chex.assert_trees_all_equal(whole, end)
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first, last)
    chex.assert_trees_all_equal(masks, joined)


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
@each_transformation
@pytest.mark.slow
def test_masks_do_not_depend_on_company(name, company):
    weights, _, masks = whole_run(name)
    # MultiSteps and its like mix int32 and float32 inside optax.
    with jax.numpy_dtype_promotion('standard'):
        other_weights, _, other = run(COMPANY[company](make(name)), linen())
    chex.assert_trees_all_equal(masks, other)
    chex.assert_trees_all_close(weights, other_weights, atol=1e-6)


@each_transformation
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
    _, skipped = optimizer.update(bad, state, params)
    chex.assert_trees_all_equal(get_masks(skipped), get_masks(state))
    _, done = optimizer.update(params, state, params)
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


@each_transformation
def test_one_trace(name):
    params = linen()
    transform = make(name)
    traces = []

    @jax.jit
    def step(state, params):
        traces.append(1)
        return transform.update(params, state, params)[1]

    state = transform.init(params)
    for _ in range(5):
        state = step(state, params)
    assert len(traces) == 1


@each_transformation
def test_no_host_round_trip(name):
    params = linen()
    transform = make(name)
    state = transform.init(params)
    text = jax.jit(transform.update).lower(params, state, params).as_text()
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
