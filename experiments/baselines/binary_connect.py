"""BinaryConnect: a network computes with ±H, and its real weights learn within [−H, H]."""

import math

import jax
import jax.numpy as jnp
import optax

import dns_jax
from dns_jax.layers import map_leaves
from experiments.baselines.quantisers import Quantiser, map_kernels


def glorot_limit(shape: tuple[int, ...]) -> float:
    r"""Gives H of a kernel: the coefficient of the initialisation of Glorot and Bengio.

    .. math::
      H = \sqrt{\frac{1.5}{\text{inputs} + \text{outputs}}}

    Args:
      shape: of the kernel, inputs and outputs last; of a convolution each tap has its own.

    Returns:
      H.

    Example:
      >>> glorot_limit((10, 5))
      0.31622776601683794
    """
    *taps, inputs, outputs = shape
    return math.sqrt(1.5 / ((inputs + outputs) * math.prod(taps)))


def binary_connect(stochastic: bool = False) -> Quantiser:
    r"""Computes with one bit a weight, forwards and backwards.

    .. math::
      w_b = \begin{cases} +H & \text{if } w \ge 0 \\ -H & \text{otherwise} \end{cases}
      \qquad \text{or} \qquad
      P(w_b = +H) = \mathrm{clip}\left(\tfrac{w / H + 1}{2}, 0, 1\right), \quad
      w \leftarrow \mathrm{clip}\left(w - \gamma\,\tfrac{\partial L}{\partial w_b}, -H, H\right)

    The paper has ±1 in place of ±H, behind it batch normalisation, and rates that are divided by
    H², or by H for Adam. Here weights are H times theirs, so one rate is the same for all layers:
    what that division makes of theirs.

    Args:
      stochastic: whether coins decide, in training; the network to keep then has its real weights.

    Returns:
      A quantiser of kernels. Pruned weights are 0, so with surgery there are −H, 0 and H. Weights
      at the bound tie, so a density below the share that lies there is not met.

    Example:
      >>> params = {'kernel': jnp.array([[0.1, -0.2, 0.0]])}
      >>> masks = {'kernel': jnp.array([[True, True, False]])}
      >>> binary_connect().finish(params, masks)['kernel'] / glorot_limit((1, 3))
      Array([[ 1., -1.,  0.]], dtype=float32)

    Reference:
      Courbariaux et al. 2015, BinaryConnect, equations (1) to (3), algorithm 1, sections 2.4 to
      2.6.
    """

    def sign(number, weights, mask):
        del number, mask
        limit = glorot_limit(weights.shape)
        return jnp.where(weights >= 0, limit, -limit).astype(weights.dtype)

    def throw(params, masks, key):
        def one(number, weights, mask):
            del mask
            limit = glorot_limit(weights.shape)
            chance = jnp.clip((weights / limit + 1) / 2, 0, 1)
            positive = jax.random.bernoulli(jax.random.fold_in(key, number), chance)
            return jnp.where(positive, limit, -limit).astype(weights.dtype)

        return map_kernels(one, params, masks)

    def clip(updates, params):
        limits = map_leaves(
            lambda path, leaf: glorot_limit(leaf.shape) if dns_jax.is_kernel(path, leaf) else None,
            params,
        )
        return jax.tree.map(_clip_update, updates, params, limits)

    if stochastic:
        return Quantiser(throw, dns_jax.apply_masks, constrain=optax.stateless(clip))

    def binarise(params, masks, key=None):
        del key
        return map_kernels(sign, params, masks)

    return Quantiser(binarise, binarise, constrain=optax.stateless(clip))


def _clip_update(update, weights, limit):
    if limit is None:
        return update
    return jnp.clip(weights + update, -limit, limit) - weights
