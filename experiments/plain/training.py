"""Plain comparisons of small networks: seed by seed, without phases or records, into one table."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dns_jax
from dns_jax.files.writing import write_whole
from experiments.baselines.quantisers import Quantiser
from experiments.config import command_line
from experiments.config.command_line import check_finite, flag
from experiments.data import resident
from experiments.data.resident import Split, batch_indices
from experiments.devices import progress
from experiments.networks.models import MNIST_INPUT
from experiments.reports.tables import to_csv
from experiments.training import steps as train

_CHUNK = 500  # steps of one compiled call
_COINS = 2**31  # the number of a quantiser's random bits, above any count of steps


@dataclasses.dataclass(frozen=True)
class PlainConfig:
    """What all commands have that compare by plain trainings; each has more."""

    workdir: str = flag('runs/plain', 'Folder that the result is written to.')
    dataset: str = flag('mnist', 'Data set.', choices=resident.DATASETS)
    data_dir: str | None = flag(None, resident.DATA_DIR_HELP)
    manual_dir: str | None = flag(None, resident.MANUAL_DIR_HELP)
    train_on_all: bool = flag(False, 'Train on the validation images too (a final run).')
    seeds: int = flag(3, 'Networks that are trained first, one for each seed.', lower_bound=1)
    steps: int = flag(20_000, 'Steps of the first training.', lower_bound=1)
    batch_size: int = flag(64, 'Images per step.', lower_bound=1)
    learning_rate: float = flag(
        0.05, 'Learning rate of the first training at its start, from which it falls to 0.'
    )
    weight_decay: float = flag(5e-4, 'Weight decay, in every training.', lower_bound=0.0)

    def __post_init__(self):
        check_finite(self)


def make_folder(workdir: str, name: str) -> Path:
    """Makes a folder for the rows of a command.

    Raises:
      ValueError: if it has such rows already, which a new run would replace.
      OSError: if it cannot be made.
    """
    folder = Path(workdir)
    if (folder / f'{name}.csv').exists():
        raise ValueError(f'--workdir={folder} already holds {name}.csv; choose another')
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compare_seeds(
    config: PlainConfig,
    name: str,
    measure: Callable[[Any, resident.Dataset, int], Iterable[dict[str, Any]]],
    to_table: Callable[[list[dict[str, Any]]], str],
) -> list[dict[str, Any]]:
    """Measures the networks of all seeds, writes `{name}.csv` and `.md`, and prints the table.

    Args:
      config: of the command.
      name: of the files.
      measure: gives the rows of one seed, from the configuration, the data and the seed.
      to_table: writes all rows as Markdown.

    Returns:
      The rows.

    Raises:
      ValueError, RuntimeError: if the folder has rows, or data are damaged, or not to be had.
      OSError: if a file cannot be read or written.
    """
    folder = make_folder(config.workdir, name)  # before the work, lest it be lost
    dataset = resident.load(config.dataset, config.data_dir, config.manual_dir, config.train_on_all)
    rows = []
    for seed in range(config.seeds):
        for row in measure(config, dataset, seed):
            rows.append(row)
            write_whole(folder / f'{name}.csv', to_csv(rows))  # at once, lest it be lost
    text = to_table(rows)
    write_whole(folder / f'{name}.md', text + '\n')
    print(text)
    print(f'\nTable: {folder}')
    command_line.print_result(rows)
    return rows


def measure_errors(
    config: PlainConfig, network: nn.Module, params: dns_jax.Params, dataset: resident.Dataset
) -> dict[str, float | None]:
    """Measures the errors of a trained network, in percent.

    Returns:
      `{validation_error, test_error}`, the former None where its images were trained on.
    """
    error = train.make_measure(network, MNIST_INPUT)
    validation = None if config.train_on_all else error(params, dataset.validation)
    return {'validation_error': validation, 'test_error': error(params, dataset.test)}


def train_network(
    config: PlainConfig,
    network: nn.Module,
    split: Split,
    *,
    seed: int,
    title: str,
    params: Any = None,
    steps: int | None = None,
    rate: float | None = None,
    pruner: optax.GradientTransformation | None = None,
    solver: optax.GradientTransformation | None = None,
    quantiser: Quantiser | None = None,
    loss: train.Loss = train.CROSS_ENTROPY,
) -> tuple[dns_jax.Params, dns_jax.Masks]:
    """Trains a network.

    Args:
      config: of the command.
      network: maps images to logits.
      split: the images to train on.
      seed: of the weights where none are given, and of the order of the images, which is another
        where a network with given weights goes on.
      title: of the bar that shows progress.
      params: the weights at the start; by default those that the network initialises.
      steps: how many; by default those of `config`, as of the first training.
      rate: at the start; by default that of `config`.
      pruner: by default nothing is pruned.
      solver: by default SGD with momentum and a rate that falls to 0 along a line.
      quantiser: of what the network computes with; its coins are thrown by the key of the pruner,
        and a count of steps that the schedule of the learning rate has.
      loss: of images.

    Returns:
      W⊙T, or what the quantiser makes of it, and T, NumPy arrays.
    """
    steps = config.steps if steps is None else steps
    rate = config.learning_rate if rate is None else rate
    pruner = pruner or _prune_nothing()
    solver = solver or _make_solver(rate, steps, config.weight_decay)
    optimizer, run_chunk = _make_run_chunk(network, pruner, solver, quantiser, loss)
    order = (seed,) if params is None else (seed, 1)
    if params is None:
        shape = 1, *MNIST_INPUT.image_shape
        params = network.init(jax.random.key(seed), np.zeros(shape, np.float32))['params']
    # Copies: a compiled call takes the state over.
    state = train.TrainState(jax.tree.map(jnp.array, params), optimizer.init(params))
    arrays = jax.device_put(split.arrays)
    with progress.bar(total=steps, desc=title, unit=' steps') as bar:
        for start in range(0, steps, _CHUNK):
            count = min(_CHUNK, steps - start)
            batches = batch_indices(order, len(split), config.batch_size, start, count)
            # Waited for, so that the bar shows what is done.
            state, _ = jax.block_until_ready(run_chunk(state, arrays, batches))
            bar.update(count)
    finish = quantiser.finish if quantiser else dns_jax.apply_masks
    return jax.device_get((finish(state.params, state.masks), state.masks))


# Trainings that are alike and follow each other are compiled once, so what they are made of is the
# same object for each.
_cached = functools.lru_cache(8)


@_cached
def _prune_nothing() -> optax.GradientTransformation:
    return dns_jax.surgery({}, jax.random.key(0))


@_cached
def _make_solver(rate: float, steps: int, weight_decay: float) -> optax.GradientTransformation:
    return dns_jax.caffe_sgd(dns_jax.caffe_poly(rate, 1.0, steps), weight_decay=weight_decay)


@_cached
def _make_run_chunk(
    network: nn.Module,
    pruner: optax.GradientTransformation,
    solver: optax.GradientTransformation,
    quantiser: Quantiser | None,
    loss: train.Loss,
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    constrain = (quantiser.constrain,) if quantiser else ()
    optimizer = optax.chain(pruner, solver, *constrain)
    rounding = train.Rounding(quantiser, _COINS) if quantiser else None
    step = train.make_step(network, optimizer, MNIST_INPUT, rounding=rounding, loss=loss)
    return optimizer, train.make_run_chunk(step, Split.gather)
