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


SIX = counting(6)
BAD_NETWORKS = [
    ('BatchNorm', (BIAS,), "'BatchNorm' with 1"),
    ('InnerProduct', (PRODUCT,) * 3, "'InnerProduct' with 3"),
    ('InnerProduct', (), "'InnerProduct' with 0"),
    ('CInnerProduct', (PRODUCT,), "'CInnerProduct' with 1"),  # neither a bias nor masks
    ('CInnerProduct', (PRODUCT, *[SIX] * 4), "'CInnerProduct' with 5"),
    ('Convolution', (counting(1, 2, 3, 2, 2),), r'of 4 axes.*\(1, 2, 3, 2, 2\)'),  # of volumes
    ('InnerProduct', (counting(1, 6, 12),), r'of 2 axes.*\(1, 6, 12\)'),
    ('Convolution', (PRODUCT,), r'of 4 axes.*\(6, 12\)'),
    ('InnerProduct', (PRODUCT, BIAS), '3 biases for 6'),
    (
        'InnerProduct',
        (PRODUCT, SIX, counting(6, 11), SIX),
        r'a mask of shape \(11, 6\) for weights of shape \(12, 6\)',
    ),
    ('InnerProduct', (PRODUCT, SIX, PRODUCT, SIX), 'other numbers than 0 and 1'),
]


@pytest.mark.parametrize(('kind', 'blobs', 'message'), BAD_NETWORKS)
def test_bad_networks(kind, blobs, message):
    with pytest.raises(ValueError, match=rf"layer 'bad': .*{message}"):
        to_linen({'bad': CaffeLayer(kind, blobs)})


CHAINS = [
    (CONVOLUTION, counting(4, 10), '10 inputs are not 3 square maps'),
    (PRODUCT, counting(2, 7), '7 inputs after 6 outputs'),
    (CONVOLUTION, counting(4, 2, 3, 3), '2 input channels after 3 outputs'),
    (PRODUCT, CONVOLUTION, '2 input channels after 6 outputs'),
]


@pytest.mark.parametrize(('first', 'second', 'message'), CHAINS)
def test_layers_must_fit_the_one_before(first, second, message):
    layers = {
        str(at): CaffeLayer('Convolution' if kernel.ndim == 4 else 'InnerProduct', (kernel,))
        for at, kernel in enumerate((first, second))
    }
    with pytest.raises(ValueError, match=f"layer '1': {message}"):
        to_linen(layers)


def test_names_must_differ():
    layers = dict.fromkeys('ab', CaffeLayer('InnerProduct', (counting(6, 6),)))
    with pytest.raises(ValueError, match="layer 'b': another layer has the name 'same' too"):
        to_linen(layers, lambda name: 'same')


@pytest.mark.parametrize(
    ('network', 'file', 'outputs', 'error'),
    [
        ('lenet5', 'lenet5', (20, 50, 500, 10), 0.91),
        ('lenet300', 'lenet300100', (300, 100, 10), 2.28),
    ],
)
@pytest.mark.slow
def test_the_networks_of_the_authors(network, file, outputs, error, tmp_path_factory):
    """They say how they are set, and make the errors that the authors tell of."""
    mnist_folder, folder = os.environ.get('DNS_JAX_MNIST'), os.environ.get('DNS_JAX_CAFFE')
    if not mnist_folder or not folder:
        pytest.skip('needs MNIST in the folder DNS_JAX_MNIST, the networks in DNS_JAX_CAFFE')
    layers = read_caffemodel(Path(folder) / f'caffe_{file}_original.caffemodel')
    said = [layer.settings for layer in layers.values()]
    assert said == [{'num_output': number} for number in outputs]
    params, masks = to_linen(layers, lambda name: name.replace('ip', 'fc'))
    assert not any(mask.ndim for mask in jax.tree.leaves(masks))
    mnist = resident.load('mnist', tmp_path_factory.mktemp('mnist'), mnist_folder)
    error_of = train.make_measure(models.NETWORKS[network](), models.INPUTS[network])
    assert round(error_of(params, mnist.test), 2) == error
