"""Tests of files.sparse: what the file holds, and that a damaged one never passes for sound."""

import struct
from collections import OrderedDict, namedtuple
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import save_file
from sparse_golden import (
    FREE,
    GOLDEN,
    GOLDEN_MASKS,
    GOLDEN_SHAPES,
    GOLDEN_TENSORS,
    OLD_TENSORS,
    bits,
    bytes_of,
    f32,
    u32,
)

from dns_jax.files.sparse import load_sparse, save_sparse


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
SAME = [  # as they are saved
    ONES,
    jnp.float32(3),
    {'a': {'b': {'c': ONES, 'd': ROW}}, 'e': ROW},
    {'a:values': {'b:shape': ONES}, 'a': ROW, 'a:shape': ROW},
    {'a': ONES, 'a ': ROW, 'a0': ROW},
    {'empty': jnp.zeros((0, 7)), 'scalar': jnp.float32(2)},
    {'axes': np.ones((1,) * 64, np.float32)},
]
NESTED = [
    *((tree, tree) for tree in SAME),
    ({'': ONES}, ONES),
    ((ONES, [ROW, ONES]), {'0': ONES, '1': {'0': ROW, '1': ONES}}),
    (Pair(ONES, {'x': ROW}), {'left': ONES, 'right': {'x': ROW}}),
    ({'mlp/~/dense': ONES, 'mlp': {'b': ROW}}, {'mlp': {'~': {'dense': ONES}, 'b': ROW}}),
    ({'a': {'': ONES}, 'b': None, 'ä ': ROW}, {'a': {'': ONES}, 'ä ': ROW}),
]


@pytest.mark.parametrize(('params', 'nested'), NESTED)
def test_any_tree_comes_back_as_nested_dicts(path, params, nested):
    """Whatever a mask of shape () says, it keeps all, as in apply_masks."""
    for mask in (lambda leaf: np.ones(leaf.shape, bool), lambda leaf: np.array(not leaf.ndim)):
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


W, T = jnp.ones(2), jnp.ones(2, bool)
WIDE = np.broadcast_to(np.float32(0), (2**16, 2**16 + 1))  # takes no memory
DEEP = W
for _ in range(101):
    DEEP = {'a': DEEP}


BAD = [
    ({'a': W}, {'b': T}, {}, ValueError, 'masks must have the leaves'),
    ({'a': W}, {'a': W}, {}, TypeError, r"masks\['a'\] must be boolean"),
    ({'a': None}, {'a': None}, {}, ValueError, 'at least one leaf'),
    ({'a/b': W, 'a': {'b': W}}, {'a/b': T, 'a': {'b': T}}, {}, ValueError, "'a/b' has the place"),
    ({'a': W, 'a/b/c': W}, {'a': T, 'a/b/c': T}, {}, ValueError, "'a/b/c' .* lies within"),
    ({'': W, 'a': W}, {'': T, 'a': T}, {}, ValueError, "'a' .* lies within"),
    (DEEP, jax.tree.map(lambda leaf: T, DEEP), {}, ValueError, '101 parts'),
    ({'a': 1.0}, {'a': True}, {}, TypeError, r"params\['a'\].*float64"),
    ({'a': W.at[1].set(jnp.nan)}, {'a': T}, {}, ValueError, r"params\['a'\].*not finite"),
    ({'a': W.at[0].set(-jnp.inf)}, {'a': jnp.array(True)}, {}, ValueError, 'not finite'),
    ({'a': WIDE}, {'a': np.array(True)}, {}, ValueError, r'4295032832 elements, over 2\*\*32'),
    ({'a': W}, {'a': T}, {'b:shape': '[2]'}, ValueError, "metadata has the key 'b:shape'"),
    ({'a': W}, {'a': T}, {'scale': 1.0}, TypeError, "metadata .* 'scale': 1.0"),
    ({'a': W}, {'a': T}, {3: 'three'}, TypeError, "metadata .* 3: 'three'"),
    ({'a': W}, {'a': T}, {'b': '\ud800'}, ValueError, 'surrogates'),
]


@pytest.mark.parametrize(('params', 'masks', 'metadata', 'error', 'message'), BAD)
def test_what_cannot_be_saved_leaves_no_trace(tmp_path, params, masks, metadata, error, message):
    with pytest.raises(error, match=message):
        save_sparse(tmp_path / 'network', params, masks, metadata)
    assert not list(tmp_path.iterdir())


def test_file_or_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_sparse(tmp_path / 'no' / 'network', W, T)
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / 'network')
