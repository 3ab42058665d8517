"""LeNet-5 whose convolutions have filters of several shapes, trained from scratch.

python -m experiments.mixed --flagfile=experiments/flagfiles/mixed_lenet5.flags

A share of the filters is whole. The others are horizontal or vertical, and a 1×1 convolution mixes
all (Ioannou et al. 2016). Where all are whole there is no mixing: those are the layers of LeNet-5,
though they start otherwise. Each convolution has a ReLU behind it, as the authors' networks have it
and Caffe's LeNet-5 has not.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax

import dns_jax
from dns_jax.inference.chain import max_pool
from experiments.baselines.mixed_filters import MixedFilters
from experiments.config import command_line
from experiments.config.command_line import flag
from experiments.config.parsers import check_distinct, parse_numbers
from experiments.data import resident
from experiments.networks import models
from experiments.networks.models import MNIST_INPUT
from experiments.plain.training import PlainConfig, compare_seeds, measure_errors, train_network
from experiments.reports.tables import group_rows, middle_and_range, table


@dataclasses.dataclass(frozen=True)
class MixedConfig(PlainConfig):
    """What `experiments.mixed` does."""

    workdir: str = flag('runs/mixed', 'Folder that the result is written to.')
    shares: str = flag('0,0.25,0.5,1', 'Shares of the filters that are whole, one network each.')

    def __post_init__(self):
        super().__post_init__()
        self.parse_shares()

    def parse_shares(self) -> list[float]:
        """Returns the shares."""
        shares = parse_numbers('shares', self.shares, 0, 1)
        check_distinct('shares', shares)
        return shares


class MixedLeNet5(nn.Module):
    """LeNet-5 with ReLU behind its convolutions, of whose filters a share is whole."""

    share: float

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (batch, 28, 28, 1) to logits (batch, 10)."""
        hidden = images
        for name, features in (('conv1', 20), ('conv2', 50)):
            full = round(self.share * features)
            vertical = (features - full) // 2
            hidden = MixedFilters(
                horizontal=features - full - vertical,
                vertical=vertical,
                full=full,
                kernel_size=(5, 5),
                features=None if full == features else features,
                padding='VALID',
                conv_general_dilated=models.fast_convolution(),
                name=name,
            )(hidden)
            hidden = max_pool(nn.relu(hidden), 2, axis=1)
        hidden = hidden.reshape(hidden.shape[0], -1)
        hidden = nn.relu(nn.Dense(500, name='fc1')(hidden))
        return nn.Dense(10, name='fc2')(hidden)


def compare(config: MixedConfig) -> list[dict[str, Any]]:
    """Trains all networks, writes `mixed.csv` and `.md`, and prints the table.

    Returns:
      A row for each share and seed.

    Raises:
      As `plain.compare_seeds` does.
    """
    return compare_seeds(config, 'mixed', _measure, to_table)


def to_table(rows: Sequence[dict[str, Any]]) -> str:
    """Writes sizes and errors as Markdown, medians and ranges over seeds."""
    lines = []
    for (share,), own in group_rows(rows, 'share').items():
        lines.append(
            (
                'all, LeNet-5' if share == 1 else f'{share:g}',
                f'{own[0]["parameters"]:,.0f}',
                f'{own[0]["multiply_adds"]:,.0f}',
                middle_and_range(own, 'test_error', '.2f', ' %'),
            )
        )
    return table(('share of whole filters', 'parameters', 'multiply-adds', 'test error'), lines)


def _measure(config: MixedConfig, dataset: resident.Dataset, seed: int) -> Iterator[dict[str, Any]]:
    """Trains a network of every share, and measures it."""
    for share in config.parse_shares():
        network, title = MixedLeNet5(share), f'share {share:g}, seed {seed}'
        params, masks = train_network(config, network, dataset.train, seed=seed, title=title)
        positions = models.count_positions(network, MNIST_INPUT.image_shape)
        total = dns_jax.measure_sizes(params, masks, positions).total
        yield {
            'share': share,
            'seed': seed,
            'parameters': total.parameters,
            'multiply_adds': total.multiply_adds,
            **measure_errors(config, network, params, dataset),
        }


if __name__ == '__main__':
    command_line.launch({}, compare, MixedConfig)
