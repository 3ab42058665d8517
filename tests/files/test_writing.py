"""Tests of files.writing: a file is written whole or not at all."""

import errno
import os

import jax.numpy as jnp
import pytest

from dns_jax.files.sparse import load_sparse, save_sparse

W, T = jnp.ones(2), jnp.ones(2, bool)


@pytest.mark.parametrize('exception', [OSError(errno.ENOSPC, 'full'), KeyboardInterrupt()])
@pytest.mark.parametrize('broken', ['fsync', 'replace'])
def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, broken, exception):
    path = tmp_path / 'network'
    save_sparse(path, W, T)
    before = path.read_bytes()

    def fail(*arguments):
        assert path.read_bytes() == before
        raise exception

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(type(exception)):
            save_sparse(path, jnp.zeros(9), jnp.ones(9, bool))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    save_sparse(path, jnp.zeros(9), jnp.ones(9, bool))
    assert load_sparse(path).params.shape == (9,)
    assert list(tmp_path.iterdir()) == [path]


def test_file_has_the_usual_permissions(tmp_path):
    save_sparse(tmp_path / 'network', W, T)
    (tmp_path / 'other').write_bytes(b'')
    assert (tmp_path / 'network').stat().st_mode == (tmp_path / 'other').stat().st_mode
