"""What goes beside optax's own transformations: Caffe's SGD, and an average of the weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dns_jax.layers import map_leaves, role
from dns_jax.typing import Params, Schedule


def caffe_sgd(
    learning_rate: float | Schedule,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    bias_scale: float = 2.0,
    decay_biases: bool = True,
) -> optax.GradientTransformation:
    r"""Momentum SGD with the learning rate inside the momentum buffer, as in Caffe.

    .. math::
      h \leftarrow m\,h + \lambda_i\,s\,(g + d\,w), \qquad w \leftarrow w - h

    `optax.sgd` multiplies the rate in afterwards; the two part as soon as the rate changes.

    Args:
      learning_rate: λ, a number or a schedule of the step.
      momentum: m, in [0, 1).
      weight_decay: d, on every dense weight, pruned ones included.
      bias_scale: s for biases (`dns_jax.role`), Caffe's `lr_mult`; 1 for all others.
      decay_biases: whether d is for biases too (Caffe's `decay_mult`, 1 or 0).

    Returns:
      An optax transformation; its `update` needs `params`.

    Raises:
      ValueError: if `momentum` is outside [0, 1), or `weight_decay` or `bias_scale` negative.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = caffe_sgd(0.1, momentum=0.5, weight_decay=0.0)
      >>> kernel = jnp.zeros((1, 1))
      >>> state = optimizer.init(kernel)
      >>> update, state = optimizer.update(kernel + 1.0, state, kernel)
      >>> round(float(update[0, 0]), 4)
      -0.1

    Reference:
      Caffe, `SGDSolver::ComputeUpdateValue`; the solvers of Guo et al. 2016.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f'momentum must be in [0, 1), but is {momentum!r}')
    if not weight_decay >= 0:
        raise ValueError(f'weight_decay must be at least 0, but is {weight_decay!r}')
    if not bias_scale >= 0:
        raise ValueError(f'bias_scale must be at least 0, but is {bias_scale!r}')

    def biases(tree):
        return map_leaves(lambda path, leaf: role(path, leaf) == 'bias', tree)

    def others(tree):
        return map_leaves(lambda path, leaf: role(path, leaf) != 'bias', tree)

    return optax.chain(
        optax.add_decayed_weights(weight_decay, None if decay_biases else others),
        optax.masked(optax.scale(bias_scale), biases),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        optax.trace(momentum),
        optax.scale(-1.0),
    )


class AverageState(NamedTuple):
    """The state of `average_weights`."""

    average: Params


def average_weights(decay: float) -> optax.GradientTransformation:
    r"""Keeps a moving average of the weights beside them, and changes no update.

    .. math::
      A \leftarrow d\,A + (1 - d)\,w

    w are the weights after the update, so it stands last in the chain, outside of `slow_pruned` and
    `train_kept`. A begins as the weights that `init` gets; after n steps they have the share dⁿ.
    While masks stay as they are, A⊙T is the average of W⊙T. BatchNorm's statistics are not those
    of A, and are to be estimated anew.

    Args:
      decay: d, in [0, 1).

    Returns:
      An optax transformation. `optax.tree.get(state, 'average')` gives A, however deep in the state
      it is; its leaves are float32 for weights of half precision, else of the weights' dtypes.

    Raises:
      ValueError: if `decay` is outside [0, 1), or, from `update`, without `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> optimizer = optax.chain(optax.sgd(1.0), average_weights(0.75))
      >>> weights = jnp.array([4.0])
      >>> state = optimizer.init(weights)
      >>> updates, state = optimizer.update(jnp.array([4.0]), state, weights)
      >>> optax.apply_updates(weights, updates), optax.tree.get(state, 'average')
      (Array([0.], dtype=float32), Array([3.], dtype=float32))

    Reference:
      Polyak and Juditsky 1992, as a moving average.
    """
    if not 0 <= decay < 1:
        raise ValueError(f'decay must be in [0, 1), but is {decay!r}')

    def widen(leaf):
        # Half precision would round (1 - d) w away.
        dtype = jnp.result_type(leaf)
        return jnp.array(leaf, jnp.float32 if dtype.itemsize < 4 else dtype)

    def init(params):
        return AverageState(jax.tree.map(widen, params))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(
                'average_weights needs the weights: call update(updates, state, params)'
            )
        new = jax.tree.map(widen, optax.apply_updates(params, updates))
        return updates, AverageState(optax.incremental_update(new, state.average, 1 - decay))

    return optax.GradientTransformation(init, update)
