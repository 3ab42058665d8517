"""What runs share that differ in seed and places alone, and what each has of its own.

Numbers that choices are made on come from the validation split; the test split is read once, at
the end.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dns_jax
from experiments.config.command_line import identify
from experiments.devices import hosts
from experiments.networks import models
from experiments.reports.commits import describe_commit
from experiments.training import references, steps
from experiments.training.feeds import open_feed
from experiments.training.flags import Config
from experiments.training.plan import Plan
from experiments.training.workdir import Records, claim


class Task:
    """The data, the network and what is measured of it: the same for many runs."""

    def __init__(self, config: Config):
        """Opens the data.

        Args:
          config: of one of the runs.

        Raises:
          ValueError: if flags do not fit the data, or these are damaged.
          OSError: if data cannot be read or written.
          RuntimeError: if data are not to be had.
        """
        self.feed = open_feed(config)
        self.dataset, self.network = self.feed.dataset, self.feed.network
        self.inputs = models.inputs_of(config.network)
        shape, dtype = self.feed.example_shape, self.inputs.dtype
        self.shapes = models.shapes(self.network, shape, dtype)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.shapes))
        self.metric = steps.metric_of(self.inputs)
        self._measure = steps.make_measure(self.network, self.inputs, self.metric)

    def measure(self, weights: steps.Weights, split: Any) -> float:
        """Measures a network on a split, by the metric of the task."""
        return self._measure(weights.params, split, weights.statistics)

    def init(self, key: jax.Array) -> steps.Weights:
        """Makes what a run begins with."""
        example = jnp.zeros((1, *self.feed.example_shape), self.inputs.dtype)
        variables = dict(self.network.init(key, example))
        return steps.Weights(variables.pop('params'), variables)


class Run:
    """One run: its plan, its first weights, its folder."""

    def __init__(
        self,
        task: Task,
        plan: Plan,
        on_record: Callable[[dict[str, Any]], None] = lambda record: None,
    ):
        """Claims the folder last: a flag that does not fit leaves no run behind.

        Args:
          task: of this run and others.
          plan: of this one.
          on_record: called with each record once it is written.

        Raises:
          ValueError: if flags do not fit each other, the network or the folder.
          OSError: if a folder cannot be read or written.
        """
        self.task, self.plan, self.on_record = task, plan, on_record
        flags = plan.config
        weights_key, self._coins_key = jax.random.split(jax.random.key(flags.seed))
        self.initial = task.init(weights_key)
        plan.surgery.make_optimizer(task.shapes)  # what does not fit the data is refused
        self.setbacks: dict[str, int] = {}  # how often each phase went back to a checkpoint
        # Of the code that runs, which may be changed on disk before the end.
        self.commit, self.identity = describe_commit(), identify(flags)
        self.reference = None
        if flags.reference:
            like = self.start(plan.reference.make_optimizer(task.shapes), self.initial)
            self.reference = references.read(Path(flags.reference), self.identity, like)
        self.folder = Path(flags.workdir)
        hosts.on_first(lambda: self._open_folder(flags))

    def _open_folder(self, flags: Config) -> None:
        """Claims the folder and opens the records, which the first process alone has."""
        claim(self.folder, self.identity, flags.resume, flags.overwrite)
        self.records = Records(self.folder, flags.tensorboard)

    def start(
        self,
        optimizer: optax.GradientTransformation,
        weights: steps.Weights,
        masks: dns_jax.Masks | None = None,
    ) -> steps.TrainState:
        """Makes the state at the start of a phase, from given masks if there are some."""
        params, statistics = weights
        state = optax.tree.set(optimizer.init(params), key=jnp.copy(self._coins_key))
        if masks is not None:
            state = optax.tree.set(state, masks=masks)
        return self.task.feed.place(steps.TrainState(params, state, statistics))

    def record(
        self, phase: str, step: int, state: steps.TrainState, chunk: steps.Chunk
    ) -> dict[str, Any]:
        """Measures where the run is after a chunk, writes it down and returns it."""
        pruned = getattr(self.plan, phase).finish(state)
        params, masks = dns_jax.unstack(self.plan.pruning.stacked, state.params, state.masks)
        sizes = dns_jax.measure_sizes(params, masks)
        record = {
            'phase': phase,
            'step': step,
            'loss': float(np.mean(chunk.losses)),
            'validation_error': self.task.measure(pruned, self.task.dataset.validation),
            'kept': {layer: size.kept for layer, size in sizes.layers.items()},
            'pruned': {layer: int(np.sum(event.pruned)) for layer, event in chunk.events.items()},
            'spliced': {layer: int(np.sum(event.spliced)) for layer, event in chunk.events.items()},
        }
        hosts.on_first(lambda: self.records.append(record))
        self.on_record(record)
        return record
