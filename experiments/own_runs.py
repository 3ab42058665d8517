"""The runs of `experiments.own_loop`: a loop of training as users write it, and what came of it.

Per seed one dense network, from which every method starts, with the same batches. The file of rows
is written after every run; rows that it has already are not made again.
"""

import csv
import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

import dns_jax
from dns_jax import pruners
from experiments import own_networks, progress
from experiments.command_line import flag
from experiments.commits import describe_commit
from experiments.own_networks import Task
from experiments.tables import middle_and_range, table, write_csv

METHODS = ('surgery', 'gradual')
_DENSE, _PRUNING = 0, 1  # phases, each with batches of its own

Row = dict[str, Any]
#: What a row says, and how it is read from the file.
COLUMNS = {
    **{'network': str, 'method': str, 'target': float, 'seed': int},
    **{'dense_steps': int, 'steps': int},  # so far what the row is of
    **{'parameters': int, 'kept': int, 'compression': float, 'empty_layers': int},
    **{'unit': str, 'validation_before': float, 'validation': float, 'test': float},
    **{'seconds': float, 'commit': str},
}
_KEY = tuple(itertools.islice(COLUMNS, 6))


@dataclasses.dataclass(frozen=True)
class OwnLoopConfig:
    """What `experiments.own_loop` measures."""

    network: str = flag(
        'cnn', 'Network: a CNN on digits, or a GPT on characters.', choices=('cnn', 'gpt')
    )
    compression: str = flag(
        '10,24,36,60', 'Targets of the CNN: all / kept parameters, with commas between.'
    )
    density: str = flag(
        '0.1,0.05', 'Targets of the GPT: kept / all weights of its kernels, with commas between.'
    )
    methods: str = flag(
        ','.join(METHODS), 'Ways to prune, of surgery and gradual, with commas between.'
    )
    seeds: int = flag(3, 'Networks of each target, with the seeds from 0 on.', lower_bound=1)
    dense_steps: int = flag(1_000, 'Steps of training before any pruning.', lower_bound=0)
    steps: int = flag(1_000, 'Steps of training with pruning.', lower_bound=10)
    text: str | None = flag(None, 'File of characters for the GPT; must be given for it.')
    output: str = flag('results/own_loop.csv', 'File that the rows are written to.')

    def __post_init__(self):
        if self.network == 'gpt' and not self.text:
            raise ValueError('--text must name a file of characters for --network=gpt')
        if unknown := sorted({*self.chosen_methods()} - {*METHODS}):
            raise ValueError(f'--methods={self.methods} names {unknown}; there are {METHODS}')
        self.targets()

    def chosen_methods(self) -> list[str]:
        """Returns the ways to prune, in order."""
        return self.methods.split(',')

    def targets(self) -> list[float]:
        """Returns the targets of the network, compressions of the CNN and densities of the GPT."""
        name = _TARGETS[self.network]
        text = getattr(self, name)
        try:
            targets = [float(part) for part in text.split(',')]
        except ValueError as error:
            raise ValueError(f'--{name}={text} must be numbers with commas between') from error
        if len(set(targets)) < len(targets):
            raise ValueError(f'--{name}={text} names one twice')
        shares = [1 / target if name == 'compression' and target else target for target in targets]
        if not all(0 < share <= 1 for share in shares):
            wanted = 'finite and at least 1' if name == 'compression' else 'in (0, 1]'
            raise ValueError(f'--{name}={text} must be {wanted}')
        return targets


_TARGETS = {'cnn': 'compression', 'gpt': 'density'}


class Network(NamedTuple):
    """What training changes, and where each part comes back to."""

    graph: Any
    params: Any
    rest: Any  # batch statistics


class Target(NamedTuple):
    """How small a network is to get, in one of two ways."""

    compression: float | None = None  # all / kept parameters
    density: float | None = None  # kept / all weights of the kernels


def make_pruner(
    method: str, target: Target, params: dns_jax.Params, steps: int
) -> optax.GradientTransformation:
    """Makes what stands before the optimizer in the chain.

    Args:
      method: one of `METHODS`, or 'dense'.
      target: for either of them.
      params: of the network.
      steps: of training, at the end of which the target is met.

    Returns:
      The transformation.
    """
    if method == 'surgery':
        return dns_jax.prune_to(steps=steps, compression=target.compression, density=target.density)
    key = jax.random.key(0)  # for coins, of which none is thrown
    if method == 'dense':
        return dns_jax.surgery({}, key)
    # As long a ramp as that of `prune_to`.
    ramp, density = steps * 4 // 5, _to_density(target, params)
    return pruners.gradual(density, 0, ramp, 1, key, divide=dns_jax.global_density)


def train(
    task: Task,
    network: Network,
    pruner: optax.GradientTransformation,
    batches: Sequence[int],
    steps: int,
) -> tuple[Network, dns_jax.Masks]:
    """Trains a network, and prunes it.

    Args:
      task: of the network.
      network: where to start.
      pruner: from `make_pruner`.
      batches: numbers that seed them.
      steps: how many.

    Returns:
      The network with its dense weights, and the masks.
    """
    optimizer = optax.chain(pruner, task.optimizer(steps))

    def loss_fn(params, rest, batch):
        model = nnx.merge(network.graph, params, rest, copy=True)
        loss = task.loss(model, *batch)
        return loss, nnx.split(model, nnx.Param, ...)[2]

    @jax.jit
    def step(params, rest, state, batch):
        masks = dns_jax.get_masks(state)
        value_and_grad = dns_jax.masked_value_and_grad(loss_fn, has_aux=True)
        (_, rest), gradients = value_and_grad(params, masks, rest, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), rest, state

    graph, params, rest = network
    state = optimizer.init(params)
    for batch in task.batches(batches, steps):
        params, rest, state = step(params, rest, state, batch)
    return Network(graph, params, rest), dns_jax.get_masks(state)


def measure(task: Task, network: Network, masks: dns_jax.Masks, split: str) -> float:
    """Measures a pruned network on a split; batch statistics are those of training."""

    @jax.jit
    def on_split(params, rest):
        model = nnx.merge(network.graph, params, rest)
        model.eval()
        return task.measure[split](model)

    return float(on_split(dns_jax.apply_masks(network.params, masks), network.rest))


def run_all(config: OwnLoopConfig) -> list[Row]:
    """Does every run whose row is not there yet.

    Args:
      config: from the command line.

    Returns:
      The rows of the configuration, of the columns `COLUMNS`; the file may have others.

    Raises:
      OSError: if the text cannot be read, or the file cannot be written.
      ValueError: if the file is none of ours.
    """
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)  # before the work, lest it be lost
    rows = read_rows(path)
    wanted = [
        (config.network, method, target, seed, config.dense_steps, config.steps)
        for seed in range(config.seeds)
        for target in config.targets()
        for method in config.chosen_methods()
    ]
    left = [key for key in wanted if key not in map(_key, rows)]
    if left:
        task = _make_task(config)
        with progress.bar(total=len(left), desc='own loop', unit=' runs') as bar:
            for seed, keys in itertools.groupby(left, lambda key: key[3]):
                for row in _run_seed(task, seed, list(keys)):
                    rows.append(row)
                    write_csv(path, rows)
                    bar.update()
    by_key = {_key(row): row for row in rows}
    return [by_key[key] for key in wanted]


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a file; none where there is no file.

    Args:
      path: of the file.

    Returns:
      The rows, with numbers where `COLUMNS` says so, and None where a network has no test split.

    Raises:
      ValueError: if the columns are others.
    """
    if not path.exists():
        return []
    with path.open(newline='', encoding='utf-8') as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(COLUMNS):
            raise ValueError(f'{path} must have the columns {list(COLUMNS)}')
        return [
            {name: read(row[name]) if row[name] else None for name, read in COLUMNS.items()}
            for row in reader
        ]


def to_table(rows: Sequence[Row]) -> str:
    """Makes the table of medians over seeds, and their ranges, by target and method."""
    header = (
        *('target', 'method', 'seeds', 'compression', 'before', 'validation', 'test'),
        *('empty layers', 'seconds'),
    )
    lines = []
    for target, method in dict.fromkeys((row['target'], row['method']) for row in rows):
        own = [row for row in rows if (row['target'], row['method']) == (target, method)]
        unit = f' {own[0]["unit"]}'
        form = '.3f' if own[0]['unit'] == 'nats' else '.2f'
        lines.append(
            (
                f'{_TARGETS[own[0]["network"]]} {target:g}',
                method,
                f'{len(own)}',
                middle_and_range(own, 'compression', '.1f', '×'),
                middle_and_range(own, 'validation_before', form, unit),
                middle_and_range(own, 'validation', form, unit),
                '' if own[0]['test'] is None else middle_and_range(own, 'test', form, unit),
                middle_and_range(own, 'empty_layers', '.0f'),
                middle_and_range(own, 'seconds', '.0f'),
            )
        )
    return table(header, lines)


def _run_seed(task: Task, seed: int, keys):
    """Trains the dense network of a seed, then gives the row of each run as it is done."""
    graph, params, rest = nnx.split(task.make(seed), nnx.Param, ...)
    network = Network(graph, params, rest)
    dense_steps = keys[0][4]
    dense, nothing = train(
        task,
        network,
        make_pruner('dense', Target(), params, dense_steps),
        (seed, _DENSE),
        dense_steps,
    )
    before = measure(task, dense, nothing, 'validation')
    for key in keys:
        name, method, target, *_, steps = key
        pruner = make_pruner(method, Target(**{_TARGETS[name]: target}), dense.params, steps)
        started = time.perf_counter()
        pruned, masks = train(task, dense, pruner, (seed, _PRUNING), steps)
        jax.block_until_ready(pruned.params)
        seconds = time.perf_counter() - started
        size = dns_jax.measure_sizes(pruned.params, masks).total
        yield dict(zip(_KEY, key, strict=True)) | {
            'parameters': size.parameters,
            'kept': size.kept,
            'compression': round(size.compression, 3),
            'empty_layers': len(dns_jax.find_empty_layers(masks)),
            'unit': task.unit,
            'validation_before': round(before, 4),
            'validation': round(measure(task, pruned, masks, 'validation'), 4),
            'test': round(measure(task, pruned, masks, 'test'), 4)
            if 'test' in task.measure
            else None,
            'seconds': round(seconds, 1),
            'commit': describe_commit(),
        }


def _make_task(config: OwnLoopConfig) -> Task:
    if config.network == 'cnn':
        return own_networks.digits()
    return own_networks.characters(Path(config.text or ''))


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


def _to_density(target: Target, params: dns_jax.Params) -> float:
    """Gives the density of the kernels at which the network meets its target."""
    if target.compression is None:
        return target.density or 1.0
    masks = jax.tree.leaves(dns_jax.init_masks(params))
    prunable = sum(mask.size for mask in masks if mask.ndim)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return (parameters / target.compression - (parameters - prunable)) / prunable
