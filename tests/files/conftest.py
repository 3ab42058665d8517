"""A file for the tests of a module to write over and over, and what Caffe's are read by."""

import pytest

from dns_jax.files.caffe import read_caffemodel


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    return tmp_path_factory.mktemp('files') / 'network'


@pytest.fixture
def read(tmp_path):
    def read_bytes(content, **limits):
        path = tmp_path / 'net.caffemodel'
        path.write_bytes(content)
        return read_caffemodel(path, **limits)

    return read_bytes
