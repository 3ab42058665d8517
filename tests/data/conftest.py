"""What the tests of data read, and a machine without a network."""

import socket

import pytest

from experiments.data import resident


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
