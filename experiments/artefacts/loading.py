"""Pruned networks from files, and such as no file holds, ready for the runners."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import dns_jax
from dns_jax.files.codec import SUFFIX, load_coded
from dns_jax.files.sharing import expand
from dns_jax.files.sparse import load_sparse
from dns_jax.inference.chain import Chain, Dense, Weights, chain_from_json, trace_shapes
from dns_jax.inference.compact import CompactNetwork, compact
from experiments.networks import models

_MOST_WEIGHTS = 2**28  # of a made layer, more than the largest of VGG-16
_SYNTHETIC = re.compile(r'fc:([1-9]\d{0,5})x([1-9]\d{0,5}):(0?\.\d+|1)')


class Model(NamedTuple):
    """A pruned network."""

    name: str
    chain: Chain
    params: Weights  # NumPy float32, zero where pruned
    masks: dns_jax.Masks
    input_shape: tuple[int, ...]
    metadata: dict[str, str]

    def compact(self) -> CompactNetwork:
        """Removes all that does not change what the network gives."""
        return compact(self.chain, self.params, self.masks, self.input_shape)


def load_model(name: str, to_run: bool = True) -> Model:
    """Loads a pruned network.

    Args:
      name: a sparse file, such as one of the zoo's; a coded one, `*.dns`; or `fc:INPUTSxUNITS:
        DENSITY`, one fully connected layer of random weights at random places.
      to_run: whether a chain is wanted, which AlexNet and VGG-16 do not have.

    Returns:
      The network. Its chain is that of the file's metadata, or of the network they name; empty
      where none is wanted.

    Raises:
      ValueError: if the file is damaged or names no network known.
      OSError: if it cannot be read.
    """
    if name.startswith('fc:'):
        return _make_layer(name)
    path = Path(name)
    params: Any
    if path.suffix == SUFFIX:
        shared = load_coded(path)
        params, masks, metadata = expand(*shared[:3]), shared.masks, shared.metadata
    else:
        params, masks, metadata = load_sparse(path)
    chain, input_shape = (), ()
    try:
        if to_run:
            chain, input_shape = _find_chain(metadata)
            trace_shapes(chain, params, input_shape)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{path} holds no network to run: {error}') from error
    params = jax.tree.map(np.asarray, params)
    return Model(path.stem, chain, params, masks, input_shape, metadata)


def _find_chain(metadata: Mapping[str, str]) -> tuple[Chain, tuple[int, ...]]:
    if 'chain' in metadata:
        return chain_from_json(metadata['chain']), _parse_shape(metadata.get('input_shape', ''))
    if metadata.get('network') in models.CHAINS:
        return models.CHAINS[metadata['network']], models.MNIST_INPUT.image_shape
    raise ValueError(
        f'it has no chain, and names the network {metadata.get("network")!r}, which is none of '
        f'{sorted(models.CHAINS)}'
    )


def _parse_shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r'\[[1-9]\d{0,5}(, ?[1-9]\d{0,5}){0,3}\]', text):
        raise ValueError(f'the input_shape must be a list of lengths, but is {text[:80]!r}')
    return tuple(json.loads(text))


def _make_layer(name: str) -> Model:
    match = _SYNTHETIC.fullmatch(name)
    if not match:
        raise ValueError(f'{name!r} must be fc:INPUTSxUNITS:DENSITY, as fc:800x500:0.007')
    inputs, units, density = int(match[1]), int(match[2]), float(match[3])
    if inputs * units > _MOST_WEIGHTS:
        raise ValueError(f'{name!r} has {inputs * units} weights, over {_MOST_WEIGHTS}')
    random = np.random.default_rng(0)
    mask = random.random((inputs, units), np.float32) < density
    kernel = np.where(mask, random.standard_normal((inputs, units), np.float32), np.float32(0))
    params = {'fc': {'kernel': kernel, 'bias': np.zeros(units, np.float32)}}
    masks = {'fc': {'kernel': mask, 'bias': np.array(True)}}
    return Model(
        f'fc {inputs}×{units} at {density:.1%}', (Dense('fc'),), params, masks, (inputs,), {}
    )
