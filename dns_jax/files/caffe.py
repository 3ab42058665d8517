"""Reads the weights and masks of `.caffemodel` files, as the paper's authors published theirs.

Owns what is to be known of Caffe's binary format: a protobuf `NetParameter`, of which are read the
names, types and blobs of the layers and how these blobs are laid out, and all else is skipped. The
wire format is walked here, as views of the file's bytes: protobuf's own decoder was seen to take up
to fifty times the size of a file before anything in it could be refused.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
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
_TYPES_OF_V1 = {4: 'Convolution', 14: 'InnerProduct', 39: 'Deconvolution'}


class _Message(NamedTuple):
    """Where a layer says how it is set: the numbers of a message and of its fields."""

    number: int
    number_in_v1: int
    fields: dict[str, int]


_OF_CONVOLUTIONS = _Message(106, 10, {'num_output': 1, 'bias_term': 2, 'group': 5, 'axis': 16})
_OF_PRODUCTS = _Message(117, 17, {'num_output': 1, 'bias_term': 2, 'axis': 5, 'transpose': 6})
# In the authors' fork of Caffe, layers under surgery have types of their own.
_CONVOLUTIONS = {'Convolution', 'CConvolution'}
_WITH_MASKS = {'CConvolution', 'CInnerProduct'}
MESSAGES = {
    **dict.fromkeys(('Convolution', 'CConvolution'), _OF_CONVOLUTIONS),
    **dict.fromkeys(('InnerProduct', 'CInnerProduct'), _OF_PRODUCTS),
}
"""Where layers say how their blobs are laid out, for the types that become layers of linen."""


class CaffeLayer(NamedTuple):
    """A layer of a file that has blobs."""

    type: str  #: Caffe's name of it, such as `Convolution`
    blobs: tuple[np.ndarray, ...]  #: float32: weight, bias, and perhaps the masks of both
    #: what it says of `num_output`, `bias_term`, `axis`, `group` and `transpose`, whole numbers
    settings: Mapping[str, int] = MappingProxyType({})


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
      products (output, input), or (input, output) where the settings have `transpose`; older files
      put axes of length 1 before them.

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
      CaffeLayer(type='InnerProduct', blobs=(array([ 1., -2.], dtype=float32),), settings={})

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
    square. Strides, padding, dilation and groups are not part of the weights; a network for colour
    images wants its channels and means as Caffe gave them.

    Masks lie behind the weights, as zeros and ones: of weight and bias, of the weight alone where
    there is no bias or it takes no part. A layer of the authors' own types without masks is one
    that they published: its zeros are what was pruned.

    Args:
      layers: from `read_caffemodel`. What their settings do not say is as Caffe has it by default,
        or as the blobs have it.
      rename: gives a layer's name in the tree from that in the file.

    Returns:
      Weights and masks. W⊙T of a network that its authors pruned is `apply_masks` of the two.

    Raises:
      ValueError: if a layer is neither of the two, its blobs do not fit each other, its settings or
        the layer before, it flattens its inputs in another way, a mask is not of zeros and ones, a
        blob may be a bias as well as a mask, or two layers get one name.

    Example:
      >>> import numpy as np
      >>> layer = CaffeLayer('InnerProduct', (np.float32([[1, 2, 3]]), np.float32([4])))
      >>> to_linen({'ip1': layer}, lambda name: name.replace('ip', 'fc')).params['fc1']['kernel']
      array([[1.],
             [2.],
             [3.]], dtype=float32)

    Reference:
      Caffe, `inner_product_layer.cpp` and `base_conv_layer.cpp`; the authors' fork of it,
      https://github.com/yiwenguo/Dynamic-Network-Surgery, `compress_inner_product_layer.cpp`.
    """
    params, masks = {}, {}
    before = None  # the layer before, if any: its outputs, and whether they are maps
    for name, layer in layers.items():
        try:
            own_name = rename(name)
            if own_name in params:
                raise ValueError(f'another layer has the name {own_name!r} too')
            weights, marks = _split(layer)
            params[own_name] = _to_linen_layout(layer, weights, before)
            shape = params[own_name]['kernel'].shape
            _check_settings(layer.settings, shape, before)
            masks[own_name] = _masks(layer, params[own_name], marks, before)
        except ValueError as error:
            raise ValueError(f'layer {name!r}: {error}') from error
        before = shape[-1], layer.type in _CONVOLUTIONS
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


def _split(layer: CaffeLayer) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Parts the weights of a layer from its masks, which lie behind them in the same order."""
    count, with_masks = len(layer.blobs), layer.type in _WITH_MASKS
    bias_term = layer.settings.get('bias_term')
    known = layer.type in MESSAGES and count in ((1, 2, 3, 4) if with_masks else (1, 2, 4))
    # One blob alone of the authors' types lacks the bias that Caffe gives a layer by default, or
    # the mask that the fork has beside it; it is whole if published and said to have no bias.
    if not known or (with_masks and count == 1 and bias_term != 0):
        raise ValueError(
            'wanted a convolution or an inner product with weight, perhaps bias, and perhaps '
            f'masks, but it is {layer.type!r} with {count} blobs'
        )
    no_bias = count == 1 or (with_masks and count == 2 and _is_mask(layer))
    if bias_term is not None and bool(bias_term) == no_bias:
        shapes = [blob.shape for blob in layer.blobs]
        raise ValueError(f'it says bias_term: {bias_term}, but has blobs of the shapes {shapes}')
    leaves, weights = ('kernel', 'bias'), 1 if no_bias else 2
    return (
        dict(zip(leaves, layer.blobs[:weights], strict=False)),
        dict(zip(leaves, layer.blobs[weights:], strict=False)),
    )


def _is_mask(layer: CaffeLayer) -> bool:
    """Whether the second blob of two is the mask of the first, as the fork has without a bias."""
    weight, second = layer.blobs
    if second.shape != weight.shape:
        return False
    # Older files have a bias as (1, 1, 1, outputs), and so the weight of one output and one input,
    # or of one input where it is transposed.
    transposed = layer.settings.get('transpose') and weight.shape[:-1] == (1, 1, 1)
    if weight.shape != (1, 1, 1, 1) and not transposed:
        return True
    # Caffe writes no message without num_output, and in one a bias_term of True goes unsaid.
    if not {'bias_term', 'num_output'} & layer.settings.keys():
        raise ValueError(
            f'its second blob of shape {second.shape} may be a bias or a mask; wanted bias_term'
        )
    return layer.settings.get('bias_term') == 0


def _to_linen_layout(layer: CaffeLayer, blobs, before) -> dict[str, np.ndarray]:
    if layer.type in _CONVOLUTIONS:
        kernel = _with_axes(blobs['kernel'], 4).transpose(2, 3, 1, 0)
        side_of_maps(kernel.shape, before)
    else:
        kernel = _with_axes(blobs['kernel'], 2)
        if not layer.settings.get('transpose'):
            kernel = kernel.T
        inputs, outputs = kernel.shape
        if side := side_of_maps(kernel.shape, before):
            maps = kernel.reshape(-1, side, side, outputs)
            kernel = maps.transpose(1, 2, 0, 3).reshape(inputs, outputs)
    arrays = {'kernel': np.ascontiguousarray(kernel)}
    if 'bias' in blobs:
        arrays['bias'] = _with_axes(blobs['bias'], 1)
        if len(arrays['bias']) != kernel.shape[-1]:
            raise ValueError(f'{len(arrays["bias"])} biases for {kernel.shape[-1]} outputs')
    return arrays


def _with_axes(blob: np.ndarray, axes: int) -> np.ndarray:
    """Drops the axes of length 1 that older files, whose blobs have four, put in front."""
    if blob.ndim not in (axes, 4) or set(blob.shape[: blob.ndim - axes]) - {1}:
        raise ValueError(f'wanted a blob of {axes} axes, but its shape is {blob.shape}')
    return blob.reshape(blob.shape[blob.ndim - axes :])


def _check_settings(said: Mapping[str, int], shape: tuple[int, ...], before) -> None:
    """Checks what a layer says of itself, where other weights would have the same shape."""
    outputs_before, are_maps = before or (0, False)
    inputs, outputs = shape[-2:]
    if said.get('num_output', outputs) != outputs:
        raise ValueError(f'{outputs} outputs, but it says num_output: {said["num_output"]}')
    # Behind another axis than this, Caffe multiplies a part of its inputs at a time.
    first = {-3} if len(shape) == 4 or are_maps else {-1} if before else set()
    if (axis := said.get('axis', 1)) not in first | {1}:
        raise ValueError(f'it says axis: {axis}; wanted {sorted(first | {1})}')
    # Where there is a num_output it is a whole message, in which 1 group goes unsaid.
    if len(shape) == 4 and {'group', 'num_output'} & said.keys():
        groups = said.get('group', 1)
        if groups < 1 or outputs % groups or (before and inputs * groups != outputs_before):
            raise ValueError(
                f'{inputs} input channels to {outputs} outputs after {outputs_before}, but it says '
                f'group: {groups}'
            )


def _masks(layer: CaffeLayer, weights, marks, before) -> dict[str, np.ndarray]:
    if layer.type in _WITH_MASKS and not marks:
        return {leaf: array != 0 for leaf, array in weights.items()}
    kept = _to_linen_layout(layer, marks, before) if marks else {}
    return {
        leaf: _to_mask(kept[leaf], array.shape) if leaf in kept else np.ones((), bool)
        for leaf, array in weights.items()
    }


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
        message = MESSAGES.get(type_)
        said = layer[message.number_in_v1, _BYTES] if message else []
        yield from _layer(layer[4, _BYTES], type_, layer[6, _BYTES], said)
    for encoded in fields[100, _BYTES]:
        layer = _fields(encoded)
        type_ = _text(layer[2, _BYTES])
        message = MESSAGES.get(type_)
        said = layer[message.number, _BYTES] if message else []
        yield from _layer(layer[1, _BYTES], type_, layer[7, _BYTES], said)


def _layer(names, type_, blobs, said) -> Iterator[tuple[str, CaffeLayer]]:
    if blobs:
        name = _text(names)
        try:
            yield name, CaffeLayer(type_, tuple(map(_to_array, blobs)), _settings(type_, said))
        except ValueError as error:
            raise ValueError(f'layer {name!r}: {error}') from error


def _settings(type_: str, messages: list[memoryview]) -> dict[str, int]:
    settings: dict[str, int] = {}
    for message in messages:  # one, or the parts of one: what is said last counts
        found = _fields(message)
        for name, number in MESSAGES[type_].fields.items():
            if found[number, _VARINT]:
                # All fit an int32, whose negative numbers are written with 64 bits.
                settings[name] = (found[number, _VARINT][-1] + 2**31) % 2**32 - 2**31
    return settings


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
