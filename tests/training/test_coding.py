"""Tests of coding: what is measured is what the file has."""

import jax
import numpy as np
import pytest

from dns_jax.files.codec import load_coded
from dns_jax.files.sharing import expand
from experiments.artefacts.loading import load_model
from experiments.training.coding import CodingConfig, code
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
    assert {'error', 'error_before', 'validation_error'} <= measured.keys()


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
