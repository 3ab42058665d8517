"""Dynamic network surgery in NumPy, float64, written from the paper's own words.

What the library is held to, so it takes nothing from it, not even a name. Weights and masks
are `{layer: {'kernel': ..., 'bias': ...}}`. Only the coins are handed in: uniform numbers,
one for each step and layer, that are compared with σ.
"""

import math
from typing import NamedTuple

import numpy as np


class LayerRule(NamedTuple):
    """What the paper lets one choose for each layer."""

    c_rate: float
    gamma: float
    power: float
    stop: int


class Solver(NamedTuple):
    """Caffe's SGD with the learning-rate policy `step`."""

    base: float
    factor: float
    step_size: int
    momentum: float
    decay: float
    bias_scale: float


def band(leaves, c_rate):
    """Section 3.3: a = 0.9 t and b = 1.1 t from mean and deviation of the non-zero |w|."""
    magnitudes = [abs(float(w)) for leaf in leaves for w in np.ravel(leaf) if w != 0]
    mean = sum(magnitudes) / len(magnitudes)
    variance = sum((magnitude - mean) ** 2 for magnitude in magnitudes) / len(magnitudes)
    middle = max(mean + c_rate * math.sqrt(variance), 0.0)
    return 0.9 * middle, 1.1 * middle


def discriminate(weights, mask, low, high):
    """Equation (3), h_k: 0 below a, the old T between a and b, 1 from b on."""
    new = mask.copy()
    new[np.abs(weights) < low] = False
    new[np.abs(weights) >= high] = True
    return new


def sigma(rule, step):
    """The probability of an update, which falls to 0 at the stop."""
    return (1 + rule.gamma * step) ** -rule.power if step < rule.stop else 0.0


def masked(weights, masks):
    """W⊙T."""
    return {
        layer: {name: leaf * masks[layer][name] for name, leaf in leaves.items()}
        for layer, leaves in weights.items()
    }


def gradient(weights, images, labels):
    """Backpropagation of the mean cross-entropy through fc1, relu, fc2, softmax."""
    before = images @ weights['fc1']['kernel'] + weights['fc1']['bias']
    hidden = np.maximum(before, 0)
    logits = hidden @ weights['fc2']['kernel'] + weights['fc2']['bias']
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    error = exponentials / exponentials.sum(1, keepdims=True)
    error[np.arange(len(labels)), labels] -= 1
    error /= len(labels)
    back = (error @ weights['fc2']['kernel'].T) * (before > 0)
    return {
        'fc1': {'kernel': images.T @ back, 'bias': back.sum(0)},
        'fc2': {'kernel': hidden.T @ error, 'bias': error.sum(0)},
    }


def descend(weights, buffers, gradients, rate, solver):
    """Caffe: h = m h + rate (g + decay w), w = w - h; biases at a rate of their own."""
    for layer, leaves in weights.items():
        for name in leaves:
            local = rate * (solver.bias_scale if name == 'bias' else 1.0)
            diff = gradients[layer][name] + solver.decay * weights[layer][name]
            buffers[layer][name] = solver.momentum * buffers[layer][name] + local * diff
            weights[layer][name] = weights[layer][name] - buffers[layer][name]


def train(weights, rules, solver, batches, coins, order):
    """Trains, and returns after every step a pair: the masks T and the dense weights W.

    `order` is 'paper' (Algorithm 1: gradient, masks, weights) or 'caffe' (the authors' layers
    refresh the masks as the forward pass begins: masks, gradient, weights).
    """
    weights = {
        layer: {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}
        for layer, leaves in weights.items()
    }
    bands = {layer: band(weights[layer].values(), rules[layer].c_rate) for layer in weights}
    masks = {
        layer: {name: np.ones(leaf.shape, bool) for name, leaf in leaves.items()}
        for layer, leaves in weights.items()
    }
    buffers = {
        layer: {name: np.zeros(leaf.shape) for name, leaf in leaves.items()}
        for layer, leaves in weights.items()
    }

    def refresh(step):
        for column, layer in enumerate(sorted(weights)):
            if coins[step][column] < sigma(rules[layer], step):
                for name, leaf in weights[layer].items():
                    masks[layer][name] = discriminate(leaf, masks[layer][name], *bands[layer])

    history = []
    for step, (images, labels) in enumerate(batches):
        if order == 'caffe':
            refresh(step)
        gradients = gradient(masked(weights, masks), images, labels)
        if order == 'paper':
            refresh(step)
        rate = solver.base * solver.factor ** (step // solver.step_size)
        descend(weights, buffers, gradients, rate, solver)
        history.append(
            ({k: dict(v) for k, v in masks.items()}, {k: dict(v) for k, v in weights.items()})
        )
    return history
