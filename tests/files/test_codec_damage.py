"""Tests of files.codec: damaged files are refused, in little memory."""

import struct
import zlib

import jax
import numpy as np
import pytest
from memory import takes_less_than

from dns_jax.files._entropy import Encoder
from dns_jax.files._header import encode_number, encode_text
from dns_jax.files.codec import load_coded, save_coded
from dns_jax.files.sharing import SharedNetwork
from dns_jax.files.sharing import share_weights as share

ONES = np.ones((2, 3), np.float32)


def assert_refused(path, message, **arguments):
    """A ValueError that names the file and what is wrong."""
    with pytest.raises(ValueError, match=message) as caught:
        load_coded(path, **arguments)
    assert str(caught.value).startswith(f'cannot load {str(path)!r}: ')


def sealed(content):
    """The bytes of a file with this content and the checksum of it."""
    return b'DNS\x01' + struct.pack('<I', zlib.crc32(content)) + content


def form(*layers, metadata=b'\0', names=('w',)):
    names = encode_number(len(names)) + b''.join(map(encode_text, names))
    return metadata + names + encode_number(len(layers)) + b''.join(layers)


def layer(name='', book=b'\x80\x3f', leaves=((0, (2,), 2),), clusters=None, amount=None):
    parts = [
        encode_text(name),
        encode_number(len(book) // 2 if clusters is None else clusters),
        book,
    ]
    parts.append(encode_number(len(leaves) if amount is None else amount))
    for name, shape, kept in leaves:
        parts += [
            encode_number(name),
            encode_number(len(shape)),
            *map(encode_number, shape),
            encode_number(kept),
        ]
    return b''.join(parts)


def whole(axes, shape):
    """A layer of one leaf, without a count of kept weights."""
    return layer(leaves=(), amount=1) + b''.join(map(encode_number, (0, axes, *shape)))


HEADERS = {
    'sound': (form(layer()), None),
    'nothing in it': (form(), 'at least one leaf'),
    'ends in the metadata': (b'\x05\x01a', 'ends too early'),
    'ends in the names': (b'\0' + encode_number(2**62) + b'\x01a', 'ends too early'),
    'name that is not there': (form(layer(leaves=[(1, (2,), 2)])), '1 names of leaves'),
    'names unsorted': (form(layer(leaves=[(0, (2,), 2)]), names=('w', 'v')), 'not what its'),
    'ends in the layers': (encode_number(2**62) + b'\x01a\x01b', 'ends too early'),
    'many layers': (b'\0\x01\x01w' + encode_number(2**62) + layer(), 'ends too early'),
    'many leaves': (form(layer(amount=2**62)), 'ends too early'),
    'many clusters': (form(layer(clusters=2**62)), 'over 65536'),
    'more clusters than there are': (form(layer(clusters=60_000)), 'ends too early'),
    'many axes': (form(layer(leaves=[(0, (1,) * 65, 1)])), '65 axes, over 64'),
    'axes of neither': (form(whole(127, (1,) * 127)), '127 axes, over 64'),
    'no part': (form(whole(129, (2,))), None),
    'no part, many axes': (form(whole(128 + 65, (1,) * 65)), '65 axes, over 64'),
    'no part, a scalar': (form(whole(128, ())), 'not what its network'),
    'no part, a count': (form(whole(129, (2, 2))), ''),
    'no part, too large': (form(whole(129, (2**31 + 1,))), r'2147483649; 2\*\*31 are the most'),
    'no part, above the limit': (form(whole(129, (2 * 10**6,))), '2000000 parameters'),
    'number too long': (b'\xff' * 10, r'2\*\*63'),
    'number with a zero too many': (b'\x80\0' + form(layer())[1:], 'not what its network'),
    'not UTF-8': (b'\x01\x01\xff\x00' + form(layer())[1:], 'utf-8'),
    'metadata unsorted': (form(layer(), metadata=b'\x02\x01b\0\x01a\0'), 'not what its network'),
    'metadata twice': (form(layer(), metadata=b'\x02\x01a\0\x01a\0'), 'not what its network'),
    'kept over its size': (form(layer(leaves=[(0, (2,), 3)])), '3 kept weights of 2'),
    'leaf too large': (form(layer(leaves=[(0, (2**31 + 1,), 3)])), '3 kept weights of'),
    'scalar pruned': (form(layer(leaves=[(0, (), 0)])), 'scalar that is not kept'),
    'too large': (form(layer(leaves=[(0, (10**6, 2), 3)])), '2000000 parameters'),
    'too large but empty': (form(layer(leaves=[(0, (0, 2**62), 0)])), 'max_parameters'),
    'too large together': (
        form(layer(leaves=[(at, (600_000,), 3) for at in range(2)]), names='vw'),
        '1200000 parameters',
    ),
    'codebook not finite': (form(layer(book=b'\xc0\x7f')), 'not finite'),
    'no codebook': (form(layer(book=b'')), 'from 0 to -1'),
    'layers unsorted': (
        form(layer('b', leaves=[(0, (2,), 2)]), layer(leaves=[(1, (2,), 2)]), names=('/w', 'w')),
        'not what its',
    ),
    'layer twice': (form(layer(), layer()), "the leaf 'w' twice"),
    'layer twice, other leaves': (
        form(layer(), layer(leaves=[(1, (2,), 2)]), names='wx'),
        'not what its network',
    ),
    'layer of no leaves': (form(layer('a', leaves=())), ''),
    'leaf of another layer': (form(layer('a')), "'aw' in another layer"),
    'leaf in a part that is no layer': (form(layer(), names=('w/w',)), "'w/w' in another layer"),
    'leaf twice': (form(layer(leaves=[(0, (2,), 2), (0, (2, 2), 2)])), "the leaf 'w' twice"),
    'leaf in a leaf': (
        form(layer(leaves=[(1, (2,), 2)]), layer('w'), names=('/v', 'w')),
        'has the place of another',
    ),
    'path too long': (form(layer(), names=('w' * 1001,)), 'over 1000 characters'),
    'path too deep': (form(layer('/'.join('a' * 101)), names=('/w',)), '102 parts'),
    'words left over': (form(layer()) + bytes(4), 'not what its network'),
    'bytes left over': (form(layer()) + bytes(1), 'multiple of 4'),
    'words missing': (form(layer(leaves=[(0, (8,), 3)])), ''),
}


@pytest.mark.parametrize(('content', 'message'), HEADERS.values(), ids=HEADERS)
def test_damaged_headers(path, content, message):
    path.write_bytes(sealed(content))
    if message is None:
        loaded = load_coded(path)
        assert loaded.masks['w'].all()
        np.testing.assert_array_equal(loaded.assignments['w'], [0, 0])
    else:
        assert_refused(path, message or '.', max_parameters=10**6)


def test_other_files_are_refused(path):
    save_coded(path, share({'a': ONES}, {'a': ONES > 0}, 1))
    data = path.read_bytes()
    for other in (b'', b'DNS', b'DNS\x02' + data[4:], b'PK\x03\x04' + bytes(60), b'\x80\x04]'):
        path.write_bytes(other)
        assert_refused(path, 'must begin with')
    for other in (
        b'DNS\x01',
        b'DNS\x01\0\0',
        data[:-1],
        data + b'\0',
        data[:8] + b'\x09' + data[9:],
    ):
        path.write_bytes(other)
        assert_refused(path, 'checksum')


def test_max_parameters(path):
    params = {'a': ONES, 'b': np.ones(4, np.float32), 'c': np.zeros((0, 5), np.float32)}
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    save_coded(path, share(params, masks, 1))
    load_coded(path, max_parameters=15)
    assert_refused(path, 'it has 15 .* max_parameters is 14', max_parameters=14)


SCALAR = ((), 1)
COMBINED = {
    'layers of leaves that lie deep': (
        form(
            *(layer(str(at), leaves=[(name, *SCALAR) for name in range(60)]) for at in range(150)),
            names=[f'/{name}' + '/a' * 96 for name in range(60)],
        ),
        "'0/0/a/a.* in another layer",
    ),
    'one leaf again and again': (
        form(layer('😀' * 900, leaves=[(0, *SCALAR)] * 60_000), names=['/w']),
        'twice',
    ),
    'a long layer of many leaves': (
        form(
            layer('😀' + 'a' * 950, leaves=[(name, *SCALAR) for name in range(20_000)]),
            names=[f'/{name}' for name in range(20_000)],
        ),
        'paths of its leaves have over 1048576 characters',
    ),
}


@pytest.mark.parametrize(('content', 'message'), COMBINED.values(), ids=COMBINED)
def test_layers_times_names_take_little_memory(path, content, message):
    path.write_bytes(sealed(content))
    paths_at_most = 4 * 2**20  # a wide character takes four bytes
    with takes_less_than(20 * len(content) + paths_at_most):
        assert_refused(path, message)


def test_decoding_takes_twelve_bytes_a_parameter(path):
    """A file of 36 bytes: all of a layer is kept but one weight."""
    mask = np.ones((2048, 2048), bool)
    mask[7, 7] = False
    save_coded(path, SharedNetwork({'': np.float32([1])}, np.zeros(mask.shape, int), mask, {}))
    assert path.stat().st_size < 50
    with takes_less_than(12 * mask.size):
        loaded = load_coded(path)
    np.testing.assert_array_equal(loaded.masks, mask)


def test_damaged_gaps_take_as_little(path):
    """All gaps have two bits, so that most kept weights lie far outside of the mask."""
    side, kept = 2048, 2048**2 - 4
    encoder = Encoder()
    for _ in ('units', 'inputs'):
        encoder.symbols(np.ones(side, bool), 2)
    encoder.symbols(np.full(kept, 2), 4)
    content = form(layer(leaves=[(0, (side, side), kept)])) + encoder.getvalue()
    path.write_bytes(sealed(content))
    with takes_less_than(12 * side**2):
        assert_refused(path, 'outside of it|damaged')


HUGE = [(2**28 + 1,), (2**14, 2**14 + 1), (0, *(2**62,) * 63)]


@pytest.mark.parametrize('shape', HUGE, ids=str)
def test_huge_networks_are_refused_before_memory_is_taken(path, shape):
    path.write_bytes(sealed(form(layer(leaves=[(0, shape, 0)]))))
    with takes_less_than(10**6):
        assert_refused(path, 'max_parameters is 268435456')
