"""Reads the weights and masks of `.caffemodel` files, as the paper's authors published theirs.

A file is a protobuf `NetParameter`, of which are read the names, types and blobs of the layers and
how these blobs are laid out, and all else is skipped.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from dns_jax.files._caffe_format import (
    BYTES,
    MAX_BYTES,
    MESSAGES,
    VARINT,
    read_blob,
    read_fields,
    read_settings,
    read_text,
    side_of_maps,
)
from dns_jax.typing import Masks, Params

# In the authors' fork of Caffe, layers under surgery have types of their own.
_CONVOLUTIONS = {'Convolution', 'CConvolution'}
_WITH_MASKS = {'CConvolution', 'CInnerProduct'}
_TYPES_OF_V1 = {4: 'Convolution', 14: 'InnerProduct', 39: 'Deconvolution'}


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
      ValueError: if the file has over 2 GiB, is damaged or no `.caffemodel`, two layers have
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
    fields = read_fields(net)
    for encoded in fields[2, BYTES]:  # V1
        layer = read_fields(encoded)
        number = (layer[5, VARINT] or [0])[-1]
        type_ = _TYPES_OF_V1.get(number, f'type {number} of V1')
        message = MESSAGES.get(type_)
        said = layer[message.number_in_v1, BYTES] if message else []
        yield from _layer(layer[4, BYTES], type_, layer[6, BYTES], said)
    for encoded in fields[100, BYTES]:
        layer = read_fields(encoded)
        type_ = read_text(layer[2, BYTES])
        message = MESSAGES.get(type_)
        said = layer[message.number, BYTES] if message else []
        yield from _layer(layer[1, BYTES], type_, layer[7, BYTES], said)


def _layer(names, type_, blobs, said) -> Iterator[tuple[str, CaffeLayer]]:
    if blobs:
        name = read_text(names)
        try:
            yield name, CaffeLayer(type_, tuple(map(read_blob, blobs)), read_settings(type_, said))
        except ValueError as error:
            raise ValueError(f'layer {name!r}: {error}') from error
