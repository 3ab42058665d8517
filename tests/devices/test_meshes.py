"""Tests of devices.meshes: what lies where, what is refused, and that it changes no result."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dns_jax
from experiments.devices import meshes
from experiments.networks import models
from experiments.training import steps as train

BATCH, STEPS, SIZE = 16, 50, 39  # pixels, the least that AlexNet takes
ALEXNET = models.AlexNet(classes=10, width=1 / 16)


@pytest.mark.parametrize(
    ('text', 'sizes'),
    [
        ('', {}),
        ('data:8', {'data': 8, 'model': 1}),
        ('model:2', {'data': 1, 'model': 2}),
        ('model:2,data:4', {'data': 4, 'model': 2}),
    ],
)
def test_parse_mesh(text, sizes):
    assert meshes.parse_mesh(text) == sizes


@pytest.mark.parametrize(
    'text', ['data', 'data:', 'data:0', 'data:-1', 'data:two', 'rows:2', 'data:2,data:4', '8']
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=f'--mesh={text} must be data:SIZE') as error:
        meshes.parse_mesh(text)
    assert text.split(',')[-1] in str(error.value)


@pytest.mark.parametrize(
    ('text', 'batch_size', 'accumulate', 'message'),
    [
        ('data:3', 12, 1, '--mesh=data:3 wants 3 devices, which does not divide the 8'),
        ('data:8,model:2', 16, 1, 'wants 16 devices, which does not divide the 8'),
        ('data:8', 12, 1, 'part a batch in 8, which does not divide --batch_size=12'),
        ('data:4', 24, 4, '--accumulate=4 part a batch in 16, which does not divide --batch_size='),
        ('', 4, 1, '--mesh=data:8 and --accumulate=1 part a batch in 8'),
    ],
)
def test_what_does_not_divide_is_refused_with_the_numbers(text, batch_size, accumulate, message):
    with pytest.raises(ValueError, match=message):
        meshes.make_mesh(text, batch_size, accumulate)


def test_by_default_all_devices_share_the_batch():
    assert dict(meshes.make_mesh('', 8).shape) == {'data': 8, 'model': 1}
    assert dict(meshes.make_mesh('data:2', 8).shape) == {'data': 2, 'model': 1}


def test_batches_are_split_over_data():
    mesh = meshes.make_mesh('data:4,model:2', 8)
    assert meshes.own_rows(mesh, 8) == slice(0, 8)
    images, labels = np.arange(24).reshape(8, 3), np.arange(8)
    placed = meshes.place_batch(mesh, (images, labels), 8)
    for array, whole in zip(placed, (images, labels), strict=True):
        np.testing.assert_array_equal(array, whole)
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {2}
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])


def make_optimizer():
    ramp = dns_jax.log_linear_density(0.1, 0, 30)
    sigma = dns_jax.update_probability(power=0)
    rule = dns_jax.Rule(dns_jax.global_density(ramp), sigma, refresh_every=5)
    return optax.chain(
        dns_jax.surgery(rule, jax.random.key(1), dns_jax.has_axes),
        dns_jax.caffe_sgd(optax.constant_schedule(0.01)),
    )


@pytest.fixture(scope='module')
def batches():
    """Images whose brightness tells their class, as random as can be learnt."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, (STEPS, BATCH), np.int32)
    noise = random.normal(100, 40, (STEPS, BATCH, SIZE, SIZE, 3))
    images = np.clip(noise + 10 * labels[..., None, None, None], 0, 255).astype(np.uint8)
    return list(zip(images, labels, strict=True))


class Tiny(nn.Module):
    """Quick to compile; its layers have names of AlexNet's."""

    @nn.compact
    def __call__(self, images, dropout=None):
        hidden = nn.relu(nn.Conv(4, (5, 5), strides=5, name='conv1')(images / 100))
        hidden = nn.relu(nn.Dense(16, name='fc6')(hidden.reshape(hidden.shape[0], -1)))
        hidden = models.drop_out(self, hidden, dropout, 'fc6')
        return nn.Dense(10, name='fc7')(hidden)


@pytest.fixture(scope='module')
def train_on(batches):
    """Trains a network with dropout on a mesh; returns the state and its course."""

    def train_on(text, network, steps=STEPS, accumulate=1, dropout=True):
        optimizer = make_optimizer()
        params = network.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))['params']
        state = train.TrainState(params, optimizer.init(params))
        mesh = meshes.make_mesh(text, BATCH, accumulate)
        state = jax.device_put(state, meshes.shardings(mesh, params, state))
        rates = dict.fromkeys(('fc6', 'fc7'), jnp.float32(0.5))
        dropping = train.Dropout(lambda masks: rates, 2**31) if dropout else None
        step = train.make_step(network, optimizer, models.INPUTS['alexnet'], dropping, accumulate)
        placed = [meshes.place_batch(mesh, batch, BATCH) for batch in batches[:steps]]
        return train.make_run_streamed_chunk(step, state)(state, placed)

    return train_on


@pytest.fixture(scope='module')
def train_once(train_on):
    return functools.cache(train_on)


@pytest.mark.parametrize(
    ('text', 'network'),
    [
        ('data:4,model:2', Tiny()),
        *(  # which take long to compile
            pytest.param(text, ALEXNET, marks=pytest.mark.slow)
            for text in ('data:8', 'data:4,model:2')
        ),
    ],
)
def test_masks_are_those_of_one_device_bit_for_bit(train_once, text, network):
    (state, chunk), one = train_once(text, network), train_once('data:1', network)
    kept = sum(int(count) for count in dns_jax.count_kept(state.masks).values())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert kept / parameters == pytest.approx(0.1, rel=0.05)
    spliced = sum(int(event.spliced.sum()) for event in chunk.events.values())
    assert spliced, 'a run without splicing shows little'
    jax.tree.map(np.testing.assert_array_equal, state.masks, one[0].masks)
    jax.tree.map(np.testing.assert_array_equal, chunk.events, one[1].events)
    jax.tree.map(
        lambda these, others: np.testing.assert_allclose(these, others, rtol=0, atol=1e-5),
        (state.params, chunk.losses),
        (one[0].params, one[1].losses),
    )


def test_what_is_shaped_like_a_split_layer_is_split(train_once):
    state, _ = train_once('data:4,model:2', Tiny())
    momentum = optax.tree.get(state.opt_state, 'trace')
    for tree in (state.params, state.masks, momentum):
        for layer, leaves in tree.items():
            parts = 2 if layer.startswith('fc') else 1
            for leaf in leaves.values():
                shard = leaf.addressable_shards[0].data
                assert shard.shape == (*leaf.shape[:-1], leaf.shape[-1] // parts), layer
    thresholds = optax.tree.get(state.opt_state, 'thresholds')
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(thresholds))


def test_layers_that_cannot_be_halved_stay_whole():
    mesh = meshes.make_mesh('data:1,model:8', 8)
    shapes = {
        'fc6': {'kernel': jnp.zeros((4, 16)), 'bias': jnp.zeros(16)},
        'fc8': {'kernel': jnp.zeros((16, 10)), 'bias': jnp.zeros(10)},
    }
    specs = jax.tree.map(lambda place: place.spec, meshes.shardings(mesh, shapes, shapes))
    split = jax.sharding.PartitionSpec
    assert specs['fc6'] == {'kernel': split(None, 'model'), 'bias': split('model')}
    assert specs['fc8'] == {'kernel': split(), 'bias': split()}


def test_a_batch_in_parts_has_the_gradient_of_the_whole(train_on):
    whole, chunk = train_on('data:2', Tiny(), steps=5, dropout=False)
    parts, chunk_of_parts = train_on('data:2', Tiny(), steps=5, accumulate=4, dropout=False)
    np.testing.assert_allclose(chunk.losses, chunk_of_parts.losses, rtol=1e-5)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=1e-5),
        whole.params,
        parts.params,
    )


def test_parts_drop_out_units_of_their_own(train_on):
    whole, _ = train_on('data:1', Tiny(), steps=1)
    parts, _ = train_on('data:1', Tiny(), steps=1, accumulate=2)
    biases = (state.params['fc6']['bias'] for state in (whole, parts))
    assert not np.allclose(*biases, atol=1e-7)


def test_a_streamed_chunk_compiles_once(batches):
    traces = []

    def step(state, images, labels):
        traces.append(images.shape)
        return state, jnp.float32(labels.sum())

    params = {'fc': {'kernel': jnp.zeros((2, 2))}}
    state = train.TrainState(params, make_optimizer().init(params))
    mesh = meshes.make_mesh('data:2', BATCH)
    state = jax.device_put(state, meshes.shardings(mesh, params, state))
    run_chunk = train.make_run_streamed_chunk(step, state)
    placed = [meshes.place_batch(mesh, batch, BATCH) for batch in batches[:4]]
    for part in (placed[:2], placed[2:]):
        state, chunk = run_chunk(state, part)
        expected = [labels.sum() for _, labels in part]
        np.testing.assert_array_equal(chunk.losses, expected)
    assert len(traces) == 1


def test_to_host_copies_what_is_split():
    mesh = meshes.make_mesh('data:4,model:2', 8)
    split = jax.NamedSharding(mesh, jax.sharding.PartitionSpec('data', 'model'))
    whole = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    copied = meshes.to_host({'a': jax.device_put(whole, split), 'b': np.ones(3)})
    np.testing.assert_array_equal(copied['a'], whole)
    assert isinstance(copied['a'], np.ndarray)
