"""Tests of files._header: numbers and texts come back, and end where they should."""

import pytest

from dns_jax.files._header import Reader, encode_number, encode_text


def test_numbers_and_texts():
    for value in (0, 1, 127, 128, 300, 2**31, 2**63 - 1):
        reader = Reader(encode_number(value) + encode_text('σ\0') + b'end')
        assert reader.number() == value
        assert reader.text() == 'σ\0'
        assert reader.rest() == b'end'
    assert encode_number(300) == b'\xac\x02'
    for data in (b'', b'\x80', b'\xff' * 20):
        with pytest.raises(ValueError, match=r'ends too early|2\*\*63'):
            Reader(data).number()
    with pytest.raises(ValueError, match='ends too early'):
        Reader(b'\x05abc').text()
    with pytest.raises(ValueError, match='utf-8'):
        Reader(b'\x01\xff').text()
