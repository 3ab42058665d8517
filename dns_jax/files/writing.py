"""Files: what may go into them, and how they are written whole or not at all."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np


def write_whole(path: Path, content: str | bytes) -> None:
    r"""Writes a file under a temporary name, then moves it to its own.

    Args:
      path: the file, in a folder that exists.
      content: all of it; text is encoded as UTF-8.

    Raises:
      OSError: if it cannot be written; what was there before is then as it was.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_whole(Path(folder, 'tiny.txt'), 'σ')
      ...     Path(folder, 'tiny.txt').read_bytes()
      b'\xcf\x83'
    """
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    try:
        with temporary.open('wb') as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # A full disk's error has no file name of its own.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


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

    Args:
      metadata: the free entries.

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
