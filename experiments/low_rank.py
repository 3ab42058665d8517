"""Low-rank factors of a trained LeNet, tuned, and with surgery on the factors.

python -m experiments.low_rank --network=lenet5

The dense network of each seed is factorised to several sizes by truncated singular value
decompositions (Tai et al. 2016), and trained on, some of them while surgery prunes the factors.
Each network that this gives is kept as a sparse file, which names its ranks.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from flax.core import FrozenDict

import dns_jax
from dns_jax.files.sparse import save_sparse
from dns_jax.layers import named_leaves
from experiments.baselines.low_rank_layers import factorise
from experiments.baselines.ranks import choose_ranks, count_fewest
from experiments.config import command_line
from experiments.config.command_line import flag
from experiments.config.parsers import check_distinct, parse_numbers
from experiments.data import resident
from experiments.networks import models
from experiments.networks.models import MNIST_INPUT, LeNet5, LeNet300
from experiments.plain.training import PlainConfig, compare_seeds, measure_errors, train_network
from experiments.reports.tables import group_rows, middle_and_range, table
from experiments.training.steps import make_measure

_NETWORKS: dict[str, Any] = {'lenet300': LeNet300, 'lenet5': LeNet5}

# Of the table: their names, formats and units.
_COLUMNS = (
    ('kept', ',.0f'),
    ('reference_error', '.2f', ' %'),
    ('untuned_error', '.2f', ' %'),
    ('test_error', '.2f', ' %'),
)


@dataclasses.dataclass(frozen=True)
class LowRankConfig(PlainConfig):
    """What `experiments.low_rank` does."""

    workdir: str = flag('runs/low_rank', 'Folder that the result is written to.')
    network: str = flag('lenet300', 'Network.', choices=tuple(_NETWORKS))
    sizes: str = flag(
        '1,2,4,8,16',
        'How many times fewer parameters than the dense network the factors have, and after a '
        'colon surgery keeps, as 2,8,2:20; 1 is the dense network, trained as long.',
    )
    tuning_steps: int = flag(20_000, 'Steps after factorising.', lower_bound=2)
    tuning_rate: float = flag(0.05, 'Learning rate after factorising, from which it falls to 0.')

    def __post_init__(self):
        super().__post_init__()
        shapes = models.shapes(_NETWORKS[self.network](), MNIST_INPUT.image_shape)
        leaves = jax.tree.leaves(shapes)
        whole = sum(leaf.size for leaf in leaves)
        smallest = whole / count_fewest(shapes, list(shapes))
        fewest = whole / (1 + sum(leaf.size for leaf in leaves if leaf.ndim == 1))  # beside biases
        for size, compression in self.pairs():
            if size > smallest:
                raise ValueError(
                    f'--sizes={self.sizes} must be up to {smallest:.4g}, which factors of rank 1 '
                    f'have, but has {size:g}'
                )
            if compression and not size < compression <= fewest:
                raise ValueError(
                    f'--sizes={self.sizes} must have behind {size:g} more than it and up to '
                    f'{fewest:.4g}, for surgery to prune and to keep some, but has {compression:g}'
                )

    def pairs(self) -> list[tuple[float, float | None]]:
        """Returns each size, with the compression that surgery is to reach, if any."""
        pairs: list[tuple[float, float | None]] = []
        for entry in self.sizes.split(','):
            size, *compressions = parse_numbers('sizes', entry.replace(':', ',', 1), 1)
            pairs.append((size, compressions[0] if compressions else None))
        check_distinct('sizes', self.sizes.split(','))
        return pairs


def compare(config: LowRankConfig) -> list[dict[str, Any]]:
    """Does all networks, writes them, `low_rank.csv` and `.md`, and prints the table.

    Returns:
      A row for each size and seed.

    Raises:
      As `plain.compare_seeds` does.
    """
    return compare_seeds(config, 'low_rank', _measure, to_table)


def to_table(rows: list[dict[str, Any]]) -> str:
    """Writes sizes and errors as Markdown, medians and ranges over seeds."""
    lines = []
    for (size, compression), own in group_rows(rows, 'size', 'compression').items():
        name = 'dense, trained as long' if size == 1 else f'factors, {size:g}×'
        name += f', surgery to {compression:g}×' if compression else ''
        cells = [middle_and_range(own, *column) for column in _COLUMNS]
        lines.append((name, own[0]['ranks'], *cells))
    header = 'network', 'ranks', 'parameters', 'dense', 'factorised', 'after training'
    return table(header, lines)


def _measure(
    config: LowRankConfig, dataset: resident.Dataset, seed: int
) -> Iterator[dict[str, Any]]:
    """Trains a network, factorises it to every size, trains that on, and measures it."""
    make_network = _NETWORKS[config.network]
    title = f'dense, seed {seed}'
    dense, _ = train_network(config, make_network(), dataset.train, seed=seed, title=title)
    whole = sum(leaf.size for leaf in jax.tree.leaves(dense))
    for size, compression in config.pairs():
        ranks = dict.fromkeys(dense)
        if size > 1:
            ranks = choose_ranks(dense, math.floor(whole / size), list(dense))
        factors, pruner = factorise(dense, ranks), None
        if compression:
            # Three quarters of the steps, as of runs that prune and then fine-tune.
            density = _density_of_kernels(factors, math.floor(whole / compression))
            pruner = dns_jax.prune_to(density=density, steps=3 * config.tuning_steps // 4)
        network = make_network(FrozenDict(ranks))
        name = f'{size:g}x' + (f'-{compression:g}x' if compression else '')
        tuned, masks = train_network(
            config,
            network,
            dataset.train,
            params=factors,
            pruner=pruner,
            steps=config.tuning_steps,
            rate=config.tuning_rate,
            seed=seed,
            title=f'{name}, seed {seed}',
        )
        metadata = {
            'network': config.network,
            'input_scale': repr(MNIST_INPUT.scale),
            'ranks': json.dumps({layer: rank for layer, rank in ranks.items() if rank}),
        }
        save_sparse(Path(config.workdir, f'{name}-{seed}.safetensors'), tuned, masks, metadata)
        positions = models.count_positions(network, MNIST_INPUT.image_shape)
        total = dns_jax.measure_sizes(tuned, masks, positions).total
        yield {
            'network': config.network,
            'size': size,
            'compression': compression,
            'seed': seed,
            'ranks': ' '.join('whole' if rank is None else f'{rank}' for rank in ranks.values()),
            'kept': total.kept,
            'multiply_adds': total.kept_multiply_adds,
            'reference_error': make_measure(make_network(), MNIST_INPUT)(dense, dataset.test),
            'untuned_error': make_measure(network, MNIST_INPUT)(factors, dataset.test),
            **measure_errors(config, network, tuned, dataset),
        }


def _density_of_kernels(params: dns_jax.Params, kept: int) -> float:
    """Says what share of the kernels is to be kept, so that the network keeps so many in all."""
    leaves = named_leaves(params)
    kernels = sum(leaf.size for path, leaf in leaves if dns_jax.is_kernel(path, leaf))
    others = sum(leaf.size for _, leaf in leaves) - kernels
    return min(1.0, (kept - others) / kernels)  # factors may have fewer than their budget


if __name__ == '__main__':
    command_line.launch({}, compare, LowRankConfig)
