"""The sparse artefact of a pruned network: a file that holds the kept weights alone.

Owns the file format. It is safetensors, so any reader of that will do, and nothing in a file is
ever run. A leaf with the path `p` (`dns_jax.layers.named_leaves`) is

  - the tensor `p:values`, float32: its kept weights;
  - the tensor `p:indices`, uint32: their flat positions in C order, ascending;
  - the entry `p:shape` of the metadata: the shape of the dense leaf, a JSON list such as `[2, 3]`.

A leaf that takes no part in surgery has no indices, and all its weights are values; a scalar, which
never does, has the index 0. All other entries of the metadata are free. The same network gives the
same bytes.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dns_jax._core.checks import needs_extra
from dns_jax._trees import check_parallel, nest_leaves
from dns_jax.files._contents import check_float32, check_metadata, sort_metadata
from dns_jax.files.writing import write_whole
from dns_jax.layers import named_leaves
from dns_jax.typing import Masks, Params

with needs_extra('sparse'):
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save

_SHAPE = re.compile(r'\[(NUMBER(, ?NUMBER){0,63})?\]'.replace('NUMBER', '(0|[1-9][0-9]{0,17})'))


class SparseNetwork(NamedTuple):
    """What a sparse file holds, made dense again."""

    params: Params  #: nested dict of float32 NumPy arrays, 0 where nothing was kept
    masks: Masks  #: parallel to the params, bool NumPy arrays; shape () where a leaf takes no part
    metadata: dict[str, str]  #: the free entries


def save_sparse(
    path: str | os.PathLike[str],
    params: Params,
    masks: Masks,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the kept weights of a network to a file, whole or not at all.

    A kept weight takes 8 bytes, whatever its value: one that is kept at 0 is stored too. One of a
    leaf that takes no part takes 4.

    Args:
      path: the file, in a folder that exists; one that is there is replaced.
      params: dense weights, concrete arrays of float32 or a narrower floating-point type,
        finite where they are kept.
      masks: the parallel masks. A leaf with a mask of shape `()` takes no part and is kept whole.
      metadata: free strings to store beside the weights, such as the name of the network.

    Raises:
      ValueError: if the trees do not match or are empty, the path of a leaf is that of another
        or lies within it, a path has more than 100 parts, a leaf more than 2**32 elements, a
        kept weight is not finite, or a key of `metadata` ends in `:shape`.
      TypeError: if a mask is not boolean, a leaf not of a type that float32 can hold, or
        `metadata` not strings alone.
      OSError: if the file cannot be written; what was there before is then as it was.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> params = {'fc1': {'kernel': jnp.array([[3.0, -2.0], [1.0, 5.0]])}}
      >>> masks = {'fc1': {'kernel': jnp.array([[True, False], [False, True]])}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_sparse(f'{folder}/tiny.safetensors', params, masks, {'network': 'tiny'})
      ...     load_sparse(f'{folder}/tiny.safetensors').params['fc1']['kernel']
      array([[3., 0.],
             [0., 5.]], dtype=float32)

    Reference:
      The format of safetensors, https://github.com/huggingface/safetensors.
    """
    masks = check_parallel(params, masks)
    entries = dict(metadata or {})
    check_metadata(entries)
    for key in entries:
        if key.endswith(':shape'):
            raise ValueError(f'metadata has the key {key!r}, which is one of a shape')

    leaves = named_leaves(params)
    nest_leaves(leaves)  # what cannot be nested could not be loaded
    tensors = {}
    for (name, leaf), mask in zip(leaves, jax.tree.leaves(masks), strict=True):
        tensors |= _to_tensors(name, np.asarray(leaf), np.asarray(mask))
        entries[f'{name}:shape'] = json.dumps(jnp.shape(leaf))
    write_whole(Path(path), sort_metadata(save(tensors, entries)))


def load_sparse(path: str | os.PathLike[str], max_parameters: int = 2**30) -> SparseNetwork:
    """Reads a sparse file, and checks all of it.

    Meant for files from anywhere: until the dense arrays are made, memory is taken in proportion
    to the size of the file.

    Args:
      path: the file.
      max_parameters: how many parameters, kept or not, the network may have at most, an empty
        axis counted as one of length 1. Each takes 5 bytes of memory.

    Returns:
      The weights and masks as nested dicts, made by splitting the paths of the leaves at `/`:
      dicts come back as they were, but for slashes in their keys, the index of a list as a key
      such as `'0'`, and a bare array as a bare array. The mask of a leaf that took no part has
      shape `()`; older files, where it has indices too, give it one of True.

    Raises:
      ValueError: if the file is damaged, is not such a file, or the network is larger than
        `max_parameters`.
      OSError: if the file cannot be read.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_sparse(f'{folder}/w', jnp.array([3.0, -2.0]), jnp.array([True, False]))
      ...     load_sparse(f'{folder}/w')
      SparseNetwork(params=array([3., 0.], dtype=float32), masks=array([ True, False]), metadata={})
    """
    try:
        with safe_open(path, 'numpy') as file:
            return _read(file, max_parameters)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f'cannot load {os.fspath(path)!r}: {error}') from error


def _to_tensors(path: str, weights: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    if weights.size > 2**32:  # positions that a uint32 tells apart
        raise ValueError(f'params[{path!r}] has {weights.size} elements, over 2**32')
    whole = mask.ndim == 0
    values = weights.reshape(-1) if whole else weights[mask]
    check_float32(path, values)
    tensors: dict[str, np.ndarray] = {f'{path}:values': values.astype(np.float32)}
    if weights.ndim == 0:  # a reader of any version knows that it takes no part
        tensors[f'{path}:indices'] = np.zeros(1, np.uint32)
    elif not whole:
        tensors[f'{path}:indices'] = np.flatnonzero(mask).astype(np.uint32)
    return tensors


def _read(file: Any, max_parameters: int) -> SparseNetwork:
    entries = dict(sorted((file.metadata() or {}).items()))
    shapes = {
        key.removesuffix(':shape'): _parse_shape(key, text)
        for key, text in entries.items()
        if key.endswith(':shape')
    }
    found = set(file.keys())
    wanted = {f'{path}:{part}' for path in shapes for part in ('values', 'indices')}
    wanted -= _needless_indices(file, found, shapes)
    if found != wanted:
        missing, extra = sorted(wanted - found), sorted(found - wanted)
        raise ValueError(f'by its shapes it lacks the tensors {missing} and has {extra} too many')
    parameters = sum(math.prod(max(axis, 1) for axis in shape) for shape in shapes.values())
    if parameters > max_parameters:
        raise ValueError(f'it has {parameters} parameters; max_parameters is {max_parameters}')

    dense = {
        path: _read_leaf(file, path, shape, f'{path}:indices' in found)
        for path, shape in shapes.items()
    }
    return SparseNetwork(
        params=nest_leaves((path, weights) for path, (weights, _) in dense.items()),
        masks=nest_leaves((path, mask) for path, (_, mask) in dense.items()),
        metadata={key: value for key, value in entries.items() if not key.endswith(':shape')},
    )


def _parse_shape(key: str, text: str) -> list[int]:
    # One pattern bounds the number of axes, as NumPy does, and their lengths before any parsing.
    if not _SHAPE.fullmatch(text):
        raise ValueError(f'{key!r} must be a list of at most 64 lengths, but is {text[:80]!r}')
    return json.loads(text)


def _needless_indices(file: Any, found: set[str], shapes: Mapping[str, list[int]]) -> set[str]:
    """Finds the indices that are not there and need not be, for the values are whole leaves."""
    return {
        f'{path}:indices'
        for path, shape in shapes.items()
        if f'{path}:indices' not in found
        and f'{path}:values' in found
        and file.get_slice(f'{path}:values').get_shape() == [math.prod(shape)]
    }


def _read_leaf(
    file: Any, path: str, shape: list[int], took_part: bool
) -> tuple[np.ndarray, np.ndarray]:
    values = _read_vector(file, f'{path}:values', 'F32')
    size = math.prod(shape)
    if not np.isfinite(values).all():
        raise ValueError(f'{path!r} has a value that is not finite')
    if not took_part:
        return values.reshape(shape), np.ones((), bool)
    indices = _read_vector(file, f'{path}:indices', 'U32')
    if len(values) != len(indices):
        raise ValueError(f'{path!r} has {len(values)} values, but {len(indices)} indices')
    if (indices[1:] <= indices[:-1]).any():
        raise ValueError(f'the indices of {path!r} do not ascend')
    if len(indices) and indices[-1] >= size:
        raise ValueError(f'{path!r} has the index {indices[-1]}, but {size} elements')
    if not shape and not len(indices):
        raise ValueError(f'{path!r} is a scalar that is not kept; scalars take no part in surgery')
    weights, mask = np.zeros(size, np.float32), np.zeros(size, bool)
    weights[indices] = values
    mask[indices] = True
    return weights.reshape(shape), mask.reshape(shape)


def _read_vector(file: Any, name: str, dtype: str) -> np.ndarray:
    entry = file.get_slice(name)  # reads nothing yet, so that a type NumPy lacks is no trouble
    kind = entry.get_dtype(), len(entry.get_shape())
    if kind != (dtype, 1):
        raise ValueError(f'{name!r} must be {dtype} of one axis, but is {kind[0]} of {kind[1]}')
    return file.get_tensor(name)
