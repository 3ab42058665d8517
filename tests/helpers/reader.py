"""What the fuzz tests must know of a reader of files or flags."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Reader(NamedTuple):
    """A reader and what it promises."""

    seeds: tuple[bytes, ...]  # valid inputs
    read: Callable[[bytes], None]  # asserts that what it accepts is sane
    errors: tuple[type[Exception], ...] = (ValueError,)  # as documented
    attacks: tuple[bytes, ...] = ()  # made to take memory or time; they must be refused
    words: tuple[bytes, ...] = ()  # how a line may begin, for those that are read by lines
    fixed: int = 4 * 2**20  # bytes of memory that any input may take,
    factor: int = 150  # and so many more for each of its own: Python's smallest objects


MakeReader = Callable[[Path], Reader]  # from a folder of its own, for the files that it reads


def write_new(path, content):
    """Writes a file anew: on some systems it takes milliseconds to cut an old one short."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def to_text(data: bytes) -> str:
    """Returns bytes as a command line has them: those that are no UTF-8 become surrogates."""
    return data.decode(errors='surrogateescape')


def check_array(array, most=10**8):
    """Asserts that an array is an ordinary one."""
    assert isinstance(array, np.ndarray)
    assert math.prod(array.shape) == array.size <= most
    assert array.dtype == bool or np.isfinite(array).all()
