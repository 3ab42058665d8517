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


FORMS = ('plain', 'V1', 'published', 'four blobs', 'three blobs')


@pytest.mark.parametrize('transposed', [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize('form', FORMS)
def test_linen_computes_what_caffe_does(read, form, transposed):
    """A convolution, a product over its maps and one over a vector, as files have them.

    Masks are in the weights, are behind them, or are behind them for the weights alone.
    """
    random = np.random.default_rng(4)
    net, compute, kept = b'', [], []
    for number, flag in enumerate((0, *transposed)):
        axes = ((3, 2, 3, 2), (5, 12), (3, 5))[number][:: -1 if flag else 1]
        weight = random.normal(size=axes).astype(np.float32)
        bias = random.normal(size=(3, 5, 3)[number]).astype(np.float32)
        mask, last = ((random.random(array.shape) < 0.6) * 1.0 for array in (weight, bias))
        if form in ('plain', 'V1'):
            mask[...] = 1
        if form in ('plain', 'V1', 'three blobs'):
            last[...] = 1
        blobs = {
            'published': (weight * mask, bias * last),
            'four blobs': (weight, bias, mask, last),
            'three blobs': (weight, bias, mask),
        }.get(form, (weight, bias))
        said = {'_1': (3, 5, 3)[number], **({'_6': 1} if flag else {})}  # what is False goes unsaid
        if form == 'V1':
            field, kind = ((10, 4), (17, 14))[number > 0]
            content = map(old_blob, blobs)
            net += old_layer(f'{number}', kind, *content, unknown=message(field, **said))
        else:
            field, kind = ((106, 'Convolution'), (117, 'InnerProduct'))[number > 0]
            kind, content = 'C' * (form != 'plain') + kind, map(blob, blobs)
            net += layer(f'{number}', kind, *content, unknown=message(field, **said))
        compute.append((weight * mask, bias * last))
        kept.append((mask.sum(), last.sum()))
    network = to_linen(read(net))

    image = random.normal(size=(2, 4, 3)).astype(np.float32)  # channel, height, width
    wanted = caffe_layers.convolve(image, *compute[0])
    for arrays, flag in zip(compute[1:], transposed, strict=True):
        wanted = caffe_layers.product(wanted, *arrays, transpose=flag)
    params = apply_masks(network.params, network.masks)
    found = image.transpose(1, 2, 0)[None]
    for name, module in ('0', nn.Conv(3, (3, 2), padding='VALID')), ('1', nn.Dense(5)):
        found = module.apply({'params': params[name]}, found).reshape(1, -1)
    found = nn.Dense(3).apply({'params': params['2']}, found)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    for masks, (weights, biases) in zip(network.masks.values(), kept, strict=True):
        if form in ('plain', 'V1'):
            assert masks['kernel'].shape == ()
        else:
            assert masks['kernel'].sum() == weights
        if form in ('published', 'four blobs'):
            assert (masks['bias'].shape, masks['bias'].sum()) == ((len(masks['bias']),), biases)
        else:  # biases took no part
            np.testing.assert_array_equal(masks['bias'], np.ones((), bool), strict=True)


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
