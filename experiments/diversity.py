"""Diversity networks: which units to remove from a dense network, and whether to fuse them.

python -m experiments.diversity --seeds=3

Networks with two hidden layers of 500 units, one for each seed, are pruned to fewer units without
training them again: by a k-DPP, at random, or by importance, each with and without fusing.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

import dns_jax
from dns_jax.files.writing import write_whole
from experiments.baselines import divnet, units
from experiments.config import command_line
from experiments.config.command_line import check_finite, flag
from experiments.data import resident
from experiments.networks.models import MNIST_INPUT
from experiments.reports.tables import middle_and_range, table, to_csv
from experiments.training.plain import train_network
from experiments.training.steps import make_error

_HIDDEN = ('fc1', 'fc2')
_UNITS = 500
_CHOICES = ('k-DPP', 'importance', 'at random')
METHODS = (*_CHOICES, *(f'{choice}, fused' for choice in _CHOICES))


@dataclasses.dataclass(frozen=True)
class DiversityConfig:
    """What `experiments.diversity` does."""

    workdir: str = flag('runs/diversity', 'Folder that the result is written to.')
    dataset: str = flag('mnist', 'Data set.', choices=resident.DATASETS)
    data_dir: str | None = flag(None, resident.DATA_DIR_HELP)
    manual_dir: str | None = flag(None, resident.MANUAL_DIR_HELP)
    seeds: int = flag(3, 'Networks, one for each seed.', lower_bound=1)
    steps: int = flag(20_000, 'Steps of training.', lower_bound=1)
    batch_size: int = flag(64, 'Images per step.', lower_bound=1)
    learning_rate: float = flag(0.1, 'Learning rate at the start, from which it falls to 0.')
    kept: str = flag('10,25,50,100,200,300,400', 'Units that each hidden layer keeps.')
    points: int = flag(5_000, 'Training images whose activations are compared.', lower_bound=1)

    def __post_init__(self):
        check_finite(self)
        self.parse_kept()

    def parse_kept(self) -> list[int]:
        """Returns the numbers of units."""
        texts = self.kept.split(',')
        if not all(text.isdecimal() and 1 <= int(text) <= _UNITS for text in texts):
            raise ValueError(f'--kept={self.kept} must be numbers from 1 to {_UNITS}, with commas')
        return [int(text) for text in texts]


class SigmoidNetwork(nn.Module):
    """Two hidden layers of sigmoid units, 500 each as Mariet and Sra have them."""

    units: int = _UNITS

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (batch, 28, 28, 1) to logits (batch, 10)."""
        hidden = images.reshape(images.shape[0], -1)
        for name in _HIDDEN:
            hidden = nn.sigmoid(nn.Dense(self.units, name=name)(hidden))
        return nn.Dense(10, name='fc3')(hidden)


def compare(config: DiversityConfig) -> list[dict[str, Any]]:
    """Trains and prunes all networks, writes `diversity.csv` and `.md`, and prints the table.

    Returns:
      A row for each network, number of units and method.

    Raises:
      ValueError, RuntimeError: if data are damaged, or not to be had.
      OSError: if a file cannot be read or written.
    """
    folder = Path(config.workdir)
    folder.mkdir(parents=True, exist_ok=True)  # before the work, lest it be lost
    dataset = resident.load(config.dataset, config.data_dir, config.manual_dir)
    rows = []
    for seed in range(config.seeds):
        params = train_dense(config, dataset.train, seed)
        rows += prune_network(config, dataset, params, seed)
    rows.sort(key=lambda row: row['kept'])
    text = to_table(rows)
    write_whole(folder / 'diversity.csv', to_csv(rows))
    write_whole(folder / 'diversity.md', text + '\n')
    print(text)
    print(f'\nTable: {folder}')
    command_line.print_result(rows)
    return rows


def train_dense(config: DiversityConfig, split: resident.Split, seed: int) -> dns_jax.Params:
    """Trains a dense network by SGD with momentum, and gives its weights as NumPy arrays."""
    network = SigmoidNetwork()
    rate = dns_jax.caffe_poly(config.learning_rate, 1.0, config.steps)
    solver = dns_jax.caffe_sgd(rate, weight_decay=0.0)
    return train_network(
        network,
        network.init(jax.random.key(seed), np.zeros((1, 28, 28, 1), np.float32))['params'],
        optax.chain(dns_jax.surgery({}, jax.random.key(0)), solver),
        split,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=seed,
        title=f'seed {seed}',
    )


def prune_network(
    config: DiversityConfig, dataset: resident.Dataset, params: dns_jax.Params, seed: int
) -> list[dict[str, Any]]:
    """Prunes a network in every way, layer by layer from the inputs, and measures its error."""
    points = dataset.train.images[: config.points].reshape(-1, 784) * np.float64(MNIST_INPUT.scale)
    reference = _error(params, dataset.test)
    rows = []
    for kept, method, fused in itertools.product(config.parse_kept(), _CHOICES, (False, True)):
        generator = np.random.default_rng([seed, kept])
        smaller = params
        for number, layer in enumerate(_HIDDEN, 1):
            # Of the network as it is so far: what is lost before a layer, fusing behind it sees.
            activations = _activations(smaller, points, number)
            reader = f'fc{number + 1}'
            if method == 'k-DPP':
                chosen = divnet.choose_diverse(activations, kept, generator)
            elif method == 'importance':
                chosen = units.choose_by_importance(smaller[reader]['kernel'], kept)
            else:
                chosen = units.choose_at_random(_UNITS, kept, generator)
            smaller = divnet.prune(smaller, layer, reader, chosen, activations if fused else None)
        rows.append(
            {
                'method': f'{method}, fused' if fused else method,
                'kept': kept,
                'seed': seed,
                'reference_error': reference,
                'test_error': _error(smaller, dataset.test),
            }
        )
    return rows


def to_table(rows: Sequence[dict[str, Any]]) -> str:
    """Writes the errors as Markdown: a line for each number of units, medians and ranges."""
    lines = []
    for kept, of_kept in itertools.groupby(rows, key=lambda row: row['kept']):
        by_method: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
        for row in of_kept:
            by_method[row['method']].append(row)
        cells = [middle_and_range(own, 'test_error', '.2f', ' %') for own in by_method.values()]
        lines.append((f'{kept:g}', *cells))
    dense = middle_and_range(rows, 'reference_error', '.2f', ' %')
    return table(('units', *METHODS), [*lines, (f'{_UNITS}, dense', *[dense] * len(METHODS))])


def _activations(params: dns_jax.Params, points: np.ndarray, layers: int) -> np.ndarray:
    """Computes the sigmoids behind some layers, float64."""
    hidden = points
    for name in _HIDDEN[:layers]:
        sums = hidden @ params[name]['kernel'] + params[name]['bias']
        hidden = 1 / (1 + np.exp(-sums))
    return hidden


def _error(params: dns_jax.Params, split: resident.Split) -> float:
    network = SigmoidNetwork(len(params['fc1']['bias']))
    return make_error(network, MNIST_INPUT)(params, split)


if __name__ == '__main__':
    command_line.launch({}, compare, DiversityConfig)
