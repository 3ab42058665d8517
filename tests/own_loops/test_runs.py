"""Tests of own_loops.runs: networks pruned in a loop of their own, and their rows."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_loops import config, rows_in, small, text

import dns_jax
from experiments.own_loops import networks as own_networks
from experiments.own_loops import runs as own_runs
from experiments.own_loops.runs import OwnLoopConfig, Run
from experiments.reports import tables

__all__ = ['config', 'small', 'text']  # fixtures, which pytest finds here by name
pytestmark = pytest.mark.usefixtures('promotion')


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


def test_what_is_missing_is_made_and_the_rest_kept(config, trained):
    config = dataclasses.replace(config, seeds=2)
    (first,) = own_runs.run_all(dataclasses.replace(config, methods='gradual', seeds=1))
    assert trained == [((0, 0), 2), ((0, 1), 10)]
    trained.clear()
    rows = own_runs.run_all(config)
    assert [(row['seed'], row['method']) for row in rows] == [
        *((0, 'surgery'), (0, 'gradual'), (1, 'surgery'), (1, 'gradual'))
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


def test_gradual_pruning_meets_a_compression_of_all_parameters():
    params = {'fc': {'kernel': jnp.ones((10, 9)), 'bias': jnp.ones(9)}, 'scale': jnp.ones(1)}
    density = own_runs._to_density(Run('cnn', 'gradual', 5, 0, 0, 10), params)
    assert 90 * density + 10 == pytest.approx(100 / 5)
    assert own_runs._to_density(Run('gpt', 'gradual', 0.3, 0, 0, 10), params) == 0.3


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
