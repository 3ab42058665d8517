"""Tests of files._entropy: symbols and masks come back, and take as many bits as they should."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dns_jax.files._entropy import Decoder, Encoder, decode_mask, encode_mask


@given(data=st.data(), shape=hnp.array_shapes(max_dims=4, max_side=9), fed=hnp.arrays(bool, 3))
def test_masks_come_back(data, shape, fed):
    masks = [data.draw(hnp.arrays(bool, shape)) for _ in range(2)]
    encoder, states = Encoder(), [fed]
    for mask in masks:
        states.append(encode_mask(encoder, mask, states[-1]))
    decoder = Decoder(encoder.getvalue())
    for mask, before, after in zip(masks, states[:-1], states[1:], strict=True):
        got, state = decode_mask(decoder, mask.shape, int(mask.sum()), before)
        np.testing.assert_array_equal(got, mask, strict=True)
        np.testing.assert_array_equal(state, after)


def test_bits_and_symbols_of_all_widths():
    widths = np.tile(np.arange(32), 40)
    values = np.random.default_rng(0).integers(0, 2**31, len(widths)) & ((1 << widths) - 1)
    values[-32:] = (1 << np.arange(32)) - 1
    symbols = np.random.default_rng(1).integers(0, 2**16, 500)
    encoder = Encoder()
    encoder.bits(values, widths)
    encoder.symbols(symbols, 2**16)
    encoder.bits(values[::-1], widths[::-1])
    decoder = Decoder(encoder.getvalue())
    np.testing.assert_array_equal(decoder.bits(widths), values)
    np.testing.assert_array_equal(decoder.symbols(500, 2**16), symbols)
    np.testing.assert_array_equal(decoder.bits(widths[::-1]), values[::-1])
    assert len(encoder.getvalue()) < 2 * widths.sum() / 8 + 1200


def test_symbols_take_their_entropy():
    random = np.random.default_rng(0)
    shares = np.array([0.7, 0.2, 0.05, 0.05])
    symbols = random.choice(4, 20_000, p=shares)
    encoder = Encoder()
    encoder.symbols(symbols, 4)
    ideal = -np.log2(shares[symbols]).sum() / 8
    assert ideal - 10 < len(encoder.getvalue()) < ideal + 20


def test_positions_take_what_dead_units_leave():
    """The model of the masks: dead units and inputs cost next to nothing."""
    random = np.random.default_rng(0)
    units, inputs = random.random(300) < 0.3, random.random(800) < 0.3
    mask = np.outer(inputs, units) & (random.random((800, 300)) < 0.05)
    encoder = Encoder()
    encode_mask(encoder, mask, np.zeros(0, bool))
    size = len(encoder.getvalue())
    grid = units.sum() * inputs.sum()
    iid = mask.sum() / 8 * (np.log2(grid / mask.sum()) + 1.45)  # in the grid that is left
    assert size < iid + 1100 / 8 + 20
    feeding = Encoder()
    encode_mask(feeding, mask, mask.any(1))
    assert len(feeding.getvalue()) < size - 600 / 8


def test_a_large_mask_takes_seconds():
    """As many positions as fully connected layers of VGG-16 have, in a twentieth of the size."""
    mask = np.random.default_rng(0).random((2048, 1024)) < 0.05
    start = time.monotonic()
    encoder = Encoder()
    encode_mask(encoder, mask, np.zeros(0, bool))
    got, _ = decode_mask(
        Decoder(encoder.getvalue()), mask.shape, int(mask.sum()), np.zeros(0, bool)
    )
    np.testing.assert_array_equal(got, mask)
    assert time.monotonic() - start < 10


def test_streams_are_of_whole_words():
    with pytest.raises(ValueError, match='multiple of 4'):
        Decoder(b'123')
