"""Tests of networks of one bit a weight: what is trained, kept and told, on the digits."""

import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import one_bit
from experiments.baselines.binary_connect import glorot_limit
from experiments.data import resident
from experiments.one_bit import METHODS, NormalisedNetwork, OneBitConfig

pytestmark = pytest.mark.usefixtures('promotion')
ROWS = ['none', 'binary', 'stochastic_binary', 'compressed', 'bitwise']
SHORT = {'dataset': 'digits', 'seeds': 1, 'units': 32, 'batch_size': 50}


@pytest.fixture(scope='module')
def config(data_dir, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp('one_bit') / 'run')
    rates = {'learning_rate': 0.005, 'end_learning_rate': 0.001}
    steps = {'steps': 150, 'bitwise_steps': 150}
    return OneBitConfig(workdir, data_dir=str(data_dir), **SHORT, **rates, **steps)


@pytest.fixture(scope='module')
def rows(config, promotion):
    return one_bit.compare(config)


def trained(config, method, **changes):
    """What a few steps make of one method."""
    config = OneBitConfig(data_dir=config.data_dir, **SHORT, steps=2, bitwise_steps=2, **changes)
    split = resident.load('digits', config.data_dir).train
    make = one_bit.train_bitwise if method == 'bitwise' else one_bit.train_normalised
    return {name: (network, params) for name, network, params in make(config, split, 0, method)}


def test_every_network_is_measured_and_written(config, rows):
    assert [row['method'] for row in rows] == ROWS
    with open(f'{config.workdir}/one_bit.csv', newline='') as file:
        written = list(csv.DictReader(file))
    for column in ('validation_error', 'test_error'):
        assert [float(row[column]) for row in written] == [row[column] for row in rows]
    table = Path(config.workdir, 'one_bit.md').read_text()
    assert all(method in table for method in ROWS)


def test_they_learn(rows):
    for row in rows:
        assert row['test_error'] < 50, row  # chance is 90 %


@pytest.mark.parametrize('method', METHODS)
def test_kept_weights_have_a_bit_where_they_should(config, method):
    network, params = trained(config, method)[method]
    for layer, leaves in params.items():
        kernel = leaves['kernel']
        if method == 'binary':
            limit = np.float32(glorot_limit(kernel.shape))
            np.testing.assert_array_equal(np.abs(kernel), np.full(kernel.shape, limit))
        elif method == 'bitwise':
            assert {*np.unique(kernel)} == {-1, 1}, layer
        else:
            assert len(np.unique(kernel)) > kernel.size / 2
        if method == 'stochastic_binary':
            assert np.abs(kernel).max() <= glorot_limit(kernel.shape) * (1 + 1e-6)
    assert network.units == SHORT['units']


def test_bitwise_networks_have_zeros_if_asked(config):
    _, params = trained(config, 'bitwise', zeros=0.4)['bitwise']
    for leaves in params.values():
        assert np.mean(leaves['kernel'] == 0) == pytest.approx(0.4, abs=0.002)


@pytest.mark.parametrize('method', ['binary', 'stochastic_binary'])
def test_statistics_are_those_of_the_weights_that_are_kept(config, method):
    network, params = trained(config, method)[method]
    images = resident.load('digits', config.data_dir).train.images / np.float32(256)
    sums = images.reshape(len(images), -1) @ params['fc1']['kernel']
    np.testing.assert_allclose(params['fc1']['mean'][0], sums.mean(0), atol=1e-4)
    np.testing.assert_allclose(params['fc1']['variance'][0], sums.var(0), rtol=1e-3, atol=1e-5)
    whole = network.apply({'params': params}, images)
    np.testing.assert_allclose(network.apply({'params': params}, images[:3]), whole[:3], atol=1e-4)
    bare = {
        layer: {name: leaves[name] for name in ('kernel', 'scale', 'bias')}
        for layer, leaves in params.items()
    }
    np.testing.assert_allclose(network.apply({'params': bare}, images), whole, atol=1e-3)
    assert np.abs(network.apply({'params': bare}, images[:3]) - whole[:3]).max() > 0.1


@pytest.mark.parametrize('method', METHODS)
def test_each_is_trained_as_its_paper_has_it(monkeypatch, config, method):
    calls = []

    def record(own, network, split, **options):
        calls.append((network, options))
        images = jnp.zeros((2, 28, 28, 1))
        return options.get('params') or network.init(jax.random.key(0), images)['params'], None

    monkeypatch.setattr(one_bit, 'train_network', record)
    changes = {'weight_decay': 0.5, 'learning_rate': 0.1, 'end_learning_rate': 0.001}
    changes |= {'methods': method, 'seeds': 1, 'steps': 2, 'units': 32, 'batch_size': 50}
    if method == 'bitwise':
        changes |= {'bitwise_steps': 3}
    own = OneBitConfig(dataset='digits', data_dir=config.data_dir, **changes)
    rows = one_bit.measure_seed(own, resident.load('digits', config.data_dir), 7)
    assert [row['seed'] for row in rows] == [7] * len(calls)

    for _, options in calls:
        assert options['seed'] == 7
        steps = options.get('steps', own.steps)
        weights, state = jnp.ones(()), options['solver'].init(jnp.ones(()))
        updates = []
        for _ in range(steps + 1):
            update, state = options['solver'].update(jnp.ones(()), state, weights)
            updates.append(float(update))
        # Adam moves by the rate whatever the gradient; the decay adds half of it.
        assert updates[0] == pytest.approx(-0.1 * 1.5, rel=1e-4)
        assert updates[-1] == pytest.approx(-0.001 * 1.5, rel=1e-4)
    if method == 'bitwise':
        (first, one), (second, two) = calls
        assert (first.signs, second.signs) == (False, True)
        assert (one['steps'], two['steps']) == (2, 3)
        assert one['params'] is None
        kernel = {'kernel': jnp.array([[0.5, -2.0]])}
        masks = {'kernel': jnp.array(True)}
        kept = [each['quantiser'].finish(kernel, masks)['kernel'] for each in (one, two)]
        np.testing.assert_allclose(kept[0], jnp.tanh(kernel['kernel']), rtol=1e-6)
        np.testing.assert_array_equal(kept[1], [[1, -1]])
    else:
        ((_, one),) = calls
        assert one['loss'] is one_bit.squared_hinge
        key = optax.tree.get(one['pruner'].init({'kernel': jnp.ones((2, 2))}), 'key')
        assert (jax.random.key_data(key) == jax.random.key_data(jax.random.key(7))).all()
        kernel, masks = {'kernel': jnp.full((50, 50), 0.01)}, {'kernel': jnp.array(True)}
        used = one['quantiser'].quantise(kernel, masks, jax.random.key(1))['kernel']
        signs = {'none': 0, 'binary': 1, 'stochastic_binary': 2}
        assert len(np.unique(used)) == (2 if signs[method] == 2 else 1)
        assert (np.asarray(used) == 0.01).all() == (method == 'none')


def test_weights_start_within_the_limit():
    images = jnp.zeros((2, 28, 28, 1))
    params = NormalisedNetwork(32).init(jax.random.key(0), images)['params']
    for leaves in params.values():
        limit = glorot_limit(leaves['kernel'].shape)
        assert 0.9 * limit < np.abs(leaves['kernel']).max() <= limit * (1 + 1e-6)


def test_the_loss_is_the_squared_hinge():
    random = np.random.default_rng(3)
    logits, labels = random.normal(size=(6, 10)).astype(np.float32), random.integers(0, 10, 6)
    wanted = [
        np.mean([max(0, 1 - (1 if c == label else -1) * z) ** 2 for c, z in enumerate(row)])
        for row, label in zip(logits, labels, strict=True)
    ]
    np.testing.assert_allclose(
        one_bit.squared_hinge(logits, jnp.asarray(labels)), wanted, rtol=1e-5
    )


def test_a_run_that_breaks_off_leaves_what_was_done(config, monkeypatch, tmp_path):
    def break_off(*_):
        raise RuntimeError('no more')

    monkeypatch.setattr(one_bit, 'train_bitwise', break_off)
    options = {**SHORT, 'methods': 'none,bitwise', 'train_on_all': True, 'steps': 2}
    with pytest.raises(RuntimeError, match='no more'):
        one_bit.compare(OneBitConfig(str(tmp_path), data_dir=config.data_dir, **options))
    with open(tmp_path / 'one_bit.csv', newline='') as file:
        (row,) = csv.DictReader(file)
    assert row['method'] == 'none'
    assert row['validation_error'] == ''  # those images were trained on


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ({'methods': ''}, '--methods='),
        ({'methods': 'binary,ternary'}, '--methods=binary,ternary must be of none, binary'),
        ({'zeros': 1.0}, 'zeros must be from 0 to below 1'),
        ({'methods': 'none,none'}, '--methods names none twice'),
        ({'learning_rate': 0.0}, '--end_learning_rate='),
        ({'end_learning_rate': 0.0}, '--end_learning_rate=0.0 must be above 0'),
        ({'end_learning_rate': 0.1}, '--end_learning_rate=0.1 must be above 0, and at most'),
    ],
)
def test_bad_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        OneBitConfig(**flags)


def test_the_table_has_medians_over_seeds():
    rows = [{'method': 'binary', 'test_error': error} for error in (2.0, 3.0, 7.0)]
    assert '3.00 % (2.00 to 7.00)' in one_bit.to_table(rows)
