"""Reads the weights and masks of `.caffemodel` files, those of the paper's authors among them.

Owns what is to be known of Caffe's binary format: a protobuf `NetParameter`, of which the names,
types and blobs of the layers are read and all else is skipped. The bytes are decoded by protobuf,
under a schema that leaves every nested message and every array as bytes until it is looked at, so
that a file takes memory in proportion to its size.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from dns_jax.typing import Masks, Params

_MAX_AXES = 32  # Caffe's own limit
_KINDS_OF_V1 = {4: 'Convolution', 14: 'InnerProduct'}
# In the authors' fork of Caffe, layers under surgery have types of their own.
_KINDS = {
    **dict.fromkeys(('Convolution', 'CConvolution'), 'Convolution'),
    **dict.fromkeys(('InnerProduct', 'CInnerProduct'), 'InnerProduct'),
}


class CaffeLayer(NamedTuple):
    """A layer of a file that has blobs."""

    kind: str  # Caffe's type, such as `Convolution`
    blobs: tuple[np.ndarray, ...]  # float32: weight, bias, and perhaps the masks of both


class CaffeNetwork(NamedTuple):
    """A network in the layout of flax.linen."""

    params: Params  # {layer: {'kernel': …, 'bias': …}}, float32 NumPy arrays
    masks: Masks  # parallel to the params, bool NumPy arrays; shape () where the file has none


def read_caffemodel(
    path: str | os.PathLike[str], max_bytes: int = 2**31 - 1
) -> dict[str, CaffeLayer]:
    r"""Reads the layers that have blobs, in the order of the file and in Caffe's own layout.

    Meant for files from anywhere: nothing in it is believed that the bytes at hand do not bear
    out. Both forms of a file are read, with `layer` and, older, with V1's `layers`.

    Args:
      path: the file.
      max_bytes: how large it may be; by default what protobuf can decode.

    Returns:
      `{name: layer}`. Kernels of convolutions are (output, input, height, width), those of inner
      products (output, input); older files put axes of length 1 before them.

    Raises:
      ValueError: if the file is too large, damaged or no such file, two layers have one name, a
        blob's shape is not that of its data, or its data are not finite float32 numbers.
      OSError: if the file cannot be read.

    Example:
      >>> import tempfile
      >>> blob = b'\x2a\x08' + np.float32([1.0, -2.0]).tobytes() + b'\x3a\x03\x0a\x01\x02'
      >>> layer = b'\x0a\x02ip' + b'\x12\x0cInnerProduct' + b'\x3a\x0f' + blob
      >>> with tempfile.NamedTemporaryFile() as file:
      ...     _ = file.write(b'\xa2\x06\x23' + layer), file.flush()
      ...     read_caffemodel(file.name)['ip']
      CaffeLayer(kind='InnerProduct', blobs=(array([ 1., -2.], dtype=float32),))

    Reference:
      Caffe, `caffe.proto`.
    """
    size = os.path.getsize(path)
    if size > max_bytes:
        raise ValueError(f'{os.fspath(path)!r} has {size} bytes; at most {max_bytes} are wanted')
    with open(path, 'rb') as file:
        content = file.read(size)
    try:
        layers: dict[str, CaffeLayer] = {}
        for name, layer in _layers(content):
            if name in layers:
                raise ValueError(f'two layers with blobs have the name {name!r}')
            layers[name] = layer
        if not layers:
            raise ValueError('no layer has blobs')
    except (ValueError, DecodeError) as error:
        raise ValueError(f'cannot read {os.fspath(path)!r}: {error}') from error
    return layers


def to_linen(layers: Mapping[str, CaffeLayer], rename: Callable[[str], str] = str) -> CaffeNetwork:
    """Brings a chain of convolutions and inner products into the layout of flax.linen.

    Kernels become (height, width, input, output) and (input, output). The first inner product
    after a convolution has its inputs reordered, as Caffe flattens maps (channel, height, width)
    and linen (height, width, channel); these maps must be square.

    Args:
      layers: from `read_caffemodel`.
      rename: gives a layer's name in the tree from that in the file.

    Returns:
      Weights and masks. W⊙T of a network that its authors pruned is `apply_masks` of the two.

    Raises:
      ValueError: if a layer is of another kind, its blobs do not fit each other or the layer
        before, a mask is not of zeros and ones, or two layers get one name.

    Example:
      >>> layer = CaffeLayer('InnerProduct', (np.float32([[1, 2, 3]]), np.float32([4])))
      >>> to_linen({'ip1': layer}, lambda name: name.replace('ip', 'fc')).params['fc1']['kernel']
      array([[1.],
             [2.],
             [3.]], dtype=float32)
    """
    params, masks = {}, {}
    channels = 0  # of the maps that come in, 0 where it is no maps
    for name, layer in layers.items():
        try:
            kind = _KINDS.get(layer.kind)
            if kind is None or len(layer.blobs) not in (1, 2, 4):
                raise ValueError(
                    f'wanted a convolution or an inner product with 1, 2 or 4 blobs, but it is '
                    f'{layer.kind!r} with {len(layer.blobs)}'
                )
            own_name = rename(name)
            if own_name in params:
                raise ValueError(f'another layer has the name {own_name!r} too')
            arrays = _to_linen_layout(kind, layer.blobs[:2], channels)
            marks = _to_linen_layout(kind, layer.blobs[2:], channels)
            params[own_name] = arrays
            masks[own_name] = {
                leaf: _to_mask(marks[leaf], array.shape) if marks else np.ones((), bool)
                for leaf, array in arrays.items()
            }
        except ValueError as error:
            raise ValueError(f'layer {name!r}: {error}') from error
        channels = arrays['kernel'].shape[-1] if kind == 'Convolution' else 0
    return CaffeNetwork(params, masks)


def _to_linen_layout(kind, blobs, channels) -> dict[str, np.ndarray]:
    if not blobs:
        return {}
    if kind == 'Convolution':
        kernel = _with_axes(blobs[0], 4).transpose(2, 3, 1, 0)
    else:
        kernel = _with_axes(blobs[0], 2).T
        if channels:
            inputs, outputs = kernel.shape
            side = math.isqrt(inputs // channels)
            if channels * side * side != inputs:
                raise ValueError(f'{inputs} inputs are not {channels} square maps')
            maps = kernel.reshape(channels, side, side, outputs)
            kernel = maps.transpose(1, 2, 0, 3).reshape(inputs, outputs)
    arrays = {'kernel': np.ascontiguousarray(kernel)}
    if len(blobs) == 2:
        arrays['bias'] = _with_axes(blobs[1], 1)
        if len(arrays['bias']) != kernel.shape[-1]:
            raise ValueError(f'{len(arrays["bias"])} biases for {kernel.shape[-1]} outputs')
    return arrays


def _with_axes(blob: np.ndarray, axes: int) -> np.ndarray:
    """Drops the axes of length 1 that older files put in front."""
    if blob.ndim < axes or set(blob.shape[: blob.ndim - axes]) - {1}:
        raise ValueError(f'wanted a blob of {axes} axes, but its shape is {blob.shape}')
    return blob.reshape(blob.shape[blob.ndim - axes :])


def _to_mask(marks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if marks.shape != shape:
        raise ValueError(f'a mask of shape {marks.shape} for weights of shape {shape}')
    if not np.isin(marks, (0, 1)).all():
        raise ValueError('a mask holds other numbers than 0 and 1')
    return marks == 1


def _layers(content: bytes) -> Iterator[tuple[str, CaffeLayer]]:
    net = _decode('Net', content)
    for message, repeated in (('V1Layer', net.v1_layers), ('Layer', net.layers)):
        for encoded in repeated:
            layer = _decode(message, encoded)
            if not layer.blobs:
                continue
            name = _text(layer.name)
            if message == 'V1Layer':
                kind = _KINDS_OF_V1.get(layer.kind, f'type {layer.kind} of V1')
            else:
                kind = _text(layer.kind)
            try:
                yield name, CaffeLayer(kind, tuple(map(_to_array, layer.blobs)))
            except ValueError as error:
                raise ValueError(f'layer {name!r}: {error}') from error


def _to_array(encoded: bytes) -> np.ndarray:
    blob = _decode('Blob', encoded)
    if blob.double_data:
        raise ValueError('a blob holds numbers of double precision; float32 is wanted')
    if blob.HasField('shape'):
        axes = _decode('Shape', blob.shape).dim
    else:
        axes = (blob.num, blob.channels, blob.height, blob.width)
    if len(axes) > _MAX_AXES:
        raise ValueError(f'a blob has {len(axes)} axes; at most {_MAX_AXES} are wanted')
    shape = tuple(axes)
    if min(shape, default=0) < 1:
        raise ValueError(f'a blob has the shape {shape}')
    data = b''.join(blob.data)
    if len(data) != 4 * math.prod(shape):
        raise ValueError(f'a blob of shape {shape} has {len(data)} bytes of float32 data')
    array = np.frombuffer(data, '<f4').reshape(shape)
    if not np.isfinite(array).all():
        raise ValueError(f'a blob of shape {shape} holds numbers that are not finite')
    return array


def _text(encoded: bytes) -> str:
    try:
        return encoded.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f'{encoded[:40]!r} is no name') from error


def _decode(message: str, encoded: bytes) -> Any:
    return _MESSAGES[message].FromString(encoded)


def _make_messages() -> dict[str, Any]:
    """Makes the classes of the messages, with the field numbers of `caffe.proto`."""
    types = descriptor_pb2.FieldDescriptorProto
    once, often = types.LABEL_OPTIONAL, types.LABEL_REPEATED
    data, number = types.TYPE_BYTES, types.TYPE_INT32
    fields = {
        'Net': {'v1_layers': (2, often, data), 'layers': (100, often, data)},
        'V1Layer': {'name': (4, once, data), 'kind': (5, once, number), 'blobs': (6, often, data)},
        'Layer': {'name': (1, once, data), 'kind': (2, once, data), 'blobs': (7, often, data)},
        'Blob': {
            **{name: (1 + at, once, number) for at, name in enumerate(_OLD_AXES)},
            # Packed floats are bytes on the wire; so they are never made Python numbers.
            **{'data': (5, often, data), 'shape': (7, once, data), 'double_data': (8, often, data)},
        },
        'Shape': {'dim': (1, often, types.TYPE_INT64)},
    }
    file = descriptor_pb2.FileDescriptorProto(name='dns_jax/caffe.proto', package='dns_jax.caffe')
    for message, its_fields in fields.items():
        descriptor = file.message_type.add(name=message)
        for name, (tag, label, kind) in its_fields.items():
            descriptor.field.add(name=name, number=tag, label=label, type=kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        message: message_factory.GetMessageClass(
            pool.FindMessageTypeByName(f'dns_jax.caffe.{message}')
        )
        for message in fields
    }


_OLD_AXES = ('num', 'channels', 'height', 'width')
_MESSAGES = _make_messages()
