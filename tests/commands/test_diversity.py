"""Tests of diversity: what it trains, prunes and tells, in a short run on the digits."""

import csv
from pathlib import Path

import numpy as np
import pytest

from experiments import diversity
from experiments.data import resident
from experiments.diversity import METHODS, DiversityConfig
from experiments.training.plain import train_network


@pytest.fixture(scope='module')
def config(data_dir, tmp_path_factory):
    return DiversityConfig(
        workdir=str(tmp_path_factory.mktemp('diversity') / 'run'),
        dataset='digits',
        data_dir=str(data_dir),
        seeds=1,
        steps=300,
        kept='5,500',
        points=400,
    )


@pytest.fixture(scope='module')
def rows(config):
    return diversity.compare(config)


def test_every_way_is_measured_and_written(config, rows, capsys):
    assert sorted((row['kept'], row['method']) for row in rows) == sorted(
        (kept, method) for kept in (5, 500) for method in METHODS
    )
    with open(f'{config.workdir}/diversity.csv', newline='') as file:
        written = list(csv.DictReader(file))
    assert [float(row['test_error']) for row in written] == [row['test_error'] for row in rows]
    table = Path(config.workdir, 'diversity.md').read_text()
    assert all(method in table for method in METHODS)


def test_the_network_learns_and_nothing_pruned_changes_nothing(rows):
    assert rows[0]['reference_error'] < 40  # chance is 90 %
    for row in rows:
        if row['kept'] == 500:
            assert row['test_error'] == pytest.approx(row['reference_error'], abs=0.3)


def test_fused_units_lose_less(rows):
    few = [row for row in rows if row['kept'] == 5]
    errors = {
        fused: np.mean([row['test_error'] for row in few if ('fused' in row['method']) == fused])
        for fused in (False, True)
    }
    assert errors[True] < errors[False] - 10


def test_activations_are_those_of_the_network(config):
    digits = resident.load('digits', config.data_dir)
    network = diversity.SigmoidNetwork()
    params, _ = train_network(config, network, digits.train, seed=1, title='short')
    images = digits.test.images / np.float32(256)
    logits = network.apply({'params': params}, images)
    hidden = diversity._activations(params, images.reshape(-1, 784), 2)
    own = hidden @ params['fc3']['kernel'] + params['fc3']['bias']
    np.testing.assert_allclose(own, logits, atol=1e-4)


@pytest.mark.parametrize('kept', ['', '0', '501', '5,x', '5,,6'])
def test_bad_numbers_of_units_are_refused(kept):
    with pytest.raises(ValueError, match='--kept='):
        DiversityConfig(kept=kept)


def test_the_table_has_medians_over_seeds():
    rows = [
        {'method': method, 'kept': 5, 'reference_error': 1.0, 'test_error': error}
        for method in METHODS
        for error in (2.0, 3.0, 7.0)
    ]
    assert '3.00 % (2.00 to 7.00)' in diversity.to_table(rows)
