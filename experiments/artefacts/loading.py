"""Pruned networks from files, and such as no file holds, ready for the runners."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import dns_jax
from dns_jax.files.codec import SUFFIX, load_coded
from dns_jax.files.sharing import expand
from dns_jax.files.sparse import load_sparse
from dns_jax.inference.chain import Chain, Dense, chain_from_json, run_chain, trace_shapes
from dns_jax.inference.compact import CompactNetwork, compact
from dns_jax.layers import named_leaves
from experiments.networks import models

REBUILT = ('resnet', 'gpt')
"""The networks that a file's `options` say how to make again; others are chains, or not run."""

_MOST_LAYERS = 1_000
_MOST = 2**20  # of any other size
_MOST_WEIGHTS = 2**28  # of a made layer, more than the largest of VGG-16
_SYNTHETIC = re.compile(r'fc:([1-9]\d{0,5})x([1-9]\d{0,5}):(0?\.\d+|1)')


class Model(NamedTuple):
    """A pruned network: a chain, or a module of Flax where the chain is empty."""

    name: str
    chain: Chain
    params: Any  # NumPy float32, zero where pruned; Flax's variables of a ResNet
    masks: dns_jax.Masks
    input_shape: tuple[int, ...]
    metadata: dict[str, str]
    network: nn.Module | None = None

    @property
    def dtype(self) -> Any:
        """Of the inputs."""
        return models.INPUTS[self.metadata['network']].dtype if self.network else jnp.float32

    def apply(self, params: Any, inputs: Any) -> Any:
        """Computes what the network gives for a batch, as it was trained, from any params."""
        if self.network is None:
            return run_chain(self.chain, params, inputs)
        return self.network.apply(params if 'params' in params else {'params': params}, inputs)

    def apart(self) -> 'Model':
        """Gives the same with each layer by itself, for what can follow no scan over layers."""
        if self.network is None or getattr(self.network, 'unrolled', True):
            return self
        stacked = models.STACKED[self.metadata['network']]
        params, masks = dns_jax.unstack(stacked, self.params, self.masks)
        network = self.network.clone(unrolled=True)
        return self._replace(params=params, masks=masks, network=network)

    def compact(self) -> CompactNetwork:
        """Removes all that does not change what the network gives."""
        return compact(self.chain, self.params, self.masks, self.input_shape)


def load_model(name: str, to_run: bool = True) -> Model:
    """Loads a pruned network.

    Args:
      name: a sparse file, such as one of the zoo's; a coded one, `*.dns`; or `fc:INPUTSxUNITS:
        DENSITY`, one fully connected layer of random weights at random places.
      to_run: whether the network is wanted, and not its weights alone, as of AlexNet and VGG-16.

    Returns:
      The network. Its chain is that of the file's metadata, or of the network they name; empty
      where none is wanted, or the network is made again from its name and options.

    Raises:
      ValueError: if the file is damaged, names no network known, or one that does not fit.
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
    params = jax.tree.map(np.asarray, params)
    model = Model(path.stem, (), params, masks, (), metadata)
    try:
        return _find_network(model) if to_run else model
    except (TypeError, ValueError) as error:
        raise ValueError(f'{path} holds no network to run: {error}') from error


def weights_of(tree: Any) -> Any:
    """Takes of a file's tree of weights, or of masks, what training prunes: no statistics."""
    return tree['params'] if isinstance(tree, dict) and 'params' in tree else tree


def rebuild(model: Model) -> tuple[nn.Module, tuple[int, ...]]:
    """Makes the module of a network again, from its name and the options of its file.

    Args:
      model: named as one of `REBUILT`.

    Returns:
      The module, and the shape of what it takes.

    Raises:
      ValueError: if the options are none of the network's, or its weights are not the file's.
    """
    name, text = model.metadata['network'], model.metadata.get('options', '{}')
    network = models.NETWORKS[name](**_parse_options(models.NETWORKS[name], text))
    shape = models.example_shape(name, network)
    examples = jax.ShapeDtypeStruct((1, *shape), models.INPUTS[name].dtype)
    variables = jax.eval_shape(network.init, jax.random.key(0), examples)
    wanted, found = (
        {path: jnp.shape(leaf) for path, leaf in named_leaves(tree)}
        for tree in (variables if len(variables) > 1 else variables['params'], model.params)
    )
    for path in sorted(wanted.keys() | found.keys()):
        if wanted.get(path) != found.get(path):
            raise ValueError(
                f'{name} with the options {text[:200]} has {path!r} of shape {wanted.get(path)}, '
                f'but the file has {found.get(path)}'
            )
    return network, shape


def _parse_options(make: type[nn.Module], text: str) -> dict[str, Any]:
    """Reads the numbers that a module is made with; what else it takes, no file says."""
    kinds = {field.name: type(field.default) for field in dataclasses.fields(make)}
    kinds = {name: kind for name, kind in kinds.items() if kind in (int, float, bool)}
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'the options {text[:80]!r} cannot be read: {error}') from error
    if not isinstance(options, dict) or options.keys() - kinds.keys():
        raise ValueError(f'the options must be some of {sorted(kinds)}, but are {text[:80]!r}')
    for name, value in options.items():
        kind, most = kinds[name], _MOST_LAYERS if name == 'depth' else _MOST
        of_kind = type(value) is kind or (kind is float and type(value) is int)
        if not of_kind or not abs(value) <= most:
            raise ValueError(
                f'the option {name} must be of type {kind.__name__} and no more than {most}, '
                f'but is {str(value)[:80]}'
            )
    return options


def _find_network(model: Model) -> Model:
    if 'chain' not in model.metadata and model.metadata.get('network') in REBUILT:
        network, shape = rebuild(model)
        return model._replace(network=network, input_shape=shape)
    chain, input_shape = _find_chain(model.metadata)
    trace_shapes(chain, model.params, input_shape)
    return model._replace(chain=chain, input_shape=input_shape)


def _find_chain(metadata: Mapping[str, str]) -> tuple[Chain, tuple[int, ...]]:
    if 'chain' in metadata:
        return chain_from_json(metadata['chain']), _parse_shape(metadata.get('input_shape', ''))
    if metadata.get('network') in models.CHAINS:
        return models.CHAINS[metadata['network']], models.MNIST_INPUT.image_shape
    raise ValueError(
        f'it has no chain, and names the network {metadata.get("network")!r}, which is none of '
        f'{sorted([*models.CHAINS, *REBUILT])}'
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
