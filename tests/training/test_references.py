"""Tests of training.references; what is read of Caffe, and which runs are refused."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import opened
import pytest
from wire import blob, layer

import dns_jax
from dns_jax.files.caffe import read_caffemodel
from experiments.artefacts import caffe_names
from experiments.config.command_line import identify
from experiments.networks import models
from experiments.training import references, run, side_by_side
from experiments.training.flags import Config
from experiments.training.steps import TrainState

SHAPES = ((784, 300), (300, 100), (100, 10))


@pytest.fixture(scope='module')
def like():
    network = models.NETWORKS['lenet300']()
    images = jax.ShapeDtypeStruct((1, 28, 28, 1), np.float32)
    return TrainState(jax.eval_shape(network.init, jax.random.key(0), images)['params'], ())


def lenet300(last_outputs=10, masks=False):
    """The layers of LeNet-300-100 as Caffe would store them, and their weights."""
    random, content, weights = np.random.default_rng(0), b'', []
    for number, (inputs, outputs) in enumerate(SHAPES, start=1):
        outputs = last_outputs if number == 3 else outputs
        kernel = random.normal(size=(outputs, inputs)).astype(np.float32)
        bias = random.normal(size=outputs).astype(np.float32)
        marks = [kernel > 0, bias > 0] if masks else []
        content += layer(f'ip{number}', 'InnerProduct', *map(blob, [kernel, bias, *marks]))
        weights.append((kernel * (kernel > 0), bias * (bias > 0)) if masks else (kernel, bias))
    return content, weights


def make_config(path, network='lenet300', **fields):
    fields = {'c_rate': '1', 'train_on_all': True, **fields}
    return Config(network, reference=str(path), **fields)


def read(config, like):
    return references.read(Path(config.reference), identify(config), like)


@pytest.mark.parametrize('masks', [False, True])
def test_a_caffemodel_is_a_reference(tmp_path, like, masks):
    content, weights = lenet300(masks=masks)
    path = tmp_path / 'net.caffemodel'
    path.write_bytes(content)
    params, statistics = read(make_config(path), like)
    assert statistics == {}
    assert jax.tree.structure(params) == jax.tree.structure(like.params)
    for number, (kernel, bias) in enumerate(weights, start=1):
        np.testing.assert_array_equal(params[f'fc{number}']['kernel'], kernel.T)
        np.testing.assert_array_equal(params[f'fc{number}']['bias'], bias)
    # Else the loop would be compiled a second time for the state that it gives back.
    assert not any(leaf.committed for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize('kind', ['missing', 'damaged', 'other network'])
def test_a_caffemodel_that_will_not_do(tmp_path, like, kind):
    path = tmp_path / 'net.caffemodel'
    error, message = ValueError, 'cannot read'
    if kind == 'missing':
        error, message = FileNotFoundError, 'net.caffemodel'
    elif kind == 'damaged':
        path.write_bytes(lenet300()[0][:-1])
    else:
        path.write_bytes(lenet300(last_outputs=11)[0])
        message = r"--reference=.* holds the shapes .*'kernel': \(100, 11\).*; wanted .*\(100, 10\)"
    with pytest.raises(error, match=message):
        read(make_config(path), like)


def test_a_caffemodel_may_have_seen_the_validation_images(like):
    with pytest.raises(ValueError, match=r'--reference=some\.caffemodel .* with --train_on_all'):
        read(make_config('some.caffemodel', train_on_all=False), like)


@pytest.fixture
def digits_config(tmp_path, data_dir):
    """Makes configurations of short runs on the digits."""
    return functools.partial(
        make_config, dataset='digits', data_dir=str(data_dir), workdir=str(tmp_path / 'run')
    )


def test_a_run_starts_from_it(tmp_path, digits_config):
    content, weights = lenet300()
    (tmp_path / 'net.caffemodel').write_bytes(content)
    opened_run = opened.open_run(digits_config(tmp_path / 'net.caffemodel'))
    ((params, _),) = side_by_side.train_references([opened_run], [])
    np.testing.assert_array_equal(params['fc1']['kernel'], weights[0][0].T)
    assert not (tmp_path / 'run' / 'checkpoints' / 'reference').exists()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (None, r'--reference=.*other has no .*checkpoints/reference'),
        ({}, r'reference holds steps \[\]; wanted the checkpoint of step 9'),
        ({'network': 'lenet5'}, "is of a run with network 'lenet5'; wanted 'lenet300'"),
        ({'dataset': 'mnist'}, "is of a run with dataset 'mnist'; wanted 'digits'"),
        ({'train_on_all': False}, 'is of a run with train_on_all False; wanted True'),
    ],
)
def test_a_run_that_is_no_reference_is_refused(tmp_path, digits_config, flags, message):
    config, other = digits_config(tmp_path / 'other'), tmp_path / 'other'
    if flags is not None:
        (other / 'checkpoints' / 'reference').mkdir(parents=True)
        own = {**identify(config), 'reference_steps': 9, **flags}
        (other / 'flags.json').write_text(json.dumps(own))
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        run.run(config)
    # What is misspelt leaves no run behind that would be in the way of the next attempt.
    assert not (tmp_path / 'run').exists()


SIZES = {'alexnet': 71, 'vgg16': 64}  # pixels a side, of which two by two maps are left


def small_weights(name):
    """Weights of a narrow network for colour images."""
    network = models.NETWORKS[name](classes=10, width=1 / 32)
    images = jax.ShapeDtypeStruct((1, SIZES[name], SIZES[name], 3), np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)['params']
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize('name', SIZES)
@pytest.mark.parametrize('masked', [None, 'all', 'above the first'])
def test_a_file_written_for_caffe_is_a_reference(tmp_path, name, masked):
    params, path = small_weights(name), tmp_path / 'net.caffemodel'
    first = next(iter(params))
    masks = jax.tree.map(lambda leaf: leaf > 0, params) if masked else None
    if masked == 'above the first':
        masks[first] = {'kernel': np.ones((), bool), 'bias': np.ones((), bool)}
    caffe_names.write_caffemodel(path, name, params, masks)

    layers = read_caffemodel(path)
    assert list(layers) == list(params)
    # Caffe has blue first, maps before rows and columns, and as many rows as outputs.
    flat = next(layer for layer, leaves in params.items() if leaves['kernel'].ndim == 2)
    for layer_name, leaves in params.items():
        kernel, outputs = leaves['kernel'], len(leaves['bias'])
        if layer_name == flat:
            kernel = kernel.reshape(2, 2, -1, outputs)
        if layer_name == first:
            kernel = kernel[:, :, ::-1]
        weight, bias, *_ = layers[layer_name].blobs
        wanted = np.moveaxis(kernel, (-1, -2), (0, 1)).reshape(weight.shape)
        np.testing.assert_array_equal(weight, wanted)
        np.testing.assert_array_equal(bias.ravel(), leaves['bias'])

    found = read(make_config(path, name), TrainState(params, ())).params
    pruned = dns_jax.apply_masks(params, masks) if masked else params
    jax.tree.map(np.testing.assert_array_equal, found, pruned)


def test_the_small_networks_are_written_with_the_names_that_caffe_gave_them(tmp_path, like):
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), like.params)
    path = tmp_path / 'net.caffemodel'
    caffe_names.write_caffemodel(path, 'lenet300', params)
    assert list(read_caffemodel(path)) == ['ip1', 'ip2', 'ip3']
    found = read(make_config(path), like).params
    jax.tree.map(np.testing.assert_array_equal, found, params)
