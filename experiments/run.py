"""A whole run: reference network, surgery, fine-tuning, evaluation, report.

Every phase saves checkpoints, continues from the newest on --resume, and leaves on SIGTERM or
Ctrl-C after saving. Numbers that choices are made on come from the validation split; the test
split is read once, at the end.
"""

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import dns_jax
from dns_jax.sparse import save_sparse
from experiments import data, models, references, report, train
from experiments.checkpoints import Checkpoints
from experiments.flags import Config, parse_learning_rate
from experiments.rules import frozen, make_optimizer, make_rules
from experiments.workdir import PHASES, Records, claim


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
    (summary,) = run_together([config])
    folder = Path(config.workdir)
    print(report.format_table(summary))
    print(f'\nReport and pictures: {folder / "report.md"}, {folder / "plots"}')
    print(json.dumps(summary))
    return summary


def run_together(
    configs: Sequence[Config], on_record: Callable[[dict[str, Any]], None] = lambda record: None
) -> list[dict[str, Any]]:
    """Does runs that differ in seed and places alone, side by side in one program.

    Args:
      configs: one for each run.
      on_record: called with each record once it is written; what it raises ends the runs.

    Returns:
      The summary of each run, as written to its folder.

    Raises:
      As `run` does.
    """
    started = time.perf_counter()
    trainers = [Trainer(config, on_record) for config in configs]
    with stop_on_signals() as stopping:
        dense = train_references(trainers, stopping)
        finals = finetune(trainers, train_surgery(trainers, dense, stopping), stopping)
    seconds = time.perf_counter() - started
    return [
        trainer.finish(reference, final, seconds)
        for trainer, reference, final in zip(trainers, dense, finals, strict=True)
    ]


class Trainer:
    """What the phases of one run share: the data, the network and the folder."""

    def __init__(
        self, config: Config, on_record: Callable[[dict[str, Any]], None] = lambda record: None
    ):
        """Builds all of it, and claims the folder last: a bad flag leaves no run behind.

        Args:
          config: of the run.
          on_record: called with each record once it is written.

        Raises:
          ValueError: if flags do not fit each other, the network or the folder.
          OSError: if a folder cannot be read or written.
        """
        self.config, self.on_record = config, on_record
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
        self.surgery = dns_jax.surgery(make_rules(config, self.initial), coins_key, takes_part)
        self.optimizer = make_optimizer(
            config,
            self.surgery,
            parse_learning_rate(config.learning_rate, config.surgery_steps),
            config.weight_decay,
        )
        # Of the code that runs, which may be changed on disk before the end.
        self.commit = _commit()
        self.dataset = data.load(
            config.dataset, config.data_dir, config.manual_dir, config.train_on_all
        )
        self.error = train.make_error(self.network)
        self.reference = references.read(config, self.dense_state()) if config.reference else None
        self.folder = claim(config)
        self.records = Records(self.folder, config.tensorboard)

    def finish(
        self, reference: dns_jax.Params, final: train.TrainState, seconds: float
    ) -> dict[str, Any]:
        """Writes the pruned network and the report, and returns the summary."""
        summary = self._summarise(reference, final, seconds)
        save_sparse(
            self.folder / 'pruned.safetensors',
            final.params,
            final.masks,
            {'network': self.config.network, 'input_scale': repr(train.INPUT_SCALE)},
        )
        first_layer = final.masks.get('fc1', {}).get('kernel')
        sees_pixels = self.config.network == 'lenet300' and jnp.ndim(first_layer)
        report.write(self.folder, summary, np.asarray(first_layer) if sees_pixels else None)
        return summary

    def _summarise(self, reference, final, seconds) -> dict[str, Any]:
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
            'commit': self.commit,
            'jax': jax.__version__,
            'device': jax.devices()[0].device_kind,
            'flags': config.identity(),
        }

    def dense_state(self) -> train.TrainState:
        """Makes the state at the start of dense training."""
        params = jax.tree.map(jnp.copy, self.initial)
        return train.TrainState(params, self.reference_optimizer.init(params))

    def record(
        self, phase: str, step: int, state: train.TrainState, chunk: train.Chunk
    ) -> dict[str, Any]:
        """Measures where the run is after a chunk, writes it down and returns it."""
        pruned = dns_jax.apply_masks(state.params, state.masks)
        sizes = dns_jax.measure_sizes(state.params, state.masks)
        record = {
            'phase': phase,
            'step': step,
            'loss': float(np.mean(chunk.losses)),
            'validation_error': self.error(pruned, self.dataset.validation),
            'kept': {layer: size.kept for layer, size in sizes.layers.items()},
            'pruned': {layer: int(event.pruned) for layer, event in chunk.events.items()},
            'spliced': {layer: int(event.spliced) for layer, event in chunk.events.items()},
        }
        self.records.append(record)
        self.on_record(record)
        return record


def train_references(trainers: Sequence[Trainer], stopping: list[int]) -> list[dns_jax.Params]:
    """Trains the dense network of each run, or takes the ones that --reference names."""
    given = [trainer.reference for trainer in trainers if trainer.reference is not None]
    if given:
        return given
    steps = trainers[0].config.reference_steps
    phases = [Phase('reference', trainer, trainer.dense_state(), steps) for trainer in trainers]
    return [state.params for state in _train(phases, trainers[0].reference_optimizer, stopping)]


def train_surgery(
    trainers: Sequence[Trainer], dense: Sequence[dns_jax.Params], stopping: list[int]
) -> list[train.TrainState]:
    """Operates on the network of each run, from its dense weights."""
    phases = []
    for trainer, params in zip(trainers, dense, strict=True):
        # A copy: the loop takes over the memory of its state, and the reference is still needed.
        state = train.TrainState(jax.tree.map(jnp.copy, params), trainer.optimizer.init(params))
        phases.append(Phase('surgery', trainer, state, trainer.config.surgery_steps))
    return _train(phases, trainers[0].optimizer, stopping)


def finetune(
    trainers: Sequence[Trainer], states: Sequence[train.TrainState], stopping: list[int]
) -> list[train.TrainState]:
    """Trains the kept connections of each run on, the masks frozen as surgery left them."""
    config = trainers[0].config
    steps = config.finetuning_steps
    if not steps:
        return list(states)
    optimizer = make_optimizer(
        config,
        frozen(trainers[0].surgery),
        parse_learning_rate(config.finetuning_learning_rate, steps),
        config.finetuning_weight_decay,
    )
    phases = []
    for trainer, state in zip(trainers, states, strict=True):
        start = optax.tree.set(optimizer.init(state.params), masks=state.masks)
        phases.append(Phase('finetuning', trainer, train.TrainState(state.params, start), steps))
    return _train(phases, optimizer, stopping)


class Phase:
    """One phase of one run: where it is, and what it leaves on disk."""

    def __init__(self, name: str, trainer: Trainer, state: train.TrainState, steps: int):
        self.name, self.trainer, self.state, self.steps = name, trainer, state, steps
        self.folder = trainer.folder / 'checkpoints' / name
        self.checkpoints = Checkpoints(self.folder)
        self.done, self.progress = 0, {}
        if trainer.config.resume and self.checkpoints.latest_step() is not None:
            self.done, self.state = self.checkpoints.restore(state)
        trainer.records.rewind(name, self.done)

    def batches(self, count: int) -> np.ndarray:
        """Chooses the images of the next steps."""
        config = self.trainer.config
        return train.batch_indices(
            (config.seed, PHASES.index(self.name)),
            len(self.trainer.dataset.train.labels),
            config.batch_size,
            self.done,
            count,
        )

    def advance(self, state: train.TrainState, chunk: train.Chunk) -> None:
        """Takes over what a chunk gave, unless it is broken, and records it."""
        broken = train.first_not_finite(chunk.losses)
        # The last step may break the weights, with no loss after it that would tell.
        if broken or not train.all_finite(state.params):
            step = self.done + (broken or len(chunk.losses))
            raise FloatingPointError(
                f'the loss or a weight is not finite at step {step} of the {self.name} phase; '
                f'{self._explain(state)}'
            )
        self.state, self.done = state, self.done + len(chunk.losses)
        record = self.trainer.record(self.name, self.done, state, chunk)
        self.progress = _progress(record, self.trainer.parameters)

    def save(self) -> None:
        """Saves a checkpoint of the step the phase is at."""
        self.checkpoints.save(self.done, self.state)

    def _explain(self, state) -> str:
        sizes = dns_jax.measure_sizes(state.params, state.masks)
        densities = ', '.join(f'{layer} {size.density:.2%}' for layer, size in sizes.layers.items())
        step = self.checkpoints.latest_step()
        good = 'none of this phase' if step is None else f'that of step {step}'
        return f'the densities are {densities}; the last good checkpoint is {good} in {self.folder}'


def _train(
    phases: Sequence[Phase], optimizer: optax.GradientTransformation, stopping: list[int]
) -> list[train.TrainState]:
    """Takes the same phase of some runs to its end, side by side where they are at one step."""
    trainer, steps, name = phases[0].trainer, phases[0].steps, phases[0].name
    config, split = trainer.config, trainer.dataset.train
    run_chunks = train.make_chunks(train.make_step(trainer.network, optimizer))
    images, labels = jax.device_put((split.images, split.labels))
    with contextlib.ExitStack() as stack:
        for phase in phases:
            stack.enter_context(phase.checkpoints)
        first = phases[0]
        bar = tqdm(total=steps, initial=first.done, desc=name, unit='step', disable=None)
        stack.enter_context(bar)
        while (done := min(phase.done for phase in phases)) < steps:
            # After a kill between two saves, those behind catch up first.
            group = [phase for phase in phases if phase.done == done]
            count = min(config.record_every, steps - done)
            batches = tuple(phase.batches(count) for phase in group)
            states = tuple(phase.state for phase in group)
            results = run_chunks(states, images, labels, batches)
            for phase, (state, chunk) in zip(group, results, strict=True):
                phase.advance(state, chunk)
            done += count
            if first in group:
                bar.update(count)
                bar.set_postfix(first.progress)
            if stopping or done == steps or done % config.checkpoint_every == 0:
                for phase in group:
                    phase.save()
            if stopping:
                break
    if stopping:
        raise Stopped(
            f'{signal.Signals(stopping[0]).name}: saved {name} at step {first.done} in '
            f'{trainer.folder}; continue with --resume'
        )
    return [phase.state for phase in phases]


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
