"""The runs of `experiments.own_loop`: a loop of training as users write it, and what came of it.

Per seed one dense network, from which every method starts, with the same batches. The file of rows
is written after every run; rows that it has already are not made again.
"""

import csv
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

import dns_jax
from dns_jax import pruners
from dns_jax.files.writing import write_whole
from experiments.config.command_line import flag
from experiments.devices import progress
from experiments.own_loops import networks as own_networks
from experiments.own_loops.networks import Task
from experiments.reports.commits import describe_commit
from experiments.reports.tables import middle_and_range, table, to_csv

METHODS = ('surgery', 'gradual')
_TARGETS = {'cnn': 'compression', 'gpt': 'density'}  # in what each network says how small
_DENSE, _PRUNING = 0, 1  # phases, each with batches of its own

Row = dict[str, Any]


class Run(NamedTuple):
    """One network to prune: no two rows have the same."""

    network: str  #: cnn or gpt
    method: str  #: one of `METHODS`
    target: float  #: a compression of the CNN, a density of the kernels of the GPT
    seed: int
    dense_steps: int
    steps: int


#: What a row says, and how it is read from the file.
COLUMNS = {
    **Run.__annotations__,
    **{'parameters': int, 'kept': int, 'compression': float, 'empty_layers': int},
    **{'unit': str, 'validation_before': float, 'validation': float, 'test': float},
    **{'seconds': float, 'commit': str},
}


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

    def runs(self) -> list[Run]:
        """Returns every run, by seed, target, then method."""
        return [
            Run(self.network, method, target, seed, self.dense_steps, self.steps)
            for seed in range(self.seeds)
            for target in self.targets()
            for method in self.chosen_methods()
        ]

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


class Network(NamedTuple):
    """What training changes, and where each part comes back to."""

    graph: Any
    params: Any
    rest: Any  # batch statistics


def make_pruner(run: Run, params: dns_jax.Params) -> optax.GradientTransformation:
    """Makes what stands before the optimizer in the chain.

    Args:
      run: whose method and target count, met before the end of its steps.
      params: of the network.
    """
    if run.method == 'surgery':
        how_small: dict[str, Any] = {_TARGETS[run.network]: run.target}
        return dns_jax.prune_to(steps=run.steps, **how_small)
    # Masks stay from about the same step on as with `prune_to`; no coin is thrown with the key.
    ramp, density = run.steps * 3 // 5, _to_density(run, params)
    return pruners.gradual(
        density, 0, ramp, 1, jax.random.key(0), density_rule=dns_jax.global_density
    )


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

    Returns:
      The rows of the configuration, of the columns `COLUMNS`; the file may have others.

    Raises:
      OSError: if the text cannot be read, or the file cannot be written.
      ValueError: if the file is none of ours.
    """
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)  # before the work, lest it be lost
    rows = read_rows(path)
    wanted = config.runs()
    left = [run for run in wanted if run not in map(_to_run, rows)]
    if left:
        task, commit = _make_task(config), describe_commit()  # of the code that runs
        with progress.bar(total=len(left), desc='own loop', unit=' runs') as bar:
            for _, runs in itertools.groupby(left, lambda run: run.seed):
                for row in _run_seed(task, list(runs)):
                    rows.append({**row, 'commit': commit})
                    write_whole(path, to_csv(rows))
                    bar.update()
    by_run = {_to_run(row): row for row in rows}
    return [by_run[run] for run in wanted]


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a file; none where there is no file.

    Returns:
      The rows, with numbers where `COLUMNS` says so, and None where a network has no test split.

    Raises:
      ValueError: if the columns are others, or what stands in one is no number.
    """
    if not path.exists():
        return []
    with path.open(newline='', encoding='utf-8') as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(COLUMNS):
            raise ValueError(f'{path} must have the columns {list(COLUMNS)}')
        try:
            return [
                {name: read(row[name]) if row[name] else None for name, read in COLUMNS.items()}
                for row in reader
            ]
        except ValueError as error:
            raise ValueError(f'{path}, line {reader.line_num}: {error}') from error


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


def _run_seed(task: Task, runs: Sequence[Run]) -> Iterator[Row]:
    """Trains the dense network of a seed, then gives the row of each run as it is done."""
    seed, dense_steps = runs[0].seed, runs[0].dense_steps
    network = Network(*nnx.split(task.make(seed), nnx.Param, ...))
    nothing = dns_jax.surgery({}, jax.random.key(0))
    dense, masks = train(task, network, nothing, (seed, _DENSE), dense_steps)
    before = measure(task, dense, masks, 'validation')
    for run in runs:
        pruner = make_pruner(run, dense.params)
        started = time.perf_counter()
        pruned, masks = train(task, dense, pruner, (seed, _PRUNING), run.steps)
        jax.block_until_ready(pruned.params)
        seconds = time.perf_counter() - started
        size = dns_jax.measure_sizes(pruned.params, masks).total
        after = {split: round(measure(task, pruned, masks, split), 4) for split in task.measure}
        yield {
            **run._asdict(),
            'parameters': size.parameters,
            'kept': size.kept,
            'compression': round(size.compression, 3),
            'empty_layers': len(dns_jax.find_empty_layers(masks)),
            'unit': task.unit,
            'validation_before': round(before, 4),
            'validation': after['validation'],
            'test': after.get('test'),
            'seconds': round(seconds, 1),
        }


def _make_task(config: OwnLoopConfig) -> Task:
    if config.network == 'cnn':
        return own_networks.digits()
    return own_networks.characters(Path(config.text or ''))


def _to_run(row: Row) -> Run:
    return Run(*(row[name] for name in Run._fields))


def _to_density(run: Run, params: dns_jax.Params) -> float:
    """Gives the density of the kernels at which the network meets its target."""
    if run.network == 'gpt':
        return run.target
    masks = jax.tree.leaves(dns_jax.init_masks(params))
    prunable = sum(mask.size for mask in masks if mask.ndim)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return (parameters / run.target - (parameters - prunable)) / prunable
