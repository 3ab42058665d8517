"""Tests of coding: what is measured is what the file has."""

import re

import jax
import numpy as np
import pytest

from dns_jax.files.codec import load_coded
from dns_jax.files.sharing import expand
from experiments.artefacts.loading import load_model
from experiments.data import resident
from experiments.networks import models
from experiments.plain import coding
from experiments.plain.coding import CodingConfig, code, find_network
from experiments.training.steps import make_measure
from experiments.zoo import FOLDER


def test_what_is_measured_is_what_was_written(data_dir, tmp_path):
    """Convolutions of LeNet-5 take their weights at 24 × 24 and 8 × 8 places."""
    path = tmp_path / 'network.dns'
    config = CodingConfig(
        model=str(FOLDER / 'lenet5.safetensors'),
        clusters='conv1:2,*:4',
        dataset='digits',
        data_dir=str(data_dir),
        finetuning_steps=0,
    )
    measured = code(config, load_model(config.model, to_run=False), path)
    written = expand(*load_coded(path)[:3])
    assert len(np.unique(written['conv1']['kernel'])) == 3  # with 0
    counts = {layer: np.count_nonzero(leaves['kernel']) for layer, leaves in written.items()}
    assert measured['multiply_adds'] == (
        576 * counts['conv1'] + 64 * counts['conv2'] + counts['fc1'] + counts['fc2']
    )
    assert measured['kept'] == sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(written))
    digits = resident.load('digits', data_dir)
    error = make_measure(models.LeNet5(), models.MNIST_INPUT)
    assert measured['error'] == error(written, digits.test)
    assert measured['validation_error'] == error(written, digits.validation)
    assert measured['error_before'] != measured['error']


@pytest.mark.usefixtures('promotion')  # which optax's Adam takes for granted
def test_zeros_of_ternary_weights_stay_zeros(data_dir, tmp_path):
    model = load_model(str(FOLDER / 'lenet300.safetensors'), to_run=False)
    everywhere = jax.tree.map(lambda mask: np.ones(np.shape(mask), bool), model.masks)
    signs = {
        layer: {'kernel': np.sign(leaves['kernel']), 'bias': leaves['bias'] + np.float32(0.5)}
        for layer, leaves in model.params.items()
    }
    flags = {'dataset': 'digits', 'data_dir': str(data_dir), 'finetuning_steps': 3}
    config = CodingConfig('ternary', clusters='16', tuned='codebooks', **flags)
    ternary = model._replace(params=signs, masks=everywhere)
    measured = code(config, ternary, tmp_path / 'ternary.dns')
    kept = sum(np.count_nonzero(leaves['kernel']) for leaves in signs.values())
    assert measured['multiply_adds'] == kept < 3_000


def test_weights_are_tuned_on_training_images(data_dir, tmp_path, monkeypatch):
    splits = []

    def record(network, params, shared, split, **options):
        splits.append(split)
        assert options['steps'] == 3
        return shared

    monkeypatch.setattr(coding, 'tune', record)
    model = str(FOLDER / 'lenet5.safetensors')
    config = CodingConfig(model, dataset='digits', data_dir=str(data_dir), finetuning_steps=3)
    code(config, load_model(model, to_run=False), tmp_path / 'network.dns')
    (split,) = splits
    np.testing.assert_array_equal(split.labels, resident.load('digits', data_dir).train.labels)


@pytest.mark.parametrize(
    ('metadata', 'message'),
    [
        ({}, 'net names the network None, but to be coded it must be one of'),
        ({'network': 'lenet300'}, 'net must have the parameters of lenet300 with ranks {}'),
        ({'network': 'lenet5', 'ranks': '{"fc1": 3}'}, 'with ranks {"fc1": 3}'),
        ({'network': 'lenet5', 'ranks': '[1]'}, 'net has ranks of no use'),
        ({'network': 'lenet5', 'ranks': 'x'}, 'net has ranks of no use'),
        ({'network': 'lenet5', 'ranks': '{"fc9": 3}'}, 'net has ranks of no use'),
    ],
)
def test_a_file_of_another_network_is_refused(metadata, message):
    model = load_model(str(FOLDER / 'lenet5.safetensors'), to_run=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        find_network('net', model._replace(metadata=metadata))


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ({'clusters': 'fc1=3'}, '--clusters'),
        ({'finetuning_steps': 0, 'seed': 1}, '--seed=1 has no meaning'),
        ({'learning_rate': float('nan')}, '--learning_rate'),
    ],
)
def test_bad_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        CodingConfig(**flags)
