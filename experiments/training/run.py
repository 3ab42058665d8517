"""A whole run: reference network, surgery, fine-tuning, evaluation, report.

Every phase saves checkpoints, continues from the newest on --resume, leaves on SIGTERM or Ctrl-C
after saving, and stops or goes back where training breaks down. What the phases share, and the
summary, is `trainer`'s.
"""

import contextlib
import functools
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

import dns_jax
from experiments.config.flags import Config
from experiments.config.parsers import parse_learning_rate
from experiments.devices import hosts, progress
from experiments.reports import run_report as report
from experiments.reports.records import PHASES
from experiments.training import divergence, probes
from experiments.training import steps as train
from experiments.training.checkpoints import Checkpoints
from experiments.training.pruning import make_optimizer
from experiments.training.task import Trainer
from experiments.training.workdir import CHECKPOINTS_FOLDER


class Stopped(RuntimeError):
    """The run was asked to leave by a signal, and has saved its state."""


def run(config: Config) -> dict[str, Any]:
    """Does all that a configuration asks for and prints the result.

    Args:
      config: from the command line.

    Returns:
      The summary, as written to `summary.json`; the last line on standard output is the same as
      one JSON object.

    Raises:
      ValueError: if flags do not fit each other, the network or the folder.
      OSError: if a folder cannot be read or written.
      Diverged: if training breaks down.
      Stopped: after SIGTERM or SIGINT.
    """
    (summary,) = run_together([config])
    if not hosts.is_first():
        return summary
    folder = Path(config.workdir)
    print(report.format_table(summary))
    print(f'\nReport: {folder / "report.html"}')
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
      The summary of each run, as written to its folder. Its `seconds` and `pruning_seconds` are
      those of this call: of all runs together, and after --resume of what was left to do.

    Raises:
      As `run` does.
    """
    started = time.perf_counter()
    trainers = [Trainer(config, on_record) for config in configs]
    with stop_on_signals() as stopping:
        dense = train_references(trainers, stopping)
        trained = time.perf_counter()
        operated = train_surgery(trainers, dense, stopping)
        # Before fine-tuning, which donates the states.
        returns = [probes.get_returns(state.opt_state) for state in operated]
        finals = finetune(trainers, operated, stopping)
    now = time.perf_counter()
    seconds = {'seconds': round(now - started, 1), 'pruning_seconds': round(now - trained, 1)}
    return [
        trainer.finish(reference, final, seconds, returned)
        for trainer, reference, final, returned in zip(
            trainers, dense, finals, returns, strict=True
        )
    ]


def train_references(trainers: Sequence[Trainer], stopping: list[int]) -> list[dns_jax.Params]:
    """Trains the dense network of each run, or takes the ones that --reference names."""
    given = [trainer.reference for trainer in trainers if trainer.reference is not None]
    if given:
        return given
    steps = trainers[0].config.reference_steps
    phases = [Phase('reference', trainer, trainer.dense_state(), steps) for trainer in trainers]
    states = _train(phases, trainers[0].make_reference_optimizer, stopping)
    return [state.params for state in states]


def train_surgery(
    trainers: Sequence[Trainer], dense: Sequence[dns_jax.Params], stopping: list[int]
) -> list[train.TrainState]:
    """Operates on the network of each run, from its dense weights."""
    phases = []
    for trainer, params in zip(trainers, dense, strict=True):
        for warning in trainer.find_emptied_layers(params):
            logging.warning('%s', warning)
        # A copy: the loop donates its state, and the reference is still needed.
        params = jax.tree.map(jnp.copy, params)
        state = train.TrainState(params, trainer.make_optimizer().init(params))
        state = trainer.feed.place(state)
        phases.append(Phase('surgery', trainer, state, trainer.config.surgery_steps))
    return _train(phases, trainers[0].make_optimizer, stopping)


def finetune(
    trainers: Sequence[Trainer], states: Sequence[train.TrainState], stopping: list[int]
) -> list[train.TrainState]:
    """Trains the kept connections of each run on, the masks frozen as surgery left them."""
    config = trainers[0].config
    steps = config.finetuning_steps
    if not steps:
        return list(states)
    make = functools.partial(
        make_optimizer,
        config,
        divergence.frozen(trainers[0].pruner),
        parse_learning_rate(config.finetuning_learning_rate, steps),
        config.finetuning_weight_decay,
    )
    phases = []
    for trainer, state in zip(trainers, states, strict=True):
        # The optimizer is the first run's; masks and key are each run's own.
        key = optax.tree.get(state.opt_state, 'key')
        start = optax.tree.set(make().init(state.params), masks=state.masks, key=key)
        state = trainer.feed.place(train.TrainState(state.params, start))
        phases.append(Phase('finetuning', trainer, state, steps))
    return _train(phases, make, stopping)


class Phase:
    """One phase of one run: where it is, and what it leaves on disk."""

    def __init__(self, name: str, trainer: Trainer, state: train.TrainState, steps: int):
        self.name, self.trainer, self.state, self.steps = name, trainer, state, steps
        self.folder = trainer.folder / CHECKPOINTS_FOLDER / name
        self.checkpoints = Checkpoints(self.folder)
        self.done, self.progress = 0, {}
        self.setbacks: tuple[bool, ...] = ()  # for each, whether surgery had emptied a layer
        self._unrecorded: list[train.Chunk] = []
        if trainer.config.resume and self.checkpoints.latest_step() is not None:
            self._return_to_checkpoint()
        else:
            hosts.on_first(lambda: trainer.records.rewind(name, 0))
            if trainer.config.on_divergence == 'rollback':
                self.save()
        self._kept = dns_jax.count_kept(self.state.masks)

    def steps_of_next_call(self) -> int:
        """Says how many steps to take in one call: of a record, as many in each."""
        record_every, most = self.trainer.config.record_every, self.trainer.feed.steps_per_call
        # Every length is compiled: of one length, if that makes no more than twice as many calls.
        alike = [n for n in range(most // 2, most + 1) if record_every % n == 0]
        left = record_every - self.done % record_every, self.steps - self.done
        return min(max(alike, default=most), *left)

    def batches(self, count: int) -> Any:
        """Gives the batches of the next steps; after a setback, others."""
        seed = self.trainer.config.seed, PHASES.index(self.name)
        if self.setbacks:
            seed = *seed, len(self.setbacks)
        return self.trainer.feed.batches(seed, self.done, count)

    def advance(self, state: train.TrainState, chunk: train.Chunk) -> None:
        """Takes over what a call gave and records it where it is time, or goes back."""
        chunk = jax.device_get(chunk)
        if breakdown := divergence.find_breakdown(chunk, self._kept, state.params):
            self._set_back(state, breakdown)
            return
        self.state, self.done = state, self.done + len(chunk.losses)
        for layer, events in chunk.events.items():
            self._kept[layer] += int(np.sum(events.spliced) - np.sum(events.pruned))
        self._unrecorded.append(chunk)
        if self.done % self.trainer.config.record_every == 0 or self.done == self.steps:
            since = jax.tree.map(lambda *parts: np.concatenate(parts), *self._unrecorded)
            record = self.trainer.record(self.name, self.done, state, since)
            self._unrecorded = []
            self.progress = _progress(record, self.trainer.parameters)

    def save(self) -> None:
        """Saves a checkpoint of the step the phase is at, where there is none."""
        if self.done != self.checkpoints.latest_step():
            unrecorded = [_to_lists(chunk) for chunk in self._unrecorded]
            notes = {'setbacks': list(self.setbacks), 'unrecorded': unrecorded}
            self.checkpoints.save(self.done, self.state, notes)

    def _return_to_checkpoint(self) -> None:
        self.done, self.state = self.checkpoints.restore(self.state)
        notes = self.checkpoints.notes(self.done)
        self.setbacks = tuple(notes['setbacks'])
        self._unrecorded = [_from_lists(lists) for lists in notes['unrecorded']]
        hosts.on_first(lambda: self.trainer.records.rewind(self.name, self.done))

    def _set_back(self, state: train.TrainState, breakdown: divergence.Breakdown) -> None:
        """Goes back to the last good checkpoint, or ends the run."""
        message = self._explain(state, breakdown)
        if self.trainer.config.on_divergence == 'stop':
            raise divergence.Diverged(message, self.name)
        setbacks = *self.setbacks, breakdown.emptied
        if len(setbacks) > divergence.MOST_SETBACKS:
            times = len(setbacks) - 1
            raise divergence.Diverged(f'{message}; the run had gone back {times} times', self.name)
        self.state = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        self._return_to_checkpoint()
        self._kept, self.setbacks = dns_jax.count_kept(self.state.masks), setbacks
        masks = 'masks as they are there' if any(setbacks) else 'surgery as before'
        logging.warning(
            '%s; going on from step %s with half the learning rate, other batches and %s',
            *(message, self.done, masks),
        )

    def _explain(self, state: train.TrainState, breakdown: divergence.Breakdown) -> str:
        sizes = dns_jax.measure_sizes(state.params, state.masks)
        densities = ', '.join(f'{layer} {size.density:.2%}' for layer, size in sizes.layers.items())
        step = self.checkpoints.latest_step()
        good = 'none of this phase' if step is None else f'that of step {step}'
        return (
            f'{breakdown.reason} at step {self.done + breakdown.step} of the {self.name} phase; '
            f'the densities are {densities}; the last good checkpoint is {good} in {self.folder}'
        )


def _train(
    phases: Sequence[Phase],
    make_optimizer: Callable[..., optax.GradientTransformation],
    stopping: list[int],
) -> list[train.TrainState]:
    """Takes the same phase of some runs to its end, side by side where they are at one step."""
    first = phases[0]
    trainer, steps, name = first.trainer, first.steps, first.name

    @functools.cache
    def compile_calls(setbacks: tuple[bool, ...]) -> Callable[..., Any]:
        step = train.make_step(
            trainer.network,
            make_optimizer(setbacks=setbacks),
            trainer.inputs,
            trainer.dropout(name),
            trainer.feed.accumulate,
        )
        return trainer.feed.compile(step, tuple(phase.state for phase in phases))

    stop = 0
    with contextlib.ExitStack() as stack:
        for phase in phases:
            stack.enter_context(phase.checkpoints)
        bar = progress.bar(total=steps, initial=first.done, desc=name, unit=' steps')
        stack.enter_context(bar)
        while not stop and (done := min(phase.done for phase in phases)) < steps:
            # After a setback, or a kill between two saves, those behind catch up first.
            behind = [phase for phase in phases if phase.done == done]
            group = [phase for phase in behind if phase.setbacks == behind[0].setbacks]
            count = behind[0].steps_of_next_call()
            batches = tuple(phase.batches(count) for phase in group)
            states = tuple(phase.state for phase in group)
            results = compile_calls(group[0].setbacks)(states, batches)
            for phase, (state, chunk) in zip(group, results, strict=True):
                phase.advance(state, chunk)
            bar.update(first.done - bar.n)
            bar.set_postfix(first.progress)
            stop = hosts.highest(stopping[0] if stopping else 0)
            # On a signal also those that wait for others to catch up.
            for phase in phases if stop else group:
                if stop or phase.done == steps or not phase.done % trainer.config.checkpoint_every:
                    phase.save()
    if stop:
        again = '--resume --nooverwrite' if trainer.config.overwrite else '--resume'
        raise Stopped(
            f'{signal.Signals(stop).name}: saved {name} at step {first.done} in '
            f'{trainer.folder}; continue with {again}'
        )
    for phase in phases:
        phase.trainer.setbacks[name] = len(phase.setbacks)
    return [phase.state for phase in phases]


def _to_lists(chunk: train.Chunk) -> list[Any]:
    events = {
        layer: [np.asarray(counts).tolist() for counts in pair]
        for layer, pair in chunk.events.items()
    }
    return [chunk.losses.tolist(), events]


def _from_lists(lists: Sequence[Any]) -> train.Chunk:
    losses, events = lists
    pairs = {layer: map(jnp.int32, pair) for layer, pair in events.items()}
    return train.Chunk(
        jnp.float32(losses), {layer: dns_jax.Events(*pair) for layer, pair in pairs.items()}
    )


@contextlib.contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """Turns SIGTERM and SIGINT into an entry of a list, for a loop to leave at a good moment.

    The same signal a second time ends the program at once.
    """
    received: list[int] = []

    def receive(number, frame):
        del frame
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    previous = {
        number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)
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
