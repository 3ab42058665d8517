"""Damage for the fuzz tests: what becomes of a valid input, and what is valid nowhere."""

import re

from hypothesis import strategies as st

_NUMBERS = (0, 1, 127, 128, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_BINARY = [
    *(number.to_bytes(8, order) for number in _NUMBERS for order in ('little', 'big')),
    *((number % 2**32).to_bytes(4, order) for number in _NUMBERS for order in ('little', 'big')),
    *(b'\xff' * 12, bytes(12), b'\x80' + b'\xff' * 11, b'77777777777\0'),  # sizes in a tar
]
# Seven bits to a byte, the lowest first; the last three have no end, or one too late.
_VARINTS = [
    *(b'\0', b'\x01', b'\x02', b'\x7f', b'\x80\x01', b'\x81\x80\x04', b'\xff\xff\x7f'),
    *(b'\xff\xff\xff\xff\x0f', b'\x80\x80\x80\x80\x10', b'\xff' * 8 + b'\x7f'),
    *(b'\xff' * 9 + b'\x01', b'\xff' * 10, b'\x80' * 20),
]
_DECIMALS = [
    *(str(number).encode() for number in (*_NUMBERS, -1, -(2**63), 10**9, 10**15, 10**30, 10**400)),
    *(b'1e999', b'-1e308', b'nan', b'NaN', b'-Infinity', b'inf', b'0x10', b'1_0', b'.', b'0.5'),
    *(b'1' * 5_000, '٣'.encode(), '²'.encode(), b'1e-400', b'00', b'+1', b' 1 ', b'1.0'),
]
_VALUES = [  # of JSON
    *(b'null', b'true', b'{}', b'[]', b'""', b'"a"', b'-1', b'1e999', b'NaN', b'[null]', b'[[0]]'),
    *(b'{"a": {}}', b'1' + b'0' * 30, b'"\\ud800"', b'[' * 5_000, b'{"a":' * 5_000, b'1.5'),
]
_TEXTS = [
    *(b'[[[[', b'"', b"'", b'\\', b'\n', b'\r\n', b'\0', b',', b':', b'=', b'--', b'%', b'*', b'['),
    *(b'#', b'\xff\xfe', b'\xed\xa0\x80', b'e', b'/', b'\xf0\x9f\x98\x80', b'a' * 3_000),
    b' ' * 3_000,
]
HOSTILE = [b'', *_VALUES, *(value + b'\n' for value in _VALUES)]
"""What is a valid input of few readers."""

_DECIMAL = re.compile(rb'[-+.\d][-+.\deE]*')
_VALUE = re.compile(rb'"[^"\n]*"|-?\d[-+.\deE]*|null|true|false|\[[^][]*\]|\{[^{}]*\}')
_OF_NUMBERS = 'flip', 'binary', 'varint', 'decimal', 'value'
_KINDS = (*_OF_NUMBERS * 2, 'text', 'cut', 'delete', 'repeat', 'insert', 'splice')
_PLACE = st.integers(0, 2**16 - 1)


def _place(data, number):
    """Returns a place in some bytes: anywhere, near the beginning, or near the end."""
    length = len(data) + 1
    near = {0: min(160, length), 1: min(32, length)}.get(number % 4, length)
    at = (number >> 2) * near >> 14
    at = length - near + at if number % 4 == 1 else at
    return at if number % 8 < 4 else len(data) - (len(data) - at) // 4 * 4  # as numbers lie


def _replace(data, pattern, others, first, second):
    """Puts something else in the place of what a pattern finds."""
    found = list(pattern.finditer(data))
    if not found:
        return data + others[second % len(others)]
    one = found[first % len(found)]
    return data[: one.start()] + others[second % len(others)] + data[one.end() :]


def _change(data, others, words, kind, first, second):
    """Does one thing to some bytes, at a place in them and with a length or a choice."""
    at = _place(data, first)
    end = at + (second * (len(data) - at + 1) >> 16)
    match kind:
        case 'flip' if at < len(data):
            return data[:at] + bytes([data[at] ^ 1 << second % 8]) + data[at + 1 :]
        case 'binary':
            number = _BINARY[second % len(_BINARY)]
            return data[:at] + number + data[at + len(number) :]
        case 'varint':
            return data[:at] + _VARINTS[second % len(_VARINTS)] + data[at + 1 :]
        case 'decimal':
            return _replace(data, _DECIMAL, _DECIMALS, first, second)
        case 'value':
            return _replace(data, _VALUE, _VALUES, first, second)
        case 'text':
            return data[:at] + _TEXTS[second % len(_TEXTS)] + data[at + second % 2 :]
        case 'delete':
            return data[:at] + data[end:]
        case 'repeat':
            return data[:end] + data[at:end] * (1 + second % 3) + data[end:]
        case 'insert':
            return data[:at] + bytes(second * step >> 8 & 255 for step in range(1, 9)) + data[at:]
        case 'splice':
            other = others[second % len(others)]
            middle = first * len(other) >> 16
            return data[:at] + other[middle : middle + 1 + second % 300] + data[at:]
        case 'line':
            lines = data.split(b'\n')
            values = [*_DECIMALS, *(line.partition(b'=')[2] for line in others[0].split(b'\n'))]
            line = words[first % len(words)] + values[second % len(values)]
            lines.insert(second % (len(lines) + 1), line)
            return b'\n'.join(lines)
    return data[:at]


def damaged(seeds, others, words=()):
    """Makes a strategy of damaged inputs, one to three changes away from a seed.

    Into them may be spliced what others are; words are how a line may begin, for inputs of lines.
    """
    kinds = (*_KINDS, *['line'] * 4 * len(_KINDS)) if words else _KINDS
    change = st.tuples(st.sampled_from(kinds), _PLACE, _PLACE)

    def apply(seed, changes):
        data = seed
        for one in changes:
            data = _change(data, (*seeds, *others), words, *one)
        return data

    changes = st.one_of(*(st.tuples(*[change] * count) for count in (1, 1, 2, 3)))
    return st.builds(apply, st.sampled_from(seeds), changes)


def arbitrary(seeds):
    """Makes a strategy of any bytes and texts, some of them behind how a seed begins."""
    pieces = [*HOSTILE, *_DECIMALS, *_TEXTS, *_BINARY, *_VARINTS]
    content = st.one_of(
        st.binary(max_size=300),
        st.text(max_size=100).map(lambda text: text.encode(errors='surrogatepass')),
        st.lists(st.sampled_from(pieces), max_size=12).map(b''.join),
    )
    heads = [b'', b'', *(seed[:length] for seed in seeds for length in (4, 12, 30))]
    return st.builds(bytes.__add__, st.sampled_from(heads), content)
