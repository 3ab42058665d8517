"""Files as runs of a residual network and a language model leave them, tiny and untrained."""

import json

import jax
import numpy as np

from dns_jax.files.sparse import save_sparse
from dns_jax.layers import map_leaves
from experiments.networks import models

OPTIONS = {
    'resnet': {'depth': 8, 'width': 0.25},
    'gpt': {'characters': 7, 'depth': 2, 'width': 8, 'heads': 2, 'context': 6},
}


def save_network(folder, kind, options=None, empty_units=False):
    """Writes `folder/w`: kernels keep about half of their weights, some of each unit or not.

    Returns:
      Its path, the network, its variables before they are masked, and their masks.
    """
    network, inputs = models.NETWORKS[kind](**OPTIONS[kind]), models.INPUTS[kind]
    shape = (network.context,) if kind == 'gpt' else inputs.image_shape
    example = jax.ShapeDtypeStruct((1, *shape), inputs.dtype)
    shapes = jax.eval_shape(network.init, jax.random.key(0), example)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.uniform(-0.5 if leaf.ndim > 1 else 0.1, 0.5, leaf.shape), dict(shapes)
    )  # a variance is positive
    variables = jax.tree.map(np.float32, variables)

    def mask(path, leaf):
        if not path.endswith('kernel'):
            return np.array(True)
        rows, columns = np.indices(leaf.shape[-2:])
        lasting = (rows - columns) % min(leaf.shape[-2:]) == 0  # one at least in each
        mask = (rng.random(leaf.shape) < 0.5) | lasting
        if empty_units and path.endswith(('_1/conv1/kernel', 'up/kernel')):
            mask[..., leaf.shape[-1] // 2 :] = False
        return mask

    tree = variables if kind == 'resnet' else variables['params']
    masks = map_leaves(mask, tree)
    metadata = {'network': kind, 'options': options or json.dumps(OPTIONS[kind])}
    save_sparse(folder / 'w', tree, masks, {**metadata, **inputs.describe()})
    return str(folder / 'w'), network, variables, masks


def inputs_of(kind, batch):
    """Draws what the tiny networks take."""
    rng = np.random.default_rng(1)
    if kind == 'gpt':
        return rng.integers(0, OPTIONS['gpt']['characters'], (batch, 6), np.int32)
    return rng.normal(size=(batch, 32, 32, 3)).astype(np.float32)
