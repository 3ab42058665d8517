"""Tests of training.steps: what a network is measured by, and images changed within a step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import Tiny

import dns_jax
from experiments.data.augmentation import shift_and_mirror
from experiments.data.resident import Split
from experiments.data.texts import TextSplit
from experiments.networks import models
from experiments.networks.inputs import Tokens
from experiments.training import steps as train
from experiments.training.flags import Config
from experiments.training.plan import make_plan

ALPHABET = 5


class Pairs(nn.Module):
    """Says what follows a character by that character alone."""

    @nn.compact
    def __call__(self, tokens):
        return nn.Embed(ALPHABET, ALPHABET, name='tokens')(tokens)


def random_text(characters, context, seed=0):
    tokens = np.random.default_rng(seed).integers(0, ALPHABET, characters).astype(np.uint8)
    return TextSplit(tokens, context)


def table():
    random = np.random.default_rng(1).normal(size=(ALPHABET, ALPHABET))
    return {'tokens': {'embedding': random.astype(np.float32)}}


def log_shares(text):
    """The logarithm of the share of each character that follows another, in float64."""
    given = table()['tokens']['embedding'].astype(np.float64)[text.tokens[:-1]]
    logs = given - np.log(np.exp(given).sum(1, keepdims=True))
    return logs[np.arange(len(given)), text.tokens[1:]], given


@pytest.mark.parametrize('characters', [20, 300, 3_000])
@pytest.mark.parametrize('context', [3, 7])
def test_bits_per_character_leave_padding_out(characters, context):
    text = random_text(characters, context)
    # Whatever the text, its last windows are padded.
    assert any((labels == -1).any() for _, labels in text.batches())
    logs, given = log_shares(text)
    measured = {
        metric: train.make_measure(Pairs(), Tokens(), metric)(table(), text)
        for metric in (train.BITS, train.NATS, train.ERROR)
    }
    assert measured[train.BITS] == pytest.approx(-np.mean(logs) / np.log(2), rel=1e-5)
    assert measured[train.NATS] == pytest.approx(-np.mean(logs), rel=1e-5)
    wrong = 100 * np.mean(given.argmax(1) != text.tokens[1:])
    assert measured[train.ERROR] == pytest.approx(wrong, rel=1e-5)


def test_metrics_say_their_units():
    units = [metric.unit for metric in (train.ERROR, train.NATS, train.BITS)]
    assert units == ['%', 'nats', 'bits/character']


def test_a_chunk_learns_the_windows_of_its_numbers():
    """The loss of a step is that of its windows, all their characters alike."""
    text, numbers = random_text(40, 6), np.array([[3, 30, 17], [0, 33, 5]], np.int32)
    optimizer = optax.chain(dns_jax.surgery({}, jax.random.key(0)), optax.sgd(0.0))
    params = jax.tree.map(jnp.asarray, table())
    run_chunk = train.make_run_chunk(train.make_step(Pairs(), optimizer, Tokens()), text.gather)
    state = train.TrainState(params, optimizer.init(params))
    _, chunk = run_chunk(state, text.arrays, numbers)
    logs, _ = log_shares(text)
    wanted = [-np.mean([logs[start : start + 6] for start in batch]) for batch in numbers]
    np.testing.assert_allclose(chunk.losses, wanted, rtol=1e-5)


# Images changed within a step.

NETWORK = Tiny(width=0.375)


@pytest.fixture(scope='module')
def split():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (16, 28, 28, 1), np.uint8)
    return Split(images, random.integers(0, 10, 16, np.int32))


@pytest.fixture(scope='module')
def params():
    return NETWORK.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))['params']


def watched_step(seen, number=7):
    """A step that says which images it computed with."""

    def change(key, images):
        changed = shift_and_mirror(key, images, pixels=2, mirror=True)
        jax.debug.callback(lambda images: seen.append(np.asarray(images)), changed)
        return changed

    optimizer = make_optimizer()
    augmentation = train.Augmentation(change, number)
    return train.make_step(NETWORK, optimizer, models.MNIST_INPUT, augmentation=augmentation)


def make_optimizer(rate=lambda step: jnp.float32(0.0)):
    return optax.chain(dns_jax.surgery({}, jax.random.key(1)), dns_jax.caffe_sgd(rate))


def losses_of(step, params, split, steps=3):
    state, losses = train.TrainState(params, make_optimizer().init(params)), []
    for _ in range(steps):
        state, loss = jax.jit(step)(state, *split.arrays)
        losses.append(float(loss))
    jax.effects_barrier()
    return losses


def test_images_change_anew_in_every_step_and_a_step_repeats_itself(split, params):
    seen = []
    losses = losses_of(watched_step(seen), params, split)
    assert len({images.tobytes() for images in (split.images, *seen)}) == 4
    # The network computes with what was changed.
    plain = train.make_step(NETWORK, make_optimizer(), models.MNIST_INPUT)
    for images, loss in zip(seen, losses, strict=True):
        (wanted,) = losses_of(plain, params, Split(images, split.labels), steps=1)
        assert loss == pytest.approx(wanted, rel=1e-5)
    again, other = [], []
    assert losses_of(watched_step(again), params, split) == losses
    losses_of(watched_step(other, number=8), params, split)
    assert other[0].tobytes() != seen[0].tobytes() == again[0].tobytes()


def test_every_use_of_random_bits_has_a_number_of_its_own():
    """In all phases: changed images, dropout and coins; above any count of steps."""
    fields = {'dropout': 0.5, 'quantiser': 'stochastic_binary', 'shift': 2, 'compression': 2.0}
    plan = make_plan(Config('lenet300', **fields))
    shapes = models.shapes(models.NETWORKS['lenet300'](), models.MNIST_INPUT.image_shape)
    numbers = []
    for phase in (plan.reference, plan.surgery, plan.finetuning):
        made = phase.make_augmentation(), phase.make_dropout(shapes), phase.make_rounding()
        numbers += [use.number for use in made if use]
    assert len(numbers) == 8  # the dense network is not quantised
    assert len(set(numbers)) == 8
    assert min(numbers) >= 2**31
