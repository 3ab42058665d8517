"""Writes a pruned network as a file for others, and says how large it is.

python -m experiments.export --model=zoo/lenet5.safetensors --format=onnx

`coded` shares weights and tunes the shared values on the training images of a data set; every
other format is exact.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dns_jax.files.codec import load_coded, save_coded
from dns_jax.files.export import save_dense, save_onnx, save_stablehlo
from dns_jax.files.sharing import expand, share_weights
from dns_jax.files.sparse import save_sparse
from dns_jax.inference.chain import chain_to_json
from dns_jax.inference.runners import choose_kinds, jax_runner
from experiments.artefacts.loading import Model, load_model
from experiments.artefacts.tuning import finetune
from experiments.config import command_line
from experiments.data import resident
from experiments.networks import models
from experiments.reports.tables import table
from experiments.tool_flags import CODED, ExportConfig
from experiments.training.references import write_caffemodel
from experiments.training.steps import make_error


def export(config: ExportConfig) -> dict[str, Any]:
    """Writes the file, and prints its size, and as the last line the same as JSON.

    Args:
      config: which network and what format.

    Returns:
      `{model, format, path, bytes, dense_bytes, ratio}`, for `coded` also the errors in percent
      before and after, on test and, unless these are trained on, validation images.

    Raises:
      ValueError: if the model cannot be read, or not be written in this format.
      OSError: if a file cannot be read or written.
      FloatingPointError: if tuning diverges.
    """
    model = load_model(config.model, to_run=config.format != 'caffemodel')
    path = Path(config.output or f'runs/exports/{model.name}{_ENDINGS[config.format]}')
    path.parent.mkdir(parents=True, exist_ok=True)
    errors = _FORMATS[config.format](config, model, path)
    dense_bytes = 4 * sum(leaf.size for layer in model.params.values() for leaf in layer.values())
    result = {
        'model': config.model,
        'format': config.format,
        'path': str(path),
        'bytes': path.stat().st_size,
        'dense_bytes': dense_bytes,
        'ratio': dense_bytes / path.stat().st_size,
        **errors,
    }
    row = [config.format, f'{result["bytes"]:,}', f'{result["ratio"]:.1f}×']
    print(table(['format', 'bytes', 'float32 dense / it'], [row]))
    print(json.dumps(result))
    return result


def _write_dense(config: ExportConfig, model: Model, path: Path) -> dict[str, float]:
    save_dense(path, model.params, model.metadata)
    return {}


def _write_sparse(config: ExportConfig, model: Model, path: Path) -> dict[str, float]:
    """Compacts the network, and records how this machine computes each layer fastest."""
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


def _write_compact(
    save: Callable[..., None], config: ExportConfig, model: Model, path: Path
) -> dict[str, float]:
    small = model.compact()
    save(path, small.chain, small.params, model.input_shape)
    return {}


def _write_coded(config: ExportConfig, model: Model, path: Path) -> dict[str, float]:
    """Shares weights, tunes what they share, and measures what was written, read back."""
    if model.metadata.get('network') not in models.CHAINS:
        raise ValueError(f'--format=coded needs a network of {sorted(models.CHAINS)}')
    network = models.NETWORKS[model.metadata['network']]()
    dataset = resident.load(config.dataset, config.data_dir, config.manual_dir, config.train_on_all)
    shared = share_weights(model.params, model.masks, config.parse_clusters(), model.metadata)
    options = {
        'tuned': config.tuned,
        'steps': config.finetuning_steps,
        'batch_size': config.batch_size,
        'learning_rate': config.learning_rate,
        'seed': config.seed,
    }
    if config.finetuning_steps:
        shared = finetune(network, model.params, shared, dataset.train, **options)
    save_coded(path, shared)
    error, written = make_error(network, models.MNIST_INPUT), expand(*load_coded(path)[:3])
    splits = {'': dataset.test}
    if not config.train_on_all:
        splits['validation_'] = dataset.validation
    return {
        f'{prefix}{name}': error(params, split)
        for prefix, split in splits.items()
        for name, params in (('error_before', model.params), ('error', written))
    }


def _write_caffemodel(config: ExportConfig, model: Model, path: Path) -> dict[str, float]:
    network = model.metadata.get('network', '')
    if network not in models.NETWORKS:
        raise ValueError(f'--format=caffemodel needs a network of {sorted(models.NETWORKS)}')
    write_caffemodel(path, network, model.params, model.masks)
    return {}


_FORMATS: dict[str, Callable[[ExportConfig, Model, Path], dict[str, float]]] = {
    'dense': _write_dense,
    'sparse': _write_sparse,
    'coded': _write_coded,
    'caffemodel': _write_caffemodel,
    'onnx': partial(_write_compact, save_onnx),
    'stablehlo': partial(_write_compact, save_stablehlo),
}
_ENDINGS = {
    'dense': '.dense.safetensors',
    'sparse': '.sparse.safetensors',
    'coded': CODED,
    'caffemodel': '.caffemodel',
    'onnx': '.onnx',
    'stablehlo': '.stablehlo',
}

if __name__ == '__main__':
    command_line.launch({}, export, ExportConfig)
