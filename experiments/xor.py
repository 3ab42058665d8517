"""Noisy XOR with 21 parameters, section 4.1 of the paper: which connections die, which come back.

python -m experiments.xor

The same networks, one for each seed and all in one program, are pruned by surgery and by the rounds
of Han et al. under several c: how often is XOR still solved, and with how many connections? For
the smallest network of surgery, pictures show its connections over time. Needs no data.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dns_jax
from dns_jax import pruners
from dns_jax.files.writing import write_whole
from experiments.config import command_line
from experiments.config.command_line import check_finite, flag
from experiments.devices import progress
from experiments.networks.logic import Xor
from experiments.reports import plots, xor_plots
from experiments.reports.tables import middle_and_range, table, to_csv
from experiments.training import probes
from experiments.training.steps import TrainState

_POINTS = 10_000  # to train with, and as many to test
_BATCH = 64
_RECORDS = 100
_ROUNDS = 5
# As many for each, from where nearly all is kept to where nothing is solved.
_C_RATES = {
    'surgery': (-0.8, -0.4, 0.0, 0.4, 0.8, 1.2),
    'Han et al.': (0.1, 0.25, 0.4, 0.5, 0.6, 0.8),
}
COLUMNS = ('method', 'c_rate', 'seed', 'reference_error', 'test_error', 'kept', 'returned')


@dataclasses.dataclass(frozen=True)
class XorConfig:
    """What `experiments.xor` does."""

    workdir: str = flag('runs/xor', 'Folder that the result is written to.')
    seed: int = flag(0, 'Seeds the points and all networks.', lower_bound=0)
    seeds: int = flag(100, 'Networks under each pruner and each c.', lower_bound=1)
    steps: int = flag(
        8_000,
        'Steps of dense training, and again of pruning, rounded down to hundreds.',
        lower_bound=100,
    )
    noise: float = flag(
        0.16, 'Standard deviation of the points around the corners of a square with sides of 1.'
    )
    solved: float = flag(1.0, 'Largest error, in percent, that counts as solved.')

    def __post_init__(self):
        check_finite(self)
        if self.noise <= 0:
            raise ValueError(f'--noise={self.noise} must be above 0')
        if not 0 <= self.solved <= 100:
            raise ValueError(f'--solved={self.solved} must be a percentage')


class Points(NamedTuple):
    """Points around the four corners of a square, and whether their corner's sides differ."""

    places: jax.Array  # shape=(points, 2), dtype=jnp.float32
    labels: jax.Array  # shape=(points,), dtype=bool


class Course(NamedTuple):
    """A training of some networks: axes (networks, records, …)."""

    params: dns_jax.Params
    masks: dns_jax.Masks
    returned: dns_jax.Masks


def make_points(key: jax.Array, count: int, noise: float) -> Points:
    """Draws points.

    Args:
      key: a typed PRNG key.
      count: how many.
      noise: the standard deviation around the corners, whose sides are 1 long.
    """
    corners_key, noise_key = jax.random.split(key)
    corners = jax.random.bernoulli(corners_key, shape=(count, 2)).astype(jnp.float32)
    places = corners + noise * jax.random.normal(noise_key, (count, 2))
    return Points(places, corners[:, 0] != corners[:, 1])


def train_networks(
    pruner: optax.GradientTransformation,
    params: dns_jax.Params,
    keys: jax.Array,
    points: Points,
    steps: int,
) -> Course:
    """Trains networks side by side.

    Args:
      pruner: of all of them; each follows coins of its own.
      params: of the networks, stacked.
      keys: one for each network, of its coins and batches.
      points: to train with.
      steps: how many, in as many equal parts as there are records.

    Returns:
      Weights and masks at the start and after each part.
    """
    network = Xor()
    optimizer = optax.chain(probes.count_returns(pruner), optax.adam(0.01))

    def loss_fn(params, batch):
        logits: Any = network.apply({'params': params}, points.places[batch])
        return optax.sigmoid_binary_cross_entropy(logits, points.labels[batch]).mean()

    def step(state, key):
        batch = jax.random.randint(key, (_BATCH,), 0, len(points.labels))
        _, gradients = dns_jax.masked_value_and_grad(loss_fn)(state.params, state.masks, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), None

    def look(state):
        return Course(state.params, state.masks, optax.tree.get(state.opt_state, 'returned'))

    def part(state, keys):
        return jax.lax.scan(step, state, keys)[0], look(state)

    @jax.jit
    @jax.vmap
    def run(params, key):
        coins_key, batches_key = jax.random.split(key)
        opt_state = optax.tree.set(optimizer.init(params), key=coins_key)
        keys = jax.random.split(batches_key, (_RECORDS, steps // _RECORDS))
        state, course = jax.lax.scan(part, TrainState(params, opt_state), keys)
        return jax.tree.map(
            lambda leaves, last: jnp.concatenate([leaves, last[None]]), course, look(state)
        )

    return run(params, keys)


def measure_error(course: Course, points: Points) -> np.ndarray:
    """Measures the error of each network at the end of its course, in percent."""

    def error(params: Any, masks):
        pruned: Any = dns_jax.apply_masks(params, masks)
        logits: Any = Xor().apply({'params': pruned}, points.places)
        return 100 * jnp.mean((logits > 0) != points.labels)

    last = jax.tree.map(lambda leaves: leaves[:, -1], course)
    return np.asarray(jax.jit(jax.vmap(error))(last.params, last.masks))


def count_returned(course: Course) -> np.ndarray:
    """Counts the connections of each network that are kept in the end, after they were pruned."""
    back = jax.tree.map(
        lambda masks, returned: masks[:, -1] & returned[:, -1], course.masks, course.returned
    )
    return _sum_leaves(back)


def count_kept(course: Course) -> np.ndarray:
    """Counts the connections that each network keeps in the end."""
    return _sum_leaves(jax.tree.map(lambda masks: masks[:, -1], course.masks))


def _sum_leaves(masks: dns_jax.Masks) -> np.ndarray:
    """Counts for each network what is True in any leaf."""
    flat = [np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(masks)]
    return np.concatenate(flat, axis=1).sum(axis=1)


def solve(config: XorConfig) -> dict[str, Any]:
    """Does all networks, writes the tables and pictures, and prints the result.

    Returns:
      What is printed for programs, as JSON.

    Raises:
      OSError: if the folder cannot be written.
    """
    folder = Path(config.workdir)
    folder.mkdir(parents=True, exist_ok=True)  # before the work, lest it be lost
    points_key, test_key, weights_key, *keys = jax.random.split(jax.random.key(config.seed), 5)
    points = make_points(points_key, _POINTS, config.noise)
    test = make_points(test_key, _POINTS, config.noise)
    init = jax.vmap(lambda key: Xor().init(key, points.places[:1])['params'])
    params = init(jax.random.split(weights_key, config.seeds))
    reference_keys, pruning_keys = (jax.random.split(key, config.seeds) for key in keys)

    steps = config.steps // _RECORDS * _RECORDS
    nothing = dns_jax.surgery({}, jax.random.key(0))
    dense = train_networks(nothing, params, reference_keys, points, steps)
    reference_errors = measure_error(dense, test)
    params = jax.tree.map(lambda leaves: leaves[:, -1], dense.params)

    rows, courses = [], {}
    pairs = [(method, c_rate) for method, c_rates in _C_RATES.items() for c_rate in c_rates]
    for method, c_rate in progress.bar(pairs, 'pruning', unit=' trainings'):
        pruner = make_pruner(method, c_rate, steps)
        course = train_networks(pruner, params, pruning_keys, points, steps)
        courses[method, c_rate] = course
        columns = (
            *(reference_errors, measure_error(course, test)),
            *(count_kept(course), count_returned(course)),
        )
        rows += [
            dict(zip(COLUMNS, (method, c_rate, seed, *numbers), strict=True))
            for seed, numbers in enumerate(zip(*map(np.ndarray.tolist, columns), strict=True))
        ]
    result = summarise(rows, config)
    _write(folder, rows, result)
    _draw(folder, rows, courses, config.solved, steps)
    print(result['table'])
    print(f'\nTable and pictures: {folder}')
    command_line.print_result({name: value for name, value in result.items() if name != 'table'})
    return result


def make_pruner(method: str, c_rate: float, steps: int) -> optax.GradientTransformation:
    """Makes a pruner that is done after seven tenths of the steps."""
    stop = 7 * steps // 10
    key = jax.random.key(0)  # each network has another, set when it begins
    if method == 'surgery':
        probability = dns_jax.update_probability(gamma=1e-3, stop=stop)
        rule = dns_jax.Rule(dns_jax.mean_std(c_rate), probability)
        return dns_jax.surgery(rule, key, dns_jax.has_axes)
    rounds = [round_ * stop // _ROUNDS for round_ in range(_ROUNDS)]
    return pruners.han(c_rate, rounds, key, takes_part=dns_jax.has_axes)


def summarise(rows: Sequence[dict[str, Any]], config: XorConfig) -> dict[str, Any]:
    """Counts the networks that solve XOR, and the connections of those, for each c.

    The smallest network of a seed is that of its best c, by the same test points.
    """
    solved = [row for row in rows if row['test_error'] <= config.solved]
    references = [row['reference_error'] for row in rows[: config.seeds]]
    references = [error for error in references if error <= config.solved]
    lines = []
    for method, c_rates in _C_RATES.items():
        for c_rate in c_rates:
            own = [row for row in solved if (row['method'], row['c_rate']) == (method, c_rate)]
            cells = [
                middle_and_range(own, name, '.0f') if own else '' for name in ('kept', 'returned')
            ]
            still = sum(row['reference_error'] <= config.solved for row in own)
            counts = (f'{len(own)} of {config.seeds}', f'{still} of {len(references)}')
            lines.append((method, f'{c_rate:g}', *counts, *cells))
    smallest = {}
    for method in _C_RATES:
        own = [row for row in solved if row['method'] == method]
        smallest[method] = [
            min((row['kept'] for row in own if row['seed'] == seed), default=None)
            for seed in range(config.seeds)
        ]
    header = ('method', 'c', 'solved', 'solved as before', 'kept', 'of these returned')
    return {
        'table': table(header, lines),
        'references_solved': len(references),
        'reference_error': statistics.median(references) if references else None,
        'smallest': smallest,
    }


def _write(folder, rows, result) -> None:
    write_whole(folder / 'xor.csv', to_csv(rows))
    write_whole(folder / 'xor.md', result['table'] + '\n')
    plots.save(xor_plots.smallest_figure(result['smallest']), folder / 'smallest.png')


def _draw(folder, rows, courses, solved, steps) -> None:
    """Draws the smallest network of surgery, of these the one that shows most splicing."""
    chosen = [row for row in rows if row['method'] == 'surgery' and row['test_error'] <= solved]
    if not chosen:
        for name in ('course.png', 'course.gif'):  # of an earlier run
            (folder / name).unlink(missing_ok=True)
        return
    best = min(chosen, key=lambda row: (row['kept'], -row['returned']))
    course = jax.tree.map(
        lambda leaves: np.asarray(leaves[best['seed']]), courses['surgery', best['c_rate']]
    )
    plots.save(xor_plots.course_figure(course, steps), folder / 'course.png')
    write_whole(folder / 'course.gif', xor_plots.animate(course, steps))


if __name__ == '__main__':
    command_line.launch({}, solve, XorConfig)
