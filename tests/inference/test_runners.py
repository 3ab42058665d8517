"""Tests of inference.runners and its steps: every way to compute a network gives what it gives."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import LENET5, LENET300, forward, networks
from networks import SMALL_CHAIN as CHAIN
from networks import SMALL_PARAMS as PARAMS

from dns_jax import apply_masks
from dns_jax.files.sparse import load_sparse
from dns_jax.inference import native
from dns_jax.inference.chain import Convolution, Dense, Flatten, MaxPool, Relu, Select
from dns_jax.inference.compact import compact
from dns_jax.inference.runners import (
    choose_kinds,
    jax_runner,
    recorded_kinds,
    scipy_runner,
    time_in_turns,
)
from experiments.zoo import FOLDER

needs_kernel = pytest.mark.skipif(bool(native.build_failure()), reason='no kernel')
WAYS = [
    (jax_runner, 'dense'),
    (jax_runner, 'sparse'),
    pytest.param(jax_runner, 'native', marks=needs_kernel),
    (scipy_runner, 'dense'),
    (scipy_runner, 'sparse'),
]


def weighted(chain):
    return [layer.name for layer in chain if isinstance(layer, Dense | Convolution)]


def run(make_runner, chain, params, inputs, kinds):
    inputs = jnp.asarray(inputs) if make_runner is jax_runner else inputs
    outputs = make_runner(chain, params, inputs.shape[1:], kinds)(inputs)
    assert outputs.dtype == np.float32
    return np.asarray(outputs)


@pytest.mark.parametrize(('make_runner', 'kind'), WAYS)
@settings(max_examples=15)
@given(networks(), st.sampled_from([1, 2, 9]))
def test_runners_give_what_the_network_gives(make_runner, kind, network, batch):
    chain, params, masks, shape = network
    masked = apply_masks(params, masks)
    inputs = np.random.default_rng(0).normal(size=(batch, *shape)).astype(np.float32)
    expected = np.stack([forward(chain, masked, example) for example in inputs])
    found = run(make_runner, chain, masked, inputs, dict.fromkeys(weighted(chain), kind))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


# What random chains have not: images that come out, selections at both ends, no weights at all.
EDGES = [
    ((Convolution('a'),), (4, 5, 3)),
    ((Convolution('a'), Select((0, 2)), MaxPool(2)), (5, 5, 3)),
    ((Select((0, 2)), Convolution('b')), (4, 5, 3)),
    ((Select((0, 3)), Dense('c')), (4,)),
    ((Dense('d'), Select((1, 4))), (4,)),
    ((Flatten(), Select((1, 2, 5)), Relu()), (2, 3, 1)),
    ((MaxPool(2), Flatten(), Select((1, 2))), (4, 2, 3)),
    ((Flatten(), Flatten()), (2, 2, 2)),
    ((), (2, 3)),
]
EDGE_SHAPES = {'a': (2, 2, 3, 4), 'b': (2, 2, 2, 4), 'c': (2, 3), 'd': (4, 6)}


@pytest.mark.parametrize(('make_runner', 'kind'), WAYS)
@pytest.mark.parametrize(('chain', 'shape'), EDGES)
def test_edges(make_runner, kind, chain, shape):
    random = np.random.default_rng(1)
    params = {
        name: {
            'kernel': (random.normal(size=size) * (random.random(size) < 0.5)).astype(np.float32),
            'bias': random.normal(size=size[-1:]).astype(np.float32),
        }
        for name, size in EDGE_SHAPES.items()
    }
    inputs = random.normal(size=(3, *shape)).astype(np.float32)
    expected = np.stack([forward(chain, params, example) for example in inputs])
    found = run(make_runner, chain, params, inputs, dict.fromkeys(weighted(chain), kind))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('make_runner', 'kind'), WAYS)
@pytest.mark.parametrize(('name', 'chain'), [('lenet5', LENET5), ('lenet300', LENET300)])
def test_networks_of_the_zoo(make_runner, kind, name, chain):
    network = load_sparse(FOLDER / f'{name}.safetensors')
    small = compact(chain, network.params, network.masks, (28, 28, 1))
    inputs = np.random.default_rng(0).random((2, 28, 28, 1), np.float32)
    expected = [forward(chain, network.params, example) for example in inputs]
    kinds = dict.fromkeys(weighted(chain), kind)
    found = run(make_runner, small.chain, small.params, inputs, kinds)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(('make_runner', 'kind'), WAYS)
@pytest.mark.parametrize('shape', [(1, 8, 8, 1), (0, 4, 4, 1), (4, 4, 1), (2, 16)])
def test_inputs_of_another_shape(make_runner, kind, shape):
    runner = make_runner(CHAIN, PARAMS, (4, 4, 1), {'a': kind, 'b': kind})
    with pytest.raises(ValueError, match=r'inputs must have the shape \(batch, 4, 4, 1\)'):
        runner(np.ones(shape, np.float32))


def test_all_dense_with_the_batch_last():
    images = jax.random.normal(jax.random.key(0), (3, 4, 4, 1))
    kinds = {'a': 'dense', 'b': 'dense'}
    first, last = (
        jax_runner(CHAIN, PARAMS, (4, 4, 1), kinds, batch_last) for batch_last in (False, True)
    )
    np.testing.assert_allclose(first(images), last(images), atol=1e-6)
    assert '3,4]' in str(jax.make_jaxpr(first)(images))  # (batch, pixels)
    assert ':f32[4,3] = dot_general' in str(jax.make_jaxpr(last)(images))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, np.float16])
@pytest.mark.parametrize(('make_runner', 'kind'), WAYS)
def test_narrow_weights(make_runner, kind, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    images = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32)
    found = run(make_runner, CHAIN, params, images, {'a': kind, 'b': kind})
    expected = np.stack([forward(CHAIN, PARAMS, image) for image in images])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_recorded_kinds(monkeypatch):
    text = '{"a": "native", "b": "sparse"}'
    monkeypatch.setattr(native, 'build_failure', lambda: '')
    assert recorded_kinds(text, CHAIN) == {'a': 'native', 'b': 'sparse'}
    monkeypatch.setattr(native, 'build_failure', lambda: 'no compiler')
    assert recorded_kinds(text, CHAIN) == {'a': 'dense', 'b': 'sparse'}


@pytest.mark.parametrize(
    'text', ['', '[]', '{}', '{"a": "dense"}', '{"a": "dense", "b": 3}', '{"a": "dense", "b": []}']
)
def test_recorded_kinds_of_other_layers(text):
    with pytest.raises(ValueError):  # noqa: PT011 - of JSON too
        recorded_kinds(text, CHAIN)


@pytest.mark.parametrize('wrong', [{'batch': 0}, {'batch': 1, 'turns': 0}])
def test_choice_by_no_time(wrong):
    with pytest.raises(ValueError, match='must be 1 or more'):
        choose_kinds(jax_runner, ['dense'], CHAIN, PARAMS, (4, 4, 1), **wrong)


def test_without_a_kernel(monkeypatch):
    monkeypatch.setattr(native, 'build_failure', lambda: 'no compiler')
    with pytest.raises(RuntimeError, match='no compiler'):
        jax_runner(CHAIN, PARAMS, (4, 4, 1), {'a': 'native', 'b': 'dense'})
    choice = choose_kinds(jax_runner, ['dense', 'native'], CHAIN, PARAMS, (4, 4, 1), 1, turns=1)
    assert choice.kinds == {'a': 'dense', 'b': 'dense'}


def choose(slow, turns=3):
    """Chooses among runners that take 0.2 ms for a layer, or 2 ms where `slow` says so."""

    def make_runner(chain, params, shape, kinds):
        waits = [2e-3 if slow(name, kinds) else 2e-4 for name in kinds]
        return lambda inputs: threading.Event().wait(sum(waits)) or inputs

    return choose_kinds(make_runner, ['dense', 'sparse'], CHAIN, PARAMS, (4, 4, 1), 1, turns)


def test_the_fastest_way_is_chosen():
    choice = choose(lambda name, kinds: (name == 'a') == (kinds[name] == 'dense'))
    assert choice.kinds == {'a': 'sparse', 'b': 'dense'}
    assert choice.seconds['a']['dense'] > choice.seconds['a']['sparse'] > 1e-4
    assert choice.seconds['b']['sparse'] > choice.seconds['b']['dense'] > 1e-4


def test_a_layer_is_chosen_for_where_it_stands():
    def slow(name, kinds):
        return kinds[name] == ('sparse' if set(kinds) == {'b'} else 'dense')

    choice = choose(slow)
    assert choice.seconds['b']['sparse'] > choice.seconds['b']['dense']
    assert choice.kinds == {'a': 'sparse', 'b': 'sparse'}


def test_all_dense_is_chosen_where_the_whole_is_faster():
    def slow(name, kinds):
        if len(kinds) == 1:
            return kinds[name] == 'dense'
        return set(kinds.values()) != {'dense'}  # one layer changed does not get there

    assert choose(slow).kinds == {'a': 'dense', 'b': 'dense'}


@pytest.mark.parametrize('offered', [[], ['fast']])
def test_choice_of_nothing(offered):
    with pytest.raises(ValueError, match='offered must be some of'):
        choose_kinds(jax_runner, offered, CHAIN, PARAMS, (4, 4, 1), 1)


def test_turns_alternate():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in 'ab'}
    times = time_in_turns(calls, turns=3, least=0)
    assert ''.join(order).endswith('ababab')
    assert all(times[name].shape == (3,) and (times[name] > 0).all() for name in 'ab')
