"""Reads the weights and masks of `.caffemodel` files, as the paper's authors published theirs.

Owns what is to be known of Caffe's binary format: a protobuf `NetParameter`, of which the names,
types and blobs of the layers are read and all else is skipped. The wire format is walked here, as
views of the file's bytes: protobuf's own decoder was seen to take up to fifty times the size of a
file before anything in it could be refused.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dns_jax.typing import Masks, Params

MAX_BYTES = 2**31 - 1
"""The most bytes of a file, protobuf's own limit."""

MAX_NAME_BYTES = 1_000
"""The most bytes of a layer's name that are read."""

_MAX_AXES = 32  # Caffe's own limit
_MAX_FIELDS = 4_096  # of one message; the deepest networks have some hundred layers
_VARINT, _BYTES = 0, 2  # wire types
_SIZES = {1: 8, 5: 4}  # of wire types without a length
_TYPES_OF_V1 = {4: 'Convolution', 14: 'InnerProduct'}
# In the authors' fork of Caffe, layers under surgery have types of their own.
_CONVOLUTIONS = {'Convolution', 'CConvolution'}
_PRODUCTS = {'InnerProduct', 'CInnerProduct'}
_WITH_MASKS = {'CConvolution', 'CInnerProduct'}


class CaffeLayer(NamedTuple):
    """A layer of a file that has blobs."""

    type: str  #: Caffe's name of it, such as `Convolution`
    blobs: tuple[np.ndarray, ...]  #: float32: weight, bias, and perhaps the masks of both


class CaffeNetwork(NamedTuple):
    """A network in the layout of flax.linen."""

    params: Params  #: `kernel` and `bias` by layer, float32 NumPy arrays
    masks: Masks  #: parallel to the params, bool NumPy arrays; shape () where the file has none


def read_caffemodel(path: str | os.PathLike[str]) -> dict[str, CaffeLayer]:
    r"""Reads the layers that have blobs, in the order of the file and in Caffe's own layout.

    Meant for files from anywhere: memory is taken for the bytes of the file and once more for its
    arrays, whatever lengths and shapes it claims. Both forms of a file are read, with `layer` and,
    older, with V1's `layers`.

    Args:
      path: the file.

    Returns:
      ``{name: layer}``. Kernels of convolutions are (output, input, height, width), those of inner
      products (output, input); older files put axes of length 1 before them.

    Raises:
      ValueError: if the file has over `MAX_BYTES`, is damaged or no `.caffemodel`, two layers have
        one name, a blob's shape is not that of its data, or its data are not finite float32
        numbers.
      OSError: if the file cannot be read.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> blob = b'\x2a\x08' + np.float32([1.0, -2.0]).tobytes() + b'\x3a\x03\x0a\x01\x02'
      >>> layer = b'\x0a\x02ip' + b'\x12\x0cInnerProduct' + b'\x3a\x0f' + blob
      >>> with tempfile.NamedTemporaryFile() as file:
      ...     _ = file.write(b'\xa2\x06\x23' + layer), file.flush()
      ...     read_caffemodel(file.name)['ip']
      CaffeLayer(type='InnerProduct', blobs=(array([ 1., -2.], dtype=float32),))

    Reference:
      Caffe, `caffe.proto`.
    """
    size = os.path.getsize(path)
    if size > MAX_BYTES:
        raise ValueError(f'{os.fspath(path)!r} has {size} bytes; at most {MAX_BYTES} are wanted')
    with open(path, 'rb') as file:
        content = file.read(size)
    layers: dict[str, CaffeLayer] = {}
    try:
        for name, layer in _layers(memoryview(content)):
            if name in layers:
                raise ValueError(f'two layers with blobs have the name {name!r}')
            layers[name] = layer
        if not layers:
            raise ValueError('no layer has blobs')
    except ValueError as error:
        raise ValueError(f'cannot read {os.fspath(path)!r}: {error}') from error
    return layers


def to_linen(layers: Mapping[str, CaffeLayer], rename: Callable[[str], str] = str) -> CaffeNetwork:
    """Brings a chain of convolutions and inner products into the layout of flax.linen.

    Kernels become (height, width, input, output), with groups (…, input / groups, output), and
    (input, output). The first inner product after a convolution has its inputs reordered, as Caffe
    flattens maps (channel, height, width) and linen (height, width, channel); these maps must be
    square. Strides, padding and groups are not part of the weights; a network for colour images
    wants its channels and means as Caffe gave them.

    Args:
      layers: from `read_caffemodel`.
      rename: gives a layer's name in the tree from that in the file.

    Returns:
      Weights and masks. W⊙T of a network that its authors pruned is `apply_masks` of the two.

    Raises:
      ValueError: if a layer is neither of the two, its blobs do not fit each other or the layer
        before, a mask is not of zeros and ones, or two layers get one name.

    Example:
      >>> import numpy as np
      >>> layer = CaffeLayer('InnerProduct', (np.float32([[1, 2, 3]]), np.float32([4])))
      >>> to_linen({'ip1': layer}, lambda name: name.replace('ip', 'fc')).params['fc1']['kernel']
      array([[1.],
             [2.],
             [3.]], dtype=float32)
    """
    params, masks = {}, {}
    before = None  # the layer before, if any: its outputs, and whether they are maps
    for name, layer in layers.items():
        try:
            own_name = rename(name)
            if own_name in params:
                raise ValueError(f'another layer has the name {own_name!r} too')
            weights, marks = _split(layer)
            params[own_name] = _to_linen_layout(layer.type, weights, before)
            kept = _to_linen_layout(layer.type, marks, before) if marks else {}
            masks[own_name] = {
                leaf: _to_mask(kept[leaf], array.shape) if marks else np.ones((), bool)
                for leaf, array in params[own_name].items()
            }
        except ValueError as error:
            raise ValueError(f'layer {name!r}: {error}') from error
        before = params[own_name]['kernel'].shape[-1], layer.type in _CONVOLUTIONS
    return CaffeNetwork(params, masks)


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


def _split(layer: CaffeLayer) -> tuple[Any, Any]:
    """Parts the weights of a layer from its masks, which lie behind them in the same order."""
    count = len(layer.blobs)
    known = layer.type in _CONVOLUTIONS | _PRODUCTS
    if not known or count not in (1, 2, 4) or (layer.type in _WITH_MASKS and count == 1):
        raise ValueError(
            'wanted a convolution or an inner product with weight, perhaps bias, and perhaps '
            f'masks, but it is {layer.type!r} with {count} blobs'
        )
    with_masks = layer.type in _WITH_MASKS or count == 4
    half = count // 2 if with_masks else count
    return layer.blobs[:half], layer.blobs[half:]


def _to_linen_layout(type_, blobs, before) -> dict[str, np.ndarray]:
    if type_ in _CONVOLUTIONS:
        kernel = _with_axes(blobs[0], 4).transpose(2, 3, 1, 0)
        side_of_maps(kernel.shape, before)
    else:
        kernel = _with_axes(blobs[0], 2).T
        inputs, outputs = kernel.shape
        if side := side_of_maps(kernel.shape, before):
            maps = kernel.reshape(-1, side, side, outputs)
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


def _layers(net: memoryview) -> Iterator[tuple[str, CaffeLayer]]:
    fields = _fields(net)
    for encoded in fields[2, _BYTES]:  # V1
        layer = _fields(encoded)
        number = (layer[5, _VARINT] or [0])[-1]
        type_ = _TYPES_OF_V1.get(number, f'type {number} of V1')
        yield from _layer(layer[4, _BYTES], type_, layer[6, _BYTES])
    for encoded in fields[100, _BYTES]:
        layer = _fields(encoded)
        yield from _layer(layer[1, _BYTES], _text(layer[2, _BYTES]), layer[7, _BYTES])


def _layer(names, type_, blobs) -> Iterator[tuple[str, CaffeLayer]]:
    if blobs:
        name = _text(names)
        try:
            yield name, CaffeLayer(type_, tuple(map(_to_array, blobs)))
        except ValueError as error:
            raise ValueError(f'layer {name!r}: {error}') from error


def _to_array(encoded: memoryview) -> np.ndarray:
    blob = _fields(encoded)
    if blob[8, _BYTES]:
        raise ValueError('a blob holds numbers of double precision; float32 is wanted')
    old_axes = [blob[number, _VARINT] for number in (1, 2, 3, 4)]
    if any(old_axes):
        shape = tuple((given or [0])[-1] for given in old_axes)
    else:
        shape = _shape(blob[7, _BYTES])
    size = sum(map(len, blob[5, _BYTES]))
    if size != 4 * math.prod(shape):
        raise ValueError(f'a blob of shape {shape} has {size} bytes of float32 data')
    if not size:
        raise ValueError(f'a blob of shape {shape} is empty')
    # A copy: it can be written to, and does not keep the whole file.
    data = bytearray().join(blob[5, _BYTES])
    array = np.frombuffer(data, '<f4').astype(np.float32, copy=False).reshape(shape)
    if not np.isfinite(array).all():
        raise ValueError(f'a blob of shape {shape} holds numbers that are not finite')
    return array


def _shape(messages: list[memoryview]) -> tuple[int, ...]:
    axes: list[int] = []
    for message in messages:
        dims = _fields(message)
        for packed in dims[1, _BYTES]:
            at = 0
            while at < len(packed) and len(axes) <= _MAX_AXES:
                axis, at = _varint(packed, at)
                axes.append(axis)
        axes += dims[1, _VARINT]
    if len(axes) > _MAX_AXES:
        raise ValueError(f'a blob has more than {_MAX_AXES} axes')
    return tuple(axes)


def _text(encoded: list[memoryview]) -> str:
    text = bytes(encoded[-1][: MAX_NAME_BYTES + 1]) if encoded else b''
    if len(text) > MAX_NAME_BYTES:
        raise ValueError(f'the name {text[:40]!r}... has over {MAX_NAME_BYTES} bytes')
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f'{text[:40]!r} is no name') from error


def _fields(message: memoryview) -> defaultdict[tuple[int, int], list[Any]]:
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
        if wire_type == _VARINT:
            content, at = _varint(message, at)
        else:
            if wire_type == _BYTES:
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


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Reads a number, seven bits to a byte, and returns it with the place behind it."""
    number = 0
    for position, byte in enumerate(message[at : at + 10]):
        number |= (byte & 127) << 7 * position
        if byte < 128:
            return number, at + position + 1
    raise ValueError('a number does not end')
