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

import numpy as np

from dns_jax.files.codec import SUFFIX, load_coded, save_coded
from dns_jax.files.export import save_dense, save_onnx, save_stablehlo
from dns_jax.files.sharing import expand, share_weights
from dns_jax.files.sparse import save_sparse
from dns_jax.inference.chain import chain_to_json
from dns_jax.inference.runners import choose_kinds, jax_runner
from experiments.artefacts.caffe_names import write_caffemodel
from experiments.artefacts.loading import Model, load_model
from experiments.artefacts.tuning import tune
from experiments.config import command_line
from experiments.config.command_line import check_finite, flag, names_of
from experiments.config.parsers import parse_table
from experiments.data import resident
from experiments.networks import models
from experiments.reports.tables import table
from experiments.training.steps import make_error


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What `experiments.export` writes."""

    model: str = flag('zoo/lenet5.safetensors', 'File of a pruned network.')
    format: str = flag(
        'sparse',
        'dense and sparse are safetensors, coded is Deep Compression, caffemodel has the masks '
        'beside the weights, as the authors have them; sparse, onnx and stablehlo hold the network '
        'as compaction leaves it.',
        choices=('dense', 'sparse', 'coded', 'caffemodel', 'onnx', 'stablehlo'),
    )
    output: str | None = flag(None, 'File that is written; by default one in runs/exports.')
    batch: int = flag(
        1,
        'Examples in a call, for which --format=sparse records how each layer is computed fastest.',
        lower_bound=1,
    )

    clusters: str = flag(
        '16',
        'With --format=coded: values that the weights of a layer share, as LAYER:NUMBER,…',
        part='coding',
    )
    tuned: str = flag(
        'weights',
        'What is tuned with --format=coded: codebooks tunes the shared values alone; weights tunes '
        'the weights as well, each of which takes the nearest shared value.',
        choices=('codebooks', 'weights'),
        part='tuning',
    )
    finetuning_steps: int = flag(
        1_500, 'Steps of tuning; 0 leaves tuning out.', lower_bound=0, part='coding'
    )
    learning_rate: float = flag(
        5e-4,
        "Adam's learning rate at the start, from which it falls to 0.",
        lower_bound=0.0,
        part='tuning',
    )
    batch_size: int = flag(64, 'Images per step of tuning.', lower_bound=1, part='tuning')
    seed: int = flag(0, 'Seeds the order of the images in tuning.', lower_bound=0, part='tuning')
    dataset: str = flag('mnist', 'Data set to tune on.', choices=resident.DATASETS, part='coding')
    data_dir: str | None = flag(None, resident.DATA_DIR_HELP, part='coding')
    manual_dir: str | None = flag(None, resident.MANUAL_DIR_HELP, part='coding')
    train_on_all: bool = flag(False, 'Tune on the validation images too.', part='tuning')

    def __post_init__(self):
        unread = [] if self.format == 'coded' else names_of(ExportConfig, 'coding', 'tuning')
        unread += [] if self.format == 'sparse' else ['batch']
        unread += [] if self.finetuning_steps else names_of(ExportConfig, 'tuning')
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in unread and value != field.default:
                raise ValueError(f'--{field.name}={value} has no meaning beside the other flags')
        if self.format == 'coded' and not (self.output or SUFFIX).endswith(SUFFIX):
            raise ValueError(f'--output={self.output} must end in {SUFFIX}, by which it is known')
        check_finite(self)
        self.parse_clusters()

    def parse_clusters(self) -> dict[str, int]:
        """Returns how many values each layer may have, by patterns."""
        try:
            return parse_table(self.clusters, int)
        except ValueError as error:
            raise ValueError(f'--clusters: {error}') from error


def export(config: ExportConfig) -> dict[str, Any]:
    """Writes the file, and prints its size, for programs as JSON.

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
    command_line.print_result(result)
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
        shared = tune(network, model.params, shared, dataset.train, **options)
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
    'coded': SUFFIX,
    'caffemodel': '.caffemodel',
    'onnx': '.onnx',
    'stablehlo': '.stablehlo',
}

if __name__ == '__main__':
    command_line.launch({}, export, ExportConfig)
