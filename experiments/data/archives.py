"""The archives that image sets are published in, read whole or refused.

A damaged archive is a `ValueError` that names it, and takes no more memory than a sound one would.
"""

import contextlib
import gzip
import math
import os
import pathlib
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

_CIFAR10_ROW = 3_073  # One byte for the label, then 1,024 each of red, green and blue.
_MOST_BYTES = 2**26  # Of an array in an archive: the largest, MNIST's images, have 47 million.
_MOST_HEADER = 2**13  # Bytes of what stands before a member of a tar: a path has fewer.
# What a damaged archive makes the standard library raise.
_DAMAGE_ERRORS = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError)


def read_idx(path: os.PathLike[str]) -> np.ndarray:
    """Reads a gzipped IDX file of bytes: 0, 0, 8, the rank, the shape as >i4, then the values.

    Returns:
      The array, uint8, of one axis or three.

    Raises:
      ValueError: it is damaged, not such a file or too large.
    """
    try:
        with gzip.open(path) as file:
            magic = file.read(4)
            if magic not in (b'\0\0\x08\x01', b'\0\0\x08\x03'):
                raise ValueError(f'it begins with {magic!r}, wanted 1 or 3 axes of bytes')
            shape = np.frombuffer(file.read(4 * magic[3]), '>u4').tolist()
            size = math.prod(shape)
            if size > _MOST_BYTES:
                raise ValueError(f'its shape is {shape}, which is over {_MOST_BYTES:,} bytes')
            content = file.read(size + 1)  # No more, for what is packed may be without bound.
        return np.frombuffer(content, np.uint8).reshape(shape)
    except (ValueError, *_DAMAGE_ERRORS) as error:
        raise ValueError(f'{os.fspath(path)} is damaged: {error}') from error


def read_cifar10(
    path: str | os.PathLike[str], files: Any
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Reads CIFAR-10 in its binary form, a gzipped tar.

    Args:
      path: the archive.
      files: what TFDS knows of it, the names of its members.

    Returns:
      The names of the classes, and of both splits the rows: a label and an image each, uint8.

    Raises:
      ValueError: it is damaged or not such a file.
    """
    wanted = {*files.label_files, *files.train_files, *files.test_files}
    contents = {}
    with _open_tar(path, 'r:gz') as archive:
        for member in archive:
            name = os.path.basename(member.name)
            _check_member(member, _MOST_BYTES)
            if member.isfile() and name in wanted:
                contents[name] = archive.extractfile(member).read()  # pyright: ignore
    if missing := sorted(wanted - contents.keys()):
        raise ValueError(f'{path} lacks {missing}')
    names = contents[files.label_files[0]].decode(errors='replace').split()
    parts = []
    for split in (files.train_files, files.test_files):
        content = b''.join(contents[file] for file in split)
        if len(content) % _CIFAR10_ROW or any(label > 9 for label in content[::_CIFAR10_ROW]):
            raise ValueError(f'{path} holds no whole images with labels from 0 to 9')
        parts.append(np.frombuffer(content, np.uint8).reshape(-1, _CIFAR10_ROW))
    if len(set(names)) != 10:
        raise ValueError(f'{path} names the classes {str(names)[:80]}, wanted ten')
    return names, *parts


class _Member(tarfile.TarInfo):
    """A header; one that would make the standard library read without an end is refused."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        # The bytes of a file are left where they are; those of a long name are read at once.
        _check_member(member, None if member.isfile() else _MOST_HEADER)
        return member


def _check_member(member: tarfile.TarInfo, most: int | None = None) -> None:
    if member.issparse() or member.type == tarfile.GNUTYPE_SPARSE:
        raise tarfile.ReadError(f'{member.name[:80]!r} has holes, wanted a plain file')
    if member.size < 0 or (most is not None and member.size > most):
        raise tarfile.ReadError(f'{member.name[:80]!r} has {member.size} bytes')


@contextlib.contextmanager
def _open_tar(path: str | os.PathLike[str], mode: Any = 'r:') -> Iterator[tarfile.TarFile]:
    """Opens a tar, and names it in the errors of the standard library."""
    try:
        with tarfile.open(path, mode, tarinfo=_Member) as archive:
            yield archive
    except _DAMAGE_ERRORS as error:
        raise ValueError(f'{path} is cut short or no tar archive: {error}') from error


def list_files(path: pathlib.Path) -> list[str]:
    """Lists the files in a tar.

    Raises:
      ValueError: it is damaged or no tar.
    """
    with _open_tar(path) as archive:
        return [name for name, _ in _iterate_files(archive)]


def iterate_images(path: pathlib.Path, labels: dict[str, str]) -> Iterator[tuple[str, bytes, str]]:
    """Reads ImageNet's validation images one by one.

    Yields:
      Name, bytes and class.

    Raises:
      ValueError: it is damaged or no tar.
    """
    with _open_tar(path) as archive:
        for name, file in _iterate_files(archive):
            yield name, file.read(), labels[name]


def iterate_classes(path: pathlib.Path) -> Iterator[tuple[str, bytes, str]]:
    """Reads ImageNet's training images one by one.

    Yields:
      Name, bytes and class.

    Raises:
      ValueError: one of them is damaged or no tar.
    """
    with _open_tar(path) as archive:
        for class_name, class_file in _iterate_files(archive):
            try:
                # Read where it lies: in memory it would take 150 MB.
                with tarfile.open(fileobj=class_file, mode='r:', tarinfo=_Member) as images:
                    for name, file in _iterate_files(images):
                        yield name, file.read(), class_name.removesuffix('.tar')
            except _DAMAGE_ERRORS as error:
                raise ValueError(f'{path}: {class_name} is damaged: {error}') from error


def _iterate_files(archive: tarfile.TarFile) -> Iterator[tuple[str, Any]]:
    file: Any = archive.fileobj
    end = file.seek(0, os.SEEK_END)
    for member in archive:
        _check_member(member, end - member.offset_data)  # Lest memory is taken for what is not.
        if member.isfile():
            yield member.name, archive.extractfile(member)
