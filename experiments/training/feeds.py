"""How batches reach the steps of a phase, and where the state lies meanwhile.

A small data set lies on the device, and many steps are one compiled call. A large one is decoded
while the devices compute, on a mesh of them, and each step is a call.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import flax.linen as nn
import jax
import numpy as np

from experiments.data import resident, texts
from experiments.devices import hosts, meshes
from experiments.networks import models
from experiments.training import steps
from experiments.training.flags import Config
from experiments.training.image_flags import ImageConfig

_AHEAD = 2  # batches on their way to the devices beside the one computed with


class Feed(Protocol):
    """What a run asks of its feed, resident or streamed."""

    dataset: Any  # with the splits train, validation and test
    network: nn.Module
    accumulate: int  # parts that a step takes its batch in
    steps_per_call: int  # at most; a run that is asked to leave does so after a call
    example_shape: tuple[int, ...]
    options: dict[str, Any]  # that the network is made with, and its file holds

    def place(self, state: steps.TrainState) -> steps.TrainState:
        """Puts a new state where the steps want it."""
        ...

    def compile(
        self, step: steps.TrainStep, states: tuple[steps.TrainState, ...]
    ) -> Callable[[Any, Any], Any]:
        """Makes the function that takes steps, of states that are placed and their batches."""
        ...

    def batches(self, seed: tuple[int, ...], start: int, count: int) -> Any:
        """Gives the batches of steps `start` to `start + count`, the same however asked for."""
        ...


def open_feed(config: Config) -> Feed:
    """Opens the data of a run, and makes its network.

    Args:
      config: an `ImageConfig` for streamed images.

    Raises:
      ValueError: if the data, the network and the mesh do not fit the flags, or data are damaged.
      OSError: if data cannot be read or written.
      RuntimeError: if they are not to be had.
    """
    return Streamed(config) if isinstance(config, ImageConfig) else Resident(config)


class Resident:
    """A data set of small images, or a text, that lies on the device."""

    def __init__(self, config: Config):
        self.steps_per_call = 1 if models.is_slow_in_loops(config.network) else 20
        self._batch_size, self.accumulate = config.batch_size, 1
        folders = config.data_dir, config.manual_dir, config.train_on_all
        if config.dataset in texts.DATASETS:
            context = models.NETWORKS[config.network](**config.network_options).context
            self.dataset = texts.load(config.dataset, context, *folders)
            own = {'characters': len(self.dataset.alphabet)}
        else:
            self.dataset = resident.load(config.dataset, *folders)
            own = {}
        self._stacked = models.STACKED.get(config.network, {})
        self.network = models.NETWORKS[config.network](**config.network_options | own)
        self.options = models.describe(self.network)
        self.example_shape = models.example_shape(config.network, self.network)

    def place(self, state):
        """Leaves a new state as it is."""
        return state

    def compile(self, step, states):
        """Makes one call of all steps, for one network or several side by side."""
        del states
        split = self.dataset.train
        run_chunks = steps.make_run_chunks(step, split.gather, self._stacked)
        arrays = jax.device_put(split.arrays)
        return lambda states, batches: run_chunks(states, arrays, batches)

    def batches(self, seed, start, count):
        """Chooses examples by number."""
        return resident.batch_indices(seed, len(self.dataset.train), self._batch_size, start, count)


class Streamed:
    """Images that are decoded when they are needed, for a network spread over a mesh."""

    steps_per_call = 5  # of large networks

    def __init__(self, config: ImageConfig):
        # Takes seconds to import, which runs on resident data need not wait for.
        from experiments.data import builders
        from experiments.data.streams import open_streams

        self._batch_size, self.accumulate = config.batch_size, config.accumulate
        self.options = {}
        self._mesh = meshes.make_mesh(config.mesh, config.batch_size, config.accumulate)
        if jax.process_count() > 1:
            folders = resident.resolve_folders(config.data_dir, config.manual_dir)
            hosts.on_first(lambda: builders.prepare(config.dataset, *folders))
        source = open_streams(
            config.dataset,
            config.image_size,
            config.crop,
            config.data_dir,
            config.manual_dir,
            config.train_on_all,
            config.workers,
        )
        self.example_shape = source.image_shape
        options = {**config.network_options, 'classes': source.classes}
        self.network = models.NETWORKS[config.network](**options)
        # Threads evaluate: processes would be started again for every record.
        splits = {
            name: _Placed(
                dataclasses.replace(getattr(source, name), workers=0),
                self._mesh,
                # No more images at once than a step takes.
                config.batch_size // config.accumulate,
            )
            for name in ('train', 'validation', 'test')
        }
        self.dataset = dataclasses.replace(source, **splits)
        self._source = source
        self._stream: tuple[Any, Iterator[Any]] = (None, iter(()))

    def place(self, state):
        """Spreads a state over the mesh."""
        leaves, structure = jax.tree.flatten(state)
        places = jax.tree.leaves(meshes.shardings(self._mesh, state.params, state))
        # What lies there already is not copied: the next step donates it.
        moving = {
            number: leaf
            for number, leaf in enumerate(leaves)
            if not leaf.sharding.is_equivalent_to(places[number], leaf.ndim)
        }
        there = {number: places[number] for number in moving}
        # Every process begins with the whole state, which device_put does not take.
        moved = jax.jit(lambda leaves: leaves, out_shardings=there)(moving)
        placed = [moved.get(number, leaf) for number, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, placed)

    def compile(self, step, states):
        """Makes one call of every step."""
        run_chunk = steps.make_run_streamed_chunk(step, states[0])

        def run_chunks(states, batches):
            return tuple(map(run_chunk, states, batches))

        return run_chunks

    def batches(self, seed, start, count):
        """Goes on with the stream where it stands there, else opens it there."""
        place, stream = self._stream
        if place != (seed, start):
            rows = meshes.own_rows(self._mesh, self._batch_size)
            stream = self._source.train.train_batches(seed, self._batch_size, start, rows)
            stream = _sent_ahead(stream, self._mesh, self._batch_size)
        self._stream = (seed, start + count), stream
        return itertools.islice(stream, count)


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A split whose batches are spread over a mesh."""

    split: Any
    mesh: jax.sharding.Mesh
    batch_size: int

    def __len__(self) -> int:
        return len(self.split)

    def batches(self) -> Iterator[tuple[jax.Array, ...]]:
        rows = meshes.own_rows(self.mesh, self.batch_size)
        own = self.split.batches(self.batch_size, rows)
        return _sent_ahead(own, self.mesh, self.batch_size)


def _sent_ahead(
    batches: Iterable[tuple[np.ndarray, ...]], mesh: jax.sharding.Mesh, batch_size: int
) -> Iterator[tuple[jax.Array, ...]]:
    """Sends batches to the devices some steps before they are asked for."""
    waiting = collections.deque()
    for batch in batches:
        waiting.append(meshes.place_batch(mesh, batch, batch_size))
        if len(waiting) > _AHEAD:
            yield waiting.popleft()
    yield from waiting
