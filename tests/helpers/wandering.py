"""Weights that wander, and what pruners are asked with on them."""

import jax
import numpy as np

import dns_jax

STEPS = 50


def wander():
    """Weights and gradients of two layers at every step, some zeros among them."""
    random = np.random.default_rng(4)
    shapes = {'fc1': {'kernel': (9, 7), 'bias': (7,)}, 'fc2': {'kernel': (7, 5), 'bias': (5,)}}
    is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    draw = lambda shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    weights = jax.tree.map(draw, shapes, is_leaf=is_shape)
    weights['fc1']['kernel'][0] = 0
    history = []
    for _ in range(STEPS):
        gradients = jax.tree.map(draw, shapes, is_leaf=is_shape)
        history.append((weights, gradients))
        weights = jax.tree.map(lambda w, g: w - np.float32(0.2) * g, weights, gradients)
    return history


HISTORY = wander()
KEY = jax.random.key(0)
ALL = {'takes_part': dns_jax.has_axes}  # biases too, as in the papers
