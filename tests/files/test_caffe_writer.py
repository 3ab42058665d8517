"""Tests of files.caffe_writer: files byte by byte, and networks there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from memory import takes_less_than
from wire import blob, delimited, layer, message, shape

from dns_jax.files.caffe import CaffeLayer, read_caffemodel, to_linen
from dns_jax.files.caffe_writer import from_linen, write_caffemodel


def random(*axes, seed=0):
    return np.random.default_rng(seed).normal(size=axes).astype(np.float32)


def write(path, layers, **options):
    write_caffemodel(path / 'net.caffemodel', layers, **options)
    return (path / 'net.caffemodel').read_bytes()


def swapped(array):
    """A blob with its shape before its data, as Caffe itself writes it too."""
    return shape(*array.shape) + delimited(5, array.tobytes())


def test_a_file_byte_by_byte(tmp_path):
    kernel, bias, weight = random(3, 2, 5, 300), random(3, seed=1), random(6, 4, seed=2)
    layers = {
        'conv1': CaffeLayer('Convolution', (kernel, bias)),
        'ip1': CaffeLayer('InnerProduct', (weight,)),
    }
    wanted = layer('conv1', 'Convolution', swapped(kernel), swapped(bias))
    wanted += layer('ip1', 'InnerProduct', swapped(weight))
    assert write(tmp_path, layers) == wanted
    assert write(tmp_path, layers, name='a net') == delimited(1, b'a net') + wanted


def test_any_layers_of_a_file_are_written_as_they_were_read(tmp_path):
    content = layer('bn', 'BatchNorm', blob(random(5)), blob(random(1, 2, 2)), blob(np.float32(3)))
    (tmp_path / 'read').write_bytes(content)
    found = read_caffemodel(tmp_path / 'read')
    write(tmp_path, found)
    again = read_caffemodel(tmp_path / 'net.caffemodel')
    assert [layer.type for layer in again.values()] == ['BatchNorm']
    for one, other in zip(found['bn'].blobs, again['bn'].blobs, strict=True):
        assert one.shape == other.shape
        np.testing.assert_array_equal(one, other)


SETTINGS = {
    'InnerProduct': {'transpose': 1, 'axis': -1, 'num_output': 2**31 - 1, 'bias_term': 0},
    'CInnerProduct': {'transpose': 0},
    'Convolution': {'axis': -(2**31), 'group': 2},
    'CConvolution': {'num_output': 300},
}


def test_settings_are_written_as_they_were_read(tmp_path):
    """A transposed product would be another one without them."""
    layers = {
        type_: CaffeLayer(type_, (random(3, 3),), settings) for type_, settings in SETTINGS.items()
    }
    content = write(tmp_path, layers)
    found = read_caffemodel(tmp_path / 'net.caffemodel')
    assert {name: layer.settings for name, layer in found.items()} == SETTINGS
    assert write(tmp_path, found) == content
    said = message(117, _1=2**31 - 1, _2=0, _5=-1, _6=1)  # behind the blobs, by their numbers
    first = delimited(1, b'InnerProduct') + delimited(2, b'InnerProduct')
    first += delimited(7, swapped(layers['InnerProduct'].blobs[0])) + said
    assert content.startswith(delimited(100, first))


def test_a_layer_without_a_bias_says_so():
    """Else one weight with its mask may be taken for one with a bias."""
    one, yes = np.ones((1, 1, 1, 1), np.float32), np.ones((1, 1, 1, 1), bool)
    layers = from_linen(
        {'a': {'kernel': one}, 'b': {'kernel': one, 'bias': one.ravel()}},
        {'a': {'kernel': yes}, 'b': {'kernel': yes, 'bias': yes.ravel()}},
    )
    assert [layer.settings for layer in layers.values()] == [{'bias_term': 0}, {}]
    assert to_linen(layers).params['a'].keys() == {'kernel'}


@st.composite
def networks(draw):
    """Chains of convolutions, perhaps with groups, and of products, and masks for some layers."""
    counts, sides = st.integers(1, 4), st.integers(1, 3)
    params, outputs, maps = {}, 0, draw(st.booleans())
    for number in range(draw(st.integers(1, 4))):
        units, after_maps = draw(counts), bool(params) and maps
        maps = maps and draw(st.booleans())
        if maps:
            divisors = [k for k in range(1, outputs + 1) if outputs % k == 0]
            inputs = draw(st.sampled_from(divisors) if params else counts)
            axes = (draw(sides), draw(sides), inputs, units)
        elif after_maps:
            axes = (outputs * draw(sides) ** 2, units)
        else:
            axes = (outputs or draw(counts), units)
        finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
        params[f'layer{number}'] = {
            'kernel': draw(arrays_of.arrays(np.float32, axes, elements=finite))
        }
        if draw(st.booleans()):
            bias = draw(arrays_of.arrays(np.float32, units, elements=finite))
            params[f'layer{number}']['bias'] = bias
        outputs = units
    masks = {}
    for name, leaves in params.items():
        whole = draw(st.booleans())
        masks[name] = {
            leaf: draw(arrays_of.arrays(bool, array.shape if whole else ()))
            if whole
            else np.ones((), bool)
            for leaf, array in leaves.items()
        }
    return params, masks


def check_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.tobytes() == other.tobytes()  # zeros have signs


@pytest.fixture(scope='module')
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp('round')


@given(networks())
def test_there_and_back(scratch, network):
    params, masks = network
    write(scratch, from_linen(params, masks))
    found = to_linen(read_caffemodel(scratch / 'net.caffemodel'))
    check_same(found.params, params)
    check_same(found.masks, masks)
    write(scratch, from_linen(params))
    found = to_linen(read_caffemodel(scratch / 'net.caffemodel'))
    check_same(found.params, params)
    assert not any(mask.ndim for mask in jax.tree.leaves(found.masks))


def test_masks_make_layers_of_the_authors_types():
    params = {
        name: {'kernel': jnp.asarray(random(*axes)), 'bias': jnp.zeros(axes[-1])}
        for name, axes in {'conv': (1, 1, 2, 3), 'fc1': (3, 4), 'fc2': (4, 5)}.items()
    }
    masks = jax.tree.map(lambda leaf: leaf > 0, params)
    masks['fc1']['bias'] = jnp.ones((), bool)  # takes no part
    masks['fc2'] = {'kernel': jnp.ones((), bool), 'bias': jnp.ones((), bool)}
    layers = from_linen(params, masks)
    types = ['CConvolution', 'CInnerProduct', 'InnerProduct']
    assert [layer.type for layer in layers.values()] == types
    assert [len(layer.blobs) for layer in layers.values()] == [4, 4, 2]
    for weight, _, mask, _ in (layers['conv'].blobs, layers['fc1'].blobs):
        assert mask.dtype == np.float32
        np.testing.assert_array_equal(mask, weight > 0)
    np.testing.assert_array_equal(layers['conv'].blobs[3], np.zeros(3))
    np.testing.assert_array_equal(layers['fc1'].blobs[3], np.ones(4))


def test_order_and_names():
    kernels = {name: {'kernel': random(2, 2)} for name in ('fc10', 'fc1', 'fc2')}
    assert list(from_linen(kernels)) == ['fc10', 'fc1', 'fc2']
    layers = from_linen(kernels, None, ['fc1', 'fc2', 'fc10'], lambda name: f'ip{name[2:]}')
    assert list(layers) == ['ip1', 'ip2', 'ip10']
    for order in (['fc1', 'fc2'], ['fc1', 'fc1', 'fc2', 'fc10'], ['fc1', 'fc2', 'fc3']):
        with pytest.raises(ValueError, match=r"order=\[.*\] must name each layer of \['fc1', "):
            from_linen(kernels, order=order)
    with pytest.raises(ValueError, match="layer 'fc1': another layer has the name 'ip' too"):
        from_linen(kernels, rename=lambda name: 'ip')


FC = {'kernel': random(2, 3), 'bias': random(3)}
BAD_NETWORKS = {
    'half precision': ({**FC, 'bias': FC['bias'].astype(np.float16)}, TypeError, 'bias is float16'),
    'numbers': ({**FC, 'kernel': np.ones((2, 3), int)}, TypeError, 'kernel is int64'),
    'no kernel': ({'bias': FC['bias']}, ValueError, 'wanted a kernel'),
    'more': ({**FC, 'scale': FC['bias']}, ValueError, 'wanted a kernel and perhaps a bias'),
    'an array': (FC['kernel'], ValueError, 'wanted a kernel and perhaps a bias'),
    'axes': ({'kernel': random(2, 3, 4)}, ValueError, r'has shape \(2, 3, 4\)'),
    'an empty kernel': ({'kernel': random(0, 3)}, ValueError, r'has shape \(0, 3\)'),
    'another bias': ({**FC, 'bias': random(2)}, ValueError, r'bias has shape \(2,\) beside'),
    'inputs': ({'kernel': random(4, 3)}, ValueError, '4 inputs after 5 outputs'),
    'maps': ({'kernel': random(1, 1, 5, 3)}, ValueError, '5 input channels after 5 outputs'),
}


@pytest.mark.parametrize('kind', BAD_NETWORKS)
def test_bad_networks(kind):
    bad, error, message = BAD_NETWORKS[kind]
    before = {'kernel': random(3, 5 if kind in ('inputs', 'maps') else 2)}
    with pytest.raises(error, match=f"layer 'bad': .*{message}"):
        from_linen({'a': before, 'bad': bad})


def test_bad_masks():
    with pytest.raises(ValueError, match='must have the leaves of params'):
        from_linen({'fc': FC}, {'fc': {'kernel': np.ones((2, 3), bool)}})
    with pytest.raises(TypeError, match='must be boolean'):
        from_linen({'fc': FC}, {'fc': FC})


BAD_LAYERS = {
    'no layers': ({}, ValueError, 'a file without layers'),
    'no blobs': ({'a': CaffeLayer('ReLU', ())}, ValueError, "layer 'a': it has no blobs"),
    'doubles': ({'a': CaffeLayer('X', (np.ones(2),))}, TypeError, "'a': .* is float64; wanted"),
    'empty': ({'a': CaffeLayer('X', (random(2, 0),))}, ValueError, r'shape \(2, 0\) is empty'),
    'nan': ({'a': CaffeLayer('X', (np.float32([np.nan]),))}, ValueError, 'not finite'),
    'other settings': (
        {'a': CaffeLayer('Convolution', (random(2),), {'transpose': 1, 'group': 1})},
        ValueError,
        r"it is 'Convolution' with the settings \['transpose'\]; known are \['num_o",
    ),
    'settings of another type': (
        {'a': CaffeLayer('BatchNorm', (random(2),), {'axis': 1})},
        ValueError,
        r"'BatchNorm' with the settings \['axis'\]; known are \[\]",
    ),
    'no name': ({'': CaffeLayer('X', (random(2),))}, ValueError, 'name has 0 bytes'),
    'a long name': ({'n' * 1001: CaffeLayer('X', (random(2),))}, ValueError, 'name has 1001 by'),
}


@pytest.mark.parametrize('kind', BAD_LAYERS)
def test_what_could_not_be_read_is_not_written(tmp_path, kind):
    layers, error, message = BAD_LAYERS[kind]
    with pytest.raises(error, match=message):
        write(tmp_path, layers)
    assert not list(tmp_path.iterdir())


def test_the_limit_of_protobuf(tmp_path):
    one_layer = CaffeLayer('X', (np.zeros(2**20, np.float32),) * 600)  # the same, 2.3 GiB of it
    with pytest.raises(ValueError, match=r'would have 25165\d+ bytes; at most 2147483647'):
        write(tmp_path, {'a': one_layer})


def test_memory_is_twice_that_of_the_network(tmp_path):
    params = {f'{n}': {'kernel': random(512, 512)} for n in range(8)}
    size = 8 * 4 * 512**2
    # Once in Caffe's layout, once as a file; a little to look for what is not finite.
    with takes_less_than(2.1 * size):
        write_caffemodel(tmp_path / 'net', from_linen(params))
