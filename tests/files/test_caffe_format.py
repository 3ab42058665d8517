"""Tests of files._caffe_format: bytes that are no network are refused, whatever they are."""

import numpy as np
import pytest
from caffe_nets import BIAS, DATA_LAYER, NET, PRODUCT, with_blob
from memory import takes_less_than
from wire import blob, delimited, floats, integer, layer, shape

from dns_jax.files.caffe import read_caffemodel

BAD_FILES = {
    'empty': (b'', 'no layer has blobs'),
    'no weights': (DATA_LAYER, 'no layer has blobs'),
    'text': (b'name: "LeNet"\nlayer {\n', 'wire type 6'),
    'truncated': (NET[:-1], 'does not end where its message does'),
    'a length beyond the end': (b'\xa2\x06\xff\xff\xff\xff\x07' + NET, 'of 2147483647 bytes'),
    'a number without end': (b'\xff' * 40, 'a number does not end'),
    'a number cut off': (NET + b'\xff', 'a number does not end'),
    'a group': (b'\x0b\x0c', 'wire type 3'),
    'two of one name': (NET + layer('ip1', 'InnerProduct', blob(BIAS)), "have the name 'ip1'"),
    'more shape than data': (
        with_blob(delimited(5, floats([1, 2])) + shape(3)),
        r"layer 'ip': a blob of shape \(3,\) has 8 bytes",
    ),
    'more data than shape': (with_blob(delimited(5, floats([1, 2])) + shape(1)), 'has 8 bytes'),
    'half a number': (with_blob(delimited(5, b'\0' * 6) + shape(1)), 'has 6 bytes'),
    'a shape of zeros': (with_blob(shape(0, 5)), r'of shape \(0, 5\) is empty'),
    'a negative axis': (with_blob(shape(2**64 - 1)), 'has 0 bytes'),
    'no data': (with_blob(b''), r'of shape \(\) has 0 bytes'),
    'too many axes': (with_blob(shape(*[1] * 33) + delimited(5, floats([1]))), 'more than 32 axes'),
    'doubles': (with_blob(delimited(8, b'\0' * 8) + shape(1)), 'double precision'),
    'a message cut off': (
        layer('ip', 'InnerProduct', blob(PRODUCT), unknown=delimited(117, b'\x08')),
        "layer 'ip': a number does not end",
    ),
    'not a number': (with_blob(blob([np.nan])), 'not finite'),
    'infinite': (with_blob(blob([np.inf])), 'not finite'),
    'a name that is none': (
        delimited(100, delimited(1, b'\xff') + delimited(7, blob(BIAS))),
        'is no name',
    ),
}


@pytest.mark.parametrize('kind', BAD_FILES)
def test_bad_files(read, kind):
    content, message = BAD_FILES[kind]
    with pytest.raises(ValueError, match=r'cannot read .*net\.caffemodel.*' + message):
        read(content)


def test_a_file_that_is_too_large_is_not_opened(read, monkeypatch):
    monkeypatch.setattr('dns_jax.files.caffe.MAX_BYTES', len(NET) - 1)
    with pytest.raises(ValueError, match=rf'has {len(NET)} bytes; at most {len(NET) - 1} are'):
        read(NET)
    monkeypatch.setattr('dns_jax.files.caffe.MAX_BYTES', len(NET))
    assert read(NET).keys() == {'conv1', 'ip1'}


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_caffemodel(tmp_path / 'none.caffemodel')


def small_pieces():
    """A megabyte of numbers, as many pieces as are read."""
    pieces = [delimited(5, floats(range(64))) for _ in range(4_000)]
    return with_blob(b''.join(pieces) + shape(4_000, 64))


HOSTILE = {
    'a huge shape': lambda: with_blob(shape(2**62, 2**62)),
    'many blobs': lambda: layer('ip', 'InnerProduct', *[b''] * 500_000),
    'many layers': lambda: delimited(100, b'') * 300_000,
    'many axes': lambda: with_blob(delimited(7, delimited(1, b'\x01' * 1_000_000))),
    'many pieces': lambda: with_blob(delimited(5, b'') * 500_000),
    'many settings': lambda: layer(
        'ip', 'InnerProduct', blob(BIAS), unknown=delimited(117, integer(1, 1) * 500_000)
    ),
    'nested without end': lambda: b'\x0b' * 1_000_000,
    'a long name': lambda: layer('n' * 1_000_000, 'InnerProduct', blob(BIAS)),
}


@pytest.mark.parametrize('kind', [*HOSTILE, 'sound'])
def test_memory_is_that_of_the_file_and_its_arrays(read, kind):
    content = small_pieces() if kind == 'sound' else HOSTILE[kind]()
    # The file, its arrays, and some hundred bytes for each of at most 4,096 fields.
    with takes_less_than(2 * len(content) + 1.5 * 2**20):
        if kind == 'sound':
            assert read(content)['ip'].blobs[0].shape == (4_000, 64)
        else:
            with pytest.raises(ValueError, match='cannot read') as refusal:
                read(content)
            assert len(str(refusal.value)) < 1_000


def test_many_fields_are_read_up_to_a_limit(read):
    assert len(read(b''.join(layer(f'{n}', 'ReLU', blob(BIAS)) for n in range(4_096)))) == 4_096
    with pytest.raises(ValueError, match='a message has more than 4096 fields'):
        read(DATA_LAYER * 4_097)


def test_a_single_number_has_no_axes_and_arrays_can_be_written_to(read):
    array = read(layer('prelu', 'PReLU', delimited(5, floats([0.25]))))['prelu'].blobs[0]
    assert (array.shape, float(array)) == ((), 0.25)
    array[...] = 1


def test_old_axes_count_where_both_are_given(read):
    both = integer(3, 2) + integer(4, 2) + integer(1, 1) + integer(2, 1) + shape(4)
    array = read(layer('a', 'Some', both + delimited(5, floats(range(4)))))['a'].blobs[0]
    assert array.shape == (1, 1, 2, 2)
