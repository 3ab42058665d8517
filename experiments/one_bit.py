"""Networks of one bit a weight at the size of their papers: three hidden layers of 1024 units.

python -m experiments.one_bit --methods=none,binary

BinaryConnect, and the real weights it is compared with, have batch normalisation and the squared
hinge loss. Bitwise networks have neither. Adam trains them all, at a rate that falls by powers.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dns_jax
from experiments.baselines.binary_connect import binary_connect
from experiments.baselines.bitwise import BitwiseNetwork, bitwise, compressed
from experiments.baselines.quantisers import Quantiser
from experiments.config import command_line
from experiments.config.command_line import flag
from experiments.config.parsers import check_distinct
from experiments.data import resident
from experiments.networks.models import MNIST_INPUT
from experiments.plain.training import PlainConfig, compare_seeds, measure_errors, train_network
from experiments.reports.tables import group_rows, middle_and_range, table

_QUANTISERS = {
    'none': Quantiser(lambda params, masks, key: params, dns_jax.apply_masks),
    'binary': binary_connect(),
    'stochastic_binary': binary_connect(stochastic=True),
}
METHODS = (*_QUANTISERS, 'bitwise')
# Both as the authors of BinaryConnect have them; weights are uniform in ±H.
_EPSILON = 1e-4
_WITHIN_LIMIT = nn.initializers.variance_scaling(0.25, 'fan_avg', 'uniform')
_IMAGES = 10_000  # whose statistics a network keeps


@dataclasses.dataclass(frozen=True)
class OneBitConfig(PlainConfig):
    """What `experiments.one_bit` does."""

    workdir: str = flag('runs/one_bit', 'Folder that the result is written to.')
    methods: str = flag(','.join(METHODS), 'What is trained, with commas.')
    units: int = flag(1_024, 'Units of each hidden layer of the networks.', lower_bound=1)
    steps: int = flag(
        27_500, 'Steps of training; for bitwise networks, of the first stage alone.', lower_bound=1
    )
    bitwise_steps: int = flag(
        27_500, 'Steps of the second stage of bitwise networks.', lower_bound=1
    )
    batch_size: int = flag(100, 'Images per step.', lower_bound=2)
    learning_rate: float = flag(1e-3, 'Learning rate of Adam at the start.')
    end_learning_rate: float = flag(3e-6, 'Learning rate at the end, to which it falls by powers.')
    weight_decay: float = flag(0.0, 'Weight decay of AdamW.', lower_bound=0.0)
    zeros: float = flag(0.0, 'Share of the weights of bitwise networks that are 0.')

    def __post_init__(self):
        super().__post_init__()
        self.parse_methods()
        bitwise(self.zeros)
        if not 0 < self.end_learning_rate <= self.learning_rate:
            raise ValueError(
                f'--end_learning_rate={self.end_learning_rate} must be above 0, and at most '
                f'--learning_rate={self.learning_rate}'
            )

    def parse_methods(self) -> list[str]:
        """Returns the names of the methods."""
        names = self.methods.split(',')
        if not {*names} <= {*METHODS}:
            raise ValueError(f'--methods={self.methods} must be of {", ".join(METHODS)}')
        check_distinct('methods', names)
        return names


class NormalisedNetwork(nn.Module):
    """Three hidden layers of ReLU units; all four layers have batch normalisation."""

    units: int = 1_024

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (batch, 28, 28, 1) to logits (batch, 10)."""
        hidden = images.reshape(len(images), -1)
        for name in ('fc1', 'fc2', 'fc3'):
            hidden = nn.relu(_NormalisedLayer(self.units, name=name)(hidden))
        return _NormalisedLayer(10, name='fc4')(hidden)


class _NormalisedLayer(nn.Module):
    """Normalises by statistics of the batch, or by those that it finds among its parameters."""

    features: int

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        row = 1, self.features
        sums = hidden @ self.param('kernel', _WITHIN_LIMIT, (hidden.shape[-1], self.features))
        if self.has_variable('params', 'mean'):
            mean, variance = (self.get_variable('params', name) for name in ('mean', 'variance'))
        else:
            mean, variance = (take(sums, axis=0, keepdims=True) for take in (jnp.mean, jnp.var))
            self.sow('statistics', 'mean', mean)
            self.sow('statistics', 'variance', variance)
        normal = (sums - mean) * jax.lax.rsqrt(variance + _EPSILON)
        scale = self.param('scale', nn.initializers.ones, row)
        return normal * scale + self.param('bias', nn.initializers.zeros, row)


def squared_hinge(logits: jax.Array, labels: jax.Array) -> jax.Array:
    r"""Punishes outputs that are not beyond 1 for the label, or below −1 for another.

    .. math::
      \frac{1}{C} \sum_{c=1}^C \max\left(0, 1 - t_c z_c\right)^2, \quad
      t_c = \begin{cases} 1 & \text{if } c \text{ is the label} \\ -1 & \text{otherwise} \end{cases}

    Args:
      logits: z, (batch, classes).
      labels: (batch,), whole numbers.

    Returns:
      The loss of each image, (batch,).

    Example:
      >>> float(squared_hinge(jnp.array([[0.5, -2.0]]), jnp.array([0]))[0])
      0.125

    Reference:
      Courbariaux et al. 2015, BinaryConnect, on MNIST; the mean over classes is of their code.
    """
    targets = 2 * jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype) - 1
    return jnp.mean(jnp.maximum(0, 1 - targets * logits) ** 2, axis=-1)


def compare(config: OneBitConfig) -> list[dict[str, Any]]:
    """Trains all networks, writes `one_bit.csv` and `.md`, and prints the table.

    Returns:
      A row for each network; of bitwise ones, a row for each stage.

    Raises:
      As `plain.compare_seeds` does.
    """
    return compare_seeds(config, 'one_bit', measure_seed, to_table)


def measure_seed(
    config: OneBitConfig, dataset: resident.Dataset, seed: int
) -> Iterator[dict[str, Any]]:
    """Trains the networks of one seed, and gives the row of each."""
    for method in config.parse_methods():
        make = train_bitwise if method == 'bitwise' else train_normalised
        for name, network, params in make(config, dataset.train, seed, method):
            errors = measure_errors(config, network, params, dataset)
            yield {'method': name, 'seed': seed, **errors}


_Trained = Iterator[tuple[str, nn.Module, dns_jax.Params]]


def train_normalised(
    config: OneBitConfig, split: resident.Split, seed: int, method: str
) -> _Trained:
    """Trains a network of BinaryConnect, or one of real weights, and gives it with its name."""
    network = NormalisedNetwork(config.units)
    params, _ = train_network(
        config,
        network,
        split,
        seed=seed,
        title=f'{method}, seed {seed}',
        pruner=dns_jax.surgery({}, jax.random.key(seed)),  # whose coins are the seed's
        solver=_make_solver(config, config.steps),
        quantiser=_QUANTISERS[method],
        loss=squared_hinge,
    )
    yield method, network, keep_statistics(network, params, split.images[:_IMAGES])


def train_bitwise(config: OneBitConfig, split: resident.Split, seed: int, method: str) -> _Trained:
    """Trains a bitwise network, and gives what each stage ends with, by name."""
    params = None
    # The second from tanh(W), as `bitwise` says.
    for name, signs, quantiser, steps in (
        ('compressed', False, compressed(), config.steps),
        (method, True, bitwise(config.zeros), config.bitwise_steps),
    ):
        network = BitwiseNetwork(signs=signs, units=config.units)
        params, _ = train_network(
            config,
            network,
            split,
            seed=seed,
            title=f'{name}, seed {seed}',
            params=params,
            steps=steps,
            solver=_make_solver(config, steps),
            quantiser=quantiser,
        )
        yield name, network, params


def keep_statistics(
    network: NormalisedNetwork, params: dns_jax.Params, images: np.ndarray
) -> dns_jax.Params:
    """Adds the statistics of batch normalisation, of one batch, to the parameters of a network.

    Those that training would average are of other weights: of coins, or of earlier steps.
    """
    scaled = images * np.float32(MNIST_INPUT.scale)
    _, found = network.apply({'params': params}, scaled, mutable=['statistics'])
    statistics = jax.device_get(found['statistics'])
    return {
        layer: leaves | {name: value for name, (value,) in statistics[layer].items()}
        for layer, leaves in params.items()
    }


def to_table(rows: Sequence[dict[str, Any]]) -> str:
    """Writes the errors as Markdown, medians and ranges over seeds."""
    lines = [
        (method, f'{len(own)}', middle_and_range(own, 'test_error', '.2f', ' %'))
        for (method,), own in group_rows(rows, 'method').items()
    ]
    return table(('method', 'seeds', 'error'), lines)


def _make_solver(config: OneBitConfig, steps: int) -> optax.GradientTransformation:
    # BinaryConnect for ±1 divides rates of Adam by H; for ±H that is one rate for all layers.
    fall = config.end_learning_rate / config.learning_rate
    rate = optax.exponential_decay(config.learning_rate, steps, fall)
    return optax.adamw(rate, weight_decay=config.weight_decay)


if __name__ == '__main__':
    command_line.launch({}, compare, OneBitConfig)
