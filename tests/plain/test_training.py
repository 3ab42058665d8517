"""The plain training: it learns, keeps what is pruned at zero, and leaves what it was given."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import dns_jax
from experiments.baselines.ternary import scaled_signs
from experiments.data import resident
from experiments.networks.models import MNIST_INPUT, LeNet300
from experiments.plain.training import PlainConfig, compare_seeds, measure_errors, train_network
from experiments.training.steps import make_measure

CONFIG = PlainConfig(steps=120, batch_size=16, seeds=2, dataset='digits')


@pytest.mark.parametrize('density', [None, 0.1])
def test_it_learns_and_gives_the_network_to_keep(density, data_dir):
    digits, network = resident.load('digits', data_dir), LeNet300()
    params = network.init(jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))['params']
    given = jax.tree.map(np.array, params)
    pruner = dns_jax.prune_to(density=density, steps=80) if density else None
    trained, masks = train_network(
        CONFIG, network, digits.train, seed=0, title='short', params=params, pruner=pruner
    )
    assert make_measure(network, MNIST_INPUT)(trained, digits.test) < 50  # chance is 90 %
    kernels = [leaves['kernel'] for leaves in trained.values()]
    kept = sum(np.count_nonzero(kernel) for kernel in kernels)
    assert kept == pytest.approx((density or 1) * sum(map(np.size, kernels)), rel=1e-3)
    assert dns_jax.measure_sizes(trained, masks).total.kept == kept + 300 + 100 + 10
    for before, after in zip(jax.tree.leaves(given), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(before, after)


def test_it_computes_and_ends_with_what_a_quantiser_makes(data_dir):
    digits, network, quantiser = resident.load('digits', data_dir), LeNet300(), scaled_signs()
    params = network.init(jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))['params']
    rate = optax.constant_schedule(1.0)  # whose count of steps coins are thrown by

    def train(loss):
        trained, _ = train_network(
            *(CONFIG, network, digits.train),
            **{'seed': 0, 'title': 'short', 'params': params, 'steps': 1},
            **{'solver': dns_jax.caffe_sgd(rate, 0.0, 0.0), 'quantiser': quantiser, 'loss': loss},
        )
        return trained

    masks = jax.tree.map(lambda leaf: jax.numpy.array(True), params)
    signs = quantiser.finish(params, masks)
    still = train(lambda logits, labels: 0 * logits[:, 0])
    moved = train(lambda logits, labels: logits[:, 0] + 2 * logits[:, 1])
    for name in params:
        np.testing.assert_allclose(still[name]['kernel'], signs[name]['kernel'], rtol=1e-5)
    # A step of 1, twice that for biases, down the mean of the loss at the signs.
    np.testing.assert_allclose(moved['fc3']['bias'][:3], [-2, -4, 0], atol=1e-6)
    assert len(np.unique(np.abs(moved['fc1']['kernel']))) == 1


def test_steps_rate_and_seed_are_those_asked_for(data_dir):
    digits, network = resident.load('digits', data_dir), LeNet300()
    start = network.init(jax.random.key(1), np.zeros((1, 28, 28, 1), np.float32))['params']

    def distance(config=CONFIG, **options):
        params, _ = train_network(config, network, digits.train, title='short', **options)
        return float(np.linalg.norm(params['fc1']['kernel'] - start['fc1']['kernel']))

    whole = distance(seed=1)
    assert 0 < whole < distance(seed=2) / 2  # which starts elsewhere
    assert whole == distance(seed=1, steps=120, rate=0.05)
    assert 0 < distance(seed=1, steps=1) < whole / 10
    assert distance(seed=1, rate=1e-6) < whole / 10
    assert whole != distance(dataclasses.replace(CONFIG, batch_size=17), seed=1)
    assert distance(dataclasses.replace(CONFIG, weight_decay=0.3), seed=1) > 2 * whole
    # With weights that are given the images come in another order.
    assert whole != distance(seed=1, params=start)


def test_rows_of_all_seeds_are_written_and_told(data_dir, tmp_path, capsys):
    config = PlainConfig(workdir=f'{tmp_path}/new/run', dataset='digits', data_dir=str(data_dir))

    def measure(given, dataset, seed):
        assert given is config
        yield {'seed': seed, 'images': len(dataset.train)}
        yield {'seed': seed, 'images': len(dataset.test)}

    rows = compare_seeds(config, 'some', measure, lambda rows: f'{len(rows)} rows')
    assert [row['seed'] for row in rows] == [0, 0, 1, 1, 2, 2]
    with open(f'{config.workdir}/some.csv', newline='') as file:
        written = list(csv.DictReader(file))
    assert [int(row['images']) for row in written] == [row['images'] for row in rows]
    assert Path(config.workdir, 'some.md').read_text() == '6 rows\n'
    with pytest.raises(ValueError, match=r'already holds some\.csv'):
        compare_seeds(config, 'some', measure, str)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == '6 rows'
    assert json.loads(last) == rows


@pytest.mark.parametrize('train_on_all', [False, True])
def test_images_that_were_trained_on_give_no_validation_error(data_dir, train_on_all):
    digits, network = resident.load('digits', data_dir), LeNet300()
    params = network.init(jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))['params']
    config, error = PlainConfig(train_on_all=train_on_all), make_measure(network, MNIST_INPUT)
    assert measure_errors(config, network, params, digits) == {
        'validation_error': None if train_on_all else error(params, digits.validation),
        'test_error': error(params, digits.test),
    }


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match='--learning_rate'):
        PlainConfig(learning_rate=math.nan)
