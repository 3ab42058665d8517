"""Low-rank factors of a trained LeNet, tuned, and with surgery on the factors.

python -m experiments.low_rank --network=lenet5

The dense network of each seed is factorised to several sizes by truncated singular value
decompositions (Tai et al. 2016), and trained on; then the same again while surgery prunes the
factors.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax.core import FrozenDict

import dns_jax
from dns_jax.files.writing import write_whole
from dns_jax.layers import named_leaves
from experiments.baselines.low_rank import choose_ranks
from experiments.baselines.low_rank_layers import factorise
from experiments.config import command_line
from experiments.config.command_line import check_finite, flag
from experiments.data import resident
from experiments.networks.models import MNIST_INPUT, LeNet5, LeNet300
from experiments.reports.tables import middle_and_range, table, to_csv
from experiments.training.plain import train_network
from experiments.training.steps import make_error

_NETWORKS: dict[str, Any] = {'lenet300': LeNet300, 'lenet5': LeNet5}


@dataclasses.dataclass(frozen=True)
class LowRankConfig:
    """What `experiments.low_rank` does."""

    workdir: str = flag('runs/low_rank', 'Folder that the result is written to.')
    network: str = flag('lenet300', 'Network.', choices=tuple(_NETWORKS))
    dataset: str = flag('mnist', 'Data set.', choices=resident.DATASETS)
    data_dir: str | None = flag(None, resident.DATA_DIR_HELP)
    manual_dir: str | None = flag(None, resident.MANUAL_DIR_HELP)
    train_on_all: bool = flag(False, 'Train on the validation images too (a final run).')
    seeds: int = flag(3, 'Dense networks, one for each seed.', lower_bound=1)
    sizes: str = flag('2,4,8,16', 'How many times fewer parameters the factors have.')
    compressions: str = flag(
        '',
        'How many times fewer parameters surgery keeps of the factors, one for each of --sizes; by '
        'default factors are not pruned.',
    )
    steps: int = flag(20_000, 'Steps of dense training.', lower_bound=1)
    tuning_steps: int = flag(20_000, 'Steps after factorising.', lower_bound=2)
    batch_size: int = flag(64, 'Images per step.', lower_bound=1)
    learning_rate: float = flag(
        0.05, 'Learning rate of dense training at its start, from which it falls to 0.'
    )
    tuning_rate: float = flag(0.05, 'Learning rate after factorising, from which it falls to 0.')
    weight_decay: float = flag(5e-4, 'Weight decay, in both trainings.', lower_bound=0.0)

    def __post_init__(self):
        check_finite(self)
        self.pairs()

    def pairs(self) -> list[tuple[float, float | None]]:
        """Returns each size of factors, with the compression that surgery is to reach, if any."""
        sizes, compressions = (
            [_number(name, text) for text in getattr(self, name).split(',') if text]
            for name in ('sizes', 'compressions')
        )
        if compressions and len(compressions) != len(sizes):
            raise ValueError(
                f'--compressions={self.compressions} must be as many as --sizes={self.sizes}'
            )
        if any(size >= more for size, more in zip(sizes, compressions, strict=False)):
            raise ValueError(
                f'--compressions={self.compressions} must each be above its --sizes={self.sizes}'
            )
        return [*((size, None) for size in sizes), *zip(sizes, compressions, strict=False)]


def compare(config: LowRankConfig) -> list[dict[str, Any]]:
    """Does all networks, writes `low_rank.csv` and `.md`, and prints the table.

    Returns:
      A row for each size and seed.

    Raises:
      ValueError, RuntimeError: if a size is out of reach, or data are damaged or not to be had.
      OSError: if a file cannot be read or written.
    """
    folder = Path(config.workdir)
    folder.mkdir(parents=True, exist_ok=True)  # before the work, lest it be lost
    dataset = resident.load(config.dataset, config.data_dir, config.manual_dir, config.train_on_all)
    rows = []
    for seed in range(config.seeds):
        dense = _train_dense(config, dataset.train, seed)
        rows += [
            _row(config, dataset, dense, seed, size, compression)
            for size, compression in config.pairs()
        ]
    text = to_table(rows)
    write_whole(folder / 'low_rank.csv', to_csv(rows))
    write_whole(folder / 'low_rank.md', text + '\n')
    print(text)
    print(f'\nTable: {folder}')
    command_line.print_result(rows)
    return rows


def to_table(rows: list[dict[str, Any]]) -> str:
    """Writes sizes and errors as Markdown, medians and ranges over seeds."""
    lines = []
    for key in dict.fromkeys((row['size'], row.get('compression')) for row in rows):
        own = [row for row in rows if (row['size'], row.get('compression')) == key]
        name = f'factors, {key[0]:g}×' + (f', surgery to {key[1]:g}×' if key[1] else '')
        cells = [
            middle_and_range(own, column, form, unit)
            for column, form, unit in (
                ('kept', ',.0f', ''),
                ('reference_error', '.2f', ' %'),
                ('untuned_error', '.2f', ' %'),
                ('test_error', '.2f', ' %'),
            )
        ]
        lines.append((name, own[0]['ranks'], *cells))
    header = 'network', 'ranks', 'parameters', 'dense', 'factorised', 'after training'
    return table(header, lines)


def _row(config, dataset, dense, seed, size, compression) -> dict[str, Any]:
    """Factorises a network, trains it on, and measures it."""
    whole = sum(leaf.size for leaf in jax.tree.leaves(dense))
    ranks = choose_ranks(dense, math.floor(whole / size), list(dense))
    factors = factorise(dense, ranks)
    optimizer = _solver(config, config.tuning_rate, config.tuning_steps)
    pruner = dns_jax.surgery({}, jax.random.key(0))
    if compression:
        # Three quarters of the steps, as of runs that prune and then fine-tune.
        density = _density_of_kernels(factors, math.floor(whole / compression))
        pruner = dns_jax.prune_to(density=density, steps=3 * config.tuning_steps // 4)
    tuned = train_network(
        _NETWORKS[config.network](FrozenDict(ranks)),
        factors,
        optax.chain(pruner, optimizer),
        dataset.train,
        steps=config.tuning_steps,
        batch_size=config.batch_size,
        seed=config.seeds + seed,  # other batches than before
        title=f'{size:g}×, seed {seed}',
    )
    return {
        'network': config.network,
        'size': size,
        'compression': compression,
        'seed': seed,
        'ranks': ' '.join('whole' if rank is None else f'{rank}' for rank in ranks.values()),
        'kept': sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(tuned)),
        'reference_error': _error(config, {}, dense, dataset),
        'untuned_error': _error(config, ranks, factors, dataset),
        'test_error': _error(config, ranks, tuned, dataset),
    }


def _train_dense(config: LowRankConfig, split: resident.Split, seed: int) -> dns_jax.Params:
    network = _NETWORKS[config.network]()
    images = np.zeros((1, 28, 28, 1), np.float32)
    return train_network(
        network,
        network.init(jax.random.key(seed), images)['params'],
        optax.chain(
            dns_jax.surgery({}, jax.random.key(0)),
            _solver(config, config.learning_rate, config.steps),
        ),
        split,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=seed,
        title=f'dense, seed {seed}',
    )


def _solver(config: LowRankConfig, rate: float, steps: int) -> optax.GradientTransformation:
    schedule = dns_jax.caffe_poly(rate, 1.0, steps)
    return dns_jax.caffe_sgd(schedule, weight_decay=config.weight_decay)


def _density_of_kernels(params: dns_jax.Params, kept: int) -> float:
    """Says what share of the kernels is to be kept, so that the network keeps so many in all."""
    leaves = named_leaves(params)
    kernels = sum(leaf.size for path, leaf in leaves if dns_jax.is_kernel(path, leaf))
    others = sum(leaf.size for _, leaf in leaves) - kernels
    return (kept - others) / kernels


def _error(
    config: LowRankConfig,
    ranks: Mapping[str, int | None],
    params: dns_jax.Params,
    dataset: resident.Dataset,
) -> float:
    network = _NETWORKS[config.network](FrozenDict(ranks))
    return make_error(network, MNIST_INPUT)(params, dataset.test)


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 1 <= number < math.inf:
        raise ValueError(f'--{name} must be finite numbers from 1, with commas, but has {text!r}')
    return number


if __name__ == '__main__':
    command_line.launch({}, compare, LowRankConfig)
