"""What goes into files: weights that float32 holds, and metadata, in an order of its own."""

import json
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np


def check_float32(path: str, weights: np.ndarray) -> None:
    """Checks that a file can hold the kept weights of a leaf.

    Args:
      path: that of the leaf.
      weights: its kept weights, of any shape.

    Raises:
      TypeError: if they are not of a floating-point type that float32 can hold.
      ValueError: if one is not finite.

    Example:
      >>> import numpy as np
      >>> check_float32('fc1/bias', np.array([1.0, np.inf], np.float32))
      Traceback (most recent call last):
        ...
      ValueError: params['fc1/bias'] has a weight that is not finite
    """
    if not jnp.issubdtype(weights.dtype, jnp.floating) or weights.dtype.itemsize > 4:
        raise TypeError(f'params[{path!r}] must be floats that fit float32, not {weights.dtype}')
    if not np.isfinite(weights).all():
        raise ValueError(f'params[{path!r}] has a weight that is not finite')


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Checks that the metadata of a file are strings alone.

    Raises:
      TypeError: if a key or a value is no string.

    Example:
      >>> check_metadata({'seed': 0})
      Traceback (most recent call last):
        ...
      TypeError: metadata must map strings to strings, but has 'seed': 0
    """
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f'metadata must map strings to strings, but has {key!r}: {value!r}')


def sort_metadata(data: bytes) -> bytes:
    """Sorts the metadata, which safetensors writes in an order that changes from run to run.

    Example:
      >>> from safetensors.numpy import save
      >>> data = sort_metadata(save({}, {'b': '1', 'a': '2'}))
      >>> data[8:].rstrip()
      b'{"__metadata__":{"a":"2","b":"1"}}'
    """
    end = 8 + int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:end])
    header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, 'little') + text + data[end:]
