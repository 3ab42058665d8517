"""Writes a pruned network as a file for others, and says how large it is.

python -m experiments.export --model=zoo/lenet5.safetensors --format=onnx

`coded` shares weights and tunes the shared values on the training images of a data set; every
other format is exact.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dns_jax.files.codec import SUFFIX
from dns_jax.files.export import save_dense, save_onnx, save_stablehlo
from dns_jax.files.sparse import save_sparse
from dns_jax.inference.chain import chain_to_json
from dns_jax.inference.runners import choose_kinds, jax_runner
from experiments.artefacts.caffe_names import CAFFE_NETWORKS, write_caffemodel
from experiments.artefacts.loading import Model, load_model
from experiments.config import command_line
from experiments.config.command_line import check_unread, flag, names_of
from experiments.plain.coding import CodingConfig, code
from experiments.reports.tables import table


@dataclasses.dataclass(frozen=True)
class ExportConfig(CodingConfig):
    """What `experiments.export` writes."""

    format: str = flag(
        'sparse',
        'dense and sparse are safetensors, coded is Deep Compression, caffemodel has the masks '
        'beside the weights, as the authors have them; sparse, onnx and stablehlo hold a chain '
        'as compaction leaves it, and any other network as it was trained.',
        choices=('dense', 'sparse', 'coded', 'caffemodel', 'onnx', 'stablehlo'),
    )
    output: str | None = flag(None, 'File that is written; by default one in runs/exports.')
    batch: int = flag(
        1,
        'Examples in a call, for which --format=sparse records how each layer of a chain is '
        'computed fastest.',
        lower_bound=1,
    )

    def __post_init__(self):
        super().__post_init__()
        unread = [] if self.format == 'coded' else names_of(ExportConfig, 'coding', 'tuning')
        check_unread(self, [*unread, *([] if self.format == 'sparse' else ['batch'])])
        if self.format == 'coded' and not (self.output or SUFFIX).endswith(SUFFIX):
            raise ValueError(f'--output={self.output} must end in {SUFFIX}, by which it is known')


def export(config: ExportConfig) -> dict[str, Any]:
    """Writes the file, and prints its size, for programs as JSON.

    Returns:
      `{model, format, path, bytes, dense_bytes, ratio}`, for `coded` also what `coding.code`
      returns. The ratio is to the file's own parameters in float32.

    Raises:
      ValueError: if the model cannot be read, or not be written in this format.
      OSError: if a file cannot be read or written.
      FloatingPointError: if tuning diverges.
    """
    model = load_model(config.model, to_run=config.format not in ('caffemodel', 'coded'))
    path = Path(config.output or f'runs/exports/{model.name}{_ENDINGS[config.format]}')
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = _FORMATS[config.format](config, model, path)
    dense_bytes = 4 * sum(leaf.size for leaf in jax.tree.leaves(model.params))
    result = {
        'model': config.model,
        'format': config.format,
        'path': str(path),
        'bytes': path.stat().st_size,
        'dense_bytes': dense_bytes,
        'ratio': dense_bytes / path.stat().st_size,
        **measured,
    }
    row = [config.format, f'{result["bytes"]:,}', f'{result["ratio"]:.1f}×']
    print(table(['format', 'bytes', 'float32 dense / it'], [row]))
    command_line.print_result(result)
    return result


def _write_dense(config: ExportConfig, model: Model, path: Path) -> dict[str, float]:
    save_dense(path, model.params, model.metadata)
    return {}


def _write_sparse(config: ExportConfig, model: Model, path: Path) -> dict[str, float]:
    """Compacts a chain, and records how this machine computes each layer fastest."""
    if not model.chain:
        if config.batch != ExportConfig.batch:
            raise ValueError(f'--batch={config.batch} has no meaning for {config.model}: no chain')
        save_sparse(path, model.params, model.masks, model.metadata)
        return {}
    small = model.compact()
    offered = ('dense', 'sparse', 'native')
    choice = choose_kinds(
        jax_runner, offered, small.chain, small.params, model.input_shape, config.batch
    )
    metadata = {
        **model.metadata,
        'chain': chain_to_json(small.chain),
        'input_shape': json.dumps(model.input_shape),
        'kinds': json.dumps(choice.kinds),
        'kinds_batch': str(config.batch),
    }
    metadata.pop('network', None)  # whose layers these no longer are
    masks = {
        name: {'kernel': weights['kernel'] != 0, 'bias': np.ones_like(weights['bias'], bool)}
        for name, weights in small.params.items()
    }
    save_sparse(path, small.params, masks, metadata)
    return {}


def _write_program(
    save: Callable[..., None], config: ExportConfig, model: Model, path: Path
) -> dict[str, float]:
    if model.chain:
        small = model.compact()
        save(path, small.chain, small.params, model.input_shape)
    else:
        model = model.apart()  # ONNX has no scan over layers
        save(path, model.apply, model.params, model.input_shape, dtype=model.dtype)
    return {}


def _write_caffemodel(config: ExportConfig, model: Model, path: Path) -> dict[str, float]:
    network = model.metadata.get('network', '')
    if network not in CAFFE_NETWORKS:
        raise ValueError(f'--format=caffemodel needs a network of {sorted(CAFFE_NETWORKS)}')
    write_caffemodel(path, network, model.params, model.masks)
    return {}


_FORMATS: dict[str, Callable[[ExportConfig, Model, Path], dict[str, float]]] = {
    'dense': _write_dense,
    'sparse': _write_sparse,
    'coded': code,
    'caffemodel': _write_caffemodel,
    'onnx': partial(_write_program, save_onnx),
    'stablehlo': partial(_write_program, save_stablehlo),
}
_ENDINGS = {
    'dense': '.dense.safetensors',
    'sparse': '.sparse.safetensors',
    'coded': SUFFIX,
    'caffemodel': '.caffemodel',
    'onnx': '.onnx',
    'stablehlo': '.stablehlo',
}

if __name__ == '__main__':
    command_line.launch({}, export, ExportConfig)
