"""One phase of one run, and the loop that takes those of several runs to their end.

A phase saves checkpoints, goes on from the newest on --resume, leaves on SIGTERM or Ctrl-C after
saving, and stops or goes back where training breaks down.
"""

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import dns_jax
from experiments.devices import hosts, progress
from experiments.reports.records import PHASES
from experiments.reports.tables import format_of
from experiments.training import divergence, plan
from experiments.training.checkpoints import Checkpoints
from experiments.training.steps import Chunk, TrainState, make_step
from experiments.training.task import Run, Task
from experiments.training.workdir import CHECKPOINTS_FOLDER


class Stopped(RuntimeError):
    """The run was asked to leave by a signal, and has saved its state."""


class PhaseOfRun:
    """One phase of one run: where it is, and what it leaves on disk."""

    def __init__(self, phase: plan.Phase, run: Run, state: TrainState):
        self.name, self.steps, self.run, self.state = phase.name, phase.steps, run, state
        self.flags, self.feed = run.plan.config, run.task.feed
        self.folder = run.folder / CHECKPOINTS_FOLDER / phase.name
        self.checkpoints = Checkpoints(self.folder)
        self.done, self.progress = 0, {}
        self.setbacks: tuple[bool, ...] = ()  # for each, whether surgery had emptied a layer
        self._unrecorded: list[Chunk] = []
        if self.flags.resume and self.checkpoints.latest_step() is not None:
            self._return_to_checkpoint()
        else:
            hosts.on_first(lambda: run.records.rewind(self.name, 0))
            if self.flags.on_divergence == 'rollback':
                self.save()
        self._kept = self._count_kept()

    def steps_of_next_call(self) -> int:
        """Says how many steps to take in one call: of a record, as many in each."""
        record_every, most = self.flags.record_every, self.feed.steps_per_call
        # Every length is compiled: of one length, if that makes no more than twice as many calls.
        alike = [n for n in range(max(most // 2, 1), most + 1) if record_every % n == 0]
        left = record_every - self.done % record_every, self.steps - self.done
        return min(max(alike, default=most), *left)

    def batches(self, count: int) -> Any:
        """Gives the batches of the next steps; after a setback, others."""
        seed = self.flags.seed, PHASES.index(self.name)
        if self.setbacks:
            seed = *seed, len(self.setbacks)
        return self.feed.batches(seed, self.done, count)

    def advance(self, state: TrainState, chunk: Chunk) -> None:
        """Takes over what a call gave and records it where it is time, or goes back."""
        chunk = jax.device_get(chunk)
        if breakdown := divergence.find_breakdown(chunk, self._kept, state.params):
            self._set_back(state, breakdown)
            return
        self.state, self.done = state, self.done + len(chunk.losses)
        for layer, events in chunk.events.items():
            self._kept[layer] += int(np.sum(events.spliced) - np.sum(events.pruned))
        self._unrecorded.append(chunk)
        if self.done % self.flags.record_every == 0 or self.done == self.steps:
            since = jax.tree.map(lambda *parts: np.concatenate(parts), *self._unrecorded)
            record = self.run.record(self.name, self.done, state, since)
            self._unrecorded = []
            self.progress = _progress(record, self.run.task)

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
        hosts.on_first(lambda: self.run.records.rewind(self.name, self.done))

    def _set_back(self, state: TrainState, breakdown: divergence.Breakdown) -> None:
        """Goes back to the last good checkpoint, or ends the run."""
        message = self._explain(state, breakdown)
        if self.flags.on_divergence == 'stop':
            raise divergence.Diverged(message, self.name)
        setbacks = *self.setbacks, breakdown.emptied
        if len(setbacks) > divergence.MOST_SETBACKS:
            times = len(setbacks) - 1
            raise divergence.Diverged(f'{message}; the run had gone back {times} times', self.name)
        self.state = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        self._return_to_checkpoint()
        self._kept, self.setbacks = self._count_kept(), setbacks
        masks = 'masks as they are there' if any(setbacks) else 'surgery as before'
        logging.warning(
            '%s; going on from step %s with half the learning rate, other batches and %s',
            *(message, self.done, masks),
        )

    def _count_kept(self) -> dict[str, int]:
        stacked = self.run.plan.pruning.stacked
        return dns_jax.count_kept(dns_jax.unstack(stacked, self.state.params, self.state.masks)[1])

    def _explain(self, state: TrainState, breakdown: divergence.Breakdown) -> str:
        stacked = self.run.plan.pruning.stacked
        params, masks = dns_jax.unstack(stacked, state.params, state.masks)
        sizes = dns_jax.measure_sizes(params, masks)
        densities = ', '.join(f'{layer} {size.density:.2%}' for layer, size in sizes.layers.items())
        step = self.checkpoints.latest_step()
        good = 'none of this phase' if step is None else f'that of step {step}'
        return (
            f'{breakdown.reason} at step {self.done + breakdown.step} of the {self.name} phase; '
            f'the densities are {densities}; the last good checkpoint is {good} in {self.folder}'
        )


def train_side_by_side(
    phase: plan.Phase, runs: Sequence[Run], states: Sequence[TrainState], stopping: list[int]
) -> list[TrainState]:
    """Takes a phase of some runs to its end, side by side where they are at one step.

    Args:
      phase: what is to be done, the same for all.
      runs: differ in seed and places alone.
      states: of each, at the start of the phase; they are donated.
      stopping: from `stop_on_signals`.

    Raises:
      Diverged: if training breaks down.
      Stopped: after a signal.
    """
    courses = [PhaseOfRun(phase, *each) for each in zip(runs, states, strict=True)]
    task, flags, first = runs[0].task, runs[0].plan.config, courses[0]

    @functools.cache
    def compile_calls(setbacks: tuple[bool, ...]) -> Callable[..., Any]:
        optimizer = phase.make_optimizer(task.shapes, setbacks)
        dropout = phase.make_dropout(task.shapes)
        step = make_step(
            task.network,
            optimizer,
            task.inputs,
            dropout=dropout,
            accumulate=task.feed.accumulate,
            rounding=phase.make_rounding(),
            augmentation=phase.make_augmentation(),
            soften=phase.soften,
        )
        return task.feed.compile(step, tuple(course.state for course in courses))

    stop = 0
    with contextlib.ExitStack() as stack:
        for course in courses:
            stack.enter_context(course.checkpoints)
        bar = progress.bar(total=phase.steps, initial=first.done, desc=phase.name, unit=' steps')
        stack.enter_context(bar)
        for course in courses:
            if not phase.steps:
                course.save()  # for runs that start from it
        while not stop and (done := min(course.done for course in courses)) < phase.steps:
            # After a setback, or a kill between two saves, those behind catch up first.
            behind = [course for course in courses if course.done == done]
            group = [course for course in behind if course.setbacks == behind[0].setbacks]
            count = behind[0].steps_of_next_call()
            batches = tuple(course.batches(count) for course in group)
            results = compile_calls(group[0].setbacks)(
                tuple(course.state for course in group), batches
            )
            for course, (state, chunk) in zip(group, results, strict=True):
                course.advance(state, chunk)
            bar.update(first.done - bar.n)
            bar.set_postfix(first.progress)
            stop = hosts.max_over_processes(stopping[0] if stopping else 0)
            # On a signal also those that wait for others to catch up.
            for course in courses if stop else group:
                if stop or course.done == phase.steps or not course.done % flags.checkpoint_every:
                    course.save()
    if stop:
        again = '--resume --nooverwrite' if flags.overwrite else '--resume'
        raise Stopped(
            f'{signal.Signals(stop).name}: saved {phase.name} at step {first.done} in '
            f'{first.run.folder}; continue with {again}'
        )
    for course in courses:
        course.run.setbacks[phase.name] = len(course.setbacks)
    return [course.state for course in courses]


def _to_lists(chunk: Chunk) -> list[Any]:
    events = {
        layer: [np.asarray(counts).tolist() for counts in pair]
        for layer, pair in chunk.events.items()
    }
    return [chunk.losses.tolist(), events]


def _from_lists(lists: Sequence[Any]) -> Chunk:
    losses, events = lists
    pairs = {layer: map(jnp.int32, pair) for layer, pair in events.items()}
    return Chunk(
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


def _progress(record: dict[str, Any], task: Task) -> dict[str, str]:
    compression = task.parameters / max(sum(record['kept'].values()), 1)
    number, unit = format_of(task.metric.unit)
    return {
        'loss': f'{record["loss"]:.4f}',
        'validation_error': f'{record["validation_error"]:{number}}{unit}',
        'compression': f'{compression:.1f}×',
    }
