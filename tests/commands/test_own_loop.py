"""Tests of own_loop: networks pruned in a loop of their own, and the rows of it."""

import csv
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dns_jax
from experiments import own_loop
from experiments.own_loops import networks as own_networks
from experiments.own_loops import runs as own_runs
from experiments.own_loops.runs import OwnLoopConfig, Run
from experiments.reports import tables

TEXT = ''.join(np.random.default_rng(0).choice(list('abcd \n'), 4_000))


@pytest.fixture(autouse=True)
def promotion():
    """Adam mixes int32 and float32 inside optax."""
    with jax.numpy_dtype_promotion('standard'):
        yield


class Tiny(nnx.Module):
    """In place of the CNN, whose programs take seconds to compile."""

    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(64, 6, rngs=rngs), nnx.Linear(6, 10, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, images):
        return self.out(nnx.relu(self.norm(self.hidden(images.reshape(len(images), -1)))))


@pytest.fixture
def small(monkeypatch):
    """Networks that compile in no time."""
    monkeypatch.setattr(own_networks, 'Cnn', Tiny)
    monkeypatch.setattr(own_networks, '_WIDTH', 8)
    monkeypatch.setattr(own_networks, '_CONTEXT', 8)
    monkeypatch.setattr(own_networks, '_BLOCKS', 1)


@pytest.fixture
def config(small, tmp_path):
    return OwnLoopConfig(
        compression='2', seeds=1, dense_steps=2, steps=10, output=str(tmp_path / 'deep/rows.csv')
    )


@pytest.fixture
def trained(monkeypatch):
    """What training was asked for, in place of training: the batches and the steps of each."""
    asked = []

    def train(task, network, pruner, batches, steps):
        del task, pruner
        asked.append((batches, steps))
        return network, dns_jax.init_masks(network.params)

    monkeypatch.setattr(own_runs, 'train', train)
    return asked


@pytest.fixture
def text(tmp_path):
    path = tmp_path / 'text.txt'
    path.write_text(TEXT)
    return path


def rows_in(config):
    with open(config.output, newline='') as file:
        return list(csv.DictReader(file))


def test_a_cnn_is_pruned_once_for_each_row(config, capsys, monkeypatch):
    own_loop.compare(config)
    table = capsys.readouterr().out
    rows = rows_in(config)
    assert [(row['method'], row['target'], row['seed']) for row in rows] == [
        ('surgery', '2.0', '0'),
        ('gradual', '2.0', '0'),
    ]
    for row in rows:
        assert tuple(row) == tuple(own_runs.COLUMNS)
        assert float(row['compression']) == pytest.approx(2, rel=0.01)
        assert int(row['parameters']) == 472
        assert int(row['kept']) == pytest.approx(236, abs=1)
        assert row['unit'] == '%'
        for name in ('validation_before', 'validation', 'test'):
            assert 0 <= float(row[name]) <= 100
    assert len({row['validation_before'] for row in rows}) == 1  # from the same dense network

    monkeypatch.setattr(own_runs, 'train', None)  # a second call trains nothing
    own_loop.compare(config)
    assert capsys.readouterr().out == table
    assert rows_in(config) == rows


def test_what_is_missing_is_made_and_the_rest_kept(config, trained):
    config = dataclasses.replace(config, seeds=2)
    (first,) = own_runs.run_all(dataclasses.replace(config, methods='gradual', seeds=1))
    assert trained == [((0, 0), 2), ((0, 1), 10)]
    trained.clear()
    rows = own_runs.run_all(config)
    assert [(row['seed'], row['method']) for row in rows] == [
        *((0, 'surgery'), (0, 'gradual'), (1, 'surgery'), (1, 'gradual')),
    ]
    assert rows[1] == first
    dense, pruning = [((seed, 0), 2) for seed in range(2)], [((seed, 1), 10) for seed in range(2)]
    assert trained == [dense[0], pruning[0], dense[1], pruning[1], pruning[1]]
    longer = dataclasses.replace(config, methods='gradual', seeds=1, steps=12)
    assert [row['steps'] for row in own_runs.run_all(longer)] == [12]
    assert [row['steps'] for row in rows_in(config)] == ['10'] * 4 + ['12']


def test_an_interrupted_command_keeps_its_rows(config, trained, monkeypatch):
    train = own_runs.train

    def interrupted(*arguments):
        if len(trained) == 2:  # after the dense network and the first method
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(own_runs, 'train', interrupted)
    monkeypatch.setattr(own_runs, 'describe_commit', lambda: 'abc')
    with pytest.raises(KeyboardInterrupt):
        own_runs.run_all(config)
    assert [(row['method'], row['commit']) for row in rows_in(config)] == [('surgery', 'abc')]


def test_a_gpt_has_rows_of_its_own(config, text, trained):
    config = dataclasses.replace(
        config, network='gpt', density='0.25', methods='surgery', text=str(text)
    )
    (row,) = own_runs.run_all(config)
    assert own_runs._to_run(row) == Run('gpt', 'surgery', 0.25, 0, 2, 10)
    assert row['unit'] == 'nats'
    assert row['test'] is None
    assert row['validation'] == row['validation_before'] == pytest.approx(np.log(6), abs=1)
    assert own_runs.read_rows(Path(config.output)) == [row]
    assert ' nats |      | ' in own_runs.to_table([row])


def test_a_gpt_learns(text, small):
    task = own_networks.characters(text)
    network = own_runs.Network(*nnx.split(task.make(0), nnx.Param, ...))
    nothing = dns_jax.surgery({}, jax.random.key(0))
    trained, masks = own_runs.train(task, network, nothing, (0, 0), 40)
    before, after = (own_runs.measure(task, one, masks, 'validation') for one in (network, trained))
    assert after < before - 0.3, before


def test_batch_statistics_are_trained_and_read(config):
    task = own_networks.digits()
    network = own_runs.Network(*nnx.split(task.make(0), nnx.Param, ...))
    pruner = dns_jax.surgery({}, jax.random.key(0))
    trained, masks = own_runs.train(task, network, pruner, (0, 0), 5)
    before, after = (one.rest['norm']['mean'][...] for one in (network, trained))
    assert not np.any(before)
    assert np.all(np.abs(after) > 0)
    first = own_runs.measure(task, trained, masks, 'validation')
    assert first == own_runs.measure(task, trained, masks, 'validation')
    others = jax.tree.map(lambda leaf: leaf + 1, trained.rest)
    assert first != own_runs.measure(task, trained._replace(rest=others), masks, 'validation')


def test_the_networks_are_as_large_as_they_say():
    kernels = 9 * (32 + 32 * 64 + 64 * 64) + 4 * 64 * 10
    in_blocks, in_output = 2 * 12 * 96**2, 96 * 65
    for make, in_kernels, parameters in (
        (lambda: own_networks.Cnn(nnx.Rngs(0)), kernels, kernels + 10 + 2 * 160),
        (lambda: own_networks.Gpt(65, nnx.Rngs(0)), in_blocks + in_output, 242_561),
    ):
        params = nnx.state(nnx.eval_shape(make), nnx.Param)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
        masks = jax.tree.leaves(jax.eval_shape(dns_jax.init_masks, params))
        assert sum(mask.size for mask in masks if mask.ndim) == in_kernels
    logits = nnx.eval_shape(lambda: own_networks.Cnn(nnx.Rngs(0))(jnp.ones((2, 8, 8, 1))))
    assert logits.shape == (2, 10)


def test_every_method_sees_the_same_batches():
    task = own_networks.digits()
    first, second = (list(task.batches((3, 1), 2)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    ((images, labels),) = task.batches((3, 0), 1)
    assert images.shape == (64, 8, 8, 1)
    assert images.dtype == np.float32
    assert labels.dtype == np.int32
    assert not np.array_equal(images, first[0][0])


def test_the_gpt_sees_no_later_character(small):
    network = nnx.jit(own_networks.Gpt(6, nnx.Rngs(0)))
    text = jnp.array([[0, 1, 2, 3, 4, 5, 0, 1]])
    other = text.at[0, 5].set(2)
    same = np.isclose(network(text), network(other)).all(axis=-1)[0]
    np.testing.assert_array_equal(same, [True] * 5 + [False] * 3)


def test_the_text_is_foretold_where_it_was_not_trained(text, small):
    task = own_networks.characters(text)
    alphabet = {character: number for number, character in enumerate(sorted(set(TEXT)))}
    tokens = np.array([alphabet[character] for character in TEXT])
    (texts,) = next(task.batches((0, 0), 1))
    joined = ' '.join(map(str, tokens[:3_600]))
    assert texts.shape == (32, 9)
    for row in np.asarray(texts):
        assert ' '.join(map(str, row)) in joined
    windows = np.array([tokens[at : at + 9] for at in range(3_600, 3_600 + 32 * 8, 8)])

    def same_again(texts):
        return 3 * jax.nn.one_hot(texts, 6)

    assert float(task.measure['validation'](same_again)) == pytest.approx(
        float(task.loss(same_again, windows)), rel=1e-5
    )


def test_gradual_pruning_meets_a_compression_of_all_parameters():
    params = {'fc': {'kernel': jnp.ones((10, 9)), 'bias': jnp.ones(9)}, 'scale': jnp.ones(1)}
    density = own_runs._to_density(Run('cnn', 'gradual', 5, 0, 0, 10), params)
    assert 90 * density + 10 == pytest.approx(100 / 5)
    assert own_runs._to_density(Run('gpt', 'gradual', 0.3, 0, 0, 10), params) == 0.3


def test_a_short_text_is_refused(tmp_path):
    path = tmp_path / 'short.txt'
    path.write_text('too short')
    with pytest.raises(
        ValueError, match=r'--text=.*short.txt must have 20490 bytes or more, but has 9'
    ):
        own_networks.characters(path)


def test_a_file_of_other_rows_is_refused(config):
    path = Path(config.output)
    path.parent.mkdir()
    path.write_text('network,error\ncnn,1\n')
    with pytest.raises(ValueError, match='must have the columns'):
        own_runs.run_all(config)
    path.write_text(tables.to_csv([dict.fromkeys(own_runs.COLUMNS, 'cnn')]))
    with pytest.raises(ValueError, match=r"rows.csv, line 2: could not convert .* 'cnn'"):
        own_runs.run_all(config)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'network': 'gpt'}, '--text must name a file of characters'),
        ({'methods': 'surgery,han'}, r"--methods=surgery,han names \['han'\]"),
        ({'compression': '10,x'}, '--compression=10,x must be numbers with commas between'),
        ({'compression': '10,10.0'}, '--compression=10,10.0 names one twice'),
        ({'compression': '0.5'}, '--compression=0.5 must be finite and at least 1'),
        ({'compression': '10,inf'}, '--compression=10,inf must be finite and at least 1'),
        ({'compression': 'nan'}, '--compression=nan must be finite and at least 1'),
        ({'network': 'gpt', 'text': 'a', 'density': ''}, '--density= must be numbers'),
        ({'network': 'gpt', 'text': 'a', 'density': '0'}, r'--density=0 must be in \(0, 1\]'),
    ],
)
def test_flags_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        OwnLoopConfig(**fields)
