"""Our networks as Caffe has them: its names of layers, and its order of colours."""

import os
import re
from typing import Any

import numpy as np

import dns_jax
from dns_jax.files import caffe, caffe_writer

CAFFE_NETWORKS = ('lenet300', 'lenet5', 'alexnet', 'vgg16')
"""Those of our networks that Caffe has too, by the names of `experiments.networks.models`."""

# Their first layers; Caffe shows these networks blue, green and red, in this order.
_COLOUR_LAYERS = {'alexnet': 'conv1', 'vgg16': 'conv1_1'}


def read_caffemodel(path: str | os.PathLike[str], network: str) -> caffe.CaffeNetwork:
    """Reads a network of Caffe as ours.

    Returns:
      Its weights and masks, with our names of layers and colours in red, green and blue.

    Raises:
      ValueError: if the file is damaged.
      OSError: if it cannot be read.
    """
    # Caffe's examples call an inner product ip1 where the field says fully connected, fc1.
    layers = caffe.read_caffemodel(path)
    found = caffe.to_linen(layers, lambda name: re.sub(r'^ip(?=\d)', 'fc', name))
    params, masks = (_swap_colours(network, tree) for tree in (found.params, found.masks))
    return found._replace(params=params, masks=masks)


def write_caffemodel(
    path: str | os.PathLike[str], network: str, params: Any, masks: dns_jax.Masks | None = None
) -> None:
    """Writes a network as Caffe would have it, with its names of layers and its order of colours.

    Args:
      path: the file, in a folder that exists.
      network: one of `CAFFE_NETWORKS`.
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
    first = _COLOUR_LAYERS.get(network, '')
    kernel = tree.get(first, {}).get('kernel')
    if np.ndim(kernel) != 4:  # a mask may have no axes
        return tree
    return {**tree, first: {**tree[first], 'kernel': kernel[:, :, ::-1]}}
