"""A whole run: reference network, surgery, evaluation, report.

Every phase saves checkpoints, continues from the newest on --resume, and leaves on SIGTERM or
Ctrl-C after saving. Numbers that choices are made on come from the validation split; the test
split is read once, at the end.
"""

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import dns_jax
from experiments import data, models, report, train
from experiments.checkpoints import Checkpoints
from experiments.flags import Config, parse_learning_rate, parse_table
from experiments.workdir import PHASES, Records, claim, read_flags


class Stopped(RuntimeError):
    """The run was asked to leave by a signal, and has saved its state."""


def run(config: Config) -> dict[str, Any]:
    """Does all that a configuration asks for and prints the result.

    Args:
      config: from `experiments.flags`.

    Returns:
      The summary, as written to `summary.json`; the last line on standard output is the same as
      one JSON object.

    Raises:
      ValueError: if flags do not fit each other, the network or the folder.
      OSError: if a folder cannot be read or written.
      FloatingPointError: if the loss is not finite.
      Stopped: after SIGTERM or SIGINT.
    """
    started = time.perf_counter()
    trainer = Trainer(config)
    with stop_on_signals() as stopping:
        reference = trainer.train_reference(stopping)
        final = trainer.train_surgery(reference, stopping)
    summary = trainer.summarise(reference, final, time.perf_counter() - started)
    first_layer = final.masks.get('fc1', {}).get('kernel')
    sees_pixels = config.network == 'lenet300' and jnp.ndim(first_layer)
    paths = report.write(config.workdir, summary, np.asarray(first_layer) if sees_pixels else None)
    print(report.format_table(summary))
    print(f'\nReport and pictures: {paths[-1]}, {paths[-1].parent / "plots"}')
    print(json.dumps(summary))
    return summary


class Trainer:
    """What the phases of one run share: the data, the network and the folder."""

    def __init__(self, config: Config):
        """Builds all of it, and claims the folder last: a bad flag leaves no run behind.

        Args:
          config: of the run.

        Raises:
          ValueError: if flags do not fit each other, the network or the folder.
          OSError: if a folder cannot be read or written.
        """
        self.config = config
        self.network = models.NETWORKS[config.network]()
        image_shape = (28, 28, 1)
        weights_key, coins_key = jax.random.split(jax.random.key(config.seed))
        self.initial = self.network.init(weights_key, jnp.zeros((1, *image_shape)))['params']
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.initial))
        self.positions = models.positions(self.network, image_shape)
        self.reference_optimizer = make_optimizer(
            config,
            dns_jax.surgery({}, coins_key),
            parse_learning_rate(config.reference_learning_rate, config.reference_steps),
            config.reference_weight_decay,
        )
        takes_part = dns_jax.has_axes if config.prune_biases else dns_jax.is_kernel
        self.optimizer = make_optimizer(
            config,
            dns_jax.surgery(make_rules(config, self.initial), coins_key, takes_part),
            parse_learning_rate(config.learning_rate, config.surgery_steps),
            config.weight_decay,
        )
        self.dataset = data.load(
            config.dataset, config.data_dir, config.manual_dir, config.train_on_all
        )
        self.error = train.make_error(self.network)
        self.reference = self._read_reference() if config.reference else None
        self.folder = claim(config)
        self.records = Records(self.folder, config.tensorboard)

    def train_reference(self, stopping: list[int]) -> dns_jax.Params:
        """Trains the dense network, or takes the one that --reference names."""
        if self.reference is not None:
            return self.reference
        state = self._dense_state()
        steps = self.config.reference_steps
        return self._train('reference', self.reference_optimizer, state, steps, stopping).params

    def train_surgery(self, params: dns_jax.Params, stopping: list[int]) -> train.TrainState:
        """Operates on the network, from its dense weights."""
        # A copy: the loop takes over the memory of its state, and the reference is still needed.
        state = train.TrainState(jax.tree.map(jnp.copy, params), self.optimizer.init(params))
        return self._train('surgery', self.optimizer, state, self.config.surgery_steps, stopping)

    def summarise(
        self, reference: dns_jax.Params, final: train.TrainState, seconds: float
    ) -> dict[str, Any]:
        """Measures sizes and errors, and reads the test split."""
        config = self.config
        pruned = dns_jax.apply_masks(final.params, final.masks)
        sizes = dns_jax.measure_sizes(final.params, final.masks, self.positions)
        return {
            'network': config.network,
            'dataset': config.dataset,
            'seed': config.seed,
            'steps': config.surgery_steps,
            'reference_validation_error': self.error(reference, self.dataset.validation),
            'reference_error': self.error(reference, self.dataset.test),
            'validation_error': self.error(pruned, self.dataset.validation),
            'test_error': self.error(pruned, self.dataset.test),
            **_size_summary(sizes.total),
            'per_layer': {layer: _size_summary(size) for layer, size in sizes.layers.items()},
            'seconds': round(seconds, 1),
            'commit': _commit(),
            'jax': jax.__version__,
            'device': jax.devices()[0].device_kind,
            'flags': config.identity(),
        }

    def _dense_state(self) -> train.TrainState:
        params = jax.tree.map(jnp.copy, self.initial)
        return train.TrainState(params, self.reference_optimizer.init(params))

    def _read_reference(self) -> dns_jax.Params:
        """Reads the finished reference of another run on the same network and images."""
        folder = Path(self.config.reference or '')
        checkpoints_folder = folder / 'checkpoints' / 'reference'
        if not checkpoints_folder.is_dir():
            raise FileNotFoundError(f'--reference={folder} has no {checkpoints_folder}')
        flags, own = read_flags(folder), self.config.identity()
        # With train_on_all another run has seen the images that this one validates with.
        for name in ('network', 'dataset', 'train_on_all'):
            if flags.get(name) != own[name]:
                raise ValueError(
                    f'--reference={folder} is of a run with {name} {flags.get(name)!r}; wanted '
                    f'{own[name]!r}'
                )
        with Checkpoints(checkpoints_folder) as checkpoints:
            return checkpoints.restore(self._dense_state(), flags['reference_steps'])[1].params

    def _train(self, phase, optimizer, state, steps, stopping) -> train.TrainState:
        config, split = self.config, self.dataset.train
        run_chunk = train.make_chunk(train.make_step(self.network, optimizer))
        images, labels = jax.device_put((split.images, split.labels))
        with Checkpoints(self.folder / 'checkpoints' / phase) as checkpoints:
            done = 0
            if config.resume and checkpoints.latest_step() is not None:
                done, state = checkpoints.restore(state)
            self.records.rewind(phase, done)
            with tqdm(total=steps, initial=done, desc=phase, unit='step', disable=None) as bar:
                while done < steps:
                    count = min(config.record_every, steps - done)
                    batches = train.batch_indices(
                        (config.seed, PHASES.index(phase)),
                        len(labels),
                        config.batch_size,
                        done,
                        count,
                    )
                    state, chunk = run_chunk(state, images, labels, batches)
                    broken = train.first_not_finite(chunk.losses)
                    # The last step may break the weights, with no loss after it that would tell.
                    if broken or not train.all_finite(state.params):
                        raise FloatingPointError(
                            f'the loss or a weight is not finite at step {done + (broken or count)}'
                            f' of the {phase} phase; {self._explain(phase, state, checkpoints)}'
                        )
                    done += count
                    record = self._record(phase, done, state, chunk)
                    self.records.append(record)
                    bar.update(count)
                    bar.set_postfix(_progress(record, self.parameters))
                    if stopping or done == steps or done % config.checkpoint_every == 0:
                        checkpoints.save(done, state)
                    if stopping:
                        break
        if stopping:
            raise Stopped(
                f'{signal.Signals(stopping[0]).name}: saved {phase} at step {done} in '
                f'{self.folder}; continue with --resume'
            )
        return state

    def _record(self, phase, step, state, chunk) -> dict[str, Any]:
        pruned = dns_jax.apply_masks(state.params, state.masks)
        sizes = dns_jax.measure_sizes(state.params, state.masks)
        return {
            'phase': phase,
            'step': step,
            'loss': float(np.mean(chunk.losses)),
            'validation_error': self.error(pruned, self.dataset.validation),
            'kept': {layer: size.kept for layer, size in sizes.layers.items()},
            'pruned': {layer: int(event.pruned) for layer, event in chunk.events.items()},
            'spliced': {layer: int(event.spliced) for layer, event in chunk.events.items()},
        }

    def _explain(self, phase, state, checkpoints) -> str:
        sizes = dns_jax.measure_sizes(state.params, state.masks)
        densities = ', '.join(f'{layer} {size.density:.2%}' for layer, size in sizes.layers.items())
        step = checkpoints.latest_step()
        good = 'none of this phase' if step is None else f'that of step {step}'
        return (
            f'the densities are {densities}; the last good checkpoint is {good} in '
            f'{self.folder / "checkpoints" / phase}'
        )


def make_optimizer(
    config: Config,
    surgery: optax.GradientTransformation,
    learning_rate: dns_jax.Schedule,
    weight_decay: float,
) -> optax.GradientTransformation:
    """Chains surgery and Caffe's SGD.

    Args:
      config: momentum and bias_scale.
      surgery: of the phase.
      learning_rate: of the phase.
      weight_decay: of the phase.

    Returns:
      The optimizer of the phase.
    """
    sgd = dns_jax.caffe_sgd(learning_rate, config.momentum, weight_decay, config.bias_scale)
    return optax.chain(surgery, sgd)


def make_rules(config: Config, params: dns_jax.Params) -> dict[str, dns_jax.Rule]:
    """Joins the tables of the flags into one rule per layer.

    Args:
      config: `c_rate`, `start` and `stop` by layer pattern; a layer without `c_rate` stays dense.
      params: the network's weights.

    Returns:
      `{layer name: rule}`.

    Raises:
      ValueError: if a pattern matches no layer, or a number is out of range.
    """
    layers: Iterable[str] = dns_jax.group_by_layer(params)
    tables = {}
    for name, number in (('c_rate', float), ('start', int), ('stop', int)):
        try:
            table = parse_table(getattr(config, name), number)
            matches = dns_jax.match_patterns(table, layers)
        except ValueError as error:
            raise ValueError(f'--{name}: {error}') from error
        tables[name] = {layer: value for layer, (_, value) in matches.items()}
        # A start or stop for a layer that stays dense would be a slip.
        layers = tables['c_rate']
    return {
        layer: dns_jax.Rule(
            dns_jax.mean_std(c_rate, config.hysteresis),
            dns_jax.update_probability(
                config.update_gamma,
                config.update_power,
                stop=tables['stop'].get(layer),
                start=tables['start'].get(layer, 0),
            ),
        )
        for layer, c_rate in tables['c_rate'].items()
    }


@contextlib.contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """Turns SIGTERM and SIGINT into an entry of a list, for a loop to leave at a good moment."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _progress(record, parameters) -> dict[str, str]:
    compression = parameters / max(sum(record['kept'].values()), 1)
    return {
        'loss': f'{record["loss"]:.4f}',
        'validation_error': f'{record["validation_error"]:.2f} %',
        'compression': f'{compression:.1f}×',
    }


def _size_summary(size: dns_jax.Size) -> dict[str, Any]:
    # JSON has no infinity: a layer of which nothing is kept has no compression.
    compression = size.compression if size.kept else None
    return {**size._asdict(), 'density': size.density, 'compression': compression}


def _commit() -> str:
    """Names the commit the code stands at, marked where the code differs from it."""
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=12']
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:  # no git here, which must not fail a run at its end
        return 'unknown'
    return answer.stdout.strip() or 'unknown'
