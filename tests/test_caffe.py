"""Tests of dns_jax.caffe against files put together by hand, byte by byte, and the authors' own."""

import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire import blob, delimited, floats, integer, layer, old_blob, old_layer, shape

from dns_jax import apply_masks
from dns_jax.caffe import CaffeLayer, read_caffemodel, to_linen
from experiments import data, models, train


def counting(*axes):
    return np.arange(np.prod(axes), dtype=np.float32).reshape(axes)


CONVOLUTION = counting(3, 2, 5, 4)
PRODUCT = counting(6, 12)  # of three maps, two by two
BIAS = np.array([7, -8, 9], np.float32)
DATA_LAYER = layer('mnist', 'Data')
NET = (
    delimited(1, b'a net')
    + DATA_LAYER
    + layer('conv1', 'Convolution', blob(CONVOLUTION), blob(BIAS))
    + layer('ip1', 'InnerProduct', blob(PRODUCT))
)


@pytest.fixture
def read(tmp_path):
    def read_bytes(content, **limits):
        path = tmp_path / 'net.caffemodel'
        path.write_bytes(content)
        return read_caffemodel(path, **limits)

    return read_bytes


def test_layers_with_blobs_are_read_as_they_lie(read):
    layers = read(NET)
    assert list(layers) == ['conv1', 'ip1']
    assert [layer.kind for layer in layers.values()] == ['Convolution', 'InnerProduct']
    found = [array for layer in layers.values() for array in layer.blobs]
    for array, wanted in zip(found, (CONVOLUTION, BIAS, PRODUCT), strict=True):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, wanted)


def test_an_old_file_gives_the_same_network(read):
    old = old_layer('conv1', 4, old_blob(CONVOLUTION), old_blob(BIAS))
    old += old_layer('ip1', 14, old_blob(PRODUCT))
    layers = read(old + old_layer('pool', 17))
    assert [layer.kind for layer in layers.values()] == ['Convolution', 'InnerProduct']
    assert layers['ip1'].blobs[0].shape == (1, 1, 6, 12)
    new = to_linen(read(NET)).params
    for name, arrays in to_linen(layers).params.items():
        assert arrays.keys() == new[name].keys()
        for leaf, array in arrays.items():
            np.testing.assert_array_equal(array, new[name][leaf])


def test_data_may_come_in_pieces_and_beside_unknown_fields(read):
    split = delimited(5, floats([1, 2])) + integer(55, 9) + delimited(5, floats([3])) + shape(3)
    layers = read(
        layer('ip', 'InnerProduct', split, unknown=delimited(60, b'some') + b'\xb5\x05four')
    )
    np.testing.assert_array_equal(layers['ip'].blobs[0], [1, 2, 3])


def test_linen_computes_what_caffe_does(read):
    """A convolution and an inner product over its maps, from the definitions of both."""
    import flax.linen as nn

    random = np.random.default_rng(0)
    kernel = random.normal(size=(3, 2, 3, 2)).astype(np.float32)
    weights = random.normal(size=(5, 12)).astype(np.float32)
    bias, last_bias = random.normal(size=3), random.normal(size=5)
    net = layer('conv', 'Convolution', blob(kernel), blob(bias))
    net += layer('ip', 'InnerProduct', blob(weights), blob(last_bias))
    image = random.normal(size=(2, 4, 3)).astype(np.float32)  # channel, height, width

    maps = np.zeros((3, 2, 2))
    for output, row, column in np.ndindex(3, 2, 2):
        patch = image[:, row : row + 3, column : column + 2]
        maps[output, row, column] = (patch * kernel[output]).sum() + bias[output]
    wanted = weights @ maps.reshape(-1) + last_bias

    params = to_linen(read(net)).params
    convolution = nn.Conv(3, (3, 2), padding='VALID')
    hidden = convolution.apply({'params': params['conv']}, image.transpose(1, 2, 0)[None])
    found = nn.Dense(5).apply({'params': params['ip']}, hidden.reshape(1, -1))
    np.testing.assert_allclose(found[0], wanted, rtol=1e-4, atol=1e-4)


def test_four_blobs_are_weights_and_masks():
    marks, bias_marks = (CONVOLUTION % 3 == 1).astype(np.float32), np.float32([1, 0, 1])
    ip_marks = (PRODUCT % 5 > 2).astype(np.float32)
    layers = {
        'conv1': CaffeLayer('CConvolution', (CONVOLUTION, BIAS, marks, bias_marks)),
        'ip1': CaffeLayer('CInnerProduct', (PRODUCT, np.ones(6, np.float32), ip_marks, np.ones(6))),
        'ip2': CaffeLayer('InnerProduct', (counting(2, 6), counting(2))),
    }
    params, masks = to_linen(layers, lambda name: name.replace('ip', 'fc'))
    assert list(params) == list(masks) == ['conv1', 'fc1', 'fc2']
    np.testing.assert_array_equal(masks['conv1']['kernel'], params['conv1']['kernel'] % 3 == 1)
    np.testing.assert_array_equal(masks['conv1']['bias'], [True, False, True])
    np.testing.assert_array_equal(masks['fc1']['kernel'], params['fc1']['kernel'] % 5 > 2)
    for leaf in ('kernel', 'bias'):
        mask = masks['fc2'][leaf]
        assert (mask.shape, mask.dtype, bool(mask)) == ((), bool, True)
    pruned = apply_masks(params, masks)
    np.testing.assert_array_equal(pruned['conv1']['bias'], [7, 0, 9])


def test_only_the_first_inner_product_reorders_its_inputs():
    layers = {
        'conv1': CaffeLayer('Convolution', (CONVOLUTION,)),
        'ip1': CaffeLayer('InnerProduct', (PRODUCT,)),
        'ip2': CaffeLayer('InnerProduct', (counting(2, 12),)),
    }
    params = to_linen(layers).params
    # Input 1 of Caffe is channel 0, row 0, column 1: in linen that is place (0, 1, 0), the third.
    np.testing.assert_array_equal(params['ip1']['kernel'][3], PRODUCT[:, 1])
    np.testing.assert_array_equal(params['ip2']['kernel'], counting(2, 12).T)


def with_blob(content):
    return layer('ip', 'InnerProduct', content)


BAD_FILES = {
    'empty': (b'', 'no layer has blobs'),
    'no weights': (DATA_LAYER, 'no layer has blobs'),
    'text': (b'name: "LeNet"\nlayer {\n', ''),
    'truncated': (NET[:-1], ''),
    'a length beyond the end': (b'\xa2\x06\xff\xff\xff\xff\x07' + NET, ''),
    'an endless varint': (b'\xff' * 40, ''),
    'nested without end': (b'\x0b' * 100_000, ''),
    'two of one name': (NET + layer('ip1', 'InnerProduct', blob(BIAS)), "have the name 'ip1'"),
    'more shape than data': (
        with_blob(delimited(5, floats([1, 2])) + shape(3)),
        r"layer 'ip': a blob of shape \(3,\) has 8 bytes",
    ),
    'more data than shape': (with_blob(delimited(5, floats([1, 2])) + shape(1)), 'has 8 bytes'),
    'half a number': (with_blob(delimited(5, b'\0' * 6) + shape(1)), 'has 6 bytes'),
    'a huge shape': (with_blob(shape(2**62, 2**62)), r'has 0 bytes'),
    'a shape of zeros': (with_blob(shape(0, 5)), r'the shape \(0, 5\)'),
    'a negative axis': (with_blob(shape(2**64 - 1)), r'the shape \(-1,\)'),
    'no shape': (with_blob(delimited(5, floats([1]))), r'the shape \(0, 0, 0, 0\)'),
    'an empty shape': (with_blob(delimited(5, floats([1])) + delimited(7, b'')), r'the shape \(\)'),
    'too many axes': (with_blob(shape(*[1] * 33) + delimited(5, floats([1]))), '33 axes'),
    'doubles': (with_blob(delimited(8, b'\0' * 8) + shape(1)), 'double precision'),
    'numbers one by one': (with_blob(b'\x2d' + floats([1]) + shape(1)), 'has 0 bytes'),
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


def test_a_file_that_is_too_large_is_not_opened(read):
    with pytest.raises(ValueError, match=rf'has {len(NET)} bytes; at most {len(NET) - 1} are'):
        read(NET, max_bytes=len(NET) - 1)
    assert read(NET, max_bytes=len(NET)).keys() == {'conv1', 'ip1'}


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_caffemodel(tmp_path / 'none.caffemodel')


def test_memory_is_of_the_size_of_the_file(read):
    """Neither what a file claims nor how it is nested makes it take much more than it has."""
    many_blobs = layer('ip', 'InnerProduct', *[b''] * 50_000)
    many_axes = with_blob(delimited(7, delimited(1, b'\x01' * 100_000)))
    for content in (BAD_FILES['a huge shape'][0], many_blobs, many_axes, b'\x0b' * 100_000):
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match='cannot read'):
                read(content)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()


BAD_NETWORKS = {
    'another kind': (CaffeLayer('BatchNorm', (BIAS,)), "'BatchNorm' with 1"),
    'three blobs': (CaffeLayer('InnerProduct', (PRODUCT,) * 3), "'InnerProduct' with 3"),
    'no blobs': (CaffeLayer('InnerProduct', ()), "'InnerProduct' with 0"),
    'a kernel of too few axes': (CaffeLayer('Convolution', (PRODUCT,)), r'of 4 axes.*\(6, 12\)'),
    'a kernel of too many axes': (CaffeLayer('InnerProduct', (counting(2, 3, 4),)), 'of 2 axes'),
    'biases of another number': (CaffeLayer('InnerProduct', (PRODUCT, BIAS)), '3 biases for 6'),
    'a mask of another shape': (
        CaffeLayer('InnerProduct', (PRODUCT, counting(6), counting(6, 11) > 0, counting(6) > 0)),
        r'a mask of shape \(11, 6\) for weights of shape \(12, 6\)',
    ),
    'a mask of other numbers': (
        CaffeLayer('InnerProduct', (PRODUCT, counting(6), PRODUCT, counting(6))),
        'other numbers than 0 and 1',
    ),
}


@pytest.mark.parametrize('kind', BAD_NETWORKS)
def test_bad_networks(kind):
    bad, message = BAD_NETWORKS[kind]
    with pytest.raises(ValueError, match=rf"layer 'bad': .*{message}"):
        to_linen({'bad': bad})


def test_maps_must_fit_and_names_differ():
    convolution = CaffeLayer('Convolution', (CONVOLUTION,))
    with pytest.raises(ValueError, match='10 inputs are not 3 square maps'):
        to_linen({'conv': convolution, 'ip': CaffeLayer('InnerProduct', (counting(4, 10),))})
    with pytest.raises(ValueError, match="layer 'b': another layer has the name 'same' too"):
        to_linen({'a': convolution, 'b': convolution}, lambda name: 'same')


@pytest.fixture(scope='module')
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp('fuzz') / 'net.caffemodel'


def try_to_read(path, content):
    """Reads what may be damaged: the only exception is `ValueError`."""
    path.write_bytes(content)
    try:
        to_linen(read_caffemodel(path))
    except ValueError:
        return False
    return True


@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    edits=st.lists(
        st.tuples(
            st.sampled_from(['change', 'cut', 'insert', 'repeat']),
            st.integers(0, len(NET) - 1),
            st.binary(min_size=1, max_size=6),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_mutated_file_is_read_or_refused(scratch, edits):
    content = NET
    for kind, at, piece in edits:
        at %= max(len(content), 1)
        after = {
            'change': piece + content[at + len(piece) :],
            'cut': b'',
            'insert': piece + content[at:],
            'repeat': content[max(0, at - 40) :],
        }
        content = content[:at] + after[kind]
    try_to_read(scratch, content)


@settings(max_examples=500, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(scratch, content):
    try_to_read(scratch, content)


def test_the_fuzzers_start_from_a_file_that_is_read(scratch):
    assert try_to_read(scratch, NET)
    # A changed number is still a network, so that mutated files reach the code behind.
    assert try_to_read(scratch, NET.replace(struct.pack('<f', 5.0), struct.pack('<f', 6.0)))


@pytest.mark.parametrize(
    ('network', 'file', 'error'), [('lenet5', 'lenet5', 0.91), ('lenet300', 'lenet300100', 2.28)]
)
def test_the_networks_of_the_authors_make_their_errors(network, file, error, tmp_path_factory):
    mnist_folder, folder = os.environ.get('DNS_JAX_MNIST'), os.environ.get('DNS_JAX_CAFFE')
    if not mnist_folder or not folder:
        pytest.skip(
            'needs the published MNIST files in DNS_JAX_MNIST, the authors in DNS_JAX_CAFFE'
        )
    path = Path(folder) / f'caffe_{file}_original.caffemodel'
    params = to_linen(read_caffemodel(path), lambda name: name.replace('ip', 'fc')).params
    mnist = data.load('mnist', tmp_path_factory.mktemp('mnist'), mnist_folder)
    measured = train.make_error(models.NETWORKS[network]())(params, mnist.test)
    assert round(measured, 2) == error
