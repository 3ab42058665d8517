"""Tests of training.steps: the order of the images, the step, and many steps in one call."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import Tiny

import dns_jax
from experiments.data import resident
from experiments.data.resident import Split
from experiments.networks import models
from experiments.training import steps as train

EXAMPLES, BATCH, STEPS = 40, 8, 12
NETWORK = Tiny(width=0.375)  # six hidden units


def random_split(examples, seed=0):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (examples, 28, 28, 1), np.uint8)
    return Split(images, random.integers(0, 10, examples, np.int32))


@pytest.fixture(scope='module')
def split():
    return random_split(EXAMPLES)


@pytest.fixture(scope='module')
def params():
    return NETWORK.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))['params']


def make_optimizer():
    # Wide thresholds that close in on the weights, so that there is pruning and splicing.
    rule = dns_jax.Rule(dns_jax.mean_std(0.3), dns_jax.update_probability(0.1))
    surgery = dns_jax.surgery({'fc1': rule}, jax.random.key(1))
    return optax.chain(surgery, dns_jax.caffe_sgd(dns_jax.caffe_inv(0.3, 0.1, 0.75)))


def initial_state(params):
    # A copy: a chunk takes over the memory of its state.
    params = jax.tree.map(jnp.copy, params)
    return train.TrainState(params, make_optimizer().init(params))


def assert_identical(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize('batch_size', [8, 7, 40, 64])
def test_every_epoch_shows_each_image_once(batch_size):
    epochs = 3 * batch_size
    steps = epochs * EXAMPLES // batch_size
    indices = resident.batch_indices((5,), EXAMPLES, batch_size, 0, steps)
    assert (indices.shape, indices.dtype) == ((steps, batch_size), np.int32)
    orders = indices.reshape(epochs, EXAMPLES)
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(EXAMPLES), (epochs, 1)))
    assert len({order.tobytes() for order in orders}) == epochs


@pytest.mark.parametrize('batch_size', [8, 7, 40, 64, 100])
@pytest.mark.parametrize('cuts', [[1, 2, 3], [10], [5, 6], list(range(1, 20))])
def test_the_batches_of_chunks_are_those_of_the_whole(batch_size, cuts):
    whole = resident.batch_indices((5,), EXAMPLES, batch_size, 0, 20)
    chunks = [
        resident.batch_indices((5,), EXAMPLES, batch_size, start, stop - start)
        for start, stop in zip([0, *cuts], [*cuts, 20], strict=True)
    ]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_batches_depend_on_the_seed_alone():
    resident._shuffled_epoch.cache_clear()
    first = resident.batch_indices((5,), EXAMPLES, BATCH, 3, 4)
    np.random.seed(0)
    resident.batch_indices((6,), EXAMPLES, BATCH, 0, 30)
    np.testing.assert_array_equal(resident.batch_indices((5,), EXAMPLES, BATCH, 3, 4), first)
    assert not np.array_equal(resident.batch_indices((6,), EXAMPLES, BATCH, 3, 4), first)
    # A far step needs only its own epochs.
    assert resident.batch_indices((0,), 60_000, 64, 10**7, 2).shape == (2, 64)


@pytest.fixture(scope='module')
def stepwise(params, split):
    """The states before and after each of some steps, one compiled step at a time."""
    step = jax.jit(train.make_step(NETWORK, make_optimizer(), models.MNIST_INPUT))
    indices = resident.batch_indices((0,), EXAMPLES, BATCH, 0, STEPS)
    states, losses = [initial_state(params)], []
    for batch in indices:
        state, loss = step(states[-1], split.images[batch], split.labels[batch])
        states.append(state)
        losses.append(loss)
    return indices, states, np.stack(losses)


@pytest.fixture(scope='module')
def run_chunk():
    return train.make_run_chunk(
        train.make_step(NETWORK, make_optimizer(), models.MNIST_INPUT), Split.gather
    )


def test_the_steps_change_all_there_is(stepwise):
    """Or what follows would compare nothing."""
    _, states, losses = stepwise
    pruned, spliced = (
        sum(
            int(getattr(dns_jax.count_events(old.masks, new.masks)['fc1'], event))
            for old, new in itertools.pairwise(states)
        )
        for event in ('pruned', 'spliced')
    )
    assert pruned > spliced > 0
    assert np.isfinite(losses).all()
    assert len(set(losses.tolist())) == STEPS


@pytest.mark.parametrize('lengths', [[STEPS], [1, 4, 7]])
def test_chunks_do_what_their_steps_do(params, split, run_chunk, stepwise, lengths):
    indices, states, losses = stepwise
    masks = [
        np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(state.masks['fc1'])])
        for state in states
    ]
    state, done = initial_state(params), 0
    for length in lengths:
        steps = slice(done, done + length)
        state, chunk = run_chunk(state, split.arrays, indices[steps])
        np.testing.assert_allclose(chunk.losses, losses[steps], rtol=1e-5)
        assert list(chunk.events) == ['fc1']
        pairs = list(itertools.pairwise(masks))[steps]
        assert chunk.events['fc1'].pruned.tolist() == [(old & ~new).sum() for old, new in pairs]
        assert chunk.events['fc1'].spliced.tolist() == [(new & ~old).sum() for old, new in pairs]
        done += length
        # The loop is another program, which may round otherwise; masks leave no room for that.
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6),
            state.params,
            states[done].params,
        )
        assert_identical(state.masks, states[done].masks)


def test_chunks_of_one_length_are_traced_once_and_give_bit_for_bit_what_a_long_one_gives(
    params, split, run_chunk
):
    step, traces = train.make_step(NETWORK, make_optimizer(), models.MNIST_INPUT), []

    def counted(*arguments):
        traces.append(arguments)
        return step(*arguments)

    run_counted = train.make_run_chunk(counted, Split.gather)
    indices = resident.batch_indices((0,), EXAMPLES, BATCH, 0, STEPS)
    whole, _ = run_chunk(initial_state(params), split.arrays, indices)
    state = initial_state(params)
    for part in np.split(indices, 3):
        state, _ = run_counted(state, split.arrays, part)
    assert_identical(state, whole)
    assert len(traces) == run_counted._cache_size() == 1


def test_a_step_takes_the_gradient_at_the_masked_weights(params, split):
    """One step of plain descent, against NumPy's derivative of softmax and two layers."""
    asleep = dns_jax.Rule(dns_jax.mean_std(0.0), dns_jax.update_probability(start=9))
    optimizer = optax.chain(
        dns_jax.surgery(asleep, jax.random.key(0), dns_jax.has_axes), optax.sgd(0.5)
    )
    state = train.TrainState(params, optimizer.init(params))
    masks = jax.tree.map(lambda leaf: jnp.abs(leaf) > jnp.abs(leaf).mean(), params)
    state = state._replace(opt_state=optax.tree.set(state.opt_state, masks=masks))
    images, labels = split.images[:BATCH], split.labels[:BATCH]
    step = jax.jit(train.make_step(NETWORK, optimizer, models.MNIST_INPUT))
    new, loss = step(state, images, labels)

    dense = jax.tree.map(np.asarray, params)
    masked = jax.tree.map(lambda leaf, mask: leaf * np.asarray(mask), dense, masks)
    pixels = images.reshape(BATCH, -1) / np.float32(256)
    hidden = np.maximum(pixels @ masked['fc1']['kernel'] + masked['fc1']['bias'], 0)
    logits = hidden @ masked['fc2']['kernel'] + masked['fc2']['bias']
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert loss == pytest.approx(-np.log(shares[np.arange(BATCH), labels]).mean(), rel=1e-5)
    outer = (shares - np.eye(10)[labels]) / BATCH
    inner = outer @ masked['fc2']['kernel'].T * (hidden > 0)
    gradients = {
        'fc1': {'kernel': pixels.T @ inner, 'bias': inner.sum(0)},
        'fc2': {'kernel': hidden.T @ outer, 'bias': outer.sum(0)},
    }
    for layer, leaves in gradients.items():
        for name, gradient in leaves.items():
            expected = dense[layer][name] - 0.5 * gradient
            np.testing.assert_allclose(new.params[layer][name], expected, rtol=1e-4, atol=1e-5)


def test_networks_side_by_side_are_those_alone(params, split, run_chunk):
    """Each has weights, coins and batches of its own, and all the same number of steps done."""
    step = train.make_step(NETWORK, make_optimizer(), models.MNIST_INPUT)
    run_chunks = train.make_run_chunks(step, Split.gather)

    def states():
        other = jax.tree.map(lambda leaf: 0.5 * leaf, params)
        for number, weights in enumerate((params, other)):
            state = initial_state(jax.tree.map(jnp.copy, weights))
            yield state._replace(
                opt_state=optax.tree.set(state.opt_state, key=jax.random.key(number))
            )

    batches = tuple(resident.batch_indices((seed,), len(split.labels), 8, 0, 6) for seed in (3, 4))
    together = run_chunks(tuple(states()), split.arrays, batches)
    for (state, chunk), start, indices in zip(together, states(), batches, strict=True):
        alone, alone_chunk = run_chunk(start, split.arrays, indices)
        np.testing.assert_allclose(chunk.losses, alone_chunk.losses, rtol=1e-5)
        chex.assert_trees_all_equal(chunk.events, alone_chunk.events)
        chex.assert_trees_all_equal(state.masks, alone.masks)
        chex.assert_trees_all_close(state.params, alone.params, rtol=1e-5, atol=1e-6)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, alone)
        counts = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int32]
        assert counts
        assert all(int(count) == 6 for count in counts)


def test_a_chunk_takes_over_the_memory_of_its_state(params, split, run_chunk):
    state = initial_state(params)
    run_chunk(state, split.arrays, resident.batch_indices((0,), EXAMPLES, BATCH, 0, 4))
    assert state.params['fc1']['kernel'].is_deleted()


@pytest.mark.parametrize('examples', [1, 1_000, 2_345])
def test_error_is_the_share_of_wrong_images(params, examples):
    part = random_split(examples, seed=1)
    hidden = part.images.reshape(examples, -1).astype(np.float32) / 256
    weights = jax.tree.map(np.asarray, params)
    hidden = np.maximum(hidden @ weights['fc1']['kernel'] + weights['fc1']['bias'], 0)
    logits = hidden @ weights['fc2']['kernel'] + weights['fc2']['bias']
    expected = 100 * np.mean(logits.argmax(1) != part.labels)
    assert train.make_measure(NETWORK, models.MNIST_INPUT)(params, part) == pytest.approx(expected)


def test_the_masks_are_found_in_the_state_of_any_optimizer(params):
    rule = dns_jax.Rule(dns_jax.mean_std(0.0), dns_jax.update_probability())
    optimizer = optax.chain(optax.adam(0.1), dns_jax.surgery(rule, jax.random.key(0)))
    masks = train.TrainState(params, optimizer.init(params)).masks
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert all(bool(leaf.all()) for leaf in jax.tree.leaves(masks))
