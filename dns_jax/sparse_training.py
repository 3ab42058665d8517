"""What the papers of other pruners train with: kept weights alone, and a dropout that falls."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dns_jax._trees import check_parallel
from dns_jax.layers import group_by_layer, parent_path
from dns_jax.masks import apply_masks, count_kept
from dns_jax.transformation import get_masks
from dns_jax.typing import LayerOf, Masks


def train_kept(
    pruner: optax.GradientTransformation, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    r"""Chains a pruner and an optimizer that trains kept connections alone; pruned weights are 0.

    .. math::
      W \leftarrow (W + \mathrm{optimizer}(\nabla L \odot T)) \odot T

    Under this W = W⊙T after every step: what a pruned weight was is lost, it does not learn, and a
    connection that `dns_jax.pruners.regrow` grows starts at zero.

    Args:
      pruner: any of this package; it sees the whole gradient.
      optimizer: sees zeros for pruned connections.

    Returns:
      A transformation whose state is that of both.

    Raises:
      ValueError: if `params` is missing, or `pruner` has no masks in its state (from `update`).

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from dns_jax.pruners import one_shot
      >>> pruner = one_shot(0.5, step=0, key=jax.random.key(0))
      >>> optimizer = train_kept(pruner, optax.sgd(1.0))
      >>> params = {'kernel': jnp.array([2.0, -1.0])}
      >>> updates, _ = optimizer.update({'kernel': jnp.ones(2)}, optimizer.init(params), params)
      >>> optax.apply_updates(params, updates)['kernel']
      Array([1., 0.], dtype=float32)

    Reference:
      Evci et al. 2020, Rigging the lottery, section 3.
    """
    pruner, optimizer = map(optax.with_extra_args_support, (pruner, optimizer))

    def init_fn(params):
        return pruner.init(params), optimizer.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        updates, pruner_state = pruner.update(updates, state[0], params, **extra_args)
        if params is None:
            raise ValueError('train_kept needs the weights: call update(updates, state, params)')
        masks = check_parallel(params, get_masks(pruner_state))
        updates = apply_masks(updates, masks)
        updates, optimizer_state = optimizer.update(updates, state[1], params, **extra_args)
        updates = jax.tree.map(
            lambda mask, update, weights: (
                jnp.where(mask, update, -weights) if jnp.ndim(mask) else update
            ),
            masks,
            updates,
            params,
        )
        return updates, (pruner_state, optimizer_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_dropout(rate: float, masks: Masks, layer_of: LayerOf = parent_path) -> dict[str, Any]:
    r"""Lowers a rate of dropout as connections go, since fewer of them overfit less.

    .. math::
      r_k = r\,\sqrt{\text{kept}_k / \text{all}_k}

    Args:
      rate: the rate of dropout for a dense layer, in [0, 1).
      masks: the masks T.
      layer_of: maps the path of a leaf to the name of its layer.

    Returns:
      ``{layer name: rate}`` for the layers that take part, float32 scalars.

    Raises:
      ValueError: if `rate` is a number outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> rates = scale_dropout(0.5, {'fc1': {'kernel': jnp.array([True, False, False, False])}})
      >>> float(rates['fc1'])
      0.25

    Reference:
      Han et al. 2015, Learning both weights and connections for efficient neural networks,
      section 3.1.
    """
    if not 0 <= rate < 1:
        raise ValueError(f'rate must be in [0, 1), but is {rate!r}')
    kept, layers = count_kept(masks, layer_of), group_by_layer(masks, layer_of)
    return {
        layer: rate * jnp.sqrt(jnp.float32(kept[layer]) / sum(mask.size for mask in leaves))
        for layer, leaves in layers.items()
    }
