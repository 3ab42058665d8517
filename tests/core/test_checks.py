"""Tests of the messages that say what is missing."""

import importlib
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from dns_jax.files import export, sharing
from dns_jax.inference.chain import Relu

PYPROJECT = Path(__file__).parents[2] / 'pyproject.toml'
KERNEL = {'fc': {'kernel': np.float32([[1], [2]])}}


def fresh(name):
    """Imports a module as if for the first time."""

    def load(monkeypatch, folder):
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.import_module(name)

    return load


@pytest.mark.parametrize(
    ('use', 'missing', 'extra'),
    [
        (fresh('dns_jax.files.sparse'), 'safetensors', 'sparse'),
        (fresh('dns_jax.files.export'), 'safetensors.numpy', 'sparse'),
        (fresh('dns_jax.files._entropy'), 'constriction', 'codec'),
        (fresh('dns_jax.inference.kernels'), 'scipy.sparse', 'runners'),
        (
            lambda *_: sharing.share_weights(KERNEL, {'fc': {'kernel': np.True_}}, 1),
            *('sklearn.cluster', 'codec'),
        ),
        (
            lambda _, folder: export.save_onnx(folder / 'x', (Relu(),), {}, (2,)),
            *('jax2onnx', 'onnx'),
        ),
        (
            lambda _, folder: export.save_stablehlo(folder / 'x', (Relu(),), {}, (2,)),
            *('jax._src.export.serialization', 'stablehlo'),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_what_is_missing_is_said_with_the_extra_that_has_it(
    use, missing, extra, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError) as caught:
        use(monkeypatch, tmp_path)
    assert str(caught.value) == (
        f'{missing} is missing, which comes with the extra {extra!r}: '
        f"pip install 'dynamic-network-surgery[{extra}]'"
    )
    project = tomllib.loads(PYPROJECT.read_text(encoding='utf-8'))['project']
    assert extra in project['optional-dependencies']
    assert not any(tmp_path.iterdir())
