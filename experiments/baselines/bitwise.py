"""Bitwise neural networks: weights, biases, inputs and units of −1 and 1, trained in two stages.

In the first, tanh squeezes weights and units. In the second they are signs, and real weights learn
by the gradients at the signs. They start at tanh(W), so that large ones can still change sign.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

import dns_jax
from dns_jax.layers import map_leaves
from experiments.baselines.quantisers import Quantiser, map_kernels

_HALVINGS = 16  # of the largest magnitude, to find β


def compressed() -> Quantiser:
    r"""Computes with weights that tanh squeezes: the first stage.

    .. math::
      \tanh(W) \odot T, \qquad
      \frac{\partial L}{\partial W} = \frac{\partial L}{\partial \tanh(W)} (1 - \tanh^2(W))

    Returns:
      A quantiser of kernels.

    Example:
      >>> params = {'kernel': jnp.array([[9.0, -9.0]])}
      >>> compressed().finish(params, {'kernel': jnp.array(True)})['kernel'].round(3)
      Array([[ 1., -1.]], dtype=float32)

    Reference:
      Kim and Smaragdis 2016, Bitwise neural networks, on weight compression.
    """
    return _by_kernel(lambda weights, mask: jnp.tanh(weights))


def bitwise(zeros: float) -> Quantiser:
    r"""Computes with signs of weights, but for small ones, which are 0: the second stage.

    .. math::
      \bar w = \mathrm{sgn}(w) \, [\,|w| \ge \beta\,], \qquad
      \frac{\partial L}{\partial w} = \frac{\partial L}{\partial \bar w} (1 - \tanh^2(w))

    where sgn(0) is 1.

    Args:
      zeros: the share that β makes 0 of the weights of each kernel that masks keep. It is met but
        for weights that are nearer to each other than 2⁻¹⁶ of the largest.

    Returns:
      A quantiser of kernels.

    Raises:
      ValueError: if `zeros` is not from 0 to below 1.

    Example:
      >>> params = {'kernel': jnp.array([[0.5, -0.1, -0.2, 0.0]])}
      >>> bitwise(zeros=0.5).finish(params, {'kernel': jnp.array(True)})['kernel']
      Array([[ 1.,  0., -1.,  0.]], dtype=float32)

    Reference:
      Kim and Smaragdis 2016, Bitwise neural networks, on noisy backpropagation.
    """
    if not 0 <= zeros < 1:
        raise ValueError(f'zeros must be from 0 to below 1, but is {zeros!r}')

    def take_signs(weights, mask):
        signs = jnp.where(weights >= 0, 1, -1).astype(weights.dtype)
        if not zeros:
            return signs
        magnitudes = jnp.abs(weights).astype(jnp.float32)
        return jnp.where(magnitudes >= _find_boundary(magnitudes, mask, zeros), signs, 0)

    return _by_kernel(take_signs)


@jax.custom_jvp
def sign_unit(sums: jax.Array) -> jax.Array:
    r"""Gives 1 where a sum is at least 0, else −1, with the derivative of tanh, 1 − tanh².

    Example:
      >>> slope = jax.grad(sign_unit)(0.0)
      >>> sign_unit(jnp.array([-3.0, 0.0])), float(slope)
      (Array([-1.,  1.], dtype=float32), 1.0)

    Reference:
      Kim and Smaragdis 2016, Bitwise neural networks, on noisy backpropagation.
    """
    return jnp.where(sums >= 0, 1, -1).astype(jnp.result_type(sums))


@sign_unit.defjvp
def _sign_unit_jvp(primals, tangents):
    return sign_unit(*primals), (1 - jnp.tanh(*primals) ** 2) * tangents[0]


class BitwiseNetwork(nn.Module):
    """Three hidden layers on images of −1 and 1, of tanh units or of signs.

    Biases are weights too, of an input that is 1: so a quantiser of kernels makes bits of them.
    """

    signs: bool  # whether it is of the second stage
    units: int = 1_024

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (batch, 28, 28, 1), from 0 to 1, to logits (batch, 10)."""
        hidden = jnp.where(images >= 0.5, 1, -1).astype(images.dtype).reshape(len(images), -1)
        for name in ('fc1', 'fc2', 'fc3'):
            sums = self._add_up(hidden, self.units, name)
            hidden = sign_unit(sums) if self.signs else jnp.tanh(sums)
        return self._add_up(hidden, 10, 'fc4')

    def _add_up(self, hidden: jax.Array, features: int, name: str) -> jax.Array:
        hidden = jnp.pad(hidden, ((0, 0), (0, 1)), constant_values=1)
        sums = nn.Dense(features, use_bias=False, name=name)(hidden)
        # Sums of n signs are about √n in size. Divided by it they have the same signs, but tanh has
        # a derivative there, and softmax does not put all on one class.
        return sums * hidden.shape[-1] ** -0.5 if self.signs else sums


def _by_kernel(function) -> Quantiser:
    def quantise(params, masks, key=None):
        del key
        return map_kernels(lambda number, *kernel: function(*kernel), params, masks)

    def slope(path, leaf):
        return 1 - jnp.tanh(leaf) ** 2 if dns_jax.is_kernel(path, leaf) else 1

    def pull_back(gradients, params):
        return jax.tree.map(jnp.multiply, gradients, map_leaves(slope, params))

    return Quantiser(quantise, quantise, pull_back)


def _find_boundary(magnitudes: jax.Array, mask: jax.Array, zeros: float) -> jax.Array:
    """Finds β by bisection: to sort a million weights takes longer than a step of training."""
    most = jnp.round(zeros * jnp.sum(mask, dtype=jnp.float32))

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        fits = jnp.sum(mask & (magnitudes < middle), dtype=jnp.float32) <= most
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    bounds = jnp.zeros((), jnp.float32), jnp.max(magnitudes, where=mask, initial=0)
    return jax.lax.fori_loop(0, _HALVINGS, halve, bounds)[0]
