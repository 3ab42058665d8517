"""Tests of mixed: its networks against sizes counted by hand and LeNet-5, and a short run."""

import csv
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments import mixed
from experiments.mixed import MixedConfig, MixedLeNet5
from experiments.networks import models

IMAGE_SHAPE = (28, 28, 1)


@pytest.fixture(scope='module')
def run(data_dir, tmp_path_factory):
    config = MixedConfig(
        workdir=str(tmp_path_factory.mktemp('mixed') / 'run'),
        dataset='digits',
        data_dir=str(data_dir),
        seeds=2,
        shares='0.25,1',
        steps=60,
        batch_size=16,
    )
    return config, mixed.compare(config)


def kernels(share):
    shapes = models.shapes(MixedLeNet5(share), IMAGE_SHAPE)
    return {
        name: {part: leaves['kernel'].shape for part, leaves in shapes[name].items()}
        for name in ('conv1', 'conv2')
    }


def test_filters_are_as_many_as_those_of_lenet5():
    assert kernels(0.25) == {
        'conv1': {
            'horizontal': (1, 5, 1, 8),
            'vertical': (5, 1, 1, 7),
            'full': (5, 5, 1, 5),
            'mixing': (1, 1, 20, 20),
        },
        'conv2': {
            'horizontal': (1, 5, 20, 19),
            'vertical': (5, 1, 20, 19),
            'full': (5, 5, 20, 12),
            'mixing': (1, 1, 50, 50),
        },
    }
    assert kernels(0)['conv1'].keys() == {'horizontal', 'vertical', 'mixing'}
    assert kernels(1) == {'conv1': {'full': (5, 5, 1, 20)}, 'conv2': {'full': (5, 5, 20, 50)}}


def test_whole_filters_alone_are_lenet5_with_relu():
    images = np.random.default_rng(0).normal(size=(3, *IMAGE_SHAPE)).astype(np.float32)
    logits, variables = MixedLeNet5(1.0).init_with_output(jax.random.key(0), images)
    params, hidden = variables['params'], images
    for name, features in (('conv1', 20), ('conv2', 50)):
        layer = nn.Conv(features, (5, 5), padding='VALID')
        hidden = nn.relu(layer.apply({'params': params[name]['full']}, hidden))
        hidden = nn.max_pool(hidden, (2, 2), (2, 2))
    hidden = hidden.reshape(3, -1)
    hidden = nn.relu(hidden @ params['fc1']['kernel'])
    np.testing.assert_allclose(logits, hidden @ params['fc2']['kernel'], rtol=1e-4, atol=1e-4)


def test_sizes_are_those_counted_by_hand(run):
    _, rows = run
    conv1, conv2 = 5 * 25 + 15 * 5 + 20 * 20, 20 * (12 * 25 + 38 * 5) + 50 * 50
    dense = 800 * 500 + 500 * 10
    mixed_size = conv1 + conv2 + dense + 20 + 50 + 510, conv1 * 24**2 + conv2 * 8**2 + dense
    plain_size = 431_080, 500 * 24**2 + 25_000 * 8**2 + dense
    found = [(row['share'], (row['parameters'], row['multiply_adds'])) for row in rows]
    assert found == [(0.25, mixed_size), (1, plain_size)] * 2


def test_networks_learn_and_are_written(run):
    config, rows = run
    assert all(row['test_error'] < 60 for row in rows)  # chance is 90 %
    assert len({row['test_error'] for row in rows}) > 2  # shares and seeds differ
    with open(f'{config.workdir}/mixed.csv', newline='') as file:
        written = list(csv.DictReader(file))
    assert [float(row['test_error']) for row in written] == [row['test_error'] for row in rows]
    table = Path(config.workdir, 'mixed.md').read_text().splitlines()
    assert [line.split('|')[1].strip() for line in table[2:]] == ['0.25', 'all, LeNet-5']
    assert '431,080 |     2,293,000' in table[3]


@pytest.mark.parametrize('shares', ['', '0.5,x', '-0.1', '1.1', '25'])
def test_bad_shares_are_refused(shares):
    with pytest.raises(ValueError, match='--shares must be finite numbers from 0 to 1'):
        MixedConfig(shares=shares)
    with pytest.raises(ValueError, match=r'--shares names 0\.5 twice'):
        MixedConfig(shares='0.5,0.50')
