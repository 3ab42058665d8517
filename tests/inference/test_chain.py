"""Tests of inference.chain: what layers compute, and that a chain that does not fit is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import LENET5, LENET300, forward, networks

from dns_jax.inference.chain import (
    Convolution,
    Dense,
    MaxPool,
    Relu,
    Select,
    chain_from_json,
    chain_to_json,
    run_chain,
    trace_shapes,
)
from experiments.networks import models


@settings(max_examples=25)
@given(networks(), st.integers(1, 3))
def test_chain_computes_what_its_layers_are(network, batch):
    chain, params, _, shape = network
    inputs = np.random.default_rng(0).normal(size=(batch, *shape)).astype(np.float32)
    expected = np.stack([forward(chain, params, example) for example in inputs])
    outputs = run_chain(chain, params, jnp.asarray(inputs))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-4)
    shapes = trace_shapes(chain, params, shape)
    assert shapes[0] == shape
    for layer, before, after in zip(chain, shapes, shapes[1:], strict=False):
        some = jax.ShapeDtypeStruct((2, *before), np.float32)
        assert jax.eval_shape(lambda x, at=layer: run_chain((at,), params, x), some).shape == (
            2,
            *after,
        )


@pytest.mark.parametrize(('name', 'chain'), [('lenet5', LENET5), ('lenet300', LENET300)])
def test_chains_of_the_networks(name, chain):
    assert models.CHAINS[name] == chain
    images = jax.random.normal(jax.random.key(0), (3, 28, 28, 1))
    network = models.NETWORKS[name]()
    params = network.init(jax.random.key(1), images)['params']
    np.testing.assert_allclose(
        run_chain(chain, params, images), network.apply({'params': params}, images), atol=1e-5
    )


@given(networks())
def test_json_round_trip(network):
    assert chain_from_json(chain_to_json(network[0])) == network[0]


@pytest.mark.parametrize(
    'text',
    [
        *('', '{}x', '3', 'null', '[3]', '[[]]', '[{}]', '{"kind": "Relu"}', '[' * 10_000),
        *('[{"kind": "Tanh"}]', '[{"kind": "Relu", "name": "a"}]', '[{"kind": "Dense"}]'),
        *('[{"kind": "Dense", "name": 3}]', '[{"kind": "MaxPool", "size": 2.0}]'),
        *('[{"kind": "MaxPool", "size": true}]', '[{"kind": "Select", "indices": 3}]'),
        *('[{"kind": "Select", "indices": ["0"]}]', '[{"kind": [], "name": "a"}]'),
        '[{"kind": "Convolution", "name": "a", "padding": 1}]',
        f'[{{"kind": "Select", "indices": [{10**30}]}}]',
    ],
)
def test_json_of_no_chain(text):
    with pytest.raises(ValueError, match='cannot be read'):
        chain_from_json(text)


def test_json_is_readable_by_anyone():
    assert json.loads(chain_to_json((Convolution('a'), Select((0, 2))))) == [
        {'kind': 'Convolution', 'name': 'a', 'padding': 'VALID'},
        {'kind': 'Select', 'indices': [0, 2]},
    ]


def weights(*shape):
    return {'kernel': np.ones(shape, np.float32), 'bias': np.ones(shape[-1], np.float32)}


@pytest.mark.parametrize(
    ('chain', 'params', 'shape', 'match'),
    [
        ((Dense('a'),), {}, (2,), r'chain\[0\].*needs a kernel and a bias'),
        ((Dense('a'),), None, (2,), 'needs a kernel and a bias'),
        ((Dense('a'),), {'a': {'kernel': np.ones((2, 2))}}, (2,), 'needs a kernel and a bias'),
        ((Dense('a'), Dense('a')), {'a': weights(2, 2)}, (2,), 'name of a layer before'),
        ((Dense('a'),), {'a': weights(3, 2)}, (2,), r'\(3, 2\) for inputs of \(2,\)'),
        ((Dense('a'),), {'a': weights(1, 1, 2, 2)}, (2,), 'kernel of shape'),
        ((Dense('a'),), {'a': {**weights(2, 2), 'bias': np.ones(3)}}, (2,), 'bias of'),
        ((Dense('a'),), {'a': weights(2, 2)}, (4, 4, 2), 'needs inputs of 1 axes'),
        ((Convolution('a'),), {'a': weights(3, 3, 1, 1)}, (2, 4, 1), 'kernel of shape'),
        ((Convolution('a'),), {'a': weights(3, 3, 2, 1)}, (4, 4, 1), 'kernel of shape'),
        ((Convolution('a', 'FULL'),), {'a': weights(1, 1, 1, 1)}, (4, 4, 1), 'must have the pad'),
        ((Convolution('a'),), {'a': weights(1, 1, 1, 1)}, (4,), 'needs inputs of 3 axes'),
        ((MaxPool(5),), {}, (4, 6, 1), 'does not fit'),
        ((MaxPool(0),), {}, (4, 6, 1), 'does not fit'),
        ((Select(()),), {}, (4,), 'ascending'),
        ((Select((1, 1)),), {}, (4,), 'ascending'),
        ((Select((-1,)),), {}, (4,), 'ascending'),
        ((Select((4,)),), {}, (4,), 'names 4, but the inputs'),
        ((Relu(),), {}, (), 'needs inputs of 1 axes'),
        ((Relu(),), {}, (3, 0), 'lengths above 0'),
        ((Dense('a'),), {'a': weights(2, 0)}, (2,), 'kernel of shape'),
    ],
)
def test_chain_that_does_not_fit(chain, params, shape, match):
    with pytest.raises(ValueError, match=match):
        trace_shapes(chain, params, shape)


def test_chain_of_other_things():
    with pytest.raises(TypeError, match='not a layer'):
        trace_shapes(('relu',), {}, (2,))
    whole = {'a': {'kernel': np.ones((2, 2), np.int32), 'bias': np.ones(2, np.int32)}}
    with pytest.raises(TypeError, match='not floating-point'):
        trace_shapes((Dense('a'),), whole, (2,))
