"""What a pruner keeps along a course of weights, and what it should by NumPy."""

import jax
import numpy as np
from wandering import HISTORY


def layer_arrays(tree, masks):
    """Each layer's numbers and masks, as two flat arrays."""
    return {
        layer: tuple(
            np.concatenate([part[layer][leaf].ravel() for leaf in sorted(part[layer])])
            for part in (tree, masks)
        )
        for layer in tree
    }


def cut(tree, masks, thresholds):
    """Prunes what is below the threshold of its layer; what is gone stays gone."""
    return {
        layer: {
            leaf: mask & (np.abs(tree[layer][leaf]) >= thresholds[layer])
            for leaf, mask in leaves.items()
        }
        for layer, leaves in masks.items()
    }


def masks_of(transform):
    """The masks after each step, through the transformation."""
    state = transform.init(HISTORY[0][0])
    update, seen = jax.jit(transform.update), []
    for weights, gradients in HISTORY:
        _, state = update(gradients, state, weights)
        seen.append(jax.device_get(state.masks))
    return seen


def expected(prune):
    """The masks after each step; `prune(step, weights, gradients, masks)` gives the new ones."""
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), HISTORY[0][0])
    seen = []
    for step, (weights, gradients) in enumerate(HISTORY):
        masks = prune(step, weights, gradients, masks)
        seen.append(masks)
    return seen


def keep_largest(tree, masks, densities):
    """Keeps of every layer the largest among those it still has."""
    thresholds = {}
    for layer, (numbers, kept) in layer_arrays(tree, masks).items():
        count = max(round(densities[layer] * numbers.size), 1)
        thresholds[layer] = np.sort(np.abs(numbers * kept))[-count]
    return cut(tree, masks, thresholds)
