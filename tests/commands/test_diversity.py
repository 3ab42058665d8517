"""Tests of diversity: what it trains, prunes and tells, in a short run on the digits."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from experiments import diversity
from experiments.data import resident
from experiments.diversity import METHODS, DiversityConfig
from experiments.plain.training import train_network


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


@pytest.fixture(scope='module')
def params(config):
    train = resident.load('digits', config.data_dir).train
    return train_network(config, diversity.SigmoidNetwork(), train, seed=0, title='short')[0]


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


def test_all_networks_are_trained_on_if_asked_to(config, rows):
    options = {'kept': '5', 'retraining_steps': 100, 'retraining_rates': '0.001'}
    options['workdir'] = f'{config.workdir}-again'
    again = diversity.compare(dataclasses.replace(config, **options))
    few = [row for row in rows if row['kept'] == 5]
    for before, after in zip(few, again, strict=True):
        assert {name: after[name] for name in before} == before
        assert after['retraining_rate'] == 0.001
        if 'fused' in after['method']:
            assert after['retrained_error'] < after['test_error']


def test_each_pruned_network_has_the_rate_that_suits_it(config, params):
    digits = resident.load('digits', config.data_dir)
    points = digits.train.images[:400].reshape(-1, 784) / np.float64(256)
    config = dataclasses.replace(config, retraining_steps=200, retraining_rates='0.01,0.1')
    # Five units that have taken over what 500 did have large weights, which a high rate blows up.
    for fused, rate in ((False, 0.1), (True, 0.01)):
        generator = np.random.default_rng(0)
        smaller = diversity._prune(params, points, 5, 'importance', fused, generator)
        found = diversity._retrain(config, digits, smaller, 0, 'short')
        assert found['retraining_rate'] == rate
        assert found['retrained_error'] < diversity._error(smaller, digits.test)


def test_the_rate_is_chosen_on_validation_images(config, params, monkeypatch):
    digits = resident.load('digits', config.data_dir)
    own = dataclasses.replace(config, retraining_steps=1, retraining_rates='0.1,0.2,0.3')
    wanted = {id(digits.validation): [2, 1, 3], id(digits.test): [1, 5, 2]}
    rates = [0.1, 0.2, 0.3]
    monkeypatch.setattr(diversity, 'train_network', lambda *_, rate, **options: (rate, None))
    monkeypatch.setattr(
        diversity, '_error', lambda rate, split: wanted[id(split)][rates.index(rate)]
    )
    row = diversity._retrain(own, digits, params, 0, 'short')
    assert row == {'retraining_rate': 0.2, 'retrained_error': 5}


def test_a_rate_is_not_chosen_on_images_that_were_trained_on():
    with pytest.raises(ValueError, match='must be one rate with --train_on_all'):
        DiversityConfig(train_on_all=True, retraining_steps=5)
    DiversityConfig(train_on_all=True, retraining_steps=5, retraining_rates='0.1')
    with pytest.raises(ValueError, match=r'--retraining_rates=0\.1 has no meaning'):
        DiversityConfig(retraining_rates='0.1')


def test_activations_are_those_of_the_network(config, params):
    images = resident.load('digits', config.data_dir).test.images / np.float32(256)
    logits = diversity.SigmoidNetwork().apply({'params': params}, images)
    hidden = diversity._activations(params, images.reshape(-1, 784), 2)
    own = hidden @ params['fc3']['kernel'] + params['fc3']['bias']
    np.testing.assert_allclose(own, logits, atol=1e-4)


@pytest.mark.parametrize('kept', ['', '0', '501', '5,x', '5,,6', '5,6,5'])
def test_bad_numbers_of_units_are_refused(kept):
    with pytest.raises(ValueError, match='--kept'):
        DiversityConfig(kept=kept)


def test_bad_rates_are_refused():
    with pytest.raises(ValueError, match='--retraining_rates must be '):
        DiversityConfig(retraining_steps=1, retraining_rates='0.1,-1')


def test_the_table_has_medians_over_seeds():
    rows = [
        {'method': method, 'kept': 5, 'reference_error': 1.0, 'test_error': error}
        for method in METHODS
        for error in (2.0, 3.0, 7.0)
    ]
    text = diversity.to_table(rows)
    assert '3.00 % (2.00 to 7.00)' in text
    assert 'retrained' not in text
    table = diversity.to_table([row | {'retrained_error': row['test_error'] / 2} for row in rows])
    assert table.startswith(text)
    assert '1.50 % (1.00 to 3.50)' in table.removeprefix(text)
