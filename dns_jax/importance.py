"""What says how much a connection matters: the numbers that h_k compares with its thresholds.

Each function maps a key, the weights and the gradient of a step to a tree like the weights, of
which only magnitudes count (`dns_jax.typing.Importance`). Owns no thresholds and no masks.
"""

import jax
import jax.numpy as jnp
import optax

from dns_jax.typing import Params


def magnitude(key: jax.Array, params: Params, gradients: optax.Updates) -> Params:
    """The weight itself, so that `|w|` counts.

    Args:
      key: not used.
      params: dense weights W.
      gradients: not used.

    Returns:
      `params`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> magnitude(jax.random.key(0), jnp.array([3.0, -2.0]), jnp.array([0.0, 1.0]))
      Array([ 3., -2.], dtype=float32)

    Reference:
      Guo et al. 2016, section 3.3.
    """
    del key, gradients
    return params


def taylor(key: jax.Array, params: Params, gradients: optax.Updates) -> Params:
    r"""By how much the loss would change, to first order, were a weight set to zero.

    .. math::
      \left| w \, \frac{\partial L}{\partial w} \right|

    The gradient is that of one batch: noisy, where the batch is small.

    Args:
      key: not used.
      params: dense weights W.
      gradients: at W⊙T, a tree like `params`; the transformation that asks for it must stand
        before the optimizer in its chain.

    Returns:
      A tree like `params`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> taylor(jax.random.key(0), jnp.array([3.0, -2.0]), jnp.array([0.5, 1.0]))
      Array([ 1.5, -2. ], dtype=float32)

    Reference:
      Molchanov et al. 2017, Pruning convolutional neural networks for resource efficient
      inference, equation (7), for single weights.
    """
    del key
    return jax.tree.map(lambda weights, gradient: weights * gradient, params, gradients)


def gradient(key: jax.Array, params: Params, gradients: optax.Updates) -> Params:
    """The gradient: how fast the loss would fall, were a connection to grow from zero.

    A gradient of exactly zero, as behind a unit that is dead, counts as a random number of no more
    than 1e-30, so that such connections do not tie.

    Args:
      key: a typed PRNG key, another at every step.
      params: dense weights W, of which the shapes alone count.
      gradients: at W⊙T, a tree like `params`; the transformation that asks for it must stand
        before the optimizer in its chain.

    Returns:
      A tree like `params`, float32.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> gradient(jax.random.key(0), jnp.array([3.0, -2.0]), jnp.array([0.5, -1.0]))
      Array([ 0.5, -1. ], dtype=float32)

    Reference:
      Evci et al. 2020, Rigging the lottery: making all tickets winners.
    """
    return jax.tree.map(
        lambda slope, number: jnp.where(slope == 0, 1e-30 * number, slope.astype(jnp.float32)),
        gradients,
        chance(key, params, gradients),
    )


def chance(key: jax.Array, params: Params, gradients: optax.Updates) -> Params:
    """Uniform random numbers in (0, 1], the least that any other importance must beat.

    Args:
      key: a typed PRNG key, another at every step.
      params: dense weights W, of which the shapes alone count.
      gradients: not used.

    Returns:
      A tree like `params`, float32.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> float(chance(jax.random.key(0), jnp.array([3.0, -2.0]), jnp.zeros(2)).max()) <= 1
      True
    """
    del gradients
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    numbers = [
        1.0
        - jax.random.uniform(
            own, jnp.shape(leaf), jnp.float32, out_sharding=_explicit_sharding(leaf)
        )
        for own, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, numbers)


def _explicit_sharding(leaf: jax.typing.ArrayLike) -> jax.NamedSharding | None:
    """Finds how numbers must lie to be combined with an array on a mesh with explicit axes."""
    sharding = jax.typeof(leaf).sharding
    return sharding if any(sharding.spec) else None
