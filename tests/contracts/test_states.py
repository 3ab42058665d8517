"""A state is saved, donated and made with few programs."""

import functools
import io

import chex
import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from situations import KEY, MAKERS, array, network, slow_but

from dns_jax import Rule, get_masks, mean_std, surgery

COMPAT_TABLE = 'field'


@functools.cache
def trained():
    optimizer = optax.chain(surgery(Rule(mean_std(0.3), 0.5, 2), KEY), optax.sgd(0.1, 0.9))
    params, state = network(), optimizer.init(network())
    for _ in range(3):
        updates, state = jax.jit(optimizer.update)(params, state, params)
        params = optax.apply_updates(params, updates)
    return optimizer, params, state


def is_key(leaf):
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def without_keys(tree):
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


def with_keys(tree, like):
    return jax.tree.map(
        lambda leaf, old: jax.random.wrap_key_data(jnp.asarray(leaf)) if is_key(old) else leaf,
        tree,
        like,
    )


def by_flax(state, like):
    data = flax.serialization.to_bytes(without_keys(state))
    return flax.serialization.from_bytes(without_keys(like), data)


def by_numpy(state, like):
    file = io.BytesIO()
    leaves = jax.tree.leaves(without_keys(state))
    np.savez(file, **{str(number): leaf for number, leaf in enumerate(leaves)})
    file.seek(0)
    loaded = np.load(file, allow_pickle=False)
    return jax.tree.unflatten(
        jax.tree.structure(like), [loaded[str(number)] for number in range(len(leaves))]
    )


def by_equinox(state, like):
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, without_keys(state))
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, without_keys(like))


@pytest.mark.parametrize('how', [by_flax, by_numpy, by_equinox])
def test_a_state_survives_serialisers(how):
    optimizer, params, state = trained()
    back = with_keys(how(state, optimizer.init(network())), state)
    chex.assert_trees_all_equal(back, state)
    ends = []
    for start in (state, jax.tree.map(jnp.asarray, back)):
        _, end = jax.jit(optimizer.update)(params, start, params)
        ends.append(end)
    chex.assert_trees_all_equal(*ends)


# Cost and shape of the program.


@pytest.mark.parametrize(
    'name', slow_but(['mean_std', 'layer_density', 'norm', 'erk', 'prune_to'], 'prune_to')
)
def test_init_of_thirty_layers_compiles_little(name):
    params = {f'block{n}': {'kernel': array(4 + n % 3, 5, seed=n)} for n in range(30)}
    compiled = []
    pruner = MAKERS[name]()
    pruner.init({'block0': params['block0']})  # the small programs that all use

    def listen(event, duration, **_):
        if event == '/jax/core/compile/backend_compile_duration':
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        pruner.init(params)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) <= 20


@pytest.mark.parametrize('name', slow_but(MAKERS, 'freeze', 'prune_to'))
def test_state_and_weights_can_be_donated(name):
    pruner = MAKERS[name]()
    optimizer = optax.chain(pruner, optax.sgd(0.1))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params, state = network(), optimizer.init(network())
    mask = get_masks(state)['fc1']['kernel']
    for _ in range(2):
        params, state = step(params, state)
    assert mask.is_deleted()
    assert int(state[0].count) == 2
    step(network(), optimizer.init(network()))  # again, though the first is gone
