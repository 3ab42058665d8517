"""What the tests of data read, and a machine without a network."""

import hashlib
import socket

import archives
import pytest
from published import lend
from tensorflow_datasets.core.download import checksums

from experiments.data import resident


@pytest.fixture(scope='session')
def mnist_files():
    """The folder with the four files of MNIST, as they are published."""
    yield from lend('DNS_JAX_MNIST', 'mnist')


@pytest.fixture(scope='session')
def text_files():
    """The folder with the file of tiny Shakespeare, as it is published."""
    yield from lend('DNS_JAX_TEXT', 'text')


@pytest.fixture(scope='session')
def prepared_sets():
    """A data_dir with cifar10_part in it, which is only read."""
    yield from lend('DNS_JAX_TFDS', 'tfds')


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A small archive whose checksum stands in for that of the published one."""
    path, arrays = archives.make_cifar10_archive(tmp_path / 'manual', train_per_batch=3, test=4)
    content = path.read_bytes()
    url = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
    known = checksums.UrlInfo(len(content), hashlib.sha256(content).hexdigest(), path.name)
    monkeypatch.setattr(checksums, 'get_all_url_infos', lambda: {url: known})
    return path, arrays


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory):
    """A data_dir with `digits` prepared and cached; to be copied before it is changed."""
    folder = tmp_path_factory.mktemp('digits')
    resident.load('digits', folder)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Lets no host name be found; lists the waits between the attempts, which it skips."""
    waits = []

    def refuse(*args, **kwargs):
        raise socket.gaierror('no network in this test')

    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr('urllib3.util.retry.Retry.sleep', lambda *args: waits.append(args))
    return waits
