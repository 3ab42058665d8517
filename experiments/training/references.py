"""Where --reference leads: the dense network of another run, or a file of Caffe's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dns_jax
from experiments.artefacts import caffe_names
from experiments.devices import meshes
from experiments.training.checkpoints import Checkpoints
from experiments.training.steps import TrainState, Weights
from experiments.training.workdir import CHECKPOINTS_FOLDER, read_flags

# Flags that make another network: as many heads as others have the same weights.
_SIZES = ('depth', 'width', 'heads', 'context', 'tied')


def check(path: Path, flags: Mapping[str, Any]) -> None:
    """Refuses a reference network that a run cannot start from, without reading its weights.

    Args:
      path: a `.caffemodel` file or the folder of a run.
      flags: what decides the numbers of the run that is to start.

    Raises:
      ValueError: if the network is another one, or may have been trained on the images that this
        run validates with.
      OSError: if there is none.
    """
    if path.suffix == '.caffemodel':
        if not flags['train_on_all']:
            raise ValueError(
                f'--reference={path} was trained elsewhere, perhaps on images with which this run '
                'would validate; it must be given with --train_on_all'
            )
        if not path.is_file():
            raise FileNotFoundError(f'--reference={path} is no file')
        return
    if not _checkpoints(path).is_dir():
        raise FileNotFoundError(f'--reference={path} has no {_checkpoints(path)}')
    theirs = read_flags(path)
    # With train_on_all another run has seen the images that this one validates with.
    for name in ('network', 'dataset', 'train_on_all', *_SIZES):
        if theirs.get(name) != flags.get(name):
            raise ValueError(
                f'--reference={path} is of a run with {name} {theirs.get(name)!r}; wanted '
                f'{flags.get(name)!r}'
            )
    steps = theirs.get('reference_steps')
    if not isinstance(steps, int):
        raise ValueError(f'--reference={path} has flags with {steps!r} for reference_steps')


def _checkpoints(folder: Path) -> Path:
    return folder / CHECKPOINTS_FOLDER / 'reference'


def read(path: Path, flags: Mapping[str, Any], like: TrainState) -> Weights:
    """Reads the reference network that a run is to start from.

    Args:
      path: a `.caffemodel` file or the folder of a run.
      flags: what decides the numbers of the run that is to start.
      like: the state at the start of the run's own dense training.

    Returns:
      The network. That of Caffe with masks is W⊙T.

    Raises:
      ValueError: if the network is another one, may have been trained on the images that this run
        validates with, or is damaged.
      OSError: if there is none, or it cannot be read.
    """
    check(path, flags)
    if path.suffix == '.caffemodel':
        weights = Weights(_of_caffe(path, flags['network'], like))
    else:
        with Checkpoints(_checkpoints(path)) as checkpoints:
            state = checkpoints.restore(like, read_flags(path)['reference_steps'])[1]
        weights = Weights(state.params, state.statistics)
    # Orbax binds arrays to a device. Beside a new optimizer state, which is not bound, the loop
    # would be compiled once for the mixture and once for what it gives back.
    return jax.tree.map(jnp.asarray, meshes.to_host(weights))


def _of_caffe(path: Path, name: str, like: TrainState) -> dns_jax.Params:
    network = caffe_names.read_caffemodel(path, name)
    found, wanted = (jax.tree.map(np.shape, params) for params in (network.params, like.params))
    if found != wanted:
        raise ValueError(f'--reference={path} holds the shapes {found}; wanted {wanted}')
    return dns_jax.apply_masks(network.params, network.masks)
