"""Tests of files.sparse: what the file holds, and that a damaged one never passes for sound."""

import errno
import json
import os
import struct
import tracemalloc
from collections import OrderedDict, namedtuple
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import save_file

from dns_jax import Thresholds, apply_masks, update_masks
from dns_jax._trees import check_parallel
from dns_jax.files.sparse import load_sparse, save_sparse

KERNEL = np.array([[0.0, 1.5, 0.0], [-2.0, 0.0, 0.25]], np.float32)
GOLDEN = {'fc': {'kernel': KERNEL, 'bias': np.array([7, 8], np.float32)}}
# The 0 at [1, 1] is kept; the bias takes no part.
GOLDEN_MASKS = {
    'fc': {'kernel': np.array([[False, True, False], [True, True, False]]), 'bias': np.array(True)}
}
GOLDEN_TENSORS = {
    'fc/bias:values': np.array([7, 8], np.float32),
    'fc/kernel:values': np.array([1.5, -2, 0], np.float32),
    'fc/kernel:indices': np.array([1, 3, 4], np.uint32),
}
# Before files said what took part, they had all indices of a leaf that took none.
OLD_TENSORS = {**GOLDEN_TENSORS, 'fc/bias:indices': np.array([0, 1], np.uint32)}
GOLDEN_SHAPES = {'fc/bias:shape': '[2]', 'fc/kernel:shape': '[2, 3]'}
FREE = {
    'network': 'tiny',
    'input_scale': '0.00390625',
    'input_shape': '28',
    'Überschrift': 'σ\n"\0😀',
    '': '',
}


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    return tmp_path_factory.mktemp('sparse') / 'network.safetensors'


def bits(array):
    return np.asarray(array).view(np.uint32)


def assert_loads(path, params, masks, metadata=None):
    """What is in the file, made dense, is these trees to the bit."""
    loaded = load_sparse(path)
    chex.assert_trees_all_equal_structs(loaded.params, params)
    # What a mask of shape () says is of no concern: it keeps all.
    wanted = jax.tree.map(lambda mask: np.asarray(mask) | (np.ndim(mask) == 0), masks)
    chex.assert_trees_all_equal(loaded.masks, wanted, strict=True)
    assert loaded.metadata == (metadata or {})

    def check(got, weights, mask):
        assert isinstance(got, np.ndarray)
        assert got.dtype == np.float32
        wanted = np.where(mask, np.asarray(weights, np.float32), np.float32(0))
        np.testing.assert_array_equal(bits(got), bits(wanted), strict=True)
        got[...] = 1  # an array of one's own

    jax.tree.map(check, loaded.params, params, wanted)


def test_golden_tensors_and_metadata(path):
    save_sparse(path, GOLDEN, GOLDEN_MASKS, FREE)
    with safe_open(path, 'numpy') as file:
        assert file.metadata() == {**GOLDEN_SHAPES, **FREE}
        assert set(file.keys()) == set(GOLDEN_TENSORS)
        for name, tensor in GOLDEN_TENSORS.items():
            np.testing.assert_array_equal(file.get_tensor(name), tensor, strict=True)
    assert_loads(path, GOLDEN, GOLDEN_MASKS, FREE)
    np.testing.assert_array_equal(
        load_sparse(path).params['fc']['kernel'], np.float32([[0, 1.5, 0], [-2, 0, 0]])
    )


def test_golden_bytes(path):
    """Also that the same network is the same file, which safetensors alone does not give."""
    masks = {'w': jnp.array([[False, True], [False, True]])}
    metadata = {'network': 'tiny', 'e': '5', 'd': '4', 'c': '3', 'b': '2', 'a': '1'}
    save_sparse(path, {'w': jnp.array([[9.0, -1.0], [9.0, 0.5]])}, masks, metadata)
    header = (
        b'{"__metadata__":{"a":"1","b":"2","c":"3","d":"4","e":"5","network":"tiny",'
        b'"w:shape":"[2, 2]"},'
        b'"w:values":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"w:indices":{"dtype":"U32","shape":[2],"data_offsets":[8,16]}}'
    )
    header += b' ' * (-len(header) % 8)
    data = struct.pack('<2f2I', -1.0, 0.5, 1, 3)
    assert path.read_bytes() == struct.pack('<Q', len(header)) + header + data


def test_golden_bytes_of_a_leaf_that_takes_no_part(path):
    """Its weights alone; a scalar is as it was, for it says of itself that it takes no part."""
    params = {'a': jnp.array([[9.0, -1.0]]), 't': jnp.float32(5), 'w': jnp.array([4.0, 0.5])}
    save_sparse(path, params, {'a': True, 't': True, 'w': jnp.array([False, True])})
    header = (
        b'{"__metadata__":{"a:shape":"[1, 2]","t:shape":"[]","w:shape":"[2]"},'
        b'"a:values":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"t:values":{"dtype":"F32","shape":[1],"data_offsets":[8,12]},'
        b'"w:values":{"dtype":"F32","shape":[1],"data_offsets":[12,16]},'
        b'"t:indices":{"dtype":"U32","shape":[1],"data_offsets":[16,20]},'
        b'"w:indices":{"dtype":"U32","shape":[1],"data_offsets":[20,24]}}'
    )
    header += b' ' * (-len(header) % 8)
    data = struct.pack('<4f2I', 9.0, -1.0, 5.0, 0.5, 0, 1)
    assert path.read_bytes() == struct.pack('<Q', len(header)) + header + data


ZOO = sorted((Path(__file__).parents[2] / 'zoo').glob('*.safetensors'))


@pytest.mark.parametrize('file', ZOO, ids=lambda file: file.stem)
def test_the_zoo_is_written_as_it_was(path, file):
    save_sparse(path, *load_sparse(file))
    assert path.read_bytes() == file.read_bytes()


def test_an_old_file_keeps_what_took_no_part(path):
    """It is a mask of True, for the file does not tell."""
    save_file(OLD_TENSORS, path, GOLDEN_SHAPES)
    masks = {'fc': {**GOLDEN_MASKS['fc'], 'bias': np.ones(2, bool)}}
    assert_loads(path, GOLDEN, masks)
    save_file({'t:values': f32(3), 't:indices': u32(0)}, path, {'t:shape': '[]'})
    assert_loads(path, {'t': jnp.float32(3)}, {'t': np.array(True)})


def test_surgery_on_what_was_loaded_prunes_what_took_part_alone(path):
    params = {'a': {'w': jnp.array([0.1, 3.0])}, 'b': {'scale': jnp.array([0.1, 3.0])}}
    save_sparse(path, params, {'a': {'w': jnp.ones(2, bool)}, 'b': {'scale': jnp.array(True)}})
    loaded = load_sparse(path)
    # Thresholds are wanted for the layers that take part, and no others.
    masks = update_masks(
        jax.random.key(0), loaded.params, loaded.masks, {'a': Thresholds(1.0, 2.0)}, {'a': 1.0}
    )
    np.testing.assert_array_equal(masks['a']['w'], [False, True])
    np.testing.assert_array_equal(apply_masks(params, masks)['b']['scale'], params['b']['scale'])


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_every_dtype_is_stored_without_loss(path, dtype):
    width = jnp.dtype(dtype).itemsize
    if width == 4:
        edges = [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 0.1]
        weights = np.array([*edges, np.inf, np.nan], np.float32)
    else:  # all values there are
        weights = np.arange(256**width, dtype=f'uint{8 * width}').view(dtype)
    mask = np.isfinite(weights.astype(np.float32))
    assert not mask.all()  # what is pruned may be anything
    save_sparse(
        path,
        {'w': jnp.asarray(weights), 'whole': jnp.asarray(weights[mask][None])},
        {'w': jnp.asarray(mask), 'whole': jnp.array(True)},
    )
    got = load_sparse(path).params['w']
    whole = load_sparse(path).params['whole']
    np.testing.assert_array_equal(bits(whole[0]), bits(got[mask]), strict=True)
    np.testing.assert_array_equal(bits(got[mask]), bits(weights[mask].astype(np.float32)))
    np.testing.assert_array_equal(got[mask].astype(dtype), weights[mask])
    assert not bits(got[~mask]).any()


Pair = namedtuple('Pair', 'left right')
ONES, ROW = jnp.ones((2, 3)), jnp.arange(4.0)
NESTED = [
    (ONES, ONES),
    (jnp.float32(3), jnp.float32(3)),
    ({'': ONES}, ONES),
    ({'a': {'b': {'c': ONES, 'd': ROW}}, 'e': ROW}, {'a': {'b': {'c': ONES, 'd': ROW}}, 'e': ROW}),
    ((ONES, [ROW, ONES]), {'0': ONES, '1': {'0': ROW, '1': ONES}}),
    (Pair(ONES, {'x': ROW}), {'left': ONES, 'right': {'x': ROW}}),
    (
        {'mlp/~/linear': {'w': ONES}, 'mlp': {'b': ROW}},
        {'mlp': {'~': {'linear': {'w': ONES}}, 'b': ROW}},
    ),
    (
        {'a:values': {'b:shape': ONES}, 'a': ROW, 'a:shape': ROW},
        {'a:values': {'b:shape': ONES}, 'a': ROW, 'a:shape': ROW},
    ),
    ({'a': {'': ONES}, 'b': None, 'ä ': ROW}, {'a': {'': ONES}, 'ä ': ROW}),
    ({'a': ONES, 'a ': ROW, 'a0': ROW}, {'a': ONES, 'a ': ROW, 'a0': ROW}),
    (
        {'empty': jnp.zeros((0, 7)), 'scalar': jnp.float32(2)},
        {'empty': jnp.zeros((0, 7)), 'scalar': jnp.float32(2)},
    ),
    ({'axes': np.ones((1,) * 64, np.float32)}, {'axes': np.ones((1,) * 64, np.float32)}),
]


@pytest.mark.parametrize(('params', 'nested'), NESTED)
def test_any_tree_comes_back_as_nested_dicts(path, params, nested):
    for mask in (lambda leaf: np.ones(leaf.shape, bool), lambda leaf: np.array(True)):
        save_sparse(path, params, jax.tree.map(mask, params))
        assert_loads(path, nested, jax.tree.map(mask, nested))


@st.composite
def networks(draw):
    """Weights and masks, of which some take no part, with names of all lengths."""
    names = draw(st.lists(st.text('ab/:', min_size=1, max_size=9), min_size=1, max_size=3))
    params, masks = {}, {}
    for at, name in enumerate(names):
        shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
        name = f'{at}{name}'  # no two collide
        masks[name] = draw(st.just(np.array(True)) | hnp.arrays(bool, shape))
        if not shape:
            masks[name] = np.array(True)
        floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
        params[name] = draw(hnp.arrays(np.float32, shape, elements=floats))
    return params, masks


def nest(tree):
    nested = {}
    for name, leaf in tree.items():
        *parts, last = name.split('/')
        node = nested
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = leaf
    return nested


def bytes_of(weights, mask):
    """A value for each kept weight, and where the leaf takes part or is a scalar its index."""
    kept = int(mask.sum()) if mask.ndim else weights.size
    return (8 if mask.ndim == weights.ndim else 4) * kept


@given(network=networks(), metadata=st.dictionaries(st.text('ab:', max_size=3), st.text('σ"\\')))
def test_round_trip(path, network, metadata):
    params, masks = network
    save_sparse(path, params, masks, metadata)
    assert_loads(path, nest(params), nest(masks), metadata)
    data = path.read_bytes()
    header = int.from_bytes(data[:8], 'little')
    assert header % 8 == 0
    assert len(data) == 8 + header + sum(map(bytes_of, params.values(), masks.values()))

    loaded = load_sparse(path)
    save_sparse(path, *loaded)
    assert path.read_bytes() == data


def test_loaded_trees_are_those_of_the_library(path):
    random = np.random.default_rng(0)
    params = {'a': {'w': jnp.asarray(random.normal(size=(30, 20)), jnp.float32)}}
    masks = {'a': {'w': jnp.asarray(random.random((30, 20)) < 0.1)}}
    save_sparse(path, params, masks)
    loaded = load_sparse(path)
    check_parallel(loaded.params, loaded.masks)
    chex.assert_trees_all_equal(loaded.params, jax.device_get(apply_masks(params, masks)))
    assert path.stat().st_size < 1000
    loaded.params['a']['w'][0, 0] = 1  # arrays of one's own, not views of the file


def test_sharded_weights_are_gathered(path, mesh):
    rows = jax.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
    params = {'w': jax.device_put(jnp.arange(32.0).reshape(16, 2), rows)}
    masks = {'w': jax.device_put(params['w'] % 3 == 1, rows)}
    save_sparse(path, params, masks)
    assert_loads(path, jax.device_get(params), jax.device_get(masks))


def test_masks_of_another_kind_of_tree_are_found_by_their_paths(path):
    """As masks from a file are, beside weights that a library keeps in another order."""
    params = OrderedDict([('b', jnp.array([1.0, 2.0])), ('a', jnp.array([3.0, 4.0]))])
    masks = {'a': np.array([True, False]), 'b': np.array(True)}
    save_sparse(path, params, masks)
    assert_loads(path, dict(params), masks)


def test_nothing_kept(path):
    params = {'a': jnp.full((3, 2), jnp.nan), 'b': jnp.ones(2)}
    masks = {'a': jnp.zeros((3, 2), bool), 'b': jnp.zeros(2, bool)}
    save_sparse(path, params, masks)
    loaded = load_sparse(path)
    np.testing.assert_array_equal(loaded.params['a'], np.zeros((3, 2), np.float32), strict=True)
    assert not loaded.masks['a'].any()
    assert not loaded.masks['b'].any()


def test_scalar_mask_keeps_all(path):
    """Whatever it says, as in apply_masks."""
    params = {'a': jnp.ones((3, 2)), 'b': jnp.float32(4)}
    save_sparse(path, params, {'a': jnp.array(False), 'b': jnp.array(False)})
    assert_loads(path, params, {'a': np.array(True), 'b': np.array(True)})


@pytest.mark.parametrize('shape', [(0,), (0, 7), (7, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize('takes_part', [True, False])
def test_empty_leaves(path, shape, takes_part):
    params = {'a': np.zeros(shape, np.float32), 'b': jnp.ones(2)}
    masks = {'a': np.ones(shape if takes_part else (), bool), 'b': np.array([True, False])}
    save_sparse(path, params, masks)
    assert_loads(path, params, masks)
    save_sparse(path, {'a': params['a'].astype(jnp.bfloat16)}, {'a': masks['a']})
    assert_loads(path, {'a': params['a']}, {'a': masks['a']})


W, T = jnp.ones(2), jnp.ones(2, bool)
WIDE = np.broadcast_to(np.float32(0), (2**16, 2**16 + 1))  # takes no memory
DEEP = W
for _ in range(101):
    DEEP = {'a': DEEP}


@pytest.mark.parametrize(
    ('params', 'masks', 'metadata', 'error', 'message'),
    [
        ({'a': W}, {'b': T}, {}, ValueError, 'masks must have the leaves'),
        ({'a': W}, {'a': jnp.ones(3, bool)}, {}, ValueError, r"masks\['a'\] has shape"),
        ({'a': W}, {'a': W}, {}, TypeError, r"masks\['a'\] must be boolean"),
        ({}, {}, {}, ValueError, 'at least one leaf'),
        ({'a': None}, {'a': None}, {}, ValueError, 'at least one leaf'),
        (
            {'a/b': W, 'a': {'b': W}},
            {'a/b': T, 'a': {'b': T}},
            {},
            ValueError,
            "'a/b' has the place",
        ),
        ({'a': W, 'a/b': W}, {'a': T, 'a/b': T}, {}, ValueError, "'a/b' .* lies within"),
        ({'a': W, 'a/b/c': W}, {'a': T, 'a/b/c': T}, {}, ValueError, "'a/b/c' .* lies within"),
        ({'': W, 'a': W}, {'': T, 'a': T}, {}, ValueError, "'a' .* lies within"),
        (DEEP, jax.tree.map(lambda leaf: T, DEEP), {}, ValueError, '101 parts'),
        ({'a': jnp.ones(2, jnp.int32)}, {'a': T}, {}, TypeError, r"params\['a'\].*int32"),
        ({'a': jnp.ones(2, bool)}, {'a': T}, {}, TypeError, r"params\['a'\].*bool"),
        ({'a': jnp.ones(2, jnp.complex64)}, {'a': T}, {}, TypeError, r"params\['a'\].*complex64"),
        ({'a': np.ones(2)}, {'a': T}, {}, TypeError, r"params\['a'\].*float64"),
        ({'a': 1.0}, {'a': True}, {}, TypeError, r"params\['a'\].*float64"),
        ({'a': W.at[1].set(jnp.nan)}, {'a': T}, {}, ValueError, r"params\['a'\].*not finite"),
        ({'a': W.at[0].set(-jnp.inf)}, {'a': jnp.array(True)}, {}, ValueError, 'not finite'),
        ({'a': WIDE}, {'a': np.array(True)}, {}, ValueError, r'4295032832 elements, over 2\*\*32'),
        ({'a': W}, {'a': T}, {'b:shape': '[2]'}, ValueError, "metadata has the key 'b:shape'"),
        ({'a': W}, {'a': T}, {':shape': ''}, ValueError, "metadata has the key ':shape'"),
        ({'a': W}, {'a': T}, {'scale': 1.0}, TypeError, "metadata .* 'scale': 1.0"),
        ({'a': W}, {'a': T}, {3: 'three'}, TypeError, "metadata .* 3: 'three'"),
        ({'a': W}, {'a': T}, {'b': None}, TypeError, "metadata .* 'b': None"),
        ({'a': W}, {'a': T}, {'b': '\ud800'}, ValueError, 'surrogates'),
    ],
)
def test_what_cannot_be_saved_leaves_no_trace(tmp_path, params, masks, metadata, error, message):
    with pytest.raises(error, match=message):
        save_sparse(tmp_path / 'network', params, masks, metadata)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('exception', [OSError(errno.ENOSPC, 'full'), KeyboardInterrupt()])
@pytest.mark.parametrize('broken', ['fsync', 'replace'])
def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, broken, exception):
    path = tmp_path / 'network'
    save_sparse(path, W, T)
    before = path.read_bytes()

    def fail(*arguments):
        assert path.read_bytes() == before
        raise exception

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(type(exception)):
            save_sparse(path, jnp.zeros(9), jnp.ones(9, bool))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    save_sparse(path, jnp.zeros(9), jnp.ones(9, bool))
    assert load_sparse(path).params.shape == (9,)
    assert list(tmp_path.iterdir()) == [path]


def test_file_has_the_usual_permissions(tmp_path):
    save_sparse(tmp_path / 'network', W, T)
    (tmp_path / 'other').write_bytes(b'')
    assert (tmp_path / 'network').stat().st_mode == (tmp_path / 'other').stat().st_mode


def test_file_or_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_sparse(tmp_path / 'no' / 'network', W, T)
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / 'network')


def assert_refused(path, message, **arguments):
    """A ValueError that names the file and what is wrong."""
    with pytest.raises(ValueError, match=message) as caught:
        load_sparse(path, **arguments)
    assert str(caught.value).startswith(f'cannot load {str(path)!r}: ')


def replaced(**changes):
    """The golden tensors with some replaced, or None to take one out."""
    names = {'values': 'fc/kernel:values', 'indices': 'fc/kernel:indices'}
    tensors = GOLDEN_TENSORS | {names.get(name, name): value for name, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not None}


def f32(*values):
    return np.array(values, np.float32)


def u32(*values):
    return np.array(values, np.uint32)


BAD_TENSORS = [
    ({'values': None}, r"lacks the tensors \['fc/kernel:values'\] and has \[\] too many"),
    ({'indices': None}, r"lacks the tensors \['fc/kernel:indices'\]"),
    ({'values': None, 'indices': None}, r"lacks .*'fc/kernel:indices', 'fc/kernel:values'\]"),
    ({'extra': f32(1)}, r"lacks the tensors \[\] and has \['extra'\] too many"),
    ({'b:values': f32(1)}, r"has \['b:values'\] too many"),
    ({'b:values': f32(1), 'b:indices': u32(0)}, r"has \['b:indices', 'b:values'\] too many"),
    ({'values': np.array([1.5, -2, 0])}, "'fc/kernel:values' must be F32 .* is F64"),
    ({'values': np.array([1.5, -2, 0], np.float16)}, "'fc/kernel:values' must be F32 .* is F16"),
    ({'values': np.array([1, 2, 3], np.int32)}, "'fc/kernel:values' must be F32 .* is I32"),
    ({'indices': np.array([1, 3, 4])}, "'fc/kernel:indices' must be U32 .* is I64"),
    ({'indices': np.array([1, 3, 4], np.int32)}, "'fc/kernel:indices' must be U32 .* is I32"),
    ({'indices': f32(1, 3, 4)}, "'fc/kernel:indices' must be U32 .* is F32"),
    ({'values': f32(1, 2, 3)[None]}, "'fc/kernel:values' must be F32 of one axis, .* 2"),
    ({'values': f32(1).reshape(()), 'indices': u32(1)}, 'must be F32 of one axis, .* 0'),
    ({'indices': u32(1, 3, 4)[:, None]}, "'fc/kernel:indices' must be U32 of one axis, .* 2"),
    ({'values': f32(1, 2)}, "'fc/kernel' has 2 values, but 3 indices"),
    ({'values': f32(1, 2, 3, 4)}, "'fc/kernel' has 4 values, but 3 indices"),
    ({'values': f32(), 'indices': u32(1)}, "'fc/kernel' has 0 values, but 1 indices"),
    ({'indices': u32(1, 3, 6)}, "'fc/kernel' has the index 6, but 6 elements"),
    ({'indices': u32(1, 3, 2**32 - 1)}, "'fc/kernel' has the index 4294967295"),
    ({'indices': u32(1, 3, 3)}, "indices of 'fc/kernel' do not ascend"),
    ({'indices': u32(1, 1, 3)}, "indices of 'fc/kernel' do not ascend"),
    ({'indices': u32(1, 4, 3)}, "indices of 'fc/kernel' do not ascend"),
    ({'indices': u32(6, 1, 3)}, "indices of 'fc/kernel' do not ascend"),
    ({'values': f32(1, np.nan, 2)}, "'fc/kernel' has a value that is not finite"),
    ({'values': f32(1, 2, np.inf)}, "'fc/kernel' has a value that is not finite"),
    ({'values': f32(-np.inf, 2, 3)}, "'fc/kernel' has a value that is not finite"),
    # Of the bias, which takes no part.
    ({'fc/bias:values': f32(7)}, r"lacks the tensors \['fc/bias:indices'\] and has \[\] too many"),
    ({'fc/bias:values': f32(7, 8, 9)}, r"lacks the tensors \['fc/bias:indices'\]"),
    ({'fc/bias:values': f32()}, r"lacks the tensors \['fc/bias:indices'\]"),
    ({'fc/bias:values': f32(7, 8)[None]}, r"lacks the tensors \['fc/bias:indices'\]"),
    ({'fc/bias:values': None}, r"lacks the tensors \['fc/bias:indices', 'fc/bias:values'\]"),
    ({'fc/bias:values': u32(7, 8)}, "'fc/bias:values' must be F32 .* is U32"),
    ({'fc/bias:values': f32(7, np.nan)}, "'fc/bias' has a value that is not finite"),
    ({'fc/bias:indices': u32(0, 2)}, "'fc/bias' has the index 2, but 2 elements"),
    ({'fc/bias:indices': u32()}, "'fc/bias' has 2 values, but 0 indices"),
]


@pytest.mark.parametrize(('changes', 'message'), BAD_TENSORS)
def test_damaged_tensors(path, changes, message):
    save_file(replaced(**changes), path, GOLDEN_SHAPES)
    assert_refused(path, message)


BAD_SHAPES = [
    '', '6', '2, 3', '(2, 3)', '[2, 3', '[2, 3]]', '[2, 3,]', '[2 3]', '[[2, 3]]', '{"2": 3}',
    'null', '"[2, 3]"', '[2, -3]', '[-2, -3]', '[2.0, 3]', '[2, 3e0]', '[2, "3"]', '[2, true]',
    '[2, null]', '[02, 3]', '[٢, 3]', '[2, NaN]', '[2, Infinity]', '[' * 100_000, '[2, 3]\n',
    '[2, ' + '9' * 10_000 + ']', '[1, ' + '1, ' * 70 + '1]', '[2, 3' + ', 1' * 63 + ']',
]  # fmt: skip


@pytest.mark.parametrize('shape', BAD_SHAPES, ids=lambda shape: repr(shape[:12]))
def test_damaged_shapes(path, shape):
    save_file(GOLDEN_TENSORS, path, GOLDEN_SHAPES | {'fc/kernel:shape': shape})
    assert_refused(path, "'fc/kernel:shape' must be a list of at most 64 lengths")


@pytest.mark.parametrize('shape', ['[2, 3]', '[2,3]', '[6]', '[1, 6]', '[5]', '[3, 2]', '[7]'])
def test_shapes_that_hold_the_indices(path, shape):
    save_file(GOLDEN_TENSORS, path, GOLDEN_SHAPES | {'fc/kernel:shape': shape})
    kernel = load_sparse(path).params['fc']['kernel']
    assert list(kernel.shape) == json.loads(shape)
    np.testing.assert_array_equal(np.flatnonzero(kernel), [1, 3])


@pytest.mark.parametrize('shape', ['[4]', '[2, 2]', '[0]', '[0, 9]', '[]', '[1]'])
def test_shapes_too_small_for_the_indices(path, shape):
    save_file(GOLDEN_TENSORS, path, GOLDEN_SHAPES | {'fc/kernel:shape': shape})
    assert_refused(path, "'fc/kernel' has the index 4, but")


def test_a_scalar_that_is_not_kept(path):
    save_file({'a:values': f32(), 'a:indices': u32()}, path, {'a:shape': '[]'})
    assert_refused(path, "'a' is a scalar that is not kept")


@pytest.mark.parametrize('shapes', [None, {}, {'network': 'tiny'}, {'fc/kernel:shape': '[2, 3]'}])
def test_missing_shapes(path, shapes):
    save_file(GOLDEN_TENSORS, path, shapes)
    assert_refused(path, r"lacks the tensors \[\] and has \['fc/bias:values'")


def leaves(*paths):
    """The tensors and shapes of leaves of one element each."""
    tensors, shapes = {}, {}
    for path in paths:
        tensors |= {f'{path}:values': f32(1), f'{path}:indices': u32(0)}
        shapes[f'{path}:shape'] = '[1]'
    return tensors, shapes


@pytest.mark.parametrize(
    'paths',
    [
        ('a', 'a/b'),
        ('a', 'a ', 'a/b/c'),
        ('', 'a'),
        ('', 'a/b'),
        ('', '/'),
        ('a/', 'a//b'),
        ('x/y', 'x'),
    ],
)
def test_paths_within_each_other(path, paths):
    for order in (paths, paths[::-1]):
        save_file(leaves(*order)[0], path, leaves(*order)[1])
        assert_refused(path, 'has the place of another, or lies within it')


def test_depth(path):
    tensors, shapes = leaves('/'.join('a' * 100))
    save_file(tensors, path, shapes)
    assert len(jax.tree.leaves(load_sparse(path).params)) == 1
    for depth in (101, 50_000):
        tensors, shapes = leaves('/'.join('a' * depth))
        save_file(tensors, path, shapes)
        assert_refused(path, f'{depth} parts')


def test_max_parameters(path):
    params = {'a': jnp.ones((2, 3)), 'b': jnp.ones(4), 'c': jnp.zeros((0, 5)), 'd': jnp.ones(())}
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    save_sparse(path, params, masks)
    load_sparse(path, max_parameters=16)
    load_sparse(path, 16)
    for limit in (15, 6, 0):
        assert_refused(path, f'it has 16 .* max_parameters is {limit}', max_parameters=limit)


HUGE = [
    ['[1073741825]'],
    ['[32768, 32769]'],
    ['[1000000000]', '[1000000000]'],
    ['[1, 0, 999999999999999999]'],
    ['[' + ', '.join(['999999999999999999'] * 64) + ']'],
    ['[0' + ', 999999999999999999' * 63 + ']'],
]


@pytest.mark.parametrize('shapes', HUGE)
def test_huge_networks_are_refused_before_memory_is_taken(path, shapes):
    tensors, _ = leaves(*map(str, range(len(shapes))))
    save_file(tensors, path, {f'{at}:shape': shape for at, shape in enumerate(shapes)})
    tracemalloc.start()
    try:
        assert_refused(path, 'max_parameters is 1073741824')
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def raw(header, data=b''):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data


def tensor(dtype, shape, start, stop):
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [start, stop]}


SHAPE_2 = {'__metadata__': {'a:shape': '[2]'}}
RAW = {
    'empty': (b'', 'header'),
    'text': (b'not a network at all', 'header'),
    'pickle': (b'\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.', 'header'),
    'zip': (b'PK\x03\x04' + bytes(60), 'header'),
    'length past the end': (struct.pack('<Q', 100) + b'{}', 'header'),
    'largest length': (struct.pack('<Q', 2**64 - 1) + b'{}', 'header'),
    'header no JSON': (raw(b'{"a": '), 'JSON'),
    'header a list': (raw([]), 'JSON'),
    'header not UTF-8': (raw(b'{"\xff": 1}'), 'UTF-8'),
    'header deep': (raw(b'{"a":' * 100_000), 'JSON'),
    'nothing in it': (raw({}), 'at least one leaf'),
    'metadata alone': (raw({'__metadata__': {'network': 'tiny'}}), 'at least one leaf'),
    'metadata not text': (raw({'__metadata__': {'a:shape': [2]}}), 'JSON'),
    'tensor past the end': (raw({'a:values': tensor('F32', [2], 0, 8)}, bytes(4)), 'header'),
    'bytes of no tensor': (raw({'a:values': tensor('F32', [1], 0, 4)}, bytes(8)), 'header'),
    'shape and bytes differ': (raw({'a:values': tensor('F32', [3], 0, 8)}, bytes(8)), 'header'),
    'hole between tensors': (
        raw(
            {'a:values': tensor('F32', [1], 0, 4), 'a:indices': tensor('U32', [1], 8, 12)},
            bytes(12),
        ),
        'header',
    ),
    'tensors overlap': (
        raw(
            {'a:values': tensor('F32', [2], 0, 8), 'a:indices': tensor('U32', [2], 0, 8)}, bytes(8)
        ),
        'header',
    ),
    'type that NumPy lacks': (
        raw(
            SHAPE_2
            | {'a:values': tensor('BF16', [2], 0, 4), 'a:indices': tensor('U32', [2], 4, 12)},
            bytes(12),
        ),
        "'a:values' must be F32 .* is BF16",
    ),
    'type of less than a byte': (
        raw(
            SHAPE_2 | {'a:values': tensor('F32', [2], 0, 8), 'a:indices': tensor('F4', [2], 8, 9)},
            bytes(9),
        ),
        "'a:indices' must be U32 .* is F4",
    ),
    'shape that NumPy lacks': (
        raw(
            SHAPE_2
            | {
                'a:values': tensor('F32', [0, 2**62, 2**62], 0, 0),
                'a:indices': tensor('U32', [0], 0, 0),
            }
        ),
        "'a:values' must be F32 of one axis, .* 3",
    ),
}


@pytest.mark.parametrize(('data', 'message'), RAW.values(), ids=RAW)
def test_damaged_files(path, data, message):
    path.write_bytes(data)
    assert_refused(path, message)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """The bytes of a small sound file."""
    path = tmp_path_factory.mktemp('small') / 'network'
    save_sparse(path, GOLDEN, GOLDEN_MASKS, {'network': 'tiny'})
    return path.read_bytes()


def test_truncation_anywhere(path, small):
    for length in range(len(small)):
        path.write_bytes(small[:length])
        assert_refused(path, 'header')
    path.write_bytes(small + b'\0')
    assert_refused(path, 'header')


def refusal(path):
    """Loads a file that may be damaged: why it was refused, or None where it is sound."""
    try:
        loaded = load_sparse(path, max_parameters=10**6)
    except ValueError as error:
        return str(error)
    check_parallel(loaded.params, loaded.masks)
    for weights, mask in zip(*map(jax.tree.leaves, loaded[:2]), strict=True):
        assert weights.dtype == np.float32
        assert mask.shape in (weights.shape, ())
        assert np.isfinite(weights).all()
        assert not bits(np.where(mask, np.float32(0), weights)).any()
    data = path.read_bytes()
    size = sum(map(bytes_of, *map(jax.tree.leaves, loaded[:2])))
    assert len(data) == 8 + int.from_bytes(data[:8], 'little') + size
    assert all(type(text) is str for pair in loaded.metadata.items() for text in pair)
    return None


@pytest.mark.parametrize('flip', [0x01, 0x10])
def test_every_byte_flipped(path, small, flip):
    refusals = []
    for at in range(len(small)):
        damaged = bytearray(small)
        damaged[at] ^= flip
        path.write_bytes(damaged)
        refusals.append(refusal(path))
    assert None in refusals  # a weight or a name that became another
    assert all(text.startswith(f'cannot load {str(path)!r}: ') for text in refusals if text)
    assert len({text for text in refusals if text}) > 10


@settings(max_examples=200)
@given(data=st.data())
def test_bytes_replaced_and_moved(path, small, data):
    damaged = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(small) - 1))
        if data.draw(st.booleans()):
            damaged[at] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789[]{}",:'))
        else:  # swap two bytes: digits, names and indices change places
            other = data.draw(st.integers(0, len(small) - 1))
            damaged[at], damaged[other] = damaged[other], damaged[at]
    path.write_bytes(damaged)
    assert (refusal(path) or 'cannot load ').startswith('cannot load ')
