"""Diversity networks: which units to remove from a dense network, and whether to fuse them.

python -m experiments.diversity --seeds=3

Networks with two hidden layers of 500 units, one for each seed, are pruned to fewer units: by a
k-DPP, at random, or by importance, each with and without fusing. The paper trains none of them
again; with --retraining_steps each is trained on as well.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import dns_jax
from experiments.baselines import divnet, units
from experiments.config import command_line
from experiments.config.command_line import check_unread, flag
from experiments.config.parsers import check_distinct, parse_numbers
from experiments.data import resident
from experiments.networks.models import MNIST_INPUT
from experiments.plain.training import PlainConfig, compare_seeds, train_network
from experiments.reports.tables import group_rows, middle_and_range, table
from experiments.training.steps import make_measure

_HIDDEN = ('fc1', 'fc2')
_UNITS = 500
_CHOICES = ('k-DPP', 'importance', 'at random')
METHODS = (*_CHOICES, *(f'{choice}, fused' for choice in _CHOICES))


@dataclasses.dataclass(frozen=True)
class DiversityConfig(PlainConfig):
    """What `experiments.diversity` does."""

    workdir: str = flag('runs/diversity', 'Folder that the result is written to.')
    learning_rate: float = flag(
        0.1, 'Learning rate of the first training at its start, from which it falls to 0.'
    )
    weight_decay: float = flag(0.0, 'Weight decay, in every training.', lower_bound=0.0)
    kept: str = flag('10,25,50,100,200,300,400', 'Units that each hidden layer keeps.')
    points: int = flag(5_000, 'Training images whose activations are compared.', lower_bound=1)
    retraining_steps: int = flag(
        0, 'Steps that each pruned network is trained on; 0 for none.', lower_bound=0
    )
    retraining_rates: str = flag(
        '0.1,0.01,0.001',
        'Learning rates to train pruned networks on with, from each of which it falls to 0; the '
        'one with the lowest validation error is taken for each network.',
    )

    def __post_init__(self):
        super().__post_init__()
        self.parse_kept()
        check_unread(self, [] if self.retraining_steps else ['retraining_rates'])
        rates = self.parse_rates()
        if self.retraining_steps and self.train_on_all and len(rates) > 1:
            raise ValueError(
                f'--retraining_rates={self.retraining_rates} must be one rate with --train_on_all: '
                'no validation images are left to choose by'
            )

    def parse_kept(self) -> list[int]:
        """Returns the numbers of units."""
        texts = self.kept.split(',')
        if not all(text.isdecimal() and 1 <= int(text) <= _UNITS for text in texts):
            raise ValueError(f'--kept={self.kept} must be numbers from 1 to {_UNITS}, with commas')
        check_distinct('kept', texts)
        return [int(text) for text in texts]

    def parse_rates(self) -> list[float]:
        """Returns the learning rates of retraining."""
        rates = parse_numbers('retraining_rates', self.retraining_rates, 0)
        check_distinct('retraining_rates', rates)
        return rates


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
      As `plain.compare_seeds` does.
    """
    return compare_seeds(config, 'diversity', _measure, to_table)


def to_table(rows: Sequence[dict[str, Any]]) -> str:
    """Writes the errors as Markdown: a line for each number of units, medians and ranges.

    Those after retraining, where there was any, have a table of their own.
    """
    lines = _lines(rows, 'test_error')
    dense = middle_and_range(rows, 'reference_error', '.2f', ' %')
    text = table(('units', *METHODS), [*lines, (f'{_UNITS}, dense', *[dense] * len(METHODS))])
    if 'retrained_error' in rows[0]:
        retrained = _lines(rows, 'retrained_error')
        text += '\n\n' + table(('units, retrained', *METHODS), retrained)
    return text


def _lines(rows: Sequence[dict[str, Any]], column: str) -> list[tuple[str, ...]]:
    """Writes a line for each number of units, a cell for each method."""
    of = group_rows(rows, 'kept', 'method')
    return [
        (f'{kept:g}', *(middle_and_range(of[kept, name], column, '.2f', ' %') for name in METHODS))
        for (kept,) in group_rows(rows, 'kept')
    ]


def _measure(
    config: DiversityConfig, dataset: resident.Dataset, seed: int
) -> Iterator[dict[str, Any]]:
    """Trains a network, prunes it in every way, trains on if asked to, and measures errors."""
    title = f'seed {seed}'
    params, _ = train_network(config, SigmoidNetwork(), dataset.train, seed=seed, title=title)
    points = dataset.train.images[: config.points].reshape(-1, 784) * np.float64(MNIST_INPUT.scale)
    reference = _error(params, dataset.test)
    for kept, choice, fused in itertools.product(config.parse_kept(), _CHOICES, (False, True)):
        smaller = _prune(params, points, kept, choice, fused, np.random.default_rng([seed, kept]))
        row = {
            'method': f'{choice}, fused' if fused else choice,
            'kept': kept,
            'seed': seed,
            'reference_error': reference,
            'test_error': _error(smaller, dataset.test),
        }
        if config.retraining_steps:
            title = f'{row["method"]}, {kept} units, seed {seed}'
            row |= _retrain(config, dataset, smaller, seed, title)
        yield row


def _retrain(
    config: DiversityConfig,
    dataset: resident.Dataset,
    params: dns_jax.Params,
    seed: int,
    title: str,
) -> dict[str, float]:
    """Trains a pruned network on, with the rate that suits it: fused weights may be large."""
    tried = []
    for rate in config.parse_rates():
        retrained, _ = train_network(
            config,
            SigmoidNetwork(len(params['fc1']['bias'])),
            dataset.train,
            params=params,
            steps=config.retraining_steps,
            rate=rate,
            seed=seed,
            title=f'{title}, rate {rate:g}',
        )
        tried.append((_error(retrained, dataset.validation), rate, retrained))
    _, rate, retrained = min(tried, key=lambda one: one[0])
    return {'retraining_rate': rate, 'retrained_error': _error(retrained, dataset.test)}


def _prune(
    params: dns_jax.Params,
    points: np.ndarray,
    kept: int,
    choice: str,
    fused: bool,
    generator: np.random.Generator,
) -> dns_jax.Params:
    """Prunes layer by layer from the inputs."""
    for number, layer in enumerate(_HIDDEN, 1):
        # Of the network as it is so far: what is lost before a layer, fusing behind it sees.
        activations = _activations(params, points, number)
        reader = f'fc{number + 1}'
        if choice == 'k-DPP':
            chosen = divnet.choose_diverse(activations, kept, generator)
        elif choice == 'importance':
            chosen = units.choose_by_importance(params[reader]['kernel'], kept)
        else:
            chosen = units.choose_at_random(_UNITS, kept, generator)
        params = divnet.prune(params, layer, reader, chosen, activations if fused else None)
    return params


def _activations(params: dns_jax.Params, points: np.ndarray, layers: int) -> np.ndarray:
    """Computes the sigmoids behind some layers, float64."""
    hidden = points
    for name in _HIDDEN[:layers]:
        sums = hidden @ params[name]['kernel'] + params[name]['bias']
        hidden = 1 / (1 + np.exp(-sums))
    return hidden


def _error(params: dns_jax.Params, split: resident.Split) -> float:
    network = SigmoidNetwork(len(params['fc1']['bias']))
    return make_measure(network, MNIST_INPUT)(params, split)


if __name__ == '__main__':
    command_line.launch({}, compare, DiversityConfig)
