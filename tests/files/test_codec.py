"""Tests of files.sharing, codec and entropy: shared weights, sound and damaged files."""

import struct
import zlib
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sparse_golden import bits

from dns_jax.files.codec import load_coded, save_coded
from dns_jax.files.sharing import SharedNetwork, expand
from dns_jax.files.sharing import share_weights as share
from dns_jax.layers import named_leaves

KERNEL = np.array([[0.0, 1.5, 0.0], [-2.0, 0.0, 0.25]], np.float32)
PARAMS = {'fc': {'kernel': KERNEL, 'bias': np.array([7, 8], np.float32)}}
MASKS = {'fc': {'kernel': KERNEL != 0, 'bias': np.array(True)}}
FREE = {'network': 'tiny', 'Überschrift': 'σ\n"\0😀', '': ''}


def by_path(tree):
    """The leaves, whose order may be another in nested dicts."""
    return dict(named_leaves(tree))


def assert_comes_back(path, network):
    """What is saved is loaded, to the bit, and is the same file when it is saved again."""
    save_coded(path, network)
    data = path.read_bytes()
    loaded = load_coded(path)
    assert loaded.metadata == network.metadata
    assert loaded.codebooks.keys() == network.codebooks.keys()
    for layer, book in network.codebooks.items():
        np.testing.assert_array_equal(bits(loaded.codebooks[layer]), bits(book), strict=True)
    masks = by_path(network.masks)
    for name, mask in by_path(loaded.masks).items():
        wanted = np.asarray(masks.pop(name))
        np.testing.assert_array_equal(mask, wanted | (wanted.ndim == 0), strict=True)
    wanted = by_path(expand(*network[:3]))
    for name, weights in by_path(expand(*loaded[:3])).items():
        np.testing.assert_array_equal(bits(weights), bits(wanted.pop(name)), strict=True)
    assert not masks
    assert not wanted
    save_coded(path, loaded)
    assert path.read_bytes() == data
    return loaded


def test_golden_bytes(path):
    params = {'w': jnp.array([[9.0, -1.0], [9.0, 0.5]])}
    masks = {'w': jnp.array([[False, True], [False, True]])}
    save_coded(path, share(params, masks, 2, {'network': 'tiny'}))
    content = (
        b'\x01\x07network\x04tiny'  # one entry of metadata
        b'\x01\x01w'  # one name of a leaf
        b'\x01\x00\x02\x80\xbf\x00\x3f'  # one layer '', two values: -1 and 0.5 in bfloat16
        b'\x01\x00\x02\x02\x02\x02'  # one leaf: its name, two axes of 2 and 2, two weights
    )
    data = path.read_bytes()
    head = b'DNS\x01' + struct.pack('<I', zlib.crc32(data[8:]))
    assert data[: 8 + len(content)] == head + content
    assert data[8 + len(content) :].hex() == GOLDEN_STREAM


GOLDEN_STREAM = '8797d07a'


def test_golden_bytes_of_a_leaf_that_takes_no_part(path):
    """128 more for its axes and no count; a scalar says of itself that it takes no part."""
    network = SharedNetwork(
        {'': np.float32([1])},
        {'a': np.zeros((1, 2), int), 't': np.zeros((), int), 'w': np.zeros(2, int)},
        {'a': np.array(False), 't': np.array(True), 'w': np.ones(2, bool)},
        {},
    )
    loaded = assert_comes_back(path, network)
    assert {name: mask.shape for name, mask in loaded.masks.items()} == {
        'a': (),
        't': (),
        'w': (2,),
    }
    content = (
        b'\0\x03\x01a\x01t\x01w'  # no metadata, three names of leaves
        b'\x01\0\x01\x80\x3f\x03'  # one layer '', one value, 1, and three leaves
        b'\0\x82\x01\x01\x02'  # a: 130 for two axes of 1 and 2
        b'\x01\0\x01'  # t: no axes, one weight
        b'\x02\x01\x02\x02'  # w: one axis of 2, two weights
    )
    assert path.read_bytes()[8:].startswith(content)


ZOO = sorted((Path(__file__).parents[2] / 'zoo').glob('*.dns'))


@pytest.mark.parametrize('file', ZOO, ids=lambda file: file.stem)
def test_the_zoo_is_written_as_it_was(path, file):
    save_coded(path, load_coded(file))
    assert path.read_bytes() == file.read_bytes()


def test_few_distinct_weights_are_kept_as_they_are(path):
    values = jnp.array([0.5, -3.0, 0.5, 7.0, jnp.nan], jnp.float16)
    mask = jnp.array([True, True, True, True, False])
    network = share(values, mask, 16)
    np.testing.assert_array_equal(network.codebooks[''], np.float32([-3, 0.5, 7]), strict=True)
    weights = expand(*assert_comes_back(path, network)[:3])
    np.testing.assert_array_equal(weights, np.float32([0.5, -3, 0.5, 7, 0]))


ONES = np.ones((2, 3), np.float32)
TREES = {
    'bare array': ONES,
    'scalar': {'t': np.float32(3)},
    'empty leaf': {'a': np.zeros((0, 7), np.float32), 'b': np.zeros((3, 0), np.float32), 'c': ONES},
    'empty alone': {'a': np.zeros(0, np.float32)},
    'one weight': {'a': np.ones((1, 1), np.float32)},
    'tuple of twelve': tuple(np.full(2, at, np.float32) for at in range(12)),
    'slashes': {'mlp/~/linear': {'w': ONES}, 'mlp': {'b': ONES}, 'é ': {'': ONES}},
    'slash first': {'': {'a': ONES}, 'b': ONES},
    'many axes': {'a': np.ones((1,) * 63 + (2,), np.float32)},
    'wide': {'a': np.arange(30_000, dtype=np.float32).reshape(3, -1)},
}


@pytest.mark.parametrize('params', TREES.values(), ids=TREES)
@pytest.mark.parametrize('keep', ['all', 'scalar', 'none', 'first', 'last', 'some'])
def test_any_tree_and_mask_comes_back(path, params, keep):
    random = np.random.default_rng(0)

    def make(leaf):
        mask = np.zeros(leaf.shape, bool)
        if keep == 'scalar' or not leaf.ndim:
            return np.array(True)
        if keep in ('first', 'last') and leaf.size:
            mask.reshape(-1)[0 if keep == 'first' else -1] = True  # `flat` has 32 axes
        if keep == 'some':
            mask = random.random(leaf.shape) < 0.2
        return mask | (keep == 'all')

    assert_comes_back(path, share(params, jax.tree.map(make, params), 3, FREE))


@st.composite
def networks(draw):
    """Weights and masks, of which some take no part, in layers of all shapes."""
    params, masks = {}, {}
    for at in range(draw(st.integers(1, 4))):
        shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))
        name = draw(st.sampled_from(['', 'a/', 'b/', 'ab/c/'])) + str(at)
        floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
        params[name] = draw(hnp.arrays(np.float32, shape, elements=floats))
        masks[name] = draw(hnp.arrays(bool, shape)) if shape else np.array(True)
        if draw(st.booleans()):
            masks[name] = np.array(True)
    return params, masks


@settings(max_examples=40)
@given(
    network=networks(),
    clusters=st.integers(1, 20),
    metadata=st.dictionaries(st.text('ab', max_size=3), st.text('σ"\\')),
)
def test_round_trip(path, network, clusters, metadata):
    params, masks = network
    assert_comes_back(path, share(params, masks, clusters, metadata))


def test_masks_of_another_kind_of_tree_are_found_by_their_paths(path):
    assignments = OrderedDict(b=np.zeros(2, int), a=np.zeros(2, int))
    masks = {'a': np.array([True, False]), 'b': np.array(True)}
    save_coded(path, SharedNetwork({'': np.float32([1])}, assignments, masks, {}))
    jax.tree.map(np.testing.assert_array_equal, load_coded(path).masks, masks)


def test_sharded_weights_are_gathered(path, mesh):
    rows = jax.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
    params = {'w': jax.device_put(jnp.arange(32.0).reshape(16, 2), rows)}
    masks = {'w': jax.device_put(params['w'] % 3 == 1, rows)}
    loaded = assert_comes_back(path, share(params, masks, 32))
    wanted = np.where(np.arange(32) % 3 == 1, np.arange(32), 0).reshape(16, 2)
    np.testing.assert_array_equal(expand(*loaded[:3])['w'], wanted)


W, T = np.ones(2, np.float32), np.ones(2, bool)
GOOD = SharedNetwork(
    {'fc': np.float32([-1, 2])},
    {'fc': {'w': np.int32([[0, 1], [1, 9]])}},
    {'fc': {'w': np.array([[True, True], [True, False]])}},
    {'network': 'tiny'},
)
WIDE = np.broadcast_to(np.int32(0), (2**16, 2**15 + 1))  # takes no memory
BAD = [
    ({'codebooks': {}}, ValueError, r"codebooks must be of the layers \['fc'\], not \[\]"),
    ({'codebooks': GOOD.codebooks | {'x': W}}, ValueError, "not \\['fc', 'x'\\]"),
    ({'codebooks': {'fc': np.float64([1, 2])}}, TypeError, 'must be float32, but is float64'),
    ({'codebooks': {'fc': np.float32([[1, 2]])}}, ValueError, 'must have one axis'),
    ({'codebooks': {'fc': np.zeros(2**16 + 1, np.float32)}}, ValueError, 'of at most 65536'),
    ({'codebooks': {'fc': np.float32([0.1, 2])}}, ValueError, 'what round_codebooks gives'),
    ({'codebooks': {'fc': np.float32([np.nan, 2])}}, ValueError, 'not finite'),
    ({'codebooks': {'fc': np.float32([1])}}, ValueError, 'from 0 to 0, but has 0 to 1'),
    ({'assignments': {'fc': {'w': -GOOD.assignments['fc']['w']}}}, ValueError, 'but has -1 to 0'),
    ({'assignments': {'fc': {'w': np.ones((2, 2))}}}, TypeError, 'must be integers, not float64'),
    ({'assignments': {'fc': {'v': np.ones((2, 2), int)}}}, ValueError, 'must have the leaves'),
    ({'masks': {'fc': {'w': np.ones((2, 2))}}}, TypeError, 'must be boolean'),
    ({'metadata': {'scale': 1.0}}, TypeError, "'scale': 1.0"),
    ({'metadata': {3: 'three'}}, TypeError, "3: 'three'"),
    ({'metadata': {'a': '\ud800'}}, ValueError, 'surrogates'),
    ({'assignments': {}, 'masks': {}, 'codebooks': {}}, ValueError, 'at least one leaf'),
    (
        {'assignments': {'fc': {'w': WIDE}}, 'masks': {'fc': {'w': WIDE == 0}}},
        ValueError,
        r'2147549184 elements, over 2\*\*31',
    ),
    (
        {
            'assignments': {'x' * 1001: np.int32([0])},
            'masks': {'x' * 1001: np.array(True)},
            'codebooks': {'': np.float32([1])},
        },
        ValueError,
        'over 1000 characters',
    ),
    (
        {
            'assignments': {f'{at:0999}': np.int32([0]) for at in range(1050)},
            'masks': {f'{at:0999}': np.array(True) for at in range(1050)},
            'codebooks': {'': np.float32([1])},
        },
        ValueError,
        'paths of the leaves have over 1048576 characters',
    ),
    (
        {
            'assignments': {'a': np.int32([0]), 'a/b': np.int32([0])},
            'masks': {'a': np.array(True), 'a/b': np.array(True)},
        },
        ValueError,
        "'a/b' has the place of another, or lies within it",
    ),
]


@pytest.mark.parametrize(('changes', 'error', 'message'), BAD)
def test_what_cannot_be_saved_leaves_no_trace(tmp_path, changes, error, message):
    save_coded(tmp_path / 'network', GOOD)
    (tmp_path / 'network').unlink()
    with pytest.raises(error, match=message):
        save_coded(tmp_path / 'network', GOOD._replace(**changes))
    assert not list(tmp_path.iterdir())


def test_what_is_assigned_where_pruned_is_of_no_concern(path):
    loaded = assert_comes_back(path, GOOD)
    np.testing.assert_array_equal(loaded.assignments['fc']['w'], np.int32([[0, 1], [1, 0]]))


def test_file_or_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_coded(tmp_path / 'no' / 'network', GOOD)
    with pytest.raises(FileNotFoundError):
        load_coded(tmp_path / 'network')
