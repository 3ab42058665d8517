"""Layers for rules by density, and what a rule keeps of them, in NumPy."""

import functools

import jax
import numpy as np

import dns_jax
from dns_jax._core import search

SHAPES = {'a': [(13, 7), (7,)], 'b': [(31, 9)], 'c': [(5, 4)], 'd': [(60, 40)]}


def draw(seed, shapes=None, scales=None, dtype=np.float32):
    """Weights and masks of some layers."""
    random = np.random.default_rng(seed)
    shapes = shapes or SHAPES
    layers = {
        layer: [
            (random.normal(size=shape) * (scales or {}).get(layer, 1.0)).astype(dtype)
            for shape in own
        ]
        for layer, own in shapes.items()
    }
    masks = {layer: [random.random(shape) < 0.5 for shape in own] for layer, own in shapes.items()}
    return layers, masks


def kept_by(bands, layers, masks):
    """What h_k keeps, by equation (3): the mask of each leaf."""
    kept = {}
    for layer, leaves in layers.items():
        low, high = (np.float32(bound) for bound in bands[layer])
        kept[layer] = [
            np.where(mask, np.abs(leaf) >= low, np.abs(leaf) >= high)
            for leaf, mask in zip(leaves, masks[layer], strict=True)
        ]
    return kept


def numbers(kept):
    return {layer: int(sum(mask.sum() for mask in leaves)) for layer, leaves in kept.items()}


def sizes_of(layers):
    return {layer: sum(leaf.size for leaf in leaves) for layer, leaves in layers.items()}


@functools.cache
def jitted(score, hysteresis, floor=0.05):
    """The rule with its density in place of the step, compiled once for each shape."""
    density = lambda step: step  # noqa: E731
    if score == 'layer':
        return jax.jit(dns_jax.layer_density(density, hysteresis).__call__)
    return jax.jit(dns_jax.global_density(density, score, hysteresis, floor).__call__)


def wanted_of(density, size):
    return int(np.clip(np.round(np.float32(density) * np.float32(size)), 1, size))


def unit_of(score, leaves, masks):
    """In float64, by the documentation of `global_density`."""
    wide = [np.abs(leaf.astype(np.float64)) for leaf in leaves]
    if score == 'rms':
        return np.sqrt(np.mean(np.concatenate([leaf.ravel() for leaf in wide]) ** 2))
    squares = sum((leaf[mask] ** 2).sum() for leaf, mask in zip(wide, masks, strict=True))
    return max(np.sqrt(squares), *(leaf.max() for leaf in wide))


def searches_and_passes(monkeypatch):
    """Counts, when what is traced from now on runs: a list of the passes of each search."""
    passes, unchanged = [], search.search

    def counted(excess_at, starts, aims):
        def noted(thresholds):
            jax.debug.callback(lambda: passes.append(passes.pop() + 1), ordered=True)
            return excess_at(thresholds)

        jax.debug.callback(lambda: passes.append(0), ordered=True)
        return unchanged(noted, starts, aims)

    monkeypatch.setattr(search, 'search', counted)
    return passes
