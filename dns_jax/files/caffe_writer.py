"""Writes weights and masks to `.caffemodel` files, as the paper's authors published theirs.

Owns the way back from what `caffe` reads. The wire format of protobuf is written here, as
it is read there.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dns_jax._trees import check_parallel
from dns_jax.files._caffe_format import MAX_BYTES, MAX_NAME_BYTES, MESSAGES, side_of_maps
from dns_jax.files._header import encode_number
from dns_jax.files.caffe import CaffeLayer
from dns_jax.files.writing import write_whole
from dns_jax.inference.chain import Weights
from dns_jax.typing import Masks


def from_linen(
    params: Weights,
    masks: Masks | None = None,
    order: Sequence[str] | None = None,
    rename: Callable[[str], str] = str,
) -> dict[str, CaffeLayer]:
    """Brings a chain of convolutions and dense layers of flax.linen into Caffe's layout.

    The inverse of `dns_jax.files.caffe.to_linen`, which says what becomes of the axes. A layer with
    masks becomes one of the authors' own types, with the masks behind its weights as zeros and
    ones; one whose masks all have shape `()` remains as Caffe has it. Beside another mask one of
    shape `()` becomes ones: the authors' layers have both masks.

    Args:
      params: `{layer: {'kernel': …, 'bias': …}}`, float32; a layer may have no bias.
      masks: parallel to the params, bool; None if the network has none.
      order: the names of all layers, first to last; by default that of the params. JAX sorts the
        names of a dict, which puts conv10 before conv2.
      rename: gives a layer's name in the file from that in the tree.

    Returns:
      ``{name in the file: layer}``, for `write_caffemodel`. The arrays are copies.

    Raises:
      ValueError: if a layer is neither of the two or does not fit the one before, two get one
        name, the order does not name each layer once, or the masks do not belong to the weights.
      TypeError: if a weight is not float32, or a mask not bool.

    Example:
      >>> import numpy as np
      >>> params = {'fc1': {'kernel': np.float32([[1], [2], [3]]), 'bias': np.float32([4])}}
      >>> from_linen(params, rename=lambda name: name.replace('fc', 'ip'))['ip1'].blobs
      (array([[1., 2., 3.]], dtype=float32), array([4.], dtype=float32))

    Reference:
      The authors' fork of Caffe, https://github.com/yiwenguo/Dynamic-Network-Surgery.
    """
    order = list(params if order is None else order)
    if sorted(order) != sorted(params):
        raise ValueError(f'order={order} must name each layer of {sorted(params)} once')
    if masks is not None:
        masks = check_parallel(params, masks)
    layers: dict[str, CaffeLayer] = {}
    before = None  # the layer before, if any: its outputs, and whether they are maps
    for name in order:
        own_name, weights = rename(name), params[name]
        try:
            if own_name in layers:
                raise ValueError(f'another layer has the name {own_name!r} too')
            shape = _check_weights(weights)
            side = side_of_maps(shape, before)
        except (TypeError, ValueError) as error:
            raise type(error)(f'layer {name!r}: {error}') from error
        layers[own_name] = _to_layer(weights, {} if masks is None else masks[name], side)
        before = shape[-1], len(shape) == 4
    return layers


def write_caffemodel(
    path: str | os.PathLike[str], layers: Mapping[str, CaffeLayer], name: str = ''
) -> None:
    """Writes a file that Caffe loads, in the newer of its two forms, whole or not at all.

    Caffe takes the blobs by the names of its layers; all else, such as strides, groups and the
    types, it has from its own description of the network, and the settings are for other readers.
    Memory is taken once for the file.

    Args:
      path: the file, in a folder that exists.
      layers: from `from_linen` or `caffe.read_caffemodel`, by name and in the order that
        the file is to have.
      name: of the network.

    Raises:
      ValueError: if there are no layers, a layer has no blobs or settings that its type has not, a
        blob is empty or not finite, a name is empty or too long, or the file would exceed
        protobuf's limit of 2 GiB.
      TypeError: if a blob is not float32.
      OSError: if the file cannot be written; what was there before is then as it was.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from dns_jax.files.caffe import CaffeLayer
      >>> from dns_jax.files.caffe import read_caffemodel
      >>> layer = CaffeLayer('InnerProduct', (np.float32([[1.0, -2.0]]),))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_caffemodel(f'{folder}/net.caffemodel', {'ip': layer}, name='net')
      ...     read_caffemodel(f'{folder}/net.caffemodel')['ip']
      CaffeLayer(type='InnerProduct', blobs=(array([[ 1., -2.]], dtype=float32),), settings={})

    Reference:
      Caffe, `caffe.proto`.
    """
    if not layers:
        raise ValueError('a file without layers cannot be read')
    pieces = list(_delimited(1, [name.encode()])) if name else []
    for layer_name, layer in layers.items():
        try:
            pieces += _encode_layer(layer_name, layer)
        except (TypeError, ValueError) as error:
            raise type(error)(f'layer {layer_name!r}: {error}') from error
    size = sum(map(len, pieces))
    if size > MAX_BYTES:
        raise ValueError(f'the file would have {size} bytes; at most {MAX_BYTES} are read')
    write_whole(Path(path), b''.join(pieces))


def _check_weights(weights: Any) -> tuple[int, ...]:
    """Checks the weights of a layer, and returns the shape of its kernel."""
    leaves = set(weights) if isinstance(weights, Mapping) else None
    if leaves not in ({'kernel'}, {'kernel', 'bias'}):
        raise ValueError(f'wanted a kernel and perhaps a bias, not {leaves or type(weights)}')
    for leaf, array in weights.items():
        if np.dtype(array.dtype) != np.float32:
            raise TypeError(f'the {leaf} is {array.dtype}; wanted float32')
    shape = np.shape(weights['kernel'])
    if len(shape) not in (2, 4) or 0 in shape:
        raise ValueError(f'the kernel has shape {shape}; wanted four axes or two, none empty')
    if 'bias' in weights and np.shape(weights['bias']) != shape[-1:]:
        raise ValueError(f'the bias has shape {np.shape(weights["bias"])} beside a kernel {shape}')
    return shape


def _to_layer(weights: Mapping[str, Any], masks: Mapping[str, Any], side: int) -> CaffeLayer:
    type_ = 'Convolution' if np.ndim(weights['kernel']) == 4 else 'InnerProduct'
    blobs = _blobs(weights, side)
    settings = {} if 'bias' in weights else {'bias_term': 0}
    if not any(np.shape(mask) for mask in masks.values()):
        return CaffeLayer(type_, blobs, settings)
    whole = {
        leaf: np.broadcast_to(np.asarray(mask), np.shape(weights[leaf]))
        for leaf, mask in masks.items()
    }
    return CaffeLayer(f'C{type_}', blobs + _blobs(whole, side), settings)


def _blobs(leaves: Mapping[str, Any], side: int) -> tuple[np.ndarray, ...]:
    """Lays out a kernel and a bias, or their masks; the side is that of the maps before, or 0."""
    kernel = np.asarray(leaves['kernel'])
    if kernel.ndim == 4:
        kernel = kernel.transpose(3, 2, 0, 1)
    elif side:
        inputs, outputs = kernel.shape
        maps = kernel.reshape(side, side, -1, outputs)
        kernel = maps.transpose(3, 2, 0, 1).reshape(outputs, inputs)
    else:
        kernel = kernel.T
    arrays = [kernel, np.asarray(leaves['bias'])] if 'bias' in leaves else [kernel]
    return tuple(np.ascontiguousarray(array, np.float32) for array in arrays)


def _encode_layer(name: str, layer: CaffeLayer) -> Iterator[bytes | memoryview]:
    encoded = name.encode()
    if not 1 <= len(encoded) <= MAX_NAME_BYTES:
        raise ValueError(f'its name has {len(encoded)} bytes; wanted 1 to {MAX_NAME_BYTES}')
    if not layer.blobs:
        raise ValueError('it has no blobs')
    content = [*_delimited(1, [encoded]), *_delimited(2, [layer.type.encode()])]
    for blob in layer.blobs:
        content += _delimited(7, _encode_blob(blob))
    if layer.settings:
        content += _encode_settings(layer)
    return _delimited(100, content)


def _encode_settings(layer: CaffeLayer) -> Iterator[bytes | memoryview]:
    message = MESSAGES.get(layer.type)
    known = message.fields if message else {}
    if unknown := sorted(layer.settings.keys() - known):
        raise ValueError(f'it is {layer.type!r} with the settings {unknown}; known are {[*known]}')
    numbers = sorted((known[name], value) for name, value in layer.settings.items())
    # Those below 0 are written with 64 bits.
    fields = [encode_number(field << 3) + encode_number(value % 2**64) for field, value in numbers]
    return _delimited(MESSAGES[layer.type].number, fields)


def _encode_blob(blob: np.ndarray) -> list[bytes | memoryview]:
    if blob.dtype != np.float32:
        raise TypeError(f'a blob of shape {blob.shape} is {blob.dtype}; wanted float32')
    if not blob.size or not np.isfinite(blob).all():
        raise ValueError(f'a blob of shape {blob.shape} is empty or not finite')
    data = np.ascontiguousarray(blob, '<f4').reshape(-1).view(np.uint8).data
    axes = b''.join(map(encode_number, blob.shape))
    return [*_delimited(7, _delimited(1, [axes])), *_delimited(5, [data])]


def _delimited(field: int, content: Any) -> Iterator[bytes | memoryview]:
    """Puts the field's number and the length before a content in pieces, which are not copied."""
    pieces = list(content)
    yield encode_number(field << 3 | 2) + encode_number(sum(map(len, pieces)))
    yield from pieces
