"""Where --reference leads: the dense network of another run, or a file of Caffe's.

Owns what must be known of the networks in such files, to read and to write them.
"""

import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dns_jax
from dns_jax.files import caffe, caffe_writer
from experiments.config.flags import Config
from experiments.devices import meshes
from experiments.training.checkpoints import Checkpoints
from experiments.training.steps import TrainState
from experiments.training.workdir import CHECKPOINTS_FOLDER, read_flags

# Their first layers; Caffe shows these networks blue, green and red, in this order.
_COLOUR_LAYERS = {'alexnet': 'conv1', 'vgg16': 'conv1_1'}


def read(config: Config, like: TrainState) -> dns_jax.Params:
    """Reads the reference network that a run is to start from.

    Args:
      config: of the run; its `reference` is a `.caffemodel` file or the folder of a run.
      like: the state at the start of the run's own dense training.

    Returns:
      The weights. Those of a Caffe network with masks are W⊙T.

    Raises:
      ValueError: if the network is another one, may have been trained on the images that this run
        validates with, or is damaged.
      OSError: if there is none, or it cannot be read.
    """
    path = Path(config.reference or '')
    read_it = _of_caffe if path.suffix == '.caffemodel' else _of_run
    params = read_it(path, config, like)
    # Orbax binds arrays to a device. Beside a new optimizer state, which is not bound, the loop
    # would be compiled once for the mixture and once for what it gives back.
    return jax.tree.map(jnp.asarray, meshes.to_host(params))


def _of_run(folder: Path, config: Config, like: TrainState) -> dns_jax.Params:
    checkpoints_folder = folder / CHECKPOINTS_FOLDER / 'reference'
    if not checkpoints_folder.is_dir():
        raise FileNotFoundError(f'--reference={folder} has no {checkpoints_folder}')
    flags, own = read_flags(folder), config.identity()
    # With train_on_all another run has seen the images that this one validates with.
    for name in ('network', 'dataset', 'train_on_all'):
        if flags.get(name) != own[name]:
            raise ValueError(
                f'--reference={folder} is of a run with {name} {flags.get(name)!r}; wanted '
                f'{own[name]!r}'
            )
    steps = flags.get('reference_steps')
    if not isinstance(steps, int):
        raise ValueError(f'--reference={folder} has flags with {steps!r} for reference_steps')
    with Checkpoints(checkpoints_folder) as checkpoints:
        return checkpoints.restore(like, steps)[1].params


def _of_caffe(path: Path, config: Config, like: TrainState) -> dns_jax.Params:
    if not config.train_on_all:
        raise ValueError(
            f'--reference={path} was trained elsewhere, on images that this run would validate '
            'with; it must be given with --train_on_all'
        )
    # Caffe's examples call an inner product ip1 where the field says fully connected, fc1.
    layers = caffe.read_caffemodel(path)
    network = caffe.to_linen(layers, lambda name: re.sub(r'^ip(?=\d)', 'fc', name))
    found, wanted = (jax.tree.map(np.shape, params) for params in (network.params, like.params))
    if found != wanted:
        raise ValueError(f'--reference={path} holds the shapes {found}; wanted {wanted}')
    pruned = dns_jax.apply_masks(network.params, network.masks)
    return _swap_colours(config.network, pruned)


def write_caffemodel(
    path: str | os.PathLike[str], network: str, params: Any, masks: dns_jax.Masks | None = None
) -> None:
    """Writes a network as Caffe would have it, with its names of layers and its order of colours.

    Args:
      path: the file, in a folder that exists.
      network: a name of `experiments.networks.models.NETWORKS`.
      params: its weights, float32.
      masks: parallel to them; None writes a file without masks.

    Raises:
      ValueError: if the weights are no chain of layers that fit each other.
      OSError: if the file cannot be written.
    """
    masks = None if masks is None else _swap_colours(network, masks)
    # Sorted by name, the layers of all our networks lie in the order in which they are applied.
    layers = caffe_writer.from_linen(
        _swap_colours(network, params),
        masks,
        sorted(params),
        str if network in _COLOUR_LAYERS else lambda name: re.sub(r'^fc(?=\d)', 'ip', name),
    )
    caffe_writer.write_caffemodel(path, layers, network)


def _swap_colours(network: str, tree: Any) -> Any:
    """Turns the first layer's colours from blue, green and red to red, green and blue, or back."""
    first = _COLOUR_LAYERS.get(network)
    if first is None or np.ndim(tree[first]['kernel']) != 4:  # a mask may have no axes
        return tree
    return {**tree, first: {**tree[first], 'kernel': tree[first]['kernel'][:, :, ::-1]}}
