"""What the tests of Caffe's files read by."""

import pytest

from dns_jax.files.caffe import read_caffemodel


@pytest.fixture
def read(tmp_path):
    def read_bytes(content, **limits):
        path = tmp_path / 'net.caffemodel'
        path.write_bytes(content)
        return read_caffemodel(path, **limits)

    return read_bytes
