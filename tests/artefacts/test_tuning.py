"""Tests of artefacts.tuning: codebooks learn, and what is shared stays shared."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dns_jax.files.codec import load_coded, save_coded
from dns_jax.files.sharing import expand, round_codebooks, share_weights
from experiments.artefacts.tuning import nearest, tune
from experiments.data.resident import Split
from experiments.networks.models import MNIST_INPUT
from experiments.training.steps import NATS, make_measure

pytestmark = pytest.mark.usefixtures('promotion')

OPTIONS = {'inputs': MNIST_INPUT, 'steps': 250, 'batch_size': 32, 'learning_rate': 1e-2, 'seed': 0}


class Small(nn.Module):
    """Two layers on four of the pixels."""

    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Dense(8, name='fc1')(images[:, :2, :2].reshape(len(images), -1)))
        return nn.Dense(3, name='fc2')(hidden)


@pytest.fixture(scope='module')
def split():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (200, 28, 28, 1)).astype(np.uint8)
    labels = images[:, :2, :2, 0].reshape(200, -1)[:, :3].argmax(1).astype(np.int32)
    return Split(images, labels)


@pytest.fixture(scope='module')
def params(split):
    variables = Small().init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    return jax.device_get(variables['params'])


@pytest.fixture(scope='module')
def shared(params):
    masks = jax.tree.map(lambda leaf: np.random.default_rng(1).random(leaf.shape) < 0.7, params)
    masks['fc1']['bias'][:] = False
    return share_weights(params, masks, 5, {'network': 'small'})


@pytest.fixture(scope='module')
def loss():
    return make_measure(Small(), MNIST_INPUT, NATS)


@pytest.fixture(scope='module')
def tuned(split, params, shared):
    with jax.numpy_dtype_promotion('standard'):
        return tune(Small(), params, shared, split, tuned='codebooks', **OPTIONS)


def test_codebooks_learn_and_nothing_else_changes(split, shared, tuned, loss):
    before, after = (loss(expand(*network[:3]), split) for network in (shared, tuned))
    assert after < 0.9 * before
    jax.tree.map(np.testing.assert_array_equal, tuned.assignments, shared.assignments)
    jax.tree.map(np.testing.assert_array_equal, tuned.masks, shared.masks)
    assert tuned.metadata == shared.metadata
    for layer, book in tuned.codebooks.items():
        assert book.shape == shared.codebooks[layer].shape
        assert (book != shared.codebooks[layer]).any()


def test_one_step_of_adam_moves_each_centroid_by_the_rate(split, params, shared):
    options = OPTIONS | {'steps': 1, 'learning_rate': 0.5}
    tuned = tune(Small(), params, shared, split, tuned='codebooks', **options)
    for layer, book in shared.codebooks.items():
        moved = np.abs(tuned.codebooks[layer] - book)
        np.testing.assert_allclose(moved[moved > 0], 0.5, rtol=0.02)
        assert (moved > 0).sum() > len(book) / 2  # those that no image reaches stay


def test_weights_that_choose_do_better(split, params, shared, tuned, loss):
    chosen = tune(Small(), params, shared, split, tuned='weights', **OPTIONS)
    assert loss(expand(*chosen[:3]), split) < loss(expand(*tuned[:3]), split)
    jax.tree.map(np.testing.assert_array_equal, chosen.masks, shared.masks)
    changed = jax.tree.map(
        lambda new, old, mask: (new != old)[mask].any(),
        chosen.assignments,
        shared.assignments,
        shared.masks,
    )
    assert any(jax.tree.leaves(changed))


@pytest.mark.parametrize('kind', ['codebooks', 'weights'])
def test_result_is_what_its_file_holds_and_repeats(tmp_path, split, params, shared, kind):
    def run(**options):
        options = OPTIONS | {'steps': 5} | options
        return tune(Small(), params, shared, split, tuned=kind, **options)

    tuned = run()
    save_coded(tmp_path / 'network', tuned)
    loaded = load_coded(tmp_path / 'network')
    jax.tree.map(np.testing.assert_array_equal, expand(*loaded[:3]), expand(*tuned[:3]))
    jax.tree.map(np.testing.assert_array_equal, run().codebooks, tuned.codebooks)
    other = run(seed=1).codebooks
    assert any((other[layer] != tuned.codebooks[layer]).any() for layer in other)
    with pytest.raises(FloatingPointError, match='learning_rate=nan left'):
        run(learning_rate=float('nan'))


def test_nearest():
    books = round_codebooks({'a': [-1, 0, 2], 'b': []})
    params = {'a': {'w': np.float32([[-3, 0.9], [1.1, -0.6]])}, 'b': {'w': np.ones(2, np.float32)}}
    places = nearest(books, params)
    np.testing.assert_array_equal(places['a']['w'], np.int32([[0, 1], [2, 0]]), strict=True)
    np.testing.assert_array_equal(places['b']['w'], np.int32([0, 0]), strict=True)


def test_a_layer_without_kept_weights(split, params):
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    masks['fc1'] = jax.tree.map(np.zeros_like, masks['fc1'])
    shared = share_weights(params, masks, 5)
    assert not shared.codebooks['fc1'].size
    options = OPTIONS | {'steps': 2}
    for kind in ('codebooks', 'weights'):
        tuned = tune(Small(), params, shared, split, tuned=kind, **options)
        assert not tuned.codebooks['fc1'].size
        assert (tuned.codebooks['fc2'] != shared.codebooks['fc2']).any()
