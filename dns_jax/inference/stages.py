"""Stages of the runners: the layers of a chain for feature-major arrays.

Arrays are (channels, height, width, batch) and (elements, batch), so that a kept weight meets
whole rows of numbers.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dns_jax.inference.chain import (
    Chain,
    Convolution,
    Dense,
    Flatten,
    Layer,
    Select,
    Weighted,
    Weights,
    trace_shapes,
)

KERNEL_KINDS = ('dense', 'sparse', 'native')
"""The kinds of kernels that a layer with weights can have; SciPy has the first two alone."""


class Stage(NamedTuple):
    """A layer made for feature-major arrays; what it does not have is empty."""

    layer: Layer
    shape: tuple[int, ...]  #: of what comes in, without the batch
    kernel: np.ndarray = np.zeros(0, np.float32)  #: (units, inputs), (filters, channels, h, w)
    bias: np.ndarray = np.zeros(0, np.float32)  #: (units,)
    rows: np.ndarray = np.zeros(0, int)  #: which it keeps of what comes in
    kind: str = ''  #: how it is computed


class Pipeline(NamedTuple):
    """A chain for feature-major arrays."""

    rows: np.ndarray  #: which of an example's flat inputs come first, second, …
    shape: tuple[int, ...]  #: what they make, without the batch
    stages: list[Stage]


def make_pipeline(
    chain: Chain,
    params: Weights,
    input_shape: Sequence[int],
    kinds: Mapping[str, str],
    known: Sequence[str],
) -> Pipeline:
    """Checks everything and makes the stages.

    Args:
      chain: the layers.
      params: their weights, concrete.
      input_shape: of one example, without a batch axis.
      kinds: how each layer with weights is computed, by its name.
      known: the kinds there are.

    Returns:
      The pipeline.

    Raises:
      TypeError, ValueError: if the chain does not fit, or `kinds` is not about its layers.

    Example:
      >>> import numpy as np
      >>> from dns_jax.inference.chain import Dense, Flatten, Relu
      >>> params = {'fc': {'kernel': np.ones((4, 1)), 'bias': np.zeros(1)}}
      >>> chain, kinds = (Flatten(), Dense('fc'), Relu()), {'fc': 'dense'}
      >>> pipeline = make_pipeline(chain, params, (2, 2, 1), kinds, KERNEL_KINDS)
      >>> pipeline.shape, [type(stage.layer).__name__ for stage in pipeline.stages]
      ((4,), ['Dense', 'Relu'])
    """
    shapes = trace_shapes(chain, params, input_shape)
    names = [layer.name for layer in chain if isinstance(layer, Weighted)]
    if sorted(kinds) != sorted(names) or not set(kinds.values()) <= set(known):
        raise ValueError(f'kinds must give one of {known} for each of {names}, but is {kinds}')
    rows, stages = np.arange(np.prod(shapes[0])), []
    if len(shapes[0]) > 1 and chain[:1] != (Flatten(),):
        rows = np.moveaxis(rows.reshape(shapes[0]), -1, 0).ravel()
    for layer, before in zip(chain, shapes, strict=False):
        stage = Stage(layer, _feature_major(before))
        match layer:
            case Dense() | Convolution():
                kernel, bias = (np.asarray(params[layer.name][leaf]) for leaf in ('kernel', 'bias'))
                order = (-1, -2, *range(kernel.ndim - 2))
                kernel = np.ascontiguousarray(kernel.transpose(order), np.float32)
                stage = stage._replace(
                    kernel=kernel, bias=bias.astype(np.float32), kind=kinds[layer.name]
                )
            case Flatten() if len(before) == 1 or not stages:
                continue
            case Flatten():
                image = np.arange(np.prod(before)).reshape(stage.shape)
                stage = stage._replace(rows=np.moveaxis(image, 0, -1).ravel())
            case Select(indices) if len(before) == 1 and not stages:
                rows = rows[np.array(indices)]
                continue
            case Select(indices) if stages and isinstance(stages[-1].layer, Flatten):
                stages[-1] = stages[-1]._replace(rows=stages[-1].rows[np.array(indices)])
                continue
            case Select(indices):
                stage = stage._replace(rows=np.array(indices))
        stages.append(stage)
    first = stages[0].shape if stages else _feature_major(shapes[-1])
    return _read_in_place(Pipeline(rows, first, stages), int(np.prod(shapes[0])))


def is_in_order(rows: np.ndarray, shape: Sequence[int]) -> bool:
    """Says whether rows are all that an array has, as they are.

    Args:
      rows: their numbers.
      shape: of the array.

    Returns:
      Whether to take them changes nothing.

    Example:
      >>> import numpy as np
      >>> is_in_order(np.arange(4), (2, 2)), is_in_order(np.arange(3), (2, 2))
      (True, False)
    """
    return np.array_equal(rows, np.arange(np.prod(shape)))


def _feature_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[-1], *shape[:-1])


def _read_in_place(pipeline: Pipeline, inputs: int) -> Pipeline:
    """Lets sparse products take what they read from where it is, unless a copy is far smaller.

    Zeros of a sparse kernel cost nothing, so all that a copy gains is that what is read lies closer
    together. Below three quarters that is taken to pay; where exactly it does was not measured.
    """
    # What puts the inputs in order is such a stage too.
    stages = [Stage(Flatten(), (inputs,), rows=pipeline.rows), *pipeline.stages]
    shape = pipeline.shape
    for index, (before, stage) in enumerate(itertools.pairwise(stages)):
        whole = math.prod(before.shape)
        is_sparse = isinstance(stage.layer, Dense) and stage.kind != 'dense'
        if is_sparse and isinstance(before.layer, Flatten) and len(before.rows) > whole * 3 // 4:
            kernel = np.zeros((len(stage.kernel), whole), np.float32)
            kernel[:, before.rows] = stage.kernel
            stages[index] = before._replace(rows=np.arange(whole))
            stages[index + 1] = stage._replace(kernel=kernel, shape=(whole,))
            shape = shape if index else (whole,)
    return Pipeline(stages[0].rows, shape, stages[1:])
