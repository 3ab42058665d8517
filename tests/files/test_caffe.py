"""Tests of files.caffe against files put together by hand, byte by byte, and the authors' own."""

import os
from pathlib import Path

import caffe_layers
import flax.linen as nn
import jax
import numpy as np
import pytest
from caffe_nets import BIAS, CONVOLUTION, NET, PRODUCT, counting
from wire import blob, delimited, floats, integer, layer, message, old_blob, old_layer, shape

from dns_jax import apply_masks
from dns_jax.files.caffe import CaffeLayer, read_caffemodel, to_linen
from experiments.data import resident
from experiments.networks import models
from experiments.training import steps as train


def test_layers_with_blobs_are_read_as_they_lie(read):
    layers = read(NET)
    assert list(layers) == ['conv1', 'ip1']
    assert [layer.type for layer in layers.values()] == ['Convolution', 'InnerProduct']
    found = [array for layer in layers.values() for array in layer.blobs]
    for array, wanted in zip(found, (CONVOLUTION, BIAS, PRODUCT), strict=True):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, wanted)


def test_an_old_file_gives_the_same_network(read):
    old = old_layer('conv1', 4, old_blob(CONVOLUTION), old_blob(BIAS))
    old += old_layer('ip1', 14, old_blob(PRODUCT))
    layers = read(old + old_layer('pool', 17))
    assert [layer.type for layer in layers.values()] == ['Convolution', 'InnerProduct']
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
        'ip2': CaffeLayer('InnerProduct', (counting(2, 6),)),
    }
    params = to_linen(layers).params
    # Input 1 of Caffe is channel 0, row 0, column 1: in linen that is place (0, 1, 0), the third.
    np.testing.assert_array_equal(params['ip1']['kernel'][3], PRODUCT[:, 1])
    np.testing.assert_array_equal(params['ip2']['kernel'], counting(2, 6).T)


AXES_OF_PRODUCT = (12, 5), (5, 3)  # of three maps, two by two; inputs first


def caffe_network(random, transposed, masks=lambda blob: np.ones(blob.shape)):
    """A convolution and two products as Caffe has them, with masks, and what they compute."""
    shapes = [(3, 2, 3, 2), *(axes[:: 1 if flag else -1] for axes, flag in transposed)]
    weights = [random.normal(size=shape).astype(np.float32) for shape in shapes]
    biases = [random.normal(size=outputs).astype(np.float32) for outputs in (3, 5, 3)]
    blobs = [
        (weight, bias, masks(weight), masks(bias))
        for weight, bias in zip(weights, biases, strict=True)
    ]

    def compute(image):
        masked = [(weight * mask, bias * last) for weight, bias, mask, last in blobs]
        hidden = caffe_layers.convolve(image, *masked[0])
        for arrays, (_, flag) in zip(masked[1:], transposed, strict=True):
            hidden = caffe_layers.product(hidden, *arrays, transpose=flag)
        return hidden

    return blobs, compute


def linen_computes(network, image):
    params = apply_masks(network.params, network.masks)
    hidden = nn.Conv(3, (3, 2), padding='VALID').apply(
        {'params': params['0']}, image.transpose(1, 2, 0)[None]
    )
    hidden = nn.Dense(5).apply({'params': params['1']}, hidden.reshape(1, -1))
    return nn.Dense(3).apply({'params': params['2']}, hidden)[0]


def said_of(number, transposed, form):
    """The message of the layer at a place, as Caffe writes it: what is False goes unsaid."""
    flag = {'_6': 1} if number and transposed[number - 1] else {}
    tags = (106, 117) if form == 'new' else (10, 17)
    return message(tags[number > 0], _1=(3, 5, 3)[number], **flag)


def random_mask(random):
    return lambda blob: (random.random(blob.shape) < 0.6).astype(np.float32)


@pytest.mark.parametrize('transposed', [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize('form', ['new', 'V1'])
def test_transposed_products(read, transposed, form):
    """Over maps and over a vector, in both forms of a file, beside one that is not."""
    random = np.random.default_rng(4)
    blobs, compute = caffe_network(random, list(zip(AXES_OF_PRODUCT, transposed, strict=True)))
    net = b''
    for number, (weight, bias, *_) in enumerate(blobs):
        said = said_of(number, transposed, form)
        if form == 'new':
            kind = 'InnerProduct' if number else 'Convolution'
            net += layer(f'{number}', kind, blob(weight), blob(bias), unknown=said)
        else:
            kind = 14 if number else 4
            net += old_layer(f'{number}', kind, old_blob(weight), old_blob(bias), unknown=said)
    image = random.normal(size=(2, 4, 3)).astype(np.float32)
    network = to_linen(read(net))
    assert not any(mask.ndim for mask in jax.tree.leaves(network.masks))
    np.testing.assert_allclose(linen_computes(network, image), compute(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('transposed', [(False, False), (True, True)])
@pytest.mark.parametrize('form', ['published', 'four blobs', 'three blobs'])
def test_what_a_network_of_the_authors_computes(read, transposed, form):
    """The masks are in the weights, are behind them, or are behind them for the weights alone."""
    random = np.random.default_rng(5)
    blobs, compute = caffe_network(
        random, list(zip(AXES_OF_PRODUCT, transposed, strict=True)), random_mask(random)
    )
    net, kept = b'', []
    for number, (weight, bias, mask, last) in enumerate(blobs):
        if form == 'three blobs':
            last[...] = 1
        arrays = {
            'published': (weight * mask, bias * last),
            'three blobs': (weight, bias, mask),
            'four blobs': (weight, bias, mask, last),
        }[form]
        kind, said = (
            ('CInnerProduct' if number else 'CConvolution'),
            said_of(number, transposed, 'new'),
        )
        net += layer(f'{number}', kind, *map(blob, arrays), unknown=said)
        kept.append((mask.sum(), last.sum()))
    network = to_linen(read(net))
    image = random.normal(size=(2, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(linen_computes(network, image), compute(image), rtol=1e-4, atol=1e-4)
    for masks, (weights, biases) in zip(network.masks.values(), kept, strict=True):
        assert masks['kernel'].sum() == weights
        if form == 'three blobs':  # biases took no part
            np.testing.assert_array_equal(masks['bias'], np.ones((), bool), strict=True)
        else:
            assert (masks['bias'].shape, masks['bias'].sum()) == ((len(masks['bias']),), biases)


def test_zeros_of_a_published_network_are_its_masks():
    """Of biases too; in the plain types zeros are weights like others."""
    weight, bias = np.float32([[1, 0, -0.0], [-3, 2e-38, 0]]), np.float32([0, -1])
    layers = {
        'a': CaffeLayer('CInnerProduct', (weight, bias)),
        'b': CaffeLayer('CInnerProduct', (np.float32([[0, 1]]),), {'bias_term': 0}),
        'c': CaffeLayer('InnerProduct', (np.float32([[0]]), np.float32([0]))),
    }
    params, masks = to_linen(layers)
    np.testing.assert_array_equal(
        masks['a']['kernel'], [[True, True], [False, True], [False, False]], strict=True
    )
    np.testing.assert_array_equal(masks['a']['bias'], [False, True], strict=True)
    np.testing.assert_array_equal(masks['b']['kernel'], [[False], [True]], strict=True)
    assert masks['b'].keys() == params['b'].keys() == {'kernel'}
    assert not any(mask.ndim for mask in masks['c'].values())


ONE = np.ones((1, 1, 1, 1), np.float32)  # may be a bias of an older file
ROW = np.float32([1, 0, 1]).reshape(1, 1, 1, 3)
BAD_NETWORKS = {
    'another type': (CaffeLayer('BatchNorm', (BIAS,)), "'BatchNorm' with 1"),
    'three blobs': (CaffeLayer('InnerProduct', (PRODUCT,) * 3), "'InnerProduct' with 3"),
    'no blobs': (CaffeLayer('InnerProduct', ()), "'InnerProduct' with 0"),
    'surgery without a bias or masks': (
        CaffeLayer('CInnerProduct', (PRODUCT,)),
        "'CInnerProduct' with 1",
    ),
    'five blobs of the authors': (
        CaffeLayer('CInnerProduct', (PRODUCT, *[counting(6)] * 4)),
        "'CInnerProduct' with 5",
    ),
    'a deconvolution': (CaffeLayer('Deconvolution', (CONVOLUTION,)), "'Deconvolution' with 1"),
    'a convolution of volumes': (
        CaffeLayer('Convolution', (counting(1, 2, 3, 2, 2),)),
        r'of 4 axes.*\(1, 2, 3, 2, 2\)',
    ),
    'three axes': (CaffeLayer('InnerProduct', (counting(1, 6, 12),)), r'of 2 axes.*\(1, 6, 12\)'),
    'a kernel of too few axes': (CaffeLayer('Convolution', (PRODUCT,)), r'of 4 axes.*\(6, 12\)'),
    'a kernel of too many axes': (CaffeLayer('InnerProduct', (counting(2, 3, 4),)), 'of 2 axes'),
    'biases of another number': (CaffeLayer('InnerProduct', (PRODUCT, BIAS)), '3 biases for 6'),
    'a mask of another shape': (
        CaffeLayer('InnerProduct', (PRODUCT, counting(6), counting(6, 11), counting(6))),
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


CHAINS = {
    'maps that are not square': (
        [('Convolution', CONVOLUTION), ('InnerProduct', counting(4, 10))],
        '10 inputs are not 3 square maps',
    ),
    'products': (
        [('InnerProduct', PRODUCT), ('InnerProduct', counting(2, 7))],
        '7 inputs after 6 outputs',
    ),
    'convolutions': (
        [('Convolution', CONVOLUTION), ('Convolution', counting(4, 2, 3, 3))],
        '2 input channels after 3 outputs',
    ),
    'a convolution after a product': (
        [('InnerProduct', PRODUCT), ('Convolution', CONVOLUTION)],
        '2 input channels after 6 outputs',
    ),
}


@pytest.mark.parametrize('kind', CHAINS)
def test_layers_must_fit_the_one_before(kind):
    chain, message = CHAINS[kind]
    layers = {str(at): CaffeLayer(kind, (kernel,)) for at, (kind, kernel) in enumerate(chain)}
    with pytest.raises(ValueError, match=f"layer '1': {message}"):
        to_linen(layers)


def test_names_must_differ():
    layers = dict.fromkeys('ab', CaffeLayer('InnerProduct', (counting(6, 6),)))
    with pytest.raises(ValueError, match="layer 'b': another layer has the name 'same' too"):
        to_linen(layers, lambda name: 'same')


def test_a_network_as_alexnet_in_an_old_file(read):
    """Groups, four axes everywhere, maps into a product, and one more: numbers of linen."""
    random = np.random.default_rng(1)
    shapes = {'conv1': (4, 3, 2, 2), 'conv2': (6, 2, 2, 2), 'fc6': (5, 24), 'fc7': (3, 5)}
    weights = {name: random.normal(size=axes).astype(np.float32) for name, axes in shapes.items()}
    net = b''.join(
        old_layer(name, 4 if name.startswith('conv') else 14, old_blob(weights[name]))
        for name in shapes
    )
    params = to_linen(read(net)).params
    image = random.normal(size=(1, 3, 4, 4)).astype(np.float32)
    hidden = jax.lax.conv(image, weights['conv1'], (1, 1), 'VALID')
    groups = [
        jax.lax.conv(
            hidden[:, 2 * at : 2 * at + 2], weights['conv2'][3 * at : 3 * at + 3], (1, 1), 'VALID'
        )
        for at in (0, 1)
    ]
    wanted = weights['fc7'] @ (weights['fc6'] @ np.concatenate(groups, 1).reshape(-1))

    def convolve(name, inputs, features, groups):
        module = nn.Conv(
            features, (2, 2), padding='VALID', feature_group_count=groups, use_bias=False
        )
        return module.apply({'params': params[name]}, inputs)

    maps = convolve('conv2', convolve('conv1', image.transpose(0, 2, 3, 1), 4, 1), 6, 2)
    found = maps.reshape(-1) @ params['fc6']['kernel'] @ params['fc7']['kernel']
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_masks_are_laid_out_as_their_weights():
    """Through both changes of order, and where a layer under surgery has no bias."""
    marks = (CONVOLUTION % 3 == 1).astype(np.float32)
    ip_marks = (PRODUCT % 5 > 2).astype(np.float32)
    layers = {
        'conv1': CaffeLayer('CConvolution', (CONVOLUTION, marks)),
        'ip1': CaffeLayer('CInnerProduct', (PRODUCT, ip_marks)),
    }
    params, masks = to_linen(layers)
    assert masks['conv1'].keys() == masks['ip1'].keys() == {'kernel'}
    np.testing.assert_array_equal(masks['conv1']['kernel'], params['conv1']['kernel'] % 3 == 1)
    np.testing.assert_array_equal(masks['ip1']['kernel'], params['ip1']['kernel'] % 5 > 2)


def test_the_networks_of_the_authors_say_how_they_are_set():
    """And pruned, in the types of the authors, they are what was kept of them."""
    folder = os.environ.get('DNS_JAX_CAFFE')
    if not folder:
        pytest.skip('needs the networks of the authors in the folder DNS_JAX_CAFFE')
    for file, outputs in (('lenet5', (20, 50, 500, 10)), ('lenet300100', (300, 100, 10))):
        layers = read_caffemodel(Path(folder) / f'caffe_{file}_original.caffemodel')
        said = [layer.settings for layer in layers.values()]
        assert said == [{'num_output': number} for number in outputs]
        dense = to_linen(layers)
        assert not any(mask.ndim for mask in jax.tree.leaves(dense.masks))
        pruned = {
            name: CaffeLayer(
                f'C{layer.type}',
                tuple(blob * (abs(blob) > abs(blob).mean()) for blob in layer.blobs),
                layer.settings,
            )
            for name, layer in layers.items()
        }
        found = to_linen(pruned)
        kept = jax.tree.map(lambda leaf: abs(leaf) > abs(leaf).mean(), dense.params)
        jax.tree.map(np.testing.assert_array_equal, found.masks, kept)
        wanted = jax.tree.map(lambda leaf, mask: leaf * mask, dense.params, kept)
        jax.tree.map(np.testing.assert_array_equal, found.params, wanted)


@pytest.mark.parametrize(
    ('network', 'file', 'error'), [('lenet5', 'lenet5', 0.91), ('lenet300', 'lenet300100', 2.28)]
)
@pytest.mark.slow
def test_the_networks_of_the_authors_make_their_errors(network, file, error, tmp_path_factory):
    mnist_folder, folder = os.environ.get('DNS_JAX_MNIST'), os.environ.get('DNS_JAX_CAFFE')
    if not mnist_folder or not folder:
        pytest.skip('needs MNIST in the folder DNS_JAX_MNIST, the networks in DNS_JAX_CAFFE')
    path = Path(folder) / f'caffe_{file}_original.caffemodel'
    params = to_linen(read_caffemodel(path), lambda name: name.replace('ip', 'fc')).params
    mnist = resident.load('mnist', tmp_path_factory.mktemp('mnist'), mnist_folder)
    error_of = train.make_error(models.NETWORKS[network](), models.INPUTS[network])
    measured = error_of(params, mnist.test)
    assert round(measured, 2) == error
