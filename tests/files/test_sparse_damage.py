"""Tests of files.sparse: damaged files are refused, whatever was done to them."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory import takes_less_than
from safetensors.numpy import save_file
from sparse_golden import (
    GOLDEN,
    GOLDEN_MASKS,
    GOLDEN_SHAPES,
    GOLDEN_TENSORS,
    bits,
    bytes_of,
    f32,
    u32,
)

from dns_jax._trees import check_parallel
from dns_jax.files.sparse import load_sparse, save_sparse


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


BAD_TENSORS = [
    ({'values': None}, r"lacks the tensors \['fc/kernel:values'\] and has \[\] too many"),
    ({'values': None, 'indices': None}, r"lacks .*'fc/kernel:indices', 'fc/kernel:values'\]"),
    ({'extra': f32(1)}, r"lacks the tensors \[\] and has \['extra'\] too many"),
    ({'b:values': f32(1), 'b:indices': u32(0)}, r"has \['b:indices', 'b:values'\] too many"),
    ({'values': np.array([1.5, -2, 0])}, "'fc/kernel:values' must be F32 .* is F64"),
    ({'values': np.array([1, 2, 3], np.int32)}, "'fc/kernel:values' must be F32 .* is I32"),
    ({'indices': np.array([1, 3, 4], np.int32)}, "'fc/kernel:indices' must be U32 .* is I32"),
    ({'values': f32(1, 2, 3)[None]}, "'fc/kernel:values' must be F32 of one axis, .* 2"),
    ({'values': f32(1).reshape(()), 'indices': u32(1)}, 'must be F32 of one axis, .* 0'),
    ({'indices': u32(1, 3, 4)[:, None]}, "'fc/kernel:indices' must be U32 of one axis, .* 2"),
    ({'values': f32(1, 2)}, "'fc/kernel' has 2 values, but 3 indices"),
    ({'values': f32(), 'indices': u32(1)}, "'fc/kernel' has 0 values, but 1 indices"),
    ({'indices': u32(1, 3, 6)}, "'fc/kernel' has the index 6, but 6 elements"),
    ({'indices': u32(1, 3, 2**32 - 1)}, "'fc/kernel' has the index 4294967295"),
    ({'indices': u32(1, 3, 3)}, "indices of 'fc/kernel' do not ascend"),
    ({'indices': u32(6, 1, 3)}, "indices of 'fc/kernel' do not ascend"),
    ({'values': f32(1, np.nan, 2)}, "'fc/kernel' has a value that is not finite"),
    ({'values': f32(-np.inf, 2, 3)}, "'fc/kernel' has a value that is not finite"),
    # Of the bias, which takes no part.
    ({'fc/bias:values': f32(7)}, r"lacks the tensors \['fc/bias:indices'\] and has \[\] too many"),
    ({'fc/bias:values': f32(7, 8)[None]}, r"lacks the tensors \['fc/bias:indices'\]"),
    ({'fc/bias:values': u32(7, 8)}, "'fc/bias:values' must be F32 .* is U32"),
    ({'fc/bias:values': f32(7, np.nan)}, "'fc/bias' has a value that is not finite"),
    ({'fc/bias:indices': u32(0, 2)}, "'fc/bias' has the index 2, but 2 elements"),
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


WITHIN = [('a', 'a ', 'a/b/c'), ('', 'a/b'), ('', '/'), ('a/', 'a//b')]


@pytest.mark.parametrize('paths', WITHIN)
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
    for limit in (15, 0):
        assert_refused(path, f'it has 16 .* max_parameters is {limit}', max_parameters=limit)


HUGE = [['[32768, 32769]'], ['[1000000000]'] * 2, ['[0' + ', 999999999999999999' * 63 + ']']]


@pytest.mark.parametrize('shapes', HUGE)
def test_huge_networks_are_refused_before_memory_is_taken(path, shapes):
    tensors, _ = leaves(*map(str, range(len(shapes))))
    save_file(tensors, path, {f'{at}:shape': shape for at, shape in enumerate(shapes)})
    with takes_less_than(10**6):
        assert_refused(path, 'max_parameters is 1073741824')


def raw(header, data=b''):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data


def tensor(dtype, shape, start, stop):
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [start, stop]}


def of_two(*tensors, size):
    """A leaf `a` of two elements, with its values and indices as they are said to lie."""
    names = 'a:values', 'a:indices'
    header = {'__metadata__': {'a:shape': '[2]'}, **dict(zip(names, tensors, strict=True))}
    return raw(header, bytes(size))


RAW = {
    'empty': (b'', 'header'),
    'text': (b'not a network at all', 'header'),
    'largest length': (struct.pack('<Q', 2**64 - 1) + b'{}', 'header'),
    'header no JSON': (raw(b'{"a": '), 'JSON'),
    'header not UTF-8': (raw(b'{"\xff": 1}'), 'UTF-8'),
    'nothing in it': (raw({}), 'at least one leaf'),
    'metadata alone': (raw({'__metadata__': {'network': 'tiny'}}), 'at least one leaf'),
    'type that NumPy lacks': (
        of_two(tensor('BF16', [2], 0, 4), tensor('U32', [2], 4, 12), size=12),
        "'a:values' must be F32 .* is BF16",
    ),
    'type of less than a byte': (
        of_two(tensor('F32', [2], 0, 8), tensor('F4', [2], 8, 9), size=9),
        "'a:indices' must be U32 .* is F4",
    ),
    'shape that NumPy lacks': (
        of_two(tensor('F32', [0, 2**62, 2**62], 0, 0), tensor('U32', [0], 0, 0), size=0),
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
    for length in range(0, len(small), 9):
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


def test_every_byte_flipped(path, small):
    refusals = []
    for at in range(len(small)):
        damaged = bytearray(small)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        refusals.append(refusal(path))
    assert None in refusals  # a weight or a name that became another
    assert all(text.startswith(f'cannot load {str(path)!r}: ') for text in refusals if text)
    assert len({text for text in refusals if text}) > 10
