"""Tests of low_rank: sizes, errors and tables of short runs on the digits."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from flax.core import FrozenDict

import dns_jax
from dns_jax.files.sparse import load_sparse
from experiments import low_rank
from experiments.data import resident
from experiments.low_rank import LowRankConfig
from experiments.networks.models import MNIST_INPUT, LeNet300
from experiments.plain.training import train_network
from experiments.training.steps import make_measure


@pytest.fixture(scope='module')
def run(data_dir, tmp_path_factory):
    config = LowRankConfig(
        workdir=str(tmp_path_factory.mktemp('low_rank') / 'run'),
        dataset='digits',
        data_dir=str(data_dir),
        seeds=1,
        sizes='1,1.05,8,1.05:8,8:40',
        steps=300,
        tuning_steps=200,
    )
    return config, low_rank.compare(config)


def test_networks_are_as_small_as_asked_for(run):
    _, rows = run
    for row in rows:
        wanted = 266_610 / (row['compression'] or row['size'])
        assert wanted * 0.9 <= row['kept'] <= wanted
    pairs = [(1, None), (1.05, None), (8, None), (1.05, 8), (8, 40)]
    assert [(row['size'], row['compression']) for row in rows] == pairs
    assert rows[0]['ranks'] == 'whole whole whole'
    # All but biases cost one multiply-add in this network.
    assert all(row['multiply_adds'] == row['kept'] - 410 for row in rows)


def test_training_makes_good_what_factorising_lost(run):
    _, rows = run
    dense, large, small, *_ = rows
    assert small['reference_error'] < 25  # chance is 90 %
    assert dense['untuned_error'] == dense['reference_error']
    assert dense['test_error'] != dense['reference_error']
    assert large['untuned_error'] == pytest.approx(large['reference_error'], abs=1)
    assert small['untuned_error'] > small['reference_error']
    assert small['test_error'] < small['untuned_error']


def test_factors_are_tuned_with_steps_and_a_rate_of_their_own(run, monkeypatch, tmp_path):
    config, _ = run
    calls = []

    def record(own, network, split, **options):
        calls.append(options)
        return train_network(own, network, split, **{**options, 'steps': 1})

    monkeypatch.setattr(low_rank, 'train_network', record)
    changes = {'sizes': '8', 'tuning_rate': 0.01, 'workdir': str(tmp_path)}
    rows = low_rank.compare(dataclasses.replace(config, **changes))
    assert calls[0].keys() == {'seed', 'title'}
    assert (calls[1]['steps'], calls[1]['rate']) == (200, 0.01)
    assert rows[0]['validation_error'] is not None


def test_budgets_that_factors_do_not_fill_prune_nothing():
    params = {'fc': {'first': {'kernel': np.ones((4, 2))}, 'second': {'kernel': np.ones((2, 4))}}}
    assert low_rank._density_of_kernels(params, 17) == 1


def test_files_and_table_have_every_row(run):
    config, rows = run
    with open(f'{config.workdir}/low_rank.csv', newline='') as file:
        written = list(csv.DictReader(file))
    assert [float(row['test_error']) for row in written] == [row['test_error'] for row in rows]
    table = Path(config.workdir, 'low_rank.md').read_text()
    assert table.count('dense, trained as long') == 1
    assert table.count('surgery to') == 2


def test_networks_are_kept_with_their_ranks(run):
    config, rows = run
    names = '1x', '1.05x', '8x', '1.05x-8x', '8x-40x'
    test = resident.load('digits', config.data_dir).test
    for name, row in zip(names, rows, strict=True):
        params, masks, metadata = load_sparse(Path(config.workdir, f'{name}-0.safetensors'))
        assert metadata['network'] == 'lenet300'
        assert float(metadata['input_scale']) == 1 / 256
        ranks = json.loads(metadata['ranks'])
        assert list(ranks.values()) == [
            int(rank) for rank in row['ranks'].split() if rank[0] != 'w'
        ]
        assert dns_jax.measure_sizes(params, masks).total.kept == row['kept']
        network = LeNet300(FrozenDict(ranks))
        assert make_measure(network, MNIST_INPUT)(params, test) == row['test_error']


def test_factors_of_convolutions_are_applied_at_many_places(data_dir, tmp_path):
    config = LowRankConfig(
        workdir=str(tmp_path),
        network='lenet5',
        dataset='digits',
        data_dir=str(data_dir),
        seeds=1,
        sizes='145',  # so few that conv1 is factorised too
        steps=2,
        tuning_steps=2,
        batch_size=4,
    )
    (row,) = low_rank.compare(config)
    conv1, conv2, fc1, fc2 = map(int, row['ranks'].split())
    convolutions = conv1 * 5 * (24 * 28 + 20 * 24 * 24) + conv2 * 5 * (20 * 8 * 12 + 50 * 8 * 8)
    assert row['multiply_adds'] == convolutions + fc1 * 1300 + fc2 * 510


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'sizes': '0.5'}, '--sizes'),
        ({'sizes': '2,x'}, '--sizes'),
        ({'sizes': '2:x'}, '--sizes'),
        ({'sizes': '2:'}, '--sizes'),
        ({'sizes': ''}, '--sizes'),
        ({'sizes': '2:4:8'}, '--sizes'),
        ({'sizes': '2,134'}, r'--sizes=2,134 must be up to 133, .*but has 134'),
        ({'sizes': '152', 'network': 'lenet5'}, r'up to 151\.5, .*but has 152'),
        ({'sizes': '1,2:2'}, r'behind 2 more than it and up to 648\.7, .*but has 2'),
        ({'sizes': '1:649'}, 'behind 1 .*but has 649'),
    ],
)
def test_sizes_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LowRankConfig(**fields)
