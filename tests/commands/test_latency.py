"""Tests of latency: the ways to run a network, timed."""

import json
import os

import numpy as np
import pytest
from pruned_files import save_network

from dns_jax.files.sparse import save_sparse
from dns_jax.inference import native
from dns_jax.inference.chain import Dense, chain_to_json
from dns_jax.inference.shrink import shrink
from experiments import latency
from experiments.artefacts.loading import load_model
from experiments.latency import LatencyConfig, _crossing, measure
from experiments.measurements import latency_report
from experiments.zoo import FOLDER

ZOO = str(FOLDER / 'lenet300.safetensors')


@pytest.mark.slow
def test_latency_of_a_network(tmp_path, capsys):
    output = tmp_path / 'new' / 'latency.json'
    result = measure(LatencyConfig(model=ZOO, batches='1,3', turns=1, output=str(output)))
    printed = capsys.readouterr().out
    assert json.loads(output.read_text()) == json.loads(printed.splitlines()[-1]) == result
    for batch in '1', '3':
        ways = result['batches'][batch]['ways']
        dense = [way for name, way in ways.items() if name.startswith('dense')]
        assert max(way['ratio'] for way in dense) == 1
        best = min(way['median_us'] for way in dense)
        for way in ways.values():
            assert way['ratio'] == pytest.approx(best / way['median_us'])
            assert 0 < way['least_us'] <= way['median_us']
    layer = result['layers']['fc1']
    kernel = load_model(ZOO).compact().params['fc1']['kernel']
    assert (layer['inputs'], layer['units']) == kernel.shape
    assert layer['kept_multiply_adds'] == layer['kept'] == np.count_nonzero(kernel)
    assert layer['multiply_adds'] == kernel.size
    assert printed.startswith(latency_report.latency_tables(result))


@pytest.mark.slow
def test_latency_of_a_layer(capsys):
    flags = {'model': 'fc:30x20:0.1', 'batches': '2', 'turns': 1, 'break_even': True}
    result = measure(LatencyConfig(**flags))
    assert {'JAX', 'JAX and C++', 'SciPy'} == set(result['break_even']['2'])
    assert all(density <= 0.5 or density == 1 for density in result['break_even']['2'].values())
    assert 'Sparse is as fast as dense' in capsys.readouterr().out


def test_latency_without_a_compiler(monkeypatch):
    monkeypatch.setattr(native, 'build_failure', lambda: 'no compiler')
    monkeypatch.setattr(latency, '_DENSITIES', latency._DENSITIES[:2])
    flags = {'model': 'fc:30x20:0.1', 'batches': '2', 'turns': 1, 'break_even': True}
    result = measure(LatencyConfig(**flags))
    assert (
        set(result['break_even']['2']) == set(result['batches']['2']['kinds']) == {'JAX', 'SciPy'}
    )
    assert result['command'].endswith(
        '--model=fc:30x20:0.1 --batches=2 --turns=1 --break_even=True'
    )


def test_latency_of_a_layer_of_any_name(tmp_path):
    weights = {'kernel': np.eye(5, 4, dtype=np.float32), 'bias': np.ones(4, np.float32)}
    masks = {'out': {'kernel': weights['kernel'] != 0, 'bias': np.array(True)}}
    metadata = {'chain': chain_to_json((Dense('out'),)), 'input_shape': '[5]'}
    save_sparse(tmp_path / 'w', {'out': weights}, masks, metadata)
    result = measure(LatencyConfig(model=str(tmp_path / 'w'), batches='2', turns=1))
    assert 'SciPy, the product alone' in result['batches']['2']['ways']


WAYS = {
    'resnet': {'dense JAX, as trained', 'ONNX Runtime'},
    'gpt': {'dense JAX, as trained', 'dense JAX, unrolled', 'ONNX Runtime'},
}


@pytest.mark.parametrize('kind', WAYS)
@pytest.mark.parametrize('empty_units', [False, True])
def test_latency_of_a_network_that_is_no_chain(tmp_path, capsys, kind, empty_units):
    """What has whole units without weights is also run without these; else nothing shrinks."""
    path, *_ = save_network(tmp_path, kind, empty_units=empty_units)
    result = measure(LatencyConfig(model=path, batches='2', turns=1))
    ways = result['batches']['2']['ways']
    assert ways.keys() == WAYS[kind] | ({'JAX, shrunken'} if empty_units else set())
    dense = [way['median_us'] for name, way in ways.items() if name.startswith('dense')]
    for way in ways.values():
        assert way['ratio'] == pytest.approx(min(dense) / way['median_us'])
    printed = capsys.readouterr().out
    assert printed.startswith(latency_report.latency_tables(result))
    assert 'This core needs' not in printed
    assert 'layers' not in result


def test_ways_that_give_other_outputs_are_refused(tmp_path, monkeypatch):
    """Also of a network that is no chain: here the shrunken one has one weight changed."""
    path, *_ = save_network(tmp_path, 'gpt', empty_units=True)

    def shrink_wrongly(*arguments):
        small = shrink(*arguments)
        small.params['output']['kernel'][0, 0] += 1
        return small

    monkeypatch.setattr(latency, 'shrink', shrink_wrongly)
    with pytest.raises(ValueError, match=r'JAX, shrunken is off by .* from dense JAX, as trained'):
        measure(LatencyConfig(model=path, batches='2', turns=1))


def test_crossing_is_where_the_ratio_is_1():
    assert _crossing([0.1] * 11) == 0
    assert _crossing([2.0] * 11) == 1
    assert _crossing([0.1, 2, 0.2, 0.5, *[2] * 7]) == pytest.approx((0.18 * 0.12) ** 0.5)
    # Half way, by logarithms, from 0.25 to 0.18.
    assert _crossing([0.1, 0.2, 0.5, 2, *[3] * 7]) == pytest.approx((0.25 * 0.18) ** 0.5)


def test_latency_where_a_process_has_no_core_of_its_own(monkeypatch):
    monkeypatch.delattr(os, 'sched_setaffinity')
    with pytest.raises(RuntimeError, match='on one core needs os'):
        measure(LatencyConfig())


@pytest.mark.parametrize(
    'flags', [{'batches': '0'}, {'batches': '1,'}, {'batches': 'x'}, {'break_even': True}]
)
def test_latency_flags_that_do_not_fit(flags):
    with pytest.raises(ValueError, match=r'--batches|--break_even'):
        LatencyConfig(**flags)
