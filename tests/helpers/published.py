"""Folders of published data, which tests read and never write to."""

import os
import pathlib

import pytest

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'  # beside the repository


def list_all(folder):
    """What lies in a folder, and when it was written; a folder is when a file comes or goes."""
    paths = (folder, *folder.rglob('*'))
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}


def lend(variable, name):
    """Lends a folder to a fixture, and looks that nothing has been written to it since."""
    folder = pathlib.Path(os.environ.get(variable, SHARED / name))
    if not folder.is_dir():
        pytest.skip(f'no data: {folder} is not a folder; {variable} names another')
    before = list_all(folder)
    yield folder
    assert list_all(folder) == before
