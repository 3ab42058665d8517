"""Shared weights of a trained network: which are shared, how they are tuned, what it costs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

import dns_jax
from dns_jax.files.codec import load_coded, save_coded
from dns_jax.files.sharing import MAX_CLUSTERS, expand, share_weights
from dns_jax.layers import named_leaves
from experiments.artefacts.loading import REBUILT, Model, rebuild, weights_of
from experiments.artefacts.tuning import tune
from experiments.config.command_line import check_finite, check_unread, flag, names_of
from experiments.config.parsers import parse_table
from experiments.data import resident, texts
from experiments.networks import models
from experiments.training.steps import make_measure, metric_of


@dataclasses.dataclass(frozen=True)
class CodingConfig:
    """Which network is coded, and how."""

    model: str = flag('zoo/lenet5.safetensors', 'File of a trained network.')
    clusters: str = flag(
        '16',
        'Values that the weights of a layer of a coded file share, as LAYER:NUMBER,…',
        part='coding',
    )
    tuned: str = flag(
        'weights',
        'What is tuned of a coded file: codebooks tunes the shared values alone; weights tunes '
        'the weights as well, each of which takes the nearest shared value.',
        choices=('codebooks', 'weights'),
        part='tuning',
    )
    finetuning_steps: int = flag(
        1_500, 'Steps of tuning; 0 leaves tuning out.', lower_bound=0, part='coding'
    )
    learning_rate: float = flag(
        5e-4,
        "Adam's learning rate at the start, from which it falls to 0.",
        lower_bound=0.0,
        part='tuning',
    )
    batch_size: int = flag(64, 'Examples per step of tuning.', lower_bound=1, part='tuning')
    seed: int = flag(0, 'Seeds the order of the examples in tuning.', lower_bound=0, part='tuning')
    dataset: str = flag(
        'mnist',
        'Data set to tune on, and to measure.',
        choices=(*resident.DATASETS, *texts.DATASETS),
        part='coding',
    )
    data_dir: str | None = flag(None, resident.DATA_DIR_HELP, part='coding')
    manual_dir: str | None = flag(None, resident.MANUAL_DIR_HELP, part='coding')
    train_on_all: bool = flag(False, 'Tune on the validation examples too.', part='tuning')

    def __post_init__(self):
        check_unread(self, [] if self.finetuning_steps else names_of(CodingConfig, 'tuning'))
        check_finite(self)
        self.parse_clusters()

    def parse_clusters(self) -> dict[str, int]:
        """Returns how many values each layer may have, by patterns."""
        try:
            return parse_table(self.clusters, int)
        except ValueError as error:
            raise ValueError(f'--clusters: {error}') from error


def find_network(path: str, model: Model) -> nn.Module:
    """Makes the network that a file names, and checks that it is the file's.

    Args:
      path: of the file, for messages.
      model: what was loaded from it.

    Raises:
      ValueError: if the file names none that can be trained here, or has other parameters.
    """
    name, ranks = model.metadata.get('network'), model.metadata.get('ranks', '{}')
    if name in REBUILT:
        try:
            return rebuild(model)[0]
        except ValueError as error:
            raise ValueError(f'{path} holds no network to code: {error}') from error
    if name not in models.CHAINS:
        raise ValueError(
            f'{path} names the network {name!r}, but to be coded it must be one of '
            f'{sorted([*models.CHAINS, *REBUILT])}'
        )
    try:
        network = models.NETWORKS[name](FrozenDict(json.loads(ranks)))
        wanted = models.shapes(network, models.MNIST_INPUT.image_shape)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{path} has ranks of no use, {ranks!r}: {error}') from error
    shapes = [
        [(name_of_leaf, jnp.shape(leaf)) for name_of_leaf, leaf in named_leaves(tree)]
        for tree in (model.params, wanted)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f'{path} must have the parameters of {name} with ranks {ranks}, '
            f'{shapes[1]}, but has {shapes[0]}'
        )
    return network


def code(config: CodingConfig, model: Model, path: Path) -> dict[str, float]:
    """Shares weights, tunes what they share, and measures what was written, read back.

    Returns:
      The parameters that are not 0, the multiply-adds that they take (of one image, or of one
      character), and the errors before and after, on test and, unless these are trained on,
      validation examples: in percent, of a language model in bits/character.

    Raises:
      ValueError, RuntimeError: as `find_network` does, or if a layer has no number of values, or
        data are damaged or not to be had.
      OSError: if a file cannot be read or written.
      FloatingPointError: if tuning diverges.
    """
    network, name = find_network(config.model, model), model.metadata['network']
    dataset, inputs = _load_data(config, network, name), models.INPUTS[name]
    masks = jax.tree.map(_leave_out_zeros, model.params, model.masks)
    clusters = config.parse_clusters()
    if 'params' in model.params:  # statistics are rounded, but share nothing
        clusters = {'batch_stats/*': MAX_CLUSTERS} | clusters
    shared = share_weights(model.params, masks, clusters, model.metadata)
    options = {
        'inputs': inputs,
        **({'chunk': 1} if models.is_slow_in_loops(name) else {}),
        'tuned': config.tuned,
        'steps': config.finetuning_steps,
        'batch_size': config.batch_size,
        'learning_rate': config.learning_rate,
        'seed': config.seed,
    }
    if config.finetuning_steps:
        shared = tune(network, model.params, shared, dataset.train, **options)
    save_coded(path, shared)
    written = expand(*load_coded(path)[:3])
    measure = make_measure(network, inputs, metric_of(inputs))

    def error(tree, split):
        statistics = {key: value for key, value in tree.items() if key == 'batch_stats'}
        return measure(weights_of(tree), split, statistics)

    splits = {'': dataset.test}
    if not config.train_on_all:
        splits['validation_'] = dataset.validation
    return _count(network, name, written) | {
        f'{prefix}{key}': error(tree, split)
        for prefix, split in splits.items()
        for key, tree in (('error_before', model.params), ('error', written))
    }


def _load_data(config: CodingConfig, network: Any, name: str) -> Any:
    """Loads the data set, if it is one for the network."""
    folders = config.data_dir, config.manual_dir, config.train_on_all
    if (name == 'gpt') != (config.dataset in texts.DATASETS):
        raise ValueError(f'--dataset={config.dataset} is not for the network {name}')
    if name != 'gpt':
        resident.check_image_shape(config.dataset, models.INPUTS[name].image_shape)
        return resident.load(config.dataset, *folders)
    dataset = texts.load(config.dataset, network.context, *folders)
    if len(dataset.alphabet) != network.characters:
        raise ValueError(
            f'--dataset={config.dataset} has {len(dataset.alphabet)} different characters, but the '
            f'network has {network.characters}'
        )
    return dataset


def _count(network: Any, name: str, written: Any) -> dict[str, float]:
    """Counts what is not 0, but for statistics, and the multiply-adds that it takes."""
    shape = models.example_shape(name, network)
    positions = models.count_positions(network, shape, models.INPUTS[name].dtype)
    (params,) = dns_jax.unstack(models.STACKED.get(name, {}), weights_of(written))
    size = dns_jax.measure_sizes(params, jax.tree.map(lambda leaf: leaf != 0, params), positions)
    return {'kept': size.total.kept, 'multiply_adds': size.total.kept_multiply_adds}


def _leave_out_zeros(weights: Any, mask: Any) -> np.ndarray:
    """Masks what is 0, as many ternary weights are: else it would share a value that is tuned."""
    kept = np.broadcast_to(mask, np.shape(weights)) & (np.asarray(weights) != 0)
    return np.asarray(mask) if kept.all() and not np.ndim(mask) else kept
