"""A network as a chain of layers: what compaction, the sparse runners and the exports can read.

Owns the kinds of layers and what each computes. A chain is a tuple of them; its weights are a
dict `{layer name: {'kernel': …, 'bias': …}}` as flax.linen has it, images are (batch, height,
width, channels).
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Dense:
    """A fully connected layer, of vectors: x · kernel + bias."""

    name: str  #: of its weights, kernel (inputs, units) and bias (units,)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution of images, without stride."""

    name: str  #: of its weights, kernel (height, width, channels, filters), bias (filters,)
    padding: str = 'VALID'  #: or 'SAME', with zeros


@dataclasses.dataclass(frozen=True)
class MaxPool:
    """The maximum over windows that do not overlap; rows and columns left over are dropped."""

    size: int  #: of a side of the window, in pixels


@dataclasses.dataclass(frozen=True)
class Relu:
    """max(x, 0)."""


@dataclasses.dataclass(frozen=True)
class Flatten:
    """Makes a vector of an image, the channel as the fastest index."""


@dataclasses.dataclass(frozen=True)
class Select:
    """Keeps some elements of the last axis: channels of images, elements of vectors."""

    indices: tuple[int, ...]  #: ascending


Layer = Dense | Convolution | MaxPool | Relu | Flatten | Select
"""Any layer of a chain."""

Chain = tuple[Layer, ...]
"""The layers of a network, first to last."""

Weighted = Dense | Convolution
"""A layer with weights."""

Weights = Mapping[str, Mapping[str, Any]]
"""The kernel and the bias of each layer with weights, by its name."""

_LAYER_KINDS = {
    kind.__name__: kind for kind in (Dense, Convolution, MaxPool, Relu, Flatten, Select)
}
_AXES = ('NHWC', 'HWIO', 'NHWC')


def run_chain(chain: Chain, params: Weights, inputs: jax.Array) -> jax.Array:
    """Computes what the network gives.

    Args:
      chain: the layers, first to last.
      params: the weights of its layers, floating-point; entries for other names are ignored.
      inputs: a batch, (batch, …), as the first layer wants them.

    Returns:
      What the last layer gives, (batch, …), of the dtype that inputs and weights have together.

    Raises:
      KeyError: if `params` lacks a layer, or that a kernel or a bias.
      TypeError, ValueError: if the inputs do not fit; `trace_shapes` says where.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {'fc': {'kernel': jnp.array([[1.0], [2.0]]), 'bias': jnp.array([-4.0])}}
      >>> run_chain((Dense('fc'), Relu()), params, jnp.array([[1.0, 1.0], [2.0, 2.0]]))
      Array([[0.],
             [2.]], dtype=float32)
    """
    for layer in chain:
        weights = params[layer.name] if isinstance(layer, Weighted) else None
        inputs = run_layer(layer, weights, inputs)
    return inputs


def run_layer(layer: Layer, weights: Any, inputs: jax.Array) -> jax.Array:
    """Computes what one layer gives.

    Args:
      layer: the layer.
      weights: its kernel and bias; None where it has none.
      inputs: (batch, …).

    Returns:
      Its outputs, (batch, …), of the dtype that inputs and weights have together.

    Raises:
      KeyError: if a kernel or a bias is missing.
      TypeError, ValueError: if the inputs do not fit; `trace_shapes` says where.

    Example:
      >>> import jax.numpy as jnp
      >>> run_layer(Flatten(), None, jnp.zeros((7, 4, 4, 3))).shape
      (7, 48)
    """
    match layer:
        case Dense():
            return inputs @ weights['kernel'] + weights['bias'][None]
        case Convolution():
            outputs = jax.lax.conv_general_dilated(
                inputs, weights['kernel'], (1, 1), layer.padding, dimension_numbers=_AXES
            )
            return outputs + weights['bias'][None, None, None]
        case MaxPool():
            return max_pool(inputs, layer.size, 1)
        case Relu():
            return jnp.maximum(inputs, 0)
        case Flatten():
            return inputs.reshape(inputs.shape[0], -1)
        case Select():
            return jnp.take(inputs, np.array(layer.indices, np.int32), axis=-1, mode='clip')


def max_pool(images: Any, size: int, axis: int) -> Any:
    """Pools two neighbouring axes, height and width, by the maximum.

    What is left over at their ends is dropped. The maximum is taken over strided slices: on CPU
    that is faster than a windowed reduction, and its gradient than the scatter of one.

    Args:
      images: an array, of JAX or NumPy.
      size: of a side of the window.
      axis: that of the height.

    Returns:
      An array of the same type and dtype, both axes divided by the size, rounded down.

    Example:
      >>> import numpy as np
      >>> max_pool(np.arange(20).reshape(4, 5), size=2, axis=0)
      array([[ 6,  8],
             [16, 18]])
    """
    height, width = (length // size * size for length in images.shape[axis : axis + 2])
    before = (slice(None),) * axis
    maximum = np.maximum if isinstance(images, np.ndarray) else jnp.maximum
    rows = [
        functools.reduce(
            maximum,
            [images[*before, row:height:size, column:width:size] for column in range(size)],
        )
        for row in range(size)
    ]
    return functools.reduce(maximum, rows)


def trace_shapes(
    chain: Chain, params: Weights, input_shape: Sequence[int]
) -> list[tuple[int, ...]]:
    """Finds the shape of one example before each layer and behind the last, and checks the chain.

    Args:
      chain: the layers.
      params: their weights; only shapes and dtypes are looked at.
      input_shape: of one example, without a batch axis.

    Returns:
      One shape more than there are layers.

    Raises:
      TypeError: if a layer is none of this module's, or its weights are not floating-point.
      ValueError: if a layer has no weights, shares them with another, or does not fit what comes
        before it.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {'fc': {'kernel': jnp.ones((4, 3)), 'bias': jnp.ones(3)}}
      >>> trace_shapes((Flatten(), Dense('fc')), params, (2, 2, 1))
      [(2, 2, 1), (4,), (3,)]
    """
    shapes, names = [tuple(input_shape)], set()
    if min(input_shape, default=1) < 1:
        raise ValueError(f'input_shape={shapes[0]} must be of lengths above 0')
    for index, layer in enumerate(chain):
        place = f'chain[{index}], {layer},'
        if not isinstance(layer, Layer):
            raise TypeError(f'{place} is not a layer of dns_jax.inference.chain')
        if isinstance(layer, Weighted):
            if layer.name in names:
                raise ValueError(f'{place} has the name of a layer before it')
            names.add(layer.name)
            _check_weights(place, layer, params)
        shapes.append(_output_shape(place, layer, params, shapes[-1]))
    return shapes


def chain_to_json(chain: Chain) -> str:
    """Writes a chain as a JSON list, for the metadata of a file.

    Args:
      chain: the layers.

    Returns:
      A list of objects, each with the kind of the layer and its fields.

    Example:
      >>> chain_to_json((Flatten(), Dense('fc1')))
      '[{"kind": "Flatten"}, {"kind": "Dense", "name": "fc1"}]'
    """
    return json.dumps([{'kind': type(layer).__name__, **vars(layer)} for layer in chain])


def chain_from_json(text: str) -> Chain:
    """Reads what `chain_to_json` wrote.

    Args:
      text: the JSON list.

    Returns:
      The layers.

    Raises:
      ValueError: if it is not such a list.

    Example:
      >>> chain_from_json('[{"kind": "Flatten"}, {"kind": "Dense", "name": "fc1"}]')
      (Flatten(), Dense(name='fc1'))
    """
    try:
        entries = json.loads(text)
        return tuple(_read_layer(**entry) for entry in entries)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'the chain {text[:80]!r} cannot be read: {error}') from error


def _check_weights(place: str, layer: Weighted, params: Weights) -> None:
    weights = params.get(layer.name) if isinstance(params, Mapping) else None
    if not isinstance(weights, Mapping) or set(weights) != {'kernel', 'bias'}:
        found = sorted(params) if isinstance(params, Mapping) else type(params)
        raise ValueError(f'{place} needs a kernel and a bias; params has {found}')
    axes = 2 if isinstance(layer, Dense) else 4
    kernel, bias = jnp.shape(weights['kernel']), jnp.shape(weights['bias'])
    if len(kernel) != axes or bias != kernel[-1:] or 0 in kernel:
        raise ValueError(f'{place} has a kernel of shape {kernel} and a bias of {bias}')
    for leaf in weights.values():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f'{place} has weights of {jnp.result_type(leaf)}, not floating-point')


def _output_shape(
    place: str, layer: Layer, params: Weights, shape: tuple[int, ...]
) -> tuple[int, ...]:
    wanted = {Dense: 1, Convolution: 3, MaxPool: 3}.get(type(layer), len(shape) or 1)
    if len(shape) != wanted:
        raise ValueError(f'{place} needs inputs of {wanted} axes, but they are {shape}')
    match layer:
        case Dense() | Convolution():
            kernel = jnp.shape(params[layer.name]['kernel'])
            if kernel[-2] != shape[-1]:
                raise ValueError(f'{place} has a kernel of shape {kernel} for inputs of {shape}')
            if isinstance(layer, Dense):
                return kernel[-1:]
            if layer.padding == 'SAME':
                return (*shape[:2], kernel[-1])
            if layer.padding != 'VALID':
                raise ValueError(f"{place} must have the padding 'VALID' or 'SAME'")
            if shape[0] < kernel[0] or shape[1] < kernel[1]:
                raise ValueError(f'{place} has a kernel of shape {kernel} for inputs of {shape}')
            return (shape[0] - kernel[0] + 1, shape[1] - kernel[1] + 1, kernel[-1])
        case MaxPool():
            if not 1 <= layer.size <= min(shape[:2]):
                raise ValueError(f'{place} does not fit inputs of {shape}')
            return (shape[0] // layer.size, shape[1] // layer.size, shape[2])
        case Flatten():
            return (int(np.prod(shape)),)
        case Select():
            indices = np.array(layer.indices, np.int64)
            if not len(indices) or (np.diff(indices, prepend=-1) < 1).any():
                raise ValueError(f'{place} must name elements in ascending order')
            if indices[-1] >= shape[-1]:
                raise ValueError(f'{place} names {indices[-1]}, but the inputs are {shape}')
            return (*shape[:-1], len(indices))
        case Relu():
            return shape


def _read_layer(kind: str, **fields: Any) -> Layer:
    if kind not in _LAYER_KINDS:
        raise ValueError(f'{kind!r} is none of {sorted(_LAYER_KINDS)}')
    if 'indices' in fields:
        fields['indices'] = tuple(fields['indices'])
    layer = _LAYER_KINDS[kind](**fields)
    for field in dataclasses.fields(layer):
        value = getattr(layer, field.name)
        values = value if field.name == 'indices' else [value]
        wanted = int if field.name in ('indices', 'size') else str
        fits = (wanted is str or abs(item) < 2**31 for item in values)
        if not all(type(item) is wanted for item in values) or not all(fits):
            raise ValueError(f'{kind} has the {field.name} {str(value)[:80]!r}')
    return layer
