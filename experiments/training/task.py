"""What the phases of a run share: its data, networks, folder and measurements.

Numbers that choices are made on come from the validation split; the test split is read once, at
the end.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dns_jax
from dns_jax import sparse_training
from dns_jax.files.sparse import save_sparse
from experiments.config.flags import Config
from experiments.config.parsers import parse_learning_rate
from experiments.devices import hosts, meshes
from experiments.networks import models
from experiments.reports import run_report as report
from experiments.reports.commits import describe_commit
from experiments.reports.records import PHASES
from experiments.training import divergence, probes, references
from experiments.training import steps as train
from experiments.training.feeds import open_feed
from experiments.training.pruning import make_optimizer, make_pruner, make_rules, takes_part
from experiments.training.workdir import NETWORK_FILE, Records, claim


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
        self.feed = open_feed(config)
        self.dataset, self.network = self.feed.dataset, self.feed.network
        self.inputs = models.INPUTS.get(config.network, models.MNIST_INPUT)
        image_shape = self.feed.image_shape
        weights_key, coins_key = jax.random.split(jax.random.key(config.seed))
        self.initial = self.network.init(weights_key, jnp.zeros((1, *image_shape)))['params']
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.initial))
        self.positions = models.positions(self.network, image_shape)
        self.make_reference_optimizer = functools.partial(
            make_optimizer,
            config,
            dns_jax.surgery({}, coins_key),
            parse_learning_rate(config.reference_learning_rate, config.reference_steps),
            config.reference_weight_decay,
        )
        self.pruner = make_pruner(config, self.initial, coins_key)
        self.make_optimizer = functools.partial(
            make_optimizer,
            config,
            self.pruner,
            parse_learning_rate(config.learning_rate, config.surgery_steps),
            config.weight_decay,
        )
        self.setbacks: dict[str, int] = {}  # how often each phase went back to a checkpoint
        # Of the code that runs, which may be changed on disk before the end.
        self.commit = describe_commit()
        self.error = train.make_error(self.network, self.inputs)
        self.reference = references.read(config, self.dense_state()) if config.reference else None
        self.folder = Path(config.workdir)
        hosts.on_first(lambda: self._open_folder(config))

    def _open_folder(self, config: Config) -> None:
        """Claims the folder and opens the records, which the first process alone has."""
        self.records = Records(claim(config), config.tensorboard)

    def dropout(self, phase: str) -> train.Dropout | None:
        """Says how a phase drops units out, None where it does not."""
        config = self.config
        dropped = phase != 'reference' and config.pruned_dropout == 'dropped'
        if dropped or not config.dropout:
            return None
        layers = dns_jax.group_by_layer(self.initial)
        dense: dict[str, Any] = dict.fromkeys(layers, jnp.float32(config.dropout))
        # Above every count of steps, so no coin is thrown with this key.
        number = 2**31 + PHASES.index(phase)
        if config.pruned_dropout == 'kept':
            return train.Dropout(lambda masks: dense, number)
        # The masks of dense training are scalars, which scale nothing.
        return train.Dropout(
            lambda masks: dense | sparse_training.scale_dropout(config.dropout, masks), number
        )

    def find_emptied_layers(self, dense: dns_jax.Params) -> list[str]:
        """Says which layers surgery would leave nothing of, where that can be known."""
        config = self.config
        if config.pruner != 'surgery' or config.importance != 'magnitude':
            return []
        rules = make_rules(config, self.initial)
        return divergence.find_emptied_layers(rules, dense, takes_part(config))

    def finish(
        self,
        reference: dns_jax.Params,
        final: train.TrainState,
        seconds: dict[str, float],
        returns: probes.ReturnsState | None,
    ) -> dict[str, Any]:
        """Writes the pruned network and the report, and returns the summary."""
        summary = self._summarise(reference, final) | seconds
        if any(self.setbacks.values()):
            summary['setbacks'] = self.setbacks
        if returns:
            summary['returns'] = self._measure_returns(final, returns)
        params, masks = meshes.to_host((final.params, final.masks))
        hosts.on_first(lambda: self._write(params, masks, summary))
        return summary

    def _write(self, params: dns_jax.Params, masks: dns_jax.Masks, summary: dict[str, Any]):
        inputs = {'input_scale': repr(self.inputs.scale)}
        if any(self.inputs.mean):
            inputs['input_mean'] = ','.join(map(repr, self.inputs.mean))
        path = self.folder / NETWORK_FILE
        save_sparse(path, params, masks, {'network': self.config.network, **inputs})
        first_layer = masks.get('fc1', {}).get('kernel')
        sees_pixels = self.config.network == 'lenet300' and np.ndim(first_layer)
        report.write(self.folder, summary, first_layer if sees_pixels else None)

    def _summarise(self, reference, final) -> dict[str, Any]:
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
            'state_mebibytes': sum(leaf.nbytes for leaf in jax.tree.leaves(final)) / 2**20,
            'commit': self.commit,
            'jax': jax.__version__,
            'device': jax.devices()[0].device_kind,
            'flags': config.identity(),
        }

    def _measure_returns(self, final, returns) -> dict[str, float]:
        """Says how many connections came back, and what they are good for in the end."""
        final_masks, returned = meshes.to_host((final.masks, returns.returned))
        counts = {
            'pruned': returns.pruned,
            'returned': returns.returned,
            'returned_kept': jax.tree.map(jnp.logical_and, returns.returned, final.masks),
        }
        measured: dict[str, float] = {
            name: sum(dns_jax.count_kept(masks).values()) for name, masks in counts.items()
        }
        without = jax.tree.map(lambda mask, back: mask & ~back, final.masks, returns.returned)
        others = probes.remove_others(final_masks, returned, self.config.seed)
        removed = dns_jax.count_events(final_masks, others).values()
        measured['others_removed'] = sum(int(np.sum(event.pruned)) for event in removed)
        loss = train.make_loss(self.network, self.inputs)
        for name, masks in (
            *(('', final.masks), ('_without', without)),
            ('_without_others', others),
        ):
            pruned = dns_jax.apply_masks(final.params, masks)
            measured[f'loss{name}'] = loss(pruned, self.dataset.train)
            measured[f'test_error{name}'] = self.error(pruned, self.dataset.test)
        return measured

    def dense_state(self) -> train.TrainState:
        """Makes the state at the start of dense training."""
        params = jax.tree.map(jnp.copy, self.initial)
        optimizer = self.make_reference_optimizer()
        return self.feed.place(train.TrainState(params, optimizer.init(params)))

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
            'pruned': {layer: int(np.sum(event.pruned)) for layer, event in chunk.events.items()},
            'spliced': {layer: int(np.sum(event.spliced)) for layer, event in chunk.events.items()},
        }
        hosts.on_first(lambda: self.records.append(record))
        self.on_record(record)
        return record


def _size_summary(size: dns_jax.Size) -> dict[str, Any]:
    # JSON has no infinity: a layer of which nothing is kept has no compression.
    compression = size.compression if size.kept else None
    return {**size._asdict(), 'density': size.density, 'compression': compression}
