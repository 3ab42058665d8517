"""Tests of files.caffe: how a layer is set must be what its blobs are."""

import numpy as np
import pytest
from caffe_nets import BIAS, CONVOLUTION, NO_BIAS, PRODUCT, WHOLE, counting
from wire import blob, delimited, integer, layer, message, old_blob, old_layer

from dns_jax.files.caffe import CaffeLayer, to_linen

ONE = np.ones((1, 1, 1, 1), np.float32)  # may be a bias of an older file
ROW = np.float32([1, 0, 1]).reshape(1, 1, 1, 3)
TWO_BLOBS = {
    'a product': ('CInnerProduct', counting(1, 3), np.float32([[1, 0, 1]]), {}, True),
    'a product of one weight': ('CInnerProduct', ONE[0, 0], ONE[0, 0], {}, True),
    'its bias': ('CInnerProduct', ONE[0, 0], ONE[0, 0, 0], {}, False),
    'a convolution': ('CConvolution', counting(2, 1, 1, 1), ONE.repeat(2, 0), {}, True),
    'its bias in an older file': ('CConvolution', counting(2, 1, 1, 1), ROW[..., :2], {}, False),
    'one weight, no bias': ('CConvolution', ONE, ONE, NO_BIAS, True),
    'one weight, a bias': ('CConvolution', ONE, ONE, {'bias_term': 1}, False),
    'one weight, a bias by default': ('CConvolution', ONE, ONE, WHOLE, False),
    'one weight, no bias, all said': ('CInnerProduct', ONE, ONE, WHOLE | NO_BIAS, True),
    'one input, a bias': ('CInnerProduct', ROW, ROW, {'transpose': 1, 'bias_term': 1}, False),
    'one input, a mask': ('CInnerProduct', ROW, ROW, {'transpose': 1, 'bias_term': 0}, True),
    'one output': ('CInnerProduct', counting(1, 1, 1, 3), ROW, {}, True),
}


@pytest.mark.parametrize('kind', TWO_BLOBS)
def test_the_second_of_two_blobs_is_a_bias_or_a_mask(kind):
    """The fork has weight and bias, or without a bias weight and mask."""
    type_, weight, second, settings, is_mask = TWO_BLOBS[kind]
    params, masks = to_linen({'a': CaffeLayer(type_, (weight, second), settings)})
    if is_mask:
        assert params['a'].keys() == {'kernel'}
        np.testing.assert_array_equal(masks['a']['kernel'].ravel(), second.ravel() == 1)
    else:
        np.testing.assert_array_equal(params['a']['bias'], second.ravel(), strict=True)
        np.testing.assert_array_equal(masks['a']['kernel'].ravel(), weight.ravel() != 0)
        np.testing.assert_array_equal(masks['a']['bias'], second.ravel() != 0, strict=True)


BAD_SETTINGS = {
    'a bias or a mask': (('CConvolution', (ONE, ONE)), 'may be a bias or a mask; wanted bias_term'),
    'a bias or a mask, transposed': (
        ('CInnerProduct', (ROW, ROW), {'transpose': 1}),
        r'of shape \(1, 1, 1, 3\) may be a bias or a mask',
    ),
    'a bias that there is not': (
        ('InnerProduct', (PRODUCT, counting(6)), NO_BIAS),
        r'says bias_term: 0, but has blobs of the shapes \[\(6, 12\), \(6,\)\]',
    ),
    'no bias where there is one': (
        ('Convolution', (CONVOLUTION,), {'bias_term': 1}),
        'bias_term: 1',
    ),
    'a mask where a bias is': (
        ('CInnerProduct', (PRODUCT, PRODUCT), {'bias_term': 1}),
        r'bias_term: 1, but has blobs of the shapes \[\(6, 12\), \(6, 12\)\]',
    ),
    'masks of a bias that there is not': (
        ('CInnerProduct', (PRODUCT, counting(6), PRODUCT, counting(6)), NO_BIAS),
        'bias_term: 0',
    ),
    'no axes': (('CInnerProduct', (ONE[0, 0, 0, 0], ONE[0, 0, 0, 0])), 'of 2 axes'),
    'one axis': (('CInnerProduct', (BIAS, BIAS), NO_BIAS), r'of 2 axes.*\(3,\)'),
    'two weights': (('InnerProduct', (PRODUCT, PRODUCT)), r'of 1 axes.*\(6, 12\)'),
    'other outputs': (
        ('InnerProduct', (PRODUCT,), {'num_output': 12}),
        '6 outputs, but .*output: 12',
    ),
    'other outputs, transposed': (
        ('InnerProduct', (PRODUCT,), {'num_output': 6, 'transpose': 1}),
        '12 outputs, but it says num_output: 6',
    ),
    'biases as if not transposed': (
        ('InnerProduct', (PRODUCT, counting(6)), {'transpose': 1}),
        '6 biases for 12 outputs',
    ),
    'another axis': (('InnerProduct', (PRODUCT,), {'axis': 2}), r'axis: 2; wanted \[1\]'),
    'the last axis': (('InnerProduct', (PRODUCT,), {'axis': -1}), r'axis: -1; wanted \[1\]'),
    'channels elsewhere': (
        ('Convolution', (CONVOLUTION,), {'axis': 2}),
        r'axis: 2; wanted \[-3, 1\]',
    ),
    'no groups': (('Convolution', (CONVOLUTION,), {'group': 0}), 'group: 0'),
    'groups of a part': (('Convolution', (CONVOLUTION,), {'group': 2}), '3 outputs .* group: 2'),
}


@pytest.mark.parametrize('kind', BAD_SETTINGS)
def test_settings_must_be_those_of_the_blobs(kind):
    bad, message = BAD_SETTINGS[kind]
    with pytest.raises(ValueError, match=rf"layer 'bad': .*{message}"):
        to_linen({'bad': CaffeLayer(*bad)})


def behind(before, layer):
    """The layer behind one of four maps or four units, through which what it says is checked."""
    first = {
        'maps': CaffeLayer('Convolution', (counting(4, 1, 2, 2),)),
        'units': CaffeLayer('InnerProduct', (counting(4, 3),)),
    }[before]
    return to_linen({'first': first, 'second': layer}).params['second']['kernel']


@pytest.mark.parametrize(
    ('before', 'axis'), [('maps', 1), ('maps', -3), ('units', 1), ('units', -1)]
)
def test_an_axis_that_is_the_first(before, axis):
    weight = counting(2, 4)
    found = behind(before, CaffeLayer('InnerProduct', (weight,), {'axis': axis}))
    np.testing.assert_array_equal(found, weight.T)


@pytest.mark.parametrize(
    ('before', 'axis'), [('maps', -1), ('maps', 2), ('units', -3), ('units', 0)]
)
def test_an_axis_behind_which_a_part_is_flattened(before, axis):
    with pytest.raises(ValueError, match=f"layer 'second': it says axis: {axis}; wanted "):
        behind(before, CaffeLayer('InnerProduct', (counting(2, 4),), {'axis': axis}))


@pytest.mark.parametrize('settings', [{}, {'group': 2}, {'group': 2, 'num_output': 6}])
def test_groups(settings):
    weight = counting(6, 2, 3, 3)
    found = behind('maps', CaffeLayer('Convolution', (weight,), settings))
    np.testing.assert_array_equal(found, weight.transpose(2, 3, 1, 0))


@pytest.mark.parametrize('settings', [{'group': 1}, {'group': 3}, {'num_output': 6}])
def test_groups_that_are_others(settings):
    """Such as behind a slice, of which no file of weights tells."""
    with pytest.raises(ValueError, match=r"'second': 2 input channels to 6 outputs after 4, but"):
        behind('maps', CaffeLayer('Convolution', (counting(6, 2, 3, 3),), settings))


def test_settings_are_read_from_the_message_of_the_type(read):
    """The last that is said counts, and what is of no concern is skipped."""
    ip = message(117, _1=7, _2=1) + message(117, _1=6, _5=-1, _6=1) + message(106, _5=9)
    ip += delimited(117, integer(2, 0) + integer(2, 1)) + delimited(
        117, delimited(3, b'\x0a\x06xavier')
    )
    net = layer('ip', 'CInnerProduct', blob(PRODUCT), unknown=ip)
    conv = message(106, _1=3, _2=0, _3=2, _4=5, _5=1, _6=2, _16=-3, _18=2)
    net += layer('conv', 'Convolution', blob(CONVOLUTION), unknown=conv)
    net += layer('bn', 'BatchNorm', blob(BIAS), unknown=message(117, _6=1))
    net += layer('wrong', 'InnerProduct', blob(PRODUCT), unknown=delimited(117, delimited(6, b'1')))
    settings = {name: layer.settings for name, layer in read(net).items()}
    assert settings == {
        'ip': {'num_output': 6, 'bias_term': 1, 'axis': -1, 'transpose': 1},
        'conv': {'num_output': 3, 'bias_term': 0, 'group': 1, 'axis': -3},
        'bn': {},
        'wrong': {},
    }


def test_a_deconvolution_of_an_older_file(read):
    layers = read(old_layer('up', 39, old_blob(CONVOLUTION)))
    with pytest.raises(ValueError, match=r"layer 'up': wanted a convolution .* 'Deconvolution'"):
        to_linen(layers)
