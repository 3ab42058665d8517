"""Exact shrinking of a masked network: what is wholly pruned goes, the outputs stay.

Owns the two rules. A unit or filter whose outgoing weights are all pruned is removed; one with no
incoming weight is a constant, which moves into the biases behind it. Inputs that no weight reads
are left out by a `Select`.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dns_jax._trees import check_parallel
from dns_jax.inference.chain import (
    Chain,
    Convolution,
    Flatten,
    Layer,
    Relu,
    Select,
    Weighted,
    Weights,
    trace_shapes,
)
from dns_jax.layers import map_leaves, named_leaves
from dns_jax.typing import Masks


class Shrunk(NamedTuple):
    """What became of one layer; pairs are before and after."""

    inputs: tuple[int, int]  #: channels of a convolution, elements of a vector
    units: tuple[int, int]  #: or filters
    folded: int  #: units without incoming weights, now in the biases behind
    refused: str  #: why units without incoming weights had to stay; empty if none did


class CompactNetwork(NamedTuple):
    """A network that gives what the masked one gives."""

    chain: Chain
    params: Weights  #: NumPy arrays of the dtypes they had, zero where pruned
    layers: dict[str, Shrunk]


class _Link(NamedTuple):
    """One layer with weights, and what lies between the one before it and itself."""

    layer: Weighted
    kernel: np.ndarray  # (positions, inputs, units), float64: taps of a convolution, else 1
    bias: np.ndarray  # (units,) float64
    between: Sequence[Layer]  # without selections, which `position` and `feature` hold
    features: int  # how many come from before
    pixels: int  # of the flattened image, 1 where none is flattened
    position: np.ndarray  # (inputs,): where in the flattened image an input stands, 0 before that
    feature: np.ndarray  # (inputs,): which feature from before it is


def compact(
    chain: Chain, params: Weights, masks: Masks, input_shape: Sequence[int]
) -> CompactNetwork:
    r"""Removes all that does not change what a masked network gives.

    A unit whose outgoing weights are all pruned is removed. So is one that no kept weight reaches:
    with v its value as it comes through what follows it, the next biases become

    .. math::
      b \leftarrow b + v \sum w \quad \text{over its outgoing weights } w

    That is exact behind ReLU, pooling and flattening, and into convolutions without padding; one
    that pads sees v end at the border, so there the unit stays unless v is 0.

    Args:
      chain: the layers.
      params: their dense weights, concrete arrays, finite where they are kept.
      masks: parallel to the params.
      input_shape: of one example, without a batch axis.

    Returns:
      The small network, equal to the masked one but for rounding, with at least one unit in each
      layer and all of its outputs.

    Raises:
      TypeError: if a mask is not boolean, a weight not floating-point, or a layer none of
        `dns_jax.inference.chain`.
      ValueError: if chain, params and masks do not fit each other, no layer has weights, a kept
        weight is not finite, or a new bias does not fit its dtype.

    Example:
      >>> import numpy as np
      >>> from dns_jax.inference.chain import Dense, Relu
      >>> chain = (Dense('fc1'), Relu(), Dense('fc2'))
      >>> ones, diagonal = np.ones((3, 3)), np.eye(3, dtype=bool)
      >>> params = {name: {'kernel': ones, 'bias': ones[0]} for name in ('fc1', 'fc2')}
      >>> masks = {name: {'kernel': diagonal, 'bias': np.array(True)} for name in params}
      >>> masks['fc1']['kernel'] = diagonal & [[False], [True], [True]]  # unit 0 is constant
      >>> small = compact(chain, params, masks, (3,))
      >>> small.chain[0], small.params['fc2']['kernel'].shape, small.params['fc2']['bias']
      (Select(indices=(1, 2)), (2, 3), array([2., 1., 1.]))
    """
    shapes = trace_shapes(chain, params, input_shape)
    names = [layer.name for layer in chain if isinstance(layer, Weighted)]
    if not names:
        raise ValueError(f'chain must have a layer with weights, but is {chain}')
    params, masks = (
        {name: dict(tree[name]) for name in names if name in tree} for tree in (params, masks)
    )
    mask_of = dict(named_leaves(check_parallel(params, masks)))
    masked = map_leaves(lambda path, leaf: _mask(path, leaf, mask_of[path]), params)
    links = _to_links(chain, shapes, masked)
    folded, refused = _fold_constants(links)
    kept = _find_live(links)

    layers, small, shrunk = [], {}, {}
    last = max(index for index, layer in enumerate(chain) if isinstance(layer, Weighted))
    for index, link in enumerate(links):
        name, inputs = link.layer.name, _live_inputs(link)
        kernel = link.kernel[:, inputs][..., kept[index + 1]]
        shape = masked[name]['kernel'].shape[:-2]
        small[name] = {
            'kernel': kernel.reshape(*shape, *kernel.shape[1:]).astype(
                masked[name]['kernel'].dtype
            ),
            'bias': _narrow(name, link.bias[kept[index + 1]], masked[name]['bias'].dtype),
        }
        layers += [*link.between, *_select(link, inputs, kept[index]), link.layer]
        shrunk[name] = Shrunk(
            inputs=(link.kernel.shape[1], len(inputs)),
            units=(link.kernel.shape[2], len(kept[index + 1])),
            folded=folded[index],
            refused=refused[index],
        )
    return CompactNetwork((*layers, *chain[last + 1 :]), small, shrunk)


def _narrow(name: str, bias: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over='ignore'):
        narrow = bias.astype(dtype)
    if not np.isfinite(narrow.astype(np.float64)).all():
        raise ValueError(f'the constants that go into the biases of {name!r} do not fit {dtype}')
    return narrow


def _mask(path, leaf, mask) -> np.ndarray:
    leaf = np.asarray(leaf)
    # A mask of no axes means that the leaf is kept, as everywhere.
    masked = np.where(np.asarray(mask), leaf, np.zeros((), leaf.dtype)) if np.ndim(mask) else leaf
    if not np.isfinite(masked.astype(np.float64)).all():
        raise ValueError(f'params[{path!r}] has a kept weight that is not finite')
    return masked


def _to_links(chain: Chain, shapes: Sequence[tuple[int, ...]], params) -> list[_Link]:
    """Cuts the chain behind each layer with weights."""
    links, between, features, pixels = [], [], shapes[0][-1], 1
    position, feature = np.zeros(features, int), np.arange(features)
    for layer, shape in zip(chain, shapes, strict=False):
        if isinstance(layer, Weighted):
            kernel, bias = (params[layer.name][leaf].astype(float) for leaf in ('kernel', 'bias'))
            kernel = kernel.reshape(-1, *kernel.shape[-2:])
            links.append(_Link(layer, kernel, bias, between, features, pixels, position, feature))
            between, features, pixels = [], len(bias), 1
            position, feature = np.zeros(features, int), np.arange(features)
        elif isinstance(layer, Select):
            position, feature = (each[list(layer.indices)] for each in (position, feature))
        else:
            if isinstance(layer, Flatten) and len(shape) > 1:
                pixels = math.prod(shape[:-1])
                position = np.repeat(np.arange(pixels), shape[-1])
                feature = np.tile(feature, pixels)
            between.append(layer)
    return links


def _fold_constants(links: list[_Link]) -> tuple[list[int], list[str]]:
    """Moves units without incoming weights into the next biases; first layers first."""
    folded, refused = [0] * len(links), [''] * len(links)
    for index, (link, next_link) in enumerate(itertools.pairwise(links)):
        constant = np.flatnonzero(~link.kernel.any((0, 1)))
        values = link.bias[constant]
        if any(isinstance(layer, Relu) for layer in next_link.between):
            values = np.maximum(values, 0)
        if isinstance(next_link.layer, Convolution) and next_link.layer.padding != 'VALID':
            if stay := np.count_nonzero(values):
                refused[index] = f'{stay} are constant, but {next_link.layer.name} pads with zeros'
            constant, values = constant[values == 0], values[values == 0]
        folded[index] = len(constant)
        value_of = np.zeros(link.kernel.shape[2])
        value_of[constant] = values
        next_link.bias[:] += (value_of[next_link.feature] @ next_link.kernel).sum(0)
        next_link.kernel[:, np.isin(next_link.feature, constant)] = 0
    return folded, refused


def _find_live(links: list[_Link]) -> list[np.ndarray]:
    """Finds which features each layer reads, last layers first; the last entry is the outputs."""
    kept = [np.arange(len(links[-1].bias))]
    for link in reversed(links):
        link.kernel[..., ~np.isin(np.arange(len(link.bias)), kept[0])] = 0
        read = np.unique(link.feature[link.kernel.any((0, 2))])
        # One at least, so that no array is empty; its weights are zero.
        kept.insert(0, read if len(read) else link.feature[:1])
    kept[0] = np.arange(links[0].features)  # the network's inputs come as they are
    return kept


def _live_inputs(link: _Link) -> np.ndarray:
    read = np.flatnonzero(link.kernel.any((0, 2)))
    return read if len(read) else np.zeros(1, int)


def _select(link: _Link, inputs: np.ndarray, features: np.ndarray) -> list[Select]:
    """Says which of the features that are still there the inputs are, unless they are all."""
    index = np.searchsorted(features, link.feature[inputs])
    chosen = link.position[inputs] * len(features) + index
    is_all = len(chosen) == link.pixels * len(features)
    return [] if is_all else [Select(tuple(map(int, chosen)))]
