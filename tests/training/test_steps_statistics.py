"""Tests of training.steps on a network with BatchNorm, whose statistics NumPy has too."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dns_jax
from experiments.data.resident import Split
from experiments.networks.inputs import Input
from experiments.training import steps as train
from experiments.training.closing import estimate_statistics

BATCH, KEPT = 8, 0.9
INPUTS = Input((100.0,), 1 / 64, 3)


class Normed(nn.Module):
    """A dense layer, its norm, and another; fields and arguments are those of `ResNet`."""

    momentum: float = KEPT

    @nn.compact
    def __call__(self, images, train=False):
        hidden = nn.Dense(4, use_bias=False, name='fc1')(images.reshape(len(images), -1))
        hidden = nn.BatchNorm(not train, momentum=self.momentum, name='norm1')(hidden)
        return nn.Dense(5, name='fc2')(nn.relu(hidden))


NETWORK = Normed()


def random_split(examples, seed=0):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (examples, 3, 3, 1), np.uint8)
    return Split(images, random.integers(0, 5, examples, np.int32))


@pytest.fixture(scope='module')
def variables():
    """Weights, and statistics that are not those of any batch."""
    made = dict(NETWORK.init(jax.random.key(0), jnp.zeros((1, 3, 3, 1))))
    random = np.random.default_rng(1)
    norm = {
        'mean': jnp.asarray(random.normal(size=4), jnp.float32),
        'var': jnp.asarray(1 + random.random(4), jnp.float32),
    }
    return train.Weights(made['params'], {'batch_stats': {'norm1': norm}})


def make_optimizer(rate=0.5):
    asleep = dns_jax.Rule(dns_jax.mean_std(0.0), dns_jax.update_probability(start=9))
    return optax.chain(dns_jax.surgery(asleep, jax.random.key(0)), optax.sgd(rate))


@pytest.fixture
def state(variables):
    """A state of which half of the first kernel is pruned."""
    params, opt_state = variables.params, make_optimizer().init(variables.params)
    masks = jax.tree.map(jnp.ones_like, dns_jax.get_masks(opt_state))
    kernel = params['fc1']['kernel']
    masks['fc1']['kernel'] = jnp.abs(kernel) > jnp.median(jnp.abs(kernel))
    opt_state = optax.tree.set(opt_state, masks=masks)
    return train.TrainState(params, opt_state, variables.statistics)


def before_the_norm(state, images):
    """What the first layer gives by W⊙T, in float64."""
    kernel = np.where(state.masks['fc1']['kernel'], state.params['fc1']['kernel'], 0)
    pixels = (images.reshape(len(images), -1).astype(np.float64) - 100) / 64
    return pixels @ kernel.astype(np.float64)


def logits(state, hidden, mean, var):
    norm, last = (jax.device_get(state.params[layer]) for layer in ('norm1', 'fc2'))
    normed = (hidden - mean) / np.sqrt(var + 1e-5) * norm['scale'] + norm['bias']
    return np.maximum(normed, 0) @ last['kernel'] + last['bias']


def run_on(statistics, hidden):
    """The running statistics after a batch, by their definition."""
    old = jax.device_get(statistics['batch_stats']['norm1'])
    return {
        'mean': KEPT * old['mean'] + (1 - KEPT) * hidden.mean(0),
        'var': KEPT * old['var'] + (1 - KEPT) * hidden.var(0),
    }


def assert_statistics(found, wanted):
    norm = found['batch_stats']['norm1']
    assert sorted(norm) == sorted(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(norm[name], value, rtol=1e-4, atol=1e-5)


def test_a_step_takes_the_statistics_of_the_masked_weights_on_its_batch(state):
    split = random_split(BATCH)
    step = jax.jit(train.make_step(NETWORK, make_optimizer(), INPUTS))
    new, loss = step(state, split.images, split.labels)
    hidden = before_the_norm(state, split.images)
    assert_statistics(new.statistics, run_on(state.statistics, hidden))
    given = logits(state, hidden, hidden.mean(0), hidden.var(0))
    shares = np.exp(given) / np.exp(given).sum(1, keepdims=True)
    wanted = -np.log(shares[np.arange(BATCH), split.labels]).mean()
    assert loss == pytest.approx(wanted, rel=1e-4)
    # The gradient of the last bias, by hand: statistics are no weights.
    outer = (shares - np.eye(5)[split.labels]) / BATCH
    moved = np.asarray(state.params['fc2']['bias']) - 0.5 * outer.sum(0)
    np.testing.assert_allclose(new.params['fc2']['bias'], moved, rtol=1e-4, atol=1e-5)


def test_a_batch_in_parts_has_the_statistics_of_one_part_after_the_other(state):
    split = random_split(BATCH)
    step = jax.jit(train.make_step(NETWORK, make_optimizer(), INPUTS, accumulate=2))
    new, loss = step(state, split.images, split.labels)
    statistics, parts = state.statistics, []
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        images, labels = split.images[rows], split.labels[rows]
        norm = run_on(statistics, before_the_norm(state, images))
        statistics = {'batch_stats': {'norm1': norm}}
        one, value = train.make_step(NETWORK, make_optimizer(), INPUTS)(state, images, labels)
        parts.append((one.params, value))
    assert_statistics(new.statistics, statistics['batch_stats']['norm1'])
    wanted = jax.tree.map(lambda one, other: (one + other) / 2, *parts)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5),
        (new.params, loss),
        wanted,
    )


def test_chunks_carry_statistics_on(state):
    split = random_split(4 * BATCH)
    numbers = np.arange(4 * BATCH, dtype=np.int32).reshape(4, BATCH)
    step = train.make_step(NETWORK, make_optimizer(rate=0.0), INPUTS)
    statistics = state.statistics
    for batch in numbers:
        norm = run_on(statistics, before_the_norm(state, split.images[batch]))
        statistics = {'batch_stats': {'norm1': norm}}
    whole, _ = train.make_run_chunk(step, split.gather)(
        jax.tree.map(jnp.copy, state), split.arrays, numbers
    )
    assert_statistics(whole.statistics, statistics['batch_stats']['norm1'])
    # Side by side each network has its own.
    batches = numbers, numbers[::-1]
    states = tuple(jax.tree.map(jnp.copy, state) for _ in batches)
    (one, _), (other, _) = train.make_run_chunks(step, split.gather)(states, split.arrays, batches)
    assert_statistics(one.statistics, statistics['batch_stats']['norm1'])
    means = [run.statistics['batch_stats']['norm1']['mean'] for run in (one, other)]
    assert not np.allclose(*means, atol=1e-3)
    # A stream does the same.
    stream = [(split.images[batch], split.labels[batch]) for batch in numbers]
    streamed, _ = train.make_run_streamed_chunk(step, state)(jax.tree.map(jnp.copy, state), stream)
    assert_statistics(streamed.statistics, statistics['batch_stats']['norm1'])


def test_a_network_is_measured_with_its_running_statistics(state):
    split = random_split(40)
    hidden = before_the_norm(state, split.images)
    pruned = dns_jax.apply_masks(state.params, state.masks)
    measure = train.make_measure(NETWORK, INPUTS)
    own = jax.device_get(state.statistics['batch_stats']['norm1'])
    given = logits(state, hidden, own['mean'], own['var'])
    wrong = 100 * np.mean(given.argmax(1) != split.labels)
    assert measure(pruned, split, state.statistics) == pytest.approx(wrong)
    # Not those of the images that it is measured on.
    given = logits(state, hidden, hidden.mean(0), hidden.var(0))
    assert wrong != 100 * np.mean(given.argmax(1) != split.labels)


class InParts(Split):
    """A split that is measured on in batches of twelve."""

    def batches(self):
        for start in range(0, len(self), 12):
            yield self.images[start : start + 12], self.labels[start : start + 12]


def drop_pixels(key, images):
    return jnp.where(jax.random.bernoulli(key, shape=images.shape), images, 0)


@pytest.mark.parametrize('augmentation', [None, train.Augmentation(drop_pixels, 7)])
def test_fresh_statistics_are_the_mean_of_those_of_all_batches(state, augmentation):
    split = InParts(*random_split(36).arrays)
    pruned = train.Weights(dns_jax.apply_masks(state.params, state.masks), state.statistics)
    fresh = estimate_statistics(NETWORK, INPUTS, pruned, split, augmentation)
    seen = [images for images, _ in split.batches()]
    if augmentation:  # as in training, and each batch by coins of its own
        keys = (jax.random.fold_in(jax.random.key(7), number) for number in range(3))
        seen = [np.asarray(drop_pixels(*each)) for each in zip(keys, seen, strict=True)]
    hidden = [before_the_norm(state, images) for images in seen]
    wanted = {
        'mean': np.mean([part.mean(0) for part in hidden], 0),
        'var': np.mean([part.var(0) for part in hidden], 0),
    }
    assert_statistics(fresh.statistics, wanted)
    jax.tree.map(np.testing.assert_array_equal, fresh.params, pruned.params)
    old = jax.device_get(state.statistics['batch_stats']['norm1'])
    assert not np.allclose(wanted['mean'], old['mean'], atol=1e-2)
