"""Tests of packing: the same run with an eighth of the bytes of masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from transformations import gradients_at, make

import dns_jax
from dns_jax import get_masks
from dns_jax.packing import pack
from dns_jax.typing import PackedMask


def params_of_odd_sizes():
    random = np.random.default_rng(0)
    return {
        'a': {'kernel': jnp.asarray(random.normal(size=(5, 13)), jnp.float32), 'bias': jnp.ones(3)},
        'scale': jnp.ones(()),
    }


@pytest.mark.parametrize('name', ['surgery', 'RigL'])
def test_masks_and_weights_are_those_of_bytes(name):
    def train(pruner):
        optimizer = optax.chain(pruner, optax.sgd(0.1))

        def step(carry, count):
            params, state = carry
            updates, state = optimizer.update(gradients_at(params, count), state, params)
            return (optax.apply_updates(params, updates), state), get_masks(state)

        params = params_of_odd_sizes()
        start = params, optimizer.init(params)
        return jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(14)))()

    bytes_, bits = train(make(name)), train(pack(make(name)))
    jax.tree.map(np.testing.assert_array_equal, bytes_[1], bits[1])
    jax.tree.map(np.testing.assert_array_equal, bytes_[0][0], bits[0][0])
    packed = bits[0][1][0].masks
    assert isinstance(packed['a']['kernel'], PackedMask)
    assert (packed['a']['kernel'].bits.shape, packed['a']['bias'].bits.shape) == ((5, 2), (1,))
    assert packed['scale'].shape == ()


def test_whatever_takes_masks_takes_packed_ones():
    params = params_of_odd_sizes()
    pruner = pack(make('surgery'))
    _, state = jax.jit(pruner.update)(params, pruner.init(params), params)
    packed, masks = state.masks, get_masks(state)
    assert dns_jax.count_kept(packed) == dns_jax.count_kept(masks)
    empty = pack(dns_jax.freeze(jax.tree.map(jnp.zeros_like, masks))).init(params).masks
    assert dns_jax.find_empty_layers(empty) == ['a']
    assert dns_jax.count_events(packed, empty) == dns_jax.count_events(
        masks, get_masks(dns_jax.freeze(empty).init(params))
    )
    assert dns_jax.measure_sizes(params, packed) == dns_jax.measure_sizes(params, masks)
    pruned = dns_jax.apply_masks(params, packed)
    jax.tree.map(np.testing.assert_array_equal, pruned, dns_jax.apply_masks(params, masks))
    for make_pruner in (
        dns_jax.freeze,
        lambda masks: dns_jax.prune_to(density=0.2, steps=9, masks=masks),
    ):
        start = make_pruner(packed).init(params).masks
        jax.tree.map(np.testing.assert_array_equal, start, masks)


def test_a_sharded_axis_stays_so(mesh):
    spread = jax.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
    params = {'kernel': jax.device_put(jnp.ones((16, 24)), spread)}
    pruner = pack(make('surgery'))
    state = pruner.init(params)
    _, state = jax.jit(pruner.update)(params, state, params)
    assert state.masks['kernel'].bits.sharding.is_equivalent_to(spread, 2)


def test_packed_masks_go_through_a_checkpoint(tmp_path):
    params = params_of_odd_sizes()
    pruner = pack(make('surgery'))
    _, state = jax.jit(pruner.update)(params, pruner.init(params), params)
    kept = state.masks, state.thresholds  # as arrays alone
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / 'state', kept)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / 'state', kept)
    jax.tree.map(np.testing.assert_array_equal, restored, kept)
    assert restored[0]['a']['kernel'].length == 13
