"""Tests of artefacts.loading, export and latency: files of networks, and their timing."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from networks import LENET5, LENET300
from safetensors.numpy import load_file

import experiments.export
from dns_jax import apply_masks
from dns_jax.files.caffe import read_caffemodel, to_linen
from dns_jax.files.codec import load_coded
from dns_jax.files.sparse import load_sparse, save_sparse
from dns_jax.inference import native
from dns_jax.inference.chain import (
    Convolution,
    Dense,
    Flatten,
    MaxPool,
    Relu,
    Select,
    chain_to_json,
    run_chain,
)
from dns_jax.inference.runners import Choice, jax_runner, recorded_kinds
from experiments.artefacts import loading
from experiments.artefacts.loading import load_model
from experiments.export import ExportConfig, export
from experiments.latency import LatencyConfig, _crossing, measure
from experiments.measurements import latency_report, timing
from experiments.networks import models
from experiments.zoo import FOLDER

ZOO = str(FOLDER / 'lenet300.safetensors')
IMAGES = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)


@pytest.fixture(scope='module')
def expected():
    model = load_model(ZOO)
    return np.asarray(run_chain(model.chain, model.params, IMAGES))


def test_models_of_the_zoo():
    for name, chain in (('lenet300', LENET300), ('lenet5', LENET5)):
        model = load_model(str(FOLDER / f'{name}.safetensors'))
        assert model.chain == chain
        assert model.input_shape == (28, 28, 1)
        assert model.metadata['network'] == model.name == name


def test_synthetic_layer():
    model = load_model('fc:80x50:0.1')
    kernel = model.params['fc']['kernel']
    assert kernel.shape == (80, 50)
    assert 0.05 < np.count_nonzero(kernel) / kernel.size < 0.15
    np.testing.assert_array_equal(kernel != 0, model.masks['fc']['kernel'])
    np.testing.assert_array_equal(kernel, load_model('fc:80x50:0.1').params['fc']['kernel'])


@pytest.mark.parametrize('name', ['fc:', 'fc:3x4', 'fc:0x4:0.1', 'fc:3x4:2', 'fc:3x4:1.5'])
def test_synthetic_layer_of_no_shape(name):
    with pytest.raises(ValueError, match='must be fc:INPUTSxUNITS:DENSITY'):
        load_model(name)


def test_synthetic_layer_of_too_many_weights():
    with pytest.raises(ValueError, match='has 999998000001 weights, over'):
        load_model('fc:999999x999999:0.1')


def test_file_of_an_unknown_network(tmp_path):
    save_sparse(tmp_path / 'w', np.ones(2, np.float32), np.array(True), {'network': 'resnet'})
    with pytest.raises(ValueError, match='w holds no network to run: it has no chain'):
        load_model(str(tmp_path / 'w'))


EMPTY = np.ones((5, 5, 1, 0), np.float32)
KEPT = {'kernel': np.array(True), 'bias': np.array(True)}


@pytest.mark.parametrize(
    ('params', 'masks'),
    [
        (np.ones(2, np.float32), np.array(True)),
        ({'conv1': np.ones(2, np.float32)}, {'conv1': np.array(True)}),
        ({'conv1': {'kernel': EMPTY, 'bias': EMPTY[0, 0, 0]}}, {'conv1': KEPT}),
    ],
)
def test_files_of_other_trees(tmp_path, params, masks):
    save_sparse(tmp_path / 'w', params, masks, {'network': 'lenet5'})
    with pytest.raises(ValueError, match='w holds no network to run'):
        load_model(str(tmp_path / 'w'))


def test_files_whose_metadata_is_damaged(tmp_path):
    """10,000 chains and shapes with letters changed, lost or doubled: a network or ValueError."""
    random = np.random.default_rng(0)
    path = tmp_path / 'small.safetensors'
    chain = (Convolution('a'), Relu(), MaxPool(2), Flatten(), Select((0, 3)), Dense('b'))
    params = {
        'a': {'kernel': np.ones((2, 2, 1, 1), np.float32), 'bias': np.ones(1, np.float32)},
        'b': {'kernel': np.ones((2, 3), np.float32), 'bias': np.ones(3, np.float32)},
    }
    masks = {name: {'kernel': np.array(True), 'bias': np.array(True)} for name in params}
    sound = {'chain': chain_to_json(chain), 'input_shape': '[5, 5, 1]'}
    save_sparse(path, params, masks, sound)
    assert load_model(str(path)).chain == chain
    network = load_sparse(path)
    refused = 0
    for _ in range(10_000):
        damaged = dict(sound)
        name = random.choice(list(damaged))
        text = list(damaged[name])
        for _ in range(random.integers(1, 4)):
            at = random.integers(len(text))
            text[at] = random.choice(['', '0', '9', '-', '"', ',', ']', '{', 'x', 2 * text[at]])
        damaged[name] = ''.join(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                loading,
                'load_sparse',
                lambda _, damaged=damaged: network._replace(metadata=damaged),
            )
            try:
                load_model(str(path))
            except ValueError:
                refused += 1
    assert refused > 5_000


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
    for format_ in ('sparse', 'coded'):
        with pytest.raises(ValueError, match="names the network 'alexnet', which is none of"):
            export(ExportConfig(model=str(pruned), format=format_))


def test_a_network_without_a_name_is_not_for_caffe(tmp_path):
    config = ExportConfig(model='fc:3x4:1', format='caffemodel', output=str(tmp_path / 'x'))
    with pytest.raises(ValueError, match='--format=caffemodel needs a network of'):
        export(config)


def test_export_dense(tmp_path, capsys, expected):
    path, _ = run_export(tmp_path, capsys, format='dense')
    tensors = load_file(path)
    params = {
        name: {leaf: tensors[f'{name}.{leaf}'] for leaf in ('kernel', 'bias')}
        for name in ('fc1', 'fc2', 'fc3')
    }
    np.testing.assert_array_equal(run_chain(LENET300, params, IMAGES), expected)


def test_export_sparse(tmp_path, capsys, expected):
    path, _ = run_export(tmp_path, capsys, format='sparse')
    path = path.rename(tmp_path / 'file.safetensors')
    model = load_model(str(path))
    assert model.params['fc1']['kernel'].shape[0] < 784
    kinds = recorded_kinds(model.metadata['kinds'], model.chain)
    assert model.metadata['kinds_batch'] == '1'
    run = jax_runner(model.chain, model.params, model.input_shape, kinds)
    np.testing.assert_allclose(run(jax.numpy.asarray(IMAGES)), expected, atol=1e-5)
    # Its layers are no longer those of the network it was: dense is what it has.
    assert 'network' not in model.metadata
    result = measure(LatencyConfig(model=str(path), batches='1', turns=1))
    assert 'JAX, as the file says' in result['batches']['1']['ways']
    with pytest.raises(ValueError, match='--format=coded needs a network of'):
        export(ExportConfig(model=str(path), format='coded'))


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


TUNING = {'clusters': '4', 'finetuning_steps': 10, 'learning_rate': 1e-2, 'batch_size': 16}


@pytest.fixture(scope='module')
def coded(tmp_path_factory):
    """Writes coded files on digits; the same flags give the same bytes."""
    folder = tmp_path_factory.mktemp('coded')

    def write(**flags):
        path = folder / 'file.dns'
        places = {'dataset': 'digits', 'data_dir': str(folder / 'tfds'), 'output': str(path)}
        with jax.numpy_dtype_promotion('standard'):
            export(ExportConfig(model=ZOO, format='coded', **places, **{**TUNING, **flags}))
        return path.read_bytes()

    return write, write()


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        *(('clusters', '5'), ('tuned', 'codebooks'), ('finetuning_steps', 11), ('batch_size', 17)),
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


def test_export_for_a_batch(tmp_path, capsys, monkeypatch):
    batches = []

    def choose(*arguments):
        batches.append(arguments[-1])
        return Choice({}, {})

    monkeypatch.setattr(experiments.export, 'choose_kinds', choose)
    run_export(tmp_path, capsys, format='sparse', batch=7)
    assert batches == [7]


def test_export_of_what_has_no_network(tmp_path):
    with pytest.raises(ValueError, match='--format=coded needs a network of'):
        export(ExportConfig(model='fc:3x4:1', format='coded', output=str(tmp_path / 'x.dns')))


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


def test_crossing_is_where_the_ratio_is_1():
    assert _crossing([0.1] * 11) == 0
    assert _crossing([2.0] * 11) == 1
    assert _crossing([0.1, 2, 0.2, 0.5, *[2] * 7]) == pytest.approx((0.18 * 0.12) ** 0.5)
    # Half way, by logarithms, from 0.25 to 0.18.
    assert _crossing([0.1, 0.2, 0.5, 2, *[3] * 7]) == pytest.approx((0.25 * 0.18) ** 0.5)


def test_one_core():
    before = os.sched_getaffinity(0)
    with timing.on_one_core():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_latency_where_a_process_has_no_core_of_its_own(monkeypatch):
    monkeypatch.delattr(os, 'sched_setaffinity')
    with pytest.raises(RuntimeError, match='on one core needs os'):
        measure(LatencyConfig())


def test_bounds_are_those_of_the_machine():
    layer = {'inputs': 10, 'units': 20, 'weights': 200, 'kept': 50, 'numbers': 30}
    layer |= {'multiply_adds': 200, 'kept_multiply_adds': 50}
    batch = {'seconds': {'JAX and C++': {'fc': {'dense': 2e-6, 'native': 3e-6}}}}
    batch['kinds'] = {'JAX and C++': {'fc': 'native'}}
    batch['ways'] = {'dense JAX': {'median_us': 1, 'least_us': 1, 'ratio': 1}}
    result = {'model': 'm', 'command': 'c', 'device': 'd', 'layers': {'fc': layer}}
    result |= {'batches': {'1': batch, '1000': batch}}
    text = latency_report.latency_tables({**result, 'multiply_adds_per_s': 1e9, 'bytes_per_s': 1e9})
    row = text.splitlines()[-1]
    # Bytes: 30 · 4 + 200 · 4 and 30 · 4 + 50 · 8; of 1,000 examples, multiply-adds count more.
    assert [cell.strip() for cell in row.split('|')[5:-1]] == [
        *('0.92', '0.52', '3.0 (native)', '200.00', '120.40', '3.0 (native)')
    ]


@pytest.mark.parametrize(
    'flags',
    [{'batches': '0'}, {'batches': '1,'}, {'batches': 'x'}, {'break_even': True}],
)
def test_latency_flags_that_do_not_fit(flags):
    with pytest.raises(ValueError, match=r'--batches|--break_even'):
        LatencyConfig(**flags)
