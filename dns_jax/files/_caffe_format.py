"""Caffe's binary format, as far as it is read and written here: messages of protobuf, and blobs.

The wire format is walked here, as views of the file's bytes: protobuf's own decoder was seen to
take up to fifty times the size of a file before anything in it could be refused.
"""

import math
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np

MAX_BYTES = 2**31 - 1
"""The most bytes of a file, protobuf's own limit."""

MAX_NAME_BYTES = 1_000
"""The most bytes of a layer's name that are read."""

_MAX_AXES = 32  # Caffe's own limit
_MAX_FIELDS = 4_096  # of one message; the deepest networks have some hundred layers
VARINT, BYTES = 0, 2  # wire types
_SIZES = {1: 8, 5: 4}  # of wire types without a length


class Message(NamedTuple):
    """Where a layer says how it is set: the numbers of a message and of its fields."""

    number: int
    number_in_v1: int
    fields: dict[str, int]


_OF_CONVOLUTIONS = Message(106, 10, {'num_output': 1, 'bias_term': 2, 'group': 5, 'axis': 16})
_OF_PRODUCTS = Message(117, 17, {'num_output': 1, 'bias_term': 2, 'axis': 5, 'transpose': 6})
MESSAGES = {
    **dict.fromkeys(('Convolution', 'CConvolution'), _OF_CONVOLUTIONS),
    **dict.fromkeys(('InnerProduct', 'CInnerProduct'), _OF_PRODUCTS),
}
"""Where layers say how their blobs are laid out, for the types that become layers of linen."""


def side_of_maps(shape: tuple[int, ...], before: tuple[int, bool] | None) -> int:
    """Checks that a layer fits the one before, and finds the maps between the two.

    Args:
      shape: of the layer's kernel in the layout of linen, of four axes or of two.
      before: the outputs of the layer before and whether they are maps; None if there is none.

    Returns:
      The side of the square maps that an inner product takes, in pixels; 0 if it takes none.

    Raises:
      ValueError: if the layer does not fit.

    Example:
      >>> side_of_maps((800, 500), before=(50, True))
      4
    """
    outputs_before, are_maps = before or (0, False)
    inputs = shape[-2]
    if len(shape) == 4:
        if before and (not are_maps or outputs_before % inputs):
            raise ValueError(f'{inputs} input channels after {outputs_before} outputs')
        return 0
    if not are_maps:
        if before and inputs != outputs_before:
            raise ValueError(f'{inputs} inputs after {outputs_before} outputs')
        return 0
    side = math.isqrt(inputs // outputs_before)
    if outputs_before * side * side != inputs:
        raise ValueError(f'{inputs} inputs are not {outputs_before} square maps')
    return side


def read_settings(type_: str, messages: list[memoryview]) -> dict[str, int]:
    """Reads what a layer of a type of `MESSAGES` says of itself."""
    settings: dict[str, int] = {}
    for message in messages:  # one, or the parts of one: what is said last counts
        found = read_fields(message)
        for name, number in MESSAGES[type_].fields.items():
            if found[number, VARINT]:
                # All fit an int32, whose negative numbers are written with 64 bits.
                settings[name] = (found[number, VARINT][-1] + 2**31) % 2**32 - 2**31
    return settings


def read_blob(encoded: memoryview) -> np.ndarray:
    """Reads an array, whose axes older files give in another way."""
    blob = read_fields(encoded)
    if blob[8, BYTES]:
        raise ValueError('a blob holds numbers of double precision; float32 is wanted')
    old_axes = [blob[number, VARINT] for number in (1, 2, 3, 4)]
    if any(old_axes):
        shape = tuple((given or [0])[-1] for given in old_axes)
    else:
        shape = _shape(blob[7, BYTES])
    size = sum(map(len, blob[5, BYTES]))
    if size != 4 * math.prod(shape):
        raise ValueError(f'a blob of shape {shape} has {size} bytes of float32 data')
    if not size:
        raise ValueError(f'a blob of shape {shape} is empty')
    # A copy: it can be written to, and does not keep the whole file.
    data = bytearray().join(blob[5, BYTES])
    array = np.frombuffer(data, '<f4').astype(np.float32, copy=False).reshape(shape)
    if not np.isfinite(array).all():
        raise ValueError(f'a blob of shape {shape} holds numbers that are not finite')
    return array


def read_text(encoded: list[memoryview]) -> str:
    """Reads a name, of which the last one counts."""
    text = bytes(encoded[-1][: MAX_NAME_BYTES + 1]) if encoded else b''
    if len(text) > MAX_NAME_BYTES:
        raise ValueError(f'the name {text[:40]!r}... has over {MAX_NAME_BYTES} bytes')
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f'{text[:40]!r} is no name') from error


def read_fields(message: memoryview) -> defaultdict[tuple[int, int], list[Any]]:
    """Finds the fields of a message.

    Returns:
      ``{(field number, wire type): contents}``, numbers for varints and views for all else.
    """
    fields: defaultdict[tuple[int, int], list[Any]] = defaultdict(list)
    at = 0
    for _ in range(_MAX_FIELDS + 1):
        if at == len(message):
            return fields
        tag, at = _varint(message, at)
        wire_type = tag & 7
        if wire_type == VARINT:
            content, at = _varint(message, at)
        else:
            if wire_type == BYTES:
                size, at = _varint(message, at)
            elif wire_type in _SIZES:
                size = _SIZES[wire_type]
            else:
                raise ValueError(f'a field has the wire type {wire_type}')
            content, at = message[at : at + size], at + size
            if at > len(message):
                raise ValueError(f'a field of {size} bytes does not end where its message does')
        fields[tag >> 3, wire_type].append(content)
    raise ValueError(f'a message has more than {_MAX_FIELDS} fields')


def _shape(messages: list[memoryview]) -> tuple[int, ...]:
    axes: list[int] = []
    for message in messages:
        dims = read_fields(message)
        for packed in dims[1, BYTES]:
            at = 0
            while at < len(packed) and len(axes) <= _MAX_AXES:
                axis, at = _varint(packed, at)
                axes.append(axis)
        axes += dims[1, VARINT]
    if len(axes) > _MAX_AXES:
        raise ValueError(f'a blob has more than {_MAX_AXES} axes')
    return tuple(axes)


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Reads a number, seven bits to a byte, and returns it with the place behind it."""
    number = 0
    for position, byte in enumerate(message[at : at + 10]):
        number |= (byte & 127) << 7 * position
        if byte < 128:
            return number, at + position + 1
    raise ValueError('a number does not end')
