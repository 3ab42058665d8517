"""Tests of export: a pruned network in every form."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from networks import LENET300
from pruned_files import inputs_of, save_network
from safetensors.numpy import load_file

import experiments.export
from dns_jax import apply_masks
from dns_jax.files.caffe import read_caffemodel, to_linen
from dns_jax.files.codec import load_coded
from dns_jax.files.sparse import load_sparse, save_sparse
from dns_jax.inference.chain import run_chain
from dns_jax.inference.runners import Choice, recorded_kinds
from dns_jax.layers import named_leaves
from experiments.artefacts.loading import load_model
from experiments.export import ExportConfig, export
from experiments.latency import LatencyConfig, measure
from experiments.networks import models
from experiments.zoo import FOLDER

ZOO = str(FOLDER / 'lenet300.safetensors')
IMAGES = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)


@pytest.fixture(scope='module')
def expected():
    model = load_model(ZOO)
    return np.asarray(run_chain(model.chain, model.params, IMAGES))


def run_export(tmp_path, capsys, **flags):
    path = tmp_path / 'file.dns'
    result = export(ExportConfig(model=ZOO, output=str(path), **flags))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result['bytes'] == path.stat().st_size
    assert result['dense_bytes'] == 1_066_440
    assert result['ratio'] == result['dense_bytes'] / result['bytes']
    return path, result


def test_export_caffemodel(tmp_path, capsys):
    """Read back as the authors' files are: weights and masks apart, and fc1 named ip1."""
    path, _ = run_export(tmp_path, capsys, format='caffemodel')
    layers = read_caffemodel(path)
    assert list(layers) == ['ip1', 'ip2', 'ip3']
    params, masks = to_linen(layers, lambda name: name.replace('ip', 'fc'))
    jax.tree.map(np.testing.assert_array_equal, (params, masks), load_sparse(ZOO)[:2])


@pytest.mark.slow
def test_alexnet_is_exported_to_caffe_but_not_run(tmp_path, capsys):
    network = models.AlexNet(classes=10, width=1 / 32)
    params = network.init(jax.random.key(0), jnp.zeros((1, 39, 39, 3)))['params']
    masks = jax.tree.map(lambda leaf: leaf > 0, params)
    pruned, path = tmp_path / 'pruned.safetensors', tmp_path / 'file.caffemodel'
    save_sparse(pruned, params, masks, {'network': 'alexnet'})
    export(ExportConfig(model=str(pruned), format='caffemodel', output=str(path)))
    kernel = read_caffemodel(path)['conv1'].blobs[0]
    expected = apply_masks(params, masks)['conv1']['kernel']
    # (height, width, red to blue, output) becomes (output, blue to red, height, width).
    np.testing.assert_array_equal(kernel, expected[:, :, ::-1].transpose(3, 2, 0, 1))
    with pytest.raises(ValueError, match="names the network 'alexnet', which is none of"):
        export(ExportConfig(model=str(pruned), format='sparse'))
    with pytest.raises(ValueError, match='to be coded it must be one of'):
        export(ExportConfig(model=str(pruned), format='coded'))


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        (
            'caffemodel',
            r"caffemodel needs a network of \['alexnet', 'lenet300', 'lenet5', 'vgg16'\]",
        ),
        ('coded', 'it must be one of'),
    ],
)
def test_a_network_without_a_name_has_not_every_format(tmp_path, name, message):
    config = ExportConfig(model='fc:3x4:1', format=name, output=str(tmp_path / 'x.dns'))
    with pytest.raises(ValueError, match=message):
        export(config)


def test_export_dense(tmp_path, capsys, expected):
    path, _ = run_export(tmp_path, capsys, format='dense')
    tensors = load_file(path)
    params = {
        name: {leaf: tensors[f'{name}.{leaf}'] for leaf in ('kernel', 'bias')}
        for name in ('fc1', 'fc2', 'fc3')
    }
    np.testing.assert_array_equal(run_chain(LENET300, params, IMAGES), expected)


def test_export_sparse(tmp_path, capsys, monkeypatch, expected):
    kinds, batches = {'fc1': 'sparse', 'fc2': 'dense', 'fc3': 'dense'}, []

    def choose(*arguments):
        batches.append(arguments[-1])
        return Choice(kinds, {})

    monkeypatch.setattr(experiments.export, 'choose_kinds', choose)
    path, _ = run_export(tmp_path, capsys, format='sparse', batch=7)
    assert batches == [7]
    path = path.rename(tmp_path / 'file.safetensors')
    model = load_model(str(path))
    assert model.params['fc1']['kernel'].shape[0] < 784
    assert recorded_kinds(model.metadata['kinds'], model.chain) == kinds
    assert model.metadata['kinds_batch'] == '7'
    outputs = run_chain(model.chain, model.params, IMAGES.reshape(3, *model.input_shape))
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    # Its layers are no longer those of the network it was: dense is what it has.
    assert 'network' not in model.metadata
    with pytest.raises(ValueError, match='to be coded it must be one of'):
        export(ExportConfig(model=str(path), format='coded'))


@pytest.mark.slow
def test_latency_is_also_that_of_what_a_file_says(tmp_path, capsys):
    path, _ = run_export(tmp_path, capsys, format='sparse')
    path = path.rename(tmp_path / 'file.safetensors')
    result = measure(LatencyConfig(model=str(path), batches='1', turns=1))
    assert 'JAX, as the file says' in result['batches']['1']['ways']


def test_export_onnx(tmp_path, capsys, expected):
    path, result = run_export(tmp_path, capsys, format='onnx')
    outputs = onnxruntime.InferenceSession(path).run(None, {'inputs': IMAGES})[0]
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    assert result['ratio'] > 5  # compact


def test_export_stablehlo(tmp_path, capsys, expected):
    path, result = run_export(tmp_path, capsys, format='stablehlo')
    program = jax.export.deserialize(path.read_bytes())
    np.testing.assert_allclose(program.call(IMAGES), expected, atol=1e-5)
    assert result['ratio'] > 5


@pytest.mark.slow
def test_export_coded(tmp_path, capsys):
    """Digits stand in for MNIST, which only makes the errors meaningless."""
    flags = {'dataset': 'digits', 'data_dir': str(tmp_path / 'tfds'), 'clusters': 'fc1:4,*:8'}
    path, untuned = run_export(tmp_path, capsys, format='coded', finetuning_steps=0, **flags)
    before = load_coded(path)
    assert {layer: len(book) for layer, book in before.codebooks.items()} == {
        'fc1': 4,
        'fc2': 8,
        'fc3': 8,
    }
    with jax.numpy_dtype_promotion('standard'):  # which optax's Adam takes for granted
        flags |= {'finetuning_steps': 200, 'learning_rate': 0.02}
        _, tuned = run_export(tmp_path, capsys, format='coded', **flags)
    after = load_coded(path)
    assert tuned['bytes'] < 4_000
    assert any((before.codebooks[name] != after.codebooks[name]).any() for name in after.codebooks)
    assert untuned['error_before'] == tuned['error_before']
    assert (
        tuned['error'] < untuned['error'] - 5
    )  # tuned on digits, which MNIST's network has not seen
    model = load_model(str(path))
    assert model.chain == LENET300
    for name, weights in load_model(ZOO).params.items():
        np.testing.assert_array_equal(
            model.masks[name]['kernel'], load_sparse(ZOO).masks[name]['kernel']
        )
        assert weights['kernel'].shape == model.params[name]['kernel'].shape


@pytest.fixture(scope='module', params=['resnet', 'gpt'])
def trained(request, tmp_path_factory):
    """A file of a network that is no chain, and what the network gives for three examples."""
    path, network, variables, masks = save_network(tmp_path_factory.mktemp('run'), request.param)
    tree = variables if request.param == 'resnet' else variables['params']
    pruned, inputs = apply_masks(tree, masks), inputs_of(request.param, 3)
    outputs = network.apply(pruned if request.param == 'resnet' else {'params': pruned}, inputs)
    return path, pruned, inputs, np.asarray(outputs)


def test_a_trained_network_is_exported_dense(trained, tmp_path):
    path, pruned, *_ = trained
    export(ExportConfig(model=path, format='dense', output=str(tmp_path / 'file')))
    tensors = load_file(tmp_path / 'file')
    named = {name.replace('/', '.'): leaf for name, leaf in named_leaves(pruned)}
    assert tensors.keys() == named.keys()
    for name, leaf in named.items():
        np.testing.assert_array_equal(tensors[name], leaf)


def test_a_trained_network_is_exported_sparse_as_it_is(trained, tmp_path):
    path = trained[0]
    export(ExportConfig(model=path, format='sparse', output=str(tmp_path / 'file')))
    assert (tmp_path / 'file').read_bytes() == Path(path).read_bytes()
    with pytest.raises(ValueError, match=r'--batch=2 has no meaning for .*: no chain'):
        export(ExportConfig(model=path, format='sparse', batch=2, output=str(tmp_path / 'x')))


def test_a_trained_network_is_exported_to_stablehlo(trained, tmp_path):
    path, _, inputs, outputs = trained
    export(ExportConfig(model=path, format='stablehlo', output=str(tmp_path / 'file')))
    program = jax.export.deserialize((tmp_path / 'file').read_bytes())
    np.testing.assert_allclose(program.call(inputs), outputs, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(program.call(inputs[:1]), outputs[:1], rtol=1e-4, atol=1e-6)


def test_a_trained_network_is_exported_to_onnx(trained, tmp_path):
    path, _, inputs, outputs = trained
    export(ExportConfig(model=path, format='onnx', output=str(tmp_path / 'file')))
    session = onnxruntime.InferenceSession(tmp_path / 'file')
    for batch in (1, 3):
        (got,) = session.run(None, {'inputs': inputs[:batch]})
        np.testing.assert_allclose(got, outputs[:batch], rtol=1e-4, atol=1e-6)


def test_a_trained_network_is_not_exported_to_caffe(trained, tmp_path):
    with pytest.raises(ValueError, match='caffemodel needs a network of'):
        export(ExportConfig(model=trained[0], format='caffemodel', output=str(tmp_path / 'x')))


TUNING = {'clusters': '4', 'finetuning_steps': 4, 'learning_rate': 1e-2, 'batch_size': 16}


@pytest.fixture(scope='module')
def coded(tmp_path_factory, data_dir):
    """Writes coded files on digits; the same flags give the same bytes."""
    path = tmp_path_factory.mktemp('coded') / 'file.dns'

    def write(**flags):
        places = {'dataset': 'digits', 'data_dir': str(data_dir), 'output': str(path)}
        with jax.numpy_dtype_promotion('standard'):
            export(ExportConfig(model=ZOO, format='coded', **places, **{**TUNING, **flags}))
        return path.read_bytes()

    return write, write()


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        *(('clusters', '5'), ('tuned', 'codebooks'), ('finetuning_steps', 5), ('batch_size', 17)),
        *(('learning_rate', 2e-2), ('seed', 1), ('train_on_all', True)),
    ],
)
@pytest.mark.slow
def test_a_flag_of_coding_has_an_effect(coded, name, value):
    write, plain = coded
    assert write(**{name: value}) != plain


def test_a_coded_file_repeats_itself(coded):
    write, plain = coded
    assert write() == plain


@pytest.mark.parametrize(
    'flags',
    [
        {'format': 'onnx', 'clusters': '3'},
        {'format': 'sparse', 'finetuning_steps': 3},
        {'format': 'dense', 'batch': 3},
        {'format': 'coded', 'batch': 3},
        {'format': 'coded', 'clusters': 'fc1:x'},
        {'format': 'coded', 'finetuning_steps': 0, 'seed': 3},
        {'format': 'coded', 'output': 'coded.safetensors'},
    ],
)
def test_export_flags_that_mean_nothing(flags):
    with pytest.raises(ValueError, match=r'has no meaning beside|--clusters|must end in .dns'):
        ExportConfig(**flags)
