"""Writes `.caffemodel` files byte by byte, in the wire format as protobuf documents it."""

import numpy as np


def varint(number):
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def delimited(tag, content):
    return varint(tag << 3 | 2) + varint(len(content)) + content


def integer(tag, number):
    return varint(tag << 3) + varint(number)


def shape(*axes):
    return delimited(7, delimited(1, b''.join(map(varint, axes))))


def floats(values):
    return np.asarray(values, '<f4').tobytes()


def blob(array):
    return delimited(5, floats(array)) + shape(*np.shape(array))


def old_blob(array):
    axes = (1,) * (4 - np.ndim(array)) + np.shape(array)
    return b''.join(map(integer, (1, 2, 3, 4), axes)) + delimited(5, floats(array))


def layer_content(name, kind, *blobs, unknown=b''):
    names = delimited(1, name.encode()) + delimited(2, kind.encode())
    return names + unknown + b''.join(delimited(7, content) for content in blobs)


def layer(name, kind, *blobs, unknown=b''):
    return delimited(100, layer_content(name, kind, *blobs, unknown=unknown))


def old_layer(name, kind, *blobs, unknown=b''):
    head = delimited(4, name.encode()) + integer(5, kind) + unknown
    return delimited(2, head + b''.join(delimited(6, content) for content in blobs))


def message(tag, **fields):
    """How a layer is set: `message(117, _6=1)` has the field 6, in `inner_product_param`."""
    numbers = ((int(name[1:]), value % 2**64) for name, value in fields.items())
    return delimited(tag, b''.join(integer(*field) for field in numbers))
