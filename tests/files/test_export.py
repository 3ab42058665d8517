"""Tests of files.export: what other programs make of the files is what the network gives."""

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from networks import LENET5
from safetensors.numpy import load_file

from dns_jax.files.export import save_dense, save_onnx, save_stablehlo
from dns_jax.files.sparse import load_sparse
from dns_jax.inference.chain import Convolution, Dense, Flatten, MaxPool, Relu, Select, run_chain

ZOO = Path(__file__).parents[2] / 'zoo'
IMAGE = (11, 10, 3)
# Name: the layers, the shapes of their kernels, and that of the inputs.
CHAINS = {
    'same, even kernel': ((Convolution('a', 'SAME'),), {'a': (4, 2, 3, 5)}, IMAGE),
    'pool 3, rows and columns left over': ((MaxPool(3),), {}, IMAGE),
    'pool 1': ((MaxPool(1),), {}, IMAGE),
    'pool all': ((MaxPool(4), Flatten()), {}, (4, 4, 2)),
    'flatten images': ((Flatten(), Dense('a')), {'a': (330, 4)}, IMAGE),
    'flatten vectors': ((Flatten(),), {}, (4,)),
    'select elements': ((Select((1, 2, 6)), Dense('a')), {'a': (3, 4)}, (7,)),
    'vectors': ((Dense('a'), Relu(), Dense('b')), {'a': (7, 5), 'b': (5, 1)}, (7,)),
    'all of them': (
        (
            Select((0, 2)), Convolution('a', 'SAME'), Relu(), MaxPool(2), Select((1, 3)),
            Convolution('b'), MaxPool(3), Relu(), Flatten(), Select((0, 3)), Dense('c'), Relu(),
            Dense('d'),
        ),
        {'a': (3, 3, 2, 5), 'b': (2, 3, 2, 4), 'c': (2, 6), 'd': (6, 3)},
        IMAGE,
    ),
}  # fmt: skip


def weights(kernels):
    """Pruned weights, a third of them zero, for kernels of these shapes."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        kept = rng.random(shape) < 2 / 3
        return (kept * rng.normal(size=shape) * 0.3).astype(np.float32)

    return {
        name: {'kernel': draw(*shape), 'bias': draw(shape[-1])} for name, shape in kernels.items()
    }


def run_onnx(path):
    """The ONNX model as a function of its inputs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    assert [node.name for node in session.get_inputs()] == ['inputs']
    assert [node.name for node in session.get_outputs()] == ['outputs']
    return lambda inputs: session.run(None, {'inputs': np.asarray(inputs)})[0]


def run_stablehlo(path):
    return jax.export.deserialize(path.read_bytes()).call


RUNS = {save_onnx: run_onnx, save_stablehlo: run_stablehlo}


@pytest.fixture(params=RUNS, ids=lambda save: save.__name__)
def save(request):
    return request.param


def assert_same(call, chain, params, input_shape):
    for batch in (1, 3, 64):
        inputs = np.random.default_rng(batch).normal(size=(batch, *input_shape))
        inputs = jnp.asarray(inputs, jnp.float32)
        wanted = jax.jit(run_chain, static_argnums=0)(chain, params, inputs)
        got = np.asarray(call(inputs))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5, strict=True)


@pytest.mark.parametrize(('chain', 'kernels', 'input_shape'), CHAINS.values(), ids=CHAINS)
def test_round_trip(tmp_path, save, chain, kernels, input_shape):
    params = weights(kernels)
    save(tmp_path / 'network', chain, params, input_shape)
    assert_same(RUNS[save](tmp_path / 'network'), chain, params, input_shape)


class Images(nn.Module):
    """What no chain has: a stride, fixed statistics, a shortcut and a mean."""

    @nn.compact
    def __call__(self, images):
        hidden = nn.Conv(5, (3, 3), strides=2, padding=1, use_bias=False)(images)
        hidden = nn.relu(nn.BatchNorm(use_running_average=True)(hidden))
        beyond = ((0, 0), (0, 0), (0, 0), (0, 2))
        hidden = nn.relu(hidden + jnp.pad(images[:, ::2, ::2], beyond))
        return nn.Dense(4)(hidden.mean((1, 2)))


class Texts(nn.Module):
    """An embedding, a norm and causal attention, of whole numbers."""

    @nn.compact
    def __call__(self, tokens):
        hidden = nn.LayerNorm()(nn.Embed(7, 8)(tokens) + nn.Embed(6, 8)(jnp.arange(6))[None])
        heads = nn.Dense(24)(hidden).reshape(*tokens.shape, 3, 2, 4)
        query, key, value = jnp.moveaxis(heads, 2, 0)
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return hidden + nn.Dense(8)(nn.gelu(seen.reshape(hidden.shape)))


FUNCTIONS = {'images': (Images(), (11, 10, 3), jnp.float32), 'texts': (Texts(), (6,), jnp.int32)}


@pytest.mark.parametrize(('network', 'shape', 'dtype'), FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions(tmp_path, capfd, save, network, shape, dtype):
    """Weights of each leaf are drawn, so that none is a 0 or 1 that may be left out."""
    rng = np.random.default_rng(0)
    form = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape), dtype))
    drawn = jax.tree.map(lambda leaf: rng.uniform(0.2, 1, leaf.shape).astype(np.float32), form)
    save(tmp_path / 'network', network.apply, drawn, shape, dtype=dtype)
    assert capfd.readouterr() == ('', '')
    call = RUNS[save](tmp_path / 'network')
    for batch in (1, 5):
        inputs = rng.integers(0, 6, (batch, *shape)).astype(dtype)
        got = np.asarray(call(inputs))
        np.testing.assert_allclose(got, network.apply(drawn, inputs), rtol=1e-5, strict=True)


def test_functions_are_made_of_the_nodes_that_runtimes_have(tmp_path):
    network, shape, dtype = FUNCTIONS['texts']
    params = network.init(jax.random.key(0), jnp.zeros((1, *shape), dtype))
    save_onnx(tmp_path / 'network', network.apply, params, shape, dtype)
    kinds = {node.op_type for node in onnx.load(tmp_path / 'network').graph.node}
    assert {'Gelu', 'LayerNormalization', 'Softmax'} <= kinds


def test_a_function_has_weights_that_files_hold(tmp_path, save):
    weights = {'a': np.array([1, np.nan], np.float32)}
    with pytest.raises(ValueError, match=r"'a'.* not finite"):
        save(tmp_path / 'network', lambda params, inputs: inputs * params['a'], weights, (2,))
    assert not list(tmp_path.iterdir())


def test_onnx_model(tmp_path):
    """Nodes that runtimes have kernels for: no windows taken apart, no sizes computed."""
    lenet5 = load_sparse(ZOO / 'lenet5.safetensors').params
    save_onnx(tmp_path / 'lenet5', LENET5, lenet5, (28, 28, 1))
    model = onnx.load(tmp_path / 'lenet5')
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert [kinds.count(kind) for kind in ('Conv', 'MaxPool', 'MatMul', 'Relu')] == [2, 2, 2, 1]
    assert set(kinds) == {'Add', 'Conv', 'MatMul', 'MaxPool', 'Relu', 'Reshape', 'Transpose'}
    ends = [model.graph.input[0], model.graph.output[0]]
    for end, shape in zip(ends, [['batch', 28, 28, 1], ['batch', 10]], strict=True):
        assert end.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        axes = end.type.tensor_type.shape.dim
        assert [axis.dim_param or axis.dim_value for axis in axes] == shape


def test_onnx_is_silent_and_leaves_all_as_it_was(tmp_path, caplog, capfd, monkeypatch):
    logger = logging.getLogger('jax2onnx.plugins.plugin_system')
    monkeypatch.setattr(logger, 'level', logging.INFO)
    chain, kernels, input_shape = CHAINS['all of them']
    before = {name: getattr(jnp, name) for name in ('maximum', 'take', 'reshape', 'matmul')}
    config = dict(jax.config.values)
    with caplog.at_level(logging.WARNING):
        save_onnx(tmp_path / 'network', chain, weights(kernels), input_shape)
    assert not caplog.records
    assert capfd.readouterr() == ('', '')
    assert all(getattr(jnp, name) is value for name, value in before.items())
    assert jax.config.values == config
    assert logger.level == logging.INFO


@pytest.mark.parametrize('platforms', [('cuda', 'tpu'), ['rocm'], ('cpu',)])
def test_stablehlo_for_platforms_that_are_not_there(tmp_path, platforms):
    chain, kernels, input_shape = CHAINS['all of them']
    save_stablehlo(tmp_path / 'network', chain, weights(kernels), input_shape, platforms)
    exported = jax.export.deserialize((tmp_path / 'network').read_bytes())
    assert exported.platforms == tuple(platforms)
    if 'cpu' not in platforms:
        with pytest.raises(ValueError, match='platform'):
            exported.call(jnp.zeros((1, *input_shape)))


def test_stablehlo_program(tmp_path):
    chain, kernels, input_shape = CHAINS['all of them']
    limit = jax.config.values['jax_traceback_in_locations_limit']
    save_stablehlo(tmp_path / 'network', chain, weights(kernels), input_shape)
    assert jax.config.values['jax_traceback_in_locations_limit'] == limit
    content = (tmp_path / 'network').read_bytes()
    assert b'.py' not in content
    exported = jax.export.deserialize(content)
    assert exported.platforms == ('cpu', 'cuda', 'tpu')
    (inputs,), (outputs,) = exported.in_avals, exported.out_avals
    assert str(inputs) == 'float32[batch,11,10,3]'
    assert str(outputs) == 'float32[batch,3]'


PROGRAM = """
import test_export as t
chain, kernels, input_shape = t.CHAINS['all of them']
t.save_onnx('network.onnx', chain, t.weights(kernels), input_shape)
t.save_stablehlo('network.stablehlo', chain, t.weights(kernels), input_shape)
"""


def test_same_bytes_in_other_processes(tmp_path):
    """Also from other lines of other files, after other work."""
    chain, kernels, input_shape = CHAINS['all of them']
    save_onnx(tmp_path / 'onnx', chain, weights(kernels), input_shape)
    save_stablehlo(tmp_path / 'stablehlo', chain, weights(kernels), input_shape)
    root, own = ZOO.parent, Path(__file__).parent
    places = os.pathsep.join(map(str, (root, own, root / 'tests' / 'helpers')))
    subprocess.run(
        [sys.executable, '-c', PROGRAM],
        cwd=tmp_path,
        env=os.environ | {'PYTHONHASHSEED': '7', 'PYTHONPATH': places},
        check=True,
    )
    for kind in ('onnx', 'stablehlo'):
        assert (tmp_path / kind).read_bytes() == (tmp_path / f'network.{kind}').read_bytes()


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_narrow_weights_become_float32(tmp_path, save, dtype):
    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), weights({'a': (7, 5)}))
    chain = (Dense('a'), Relu())
    save(tmp_path / 'network', chain, narrow, (7,))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    assert_same(RUNS[save](tmp_path / 'network'), chain, wide, (7,))
    save_dense(tmp_path / 'dense', narrow)
    got = load_file(tmp_path / 'dense')
    np.testing.assert_array_equal(got['a.kernel'], wide['a']['kernel'], strict=True)


def test_entries_of_others_are_not_looked_at(tmp_path, save):
    params = weights({'a': (7, 5)}) | {'other': {'step': np.array([1], np.int64)}}
    save(tmp_path / 'network', (Dense('a'),), params, (7,))
    assert_same(RUNS[save](tmp_path / 'network'), (Dense('a'),), params, (7,))


A = {'kernel': np.ones((7, 5), np.float32), 'bias': np.ones(5, np.float32)}
BAD = {
    'empty': ((), {}, ValueError, 'chain must have at least one layer'),
    'no layer': ((Relu,), {}, TypeError, 'not a layer'),
    'no weights': ((Dense('b'),), {'a': A}, ValueError, r"Dense\(name='b'\), needs a kernel"),
    'unfit': ((Flatten(), MaxPool(2)), {}, ValueError, 'needs inputs of 3 axes'),
    'not finite': (
        (Dense('a'),), {'a': A | {'bias': np.full(5, np.nan, np.float32)}},
        ValueError, "'a/bias'.* not finite",
    ),
    'wide': ((Dense('a'),), {'a': A | {'bias': np.ones(5)}}, TypeError, "'a/bias'.* not float64"),
}  # fmt: skip


@pytest.mark.parametrize(('chain', 'params', 'error', 'message'), BAD.values(), ids=BAD)
def test_what_cannot_be_exported_leaves_no_trace(tmp_path, save, chain, params, error, message):
    with pytest.raises(error, match=message):
        save(tmp_path / 'network', chain, params, (7,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('platforms', ['cpu', (), ('cpu', 'gpu'), ('metal',)])
def test_unknown_platforms(tmp_path, platforms):
    with pytest.raises(ValueError, match='platforms must be some of'):
        save_stablehlo(tmp_path / 'network', (Relu(),), {}, (7,), platforms)
    assert not list(tmp_path.iterdir())


def test_dense_golden_bytes(tmp_path):
    """Also that the order in memory does not matter, and that metadata have one order."""
    kernel = np.asfortranarray(np.array([[0, 1], [2, 0]], np.float32))
    metadata = {'b': '2', 'a': '1', 'ü': '"', 'd': '4', 'c': '3'}
    save_dense(tmp_path / 'network', {'fc': {'kernel': kernel, 'bias': jnp.ones(1)}}, metadata)
    content = (tmp_path / 'network').read_bytes()
    end = 8 + int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:end])
    assert list(header['__metadata__'].items()) == sorted(metadata.items())
    assert header['fc.bias'] == {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}
    assert header['fc.kernel'] == {'dtype': 'F32', 'shape': [2, 2], 'data_offsets': [4, 20]}
    assert content[end:] == np.array([1, 0, 1, 2, 0], '<f4').tobytes()
    np.testing.assert_array_equal(load_file(tmp_path / 'network')['fc.kernel'], kernel)


def test_dense_trees(tmp_path):
    save_dense(tmp_path / 'network', [jnp.zeros((2, 0)), {'b': (jnp.float32(3),)}])
    assert {name: leaf.shape for name, leaf in load_file(tmp_path / 'network').items()} == {
        '0': (2, 0),
        '1.b.0': (),
    }


W = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ('params', 'metadata', 'error', 'message'),
    [
        ({}, None, ValueError, 'at least one leaf'),
        ({'a': {'b': W}, 'a.b': W}, None, ValueError, "'a.b' is taken"),
        ({'__metadata__': W}, None, ValueError, "'__metadata__' is taken"),
        ({'a': np.array([1, np.inf], np.float32)}, None, ValueError, "'a'.* not finite"),
        ({'a': np.ones(2)}, None, TypeError, "'a'.* not float64"),
        ({'a': W}, {'a': 1}, TypeError, 'metadata'),
        ({'a': W}, {'a': '\ud800'}, ValueError, 'surrogates'),
    ],
)
def test_what_cannot_be_saved_dense_leaves_no_trace(tmp_path, params, metadata, error, message):
    with pytest.raises(error, match=message):
        save_dense(tmp_path / 'network', params, metadata)
    assert not list(tmp_path.iterdir())


TINY = {
    'dense': lambda path: save_dense(path, {'a': W}),
    'ONNX': lambda path: save_onnx(path, (Relu(),), {}, (2,)),
    'StableHLO': lambda path: save_stablehlo(path, (Relu(),), {}, (2,)),
}


@pytest.mark.parametrize('save_tiny', TINY.values(), ids=TINY)
def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, save_tiny):
    path = tmp_path / 'network'
    path.write_bytes(b'before')

    def fail(*arguments):
        raise OSError(errno.ENOSPC, 'full')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fail)
        with pytest.raises(OSError, match='full'):
            save_tiny(path)
    assert path.read_bytes() == b'before'
    save_tiny(str(path))
    assert path.read_bytes() != b'before'
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        save_tiny(tmp_path / 'no' / 'network')
