"""Weights of −Δ, 0 and Δ, one Δ a layer: zeros by Δ as Hwang and Sung have them, or by masks."""

import jax
import jax.numpy as jnp

from experiments.baselines.quantisers import Quantiser, map_kernels

_ROUNDS = 16  # after which Δ of 300,000 normal weights moves by less than 1e-5 of it


def find_step(weights: jax.Array, mask: jax.Array) -> jax.Array:
    r"""Finds a Δ whose multiples −1, 0 and 1 are near to the weights.

    .. math::
      \Delta = \arg\min_\Delta \sum_i \left(Q_\Delta(w_i) - w_i\right)^2, \quad
      Q_\Delta(w) = \begin{cases} \mathrm{sgn}(w)\,\Delta & \text{if } |w| \ge \Delta / 2 \\
        0 & \text{otherwise} \end{cases}

    in turns, from the mean magnitude: Δ is that of what is not 0, and this is what is at least Δ/2.
    So the minimum is a local one; for normal weights it is the least.

    Args:
      weights: of one layer.
      mask: which of them count, bool.

    Returns:
      Δ, a float32 scalar; 0 where no weight counts.

    Example:
      >>> weights = jnp.array([0.1, -1.0, 1.2, 0.0])
      >>> round(float(find_step(weights, jnp.ones(4, bool))), 3)
      1.1

    Reference:
      Hwang and Sung 2014, Fixed-point feedforward deep neural network design using weights +1, 0,
      and −1, section on optimal steps by L2 error.
    """
    magnitudes = jnp.abs(weights).astype(jnp.float32)

    def turn(_, step):
        return _mean_where(magnitudes, mask & (magnitudes >= step / 2))

    return jax.lax.fori_loop(0, _ROUNDS, turn, _mean_where(magnitudes, mask))


def ternary() -> Quantiser:
    r"""Rounds each kernel to −Δ, 0 and Δ, with Δ of `find_step`; real weights learn.

    Returns:
      A quantiser. The gradient at the rounded weights goes to the real ones.

    Example:
      >>> params = {'kernel': jnp.array([[0.1, -1.0, 1.2]])}
      >>> ternary().finish(params, {'kernel': jnp.array(True)})['kernel'].round(3)
      Array([[ 0. , -1.1,  1.1]], dtype=float32)

    Reference:
      Hwang and Sung 2014, as for `find_step`.
    """

    def round_to_step(number, weights, mask):
        del number
        step, wide = find_step(weights, mask), weights.astype(jnp.float32)
        rounded = jnp.where(jnp.abs(wide) >= step / 2, jnp.sign(wide) * step, 0)
        return rounded.astype(weights.dtype)

    return _by_kernel(round_to_step)


def scaled_signs() -> Quantiser:
    r"""Gives each kept weight of a kernel its sign times the mean magnitude of those kept.

    .. math::
      q_i = T_i\,\mathrm{sgn}(w_i)\,\frac{\sum_j T_j |w_j|}{\sum_j T_j}

    where sgn(0) is 1. With surgery this is a ternary network whose zeros h_k chooses; without, a
    binary one.

    Returns:
      A quantiser. The gradient at the signs goes to the real weights.

    Example:
      >>> params = {'kernel': jnp.array([[0.1, -1.0, 1.2]])}
      >>> masks = {'kernel': jnp.array([[False, True, True]])}
      >>> scaled_signs().finish(params, masks)['kernel'].round(3)
      Array([[ 0. , -1.1,  1.1]], dtype=float32)

    Reference:
      Rastegari et al. 2016, XNOR-Net, equation (6), for the scale; there each filter has its own.
    """

    def scale_sign(number, weights, mask):
        del number
        scale = _mean_where(jnp.abs(weights).astype(jnp.float32), mask)
        return jnp.where(weights >= 0, scale, -scale).astype(weights.dtype)

    return _by_kernel(scale_sign)


def _by_kernel(function) -> Quantiser:
    """Makes the quantiser of a function of the number, weights and mask of a kernel."""

    def quantise(params, masks, key=None):
        del key
        return map_kernels(function, params, masks)

    return Quantiser(quantise, quantise)


def _mean_where(magnitudes: jax.Array, where: jax.Array) -> jax.Array:
    number = jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1.0)
    return jnp.sum(magnitudes, where=where) / number
