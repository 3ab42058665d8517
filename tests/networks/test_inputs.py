"""Tests of networks.inputs: what becomes of pixels and of characters."""

import numpy as np

from experiments.networks.inputs import Input, Tokens


def test_an_image_is_scaled_around_its_mean_colour():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3), np.uint8)
    taken = Input((1.5, 20.0, 100.0), 0.25, 3)
    wanted = (images.astype(np.float64) - [1.5, 20.0, 100.0]) / 4
    prepared = taken.prepare(images)
    np.testing.assert_allclose(prepared, wanted, rtol=1e-6, atol=1e-5)
    assert prepared.dtype == taken.dtype
    assert taken.image_shape == (3, 3, 3)
    assert taken.describe() == {'input_scale': '0.25', 'input_mean': '1.5,20.0,100.0'}


def test_grey_pixels_may_have_no_mean():
    images = np.array([[[[0], [255]]]], np.uint8)
    taken = Input((0.0,), 1 / 256, 28)
    np.testing.assert_array_equal(taken.prepare(images), images / np.float32(256))
    assert taken.describe() == {'input_scale': '0.00390625'}


def test_characters_are_taken_as_they_are():
    tokens = np.array([[3, 1, 2]], np.int32)
    assert Tokens().prepare(tokens) is tokens
    assert Tokens().dtype == tokens.dtype
    assert Tokens().describe() == {}
