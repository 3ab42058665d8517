"""Chains of a pruner and an optimizer that treat pruned weights apart, and a falling dropout."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dns_jax._trees import check_parallel
from dns_jax.layers import group_by_layer, parent_path
from dns_jax.masks import count_kept
from dns_jax.schedules import check_finite
from dns_jax.transformation import get_masks
from dns_jax.typing import LayerOf, Masks, Params


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

    def mask(update, weights):
        del weights
        return jnp.zeros_like(update)

    def reset(update, weights):
        del update
        return -weights

    return _chain('train_kept', pruner, optimizer, before=mask, after=reset)


def decay_pruned(
    pruner: optax.GradientTransformation,
    optimizer: optax.GradientTransformation,
    rate: float = 2e-4,
) -> optax.GradientTransformationExtraArgs:
    r"""Chains a pruner and an optimizer that also sees a weight decay of pruned weights: SR-STE.

    .. math::
      W \leftarrow W + \mathrm{optimizer}(\nabla L + \lambda\,(1 - T) \odot W)

    with T the masks of this W, as the pruner has just chosen them. Pruned weights that no gradient
    holds up shrink, so that masks change less often. Meant for `dns_jax.pruners.straight_through`.

    Args:
      pruner: any of this package; it sees the gradient alone.
      optimizer: sees the sum.
      rate: λ, at least 0.

    Returns:
      A transformation whose state is that of both.

    Raises:
      ValueError: if `rate` is out of range; if `params` is missing, or `pruner` has no masks in its
        state (from `update`).

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from dns_jax.pruners import straight_through
      >>> pruner = straight_through(0.5, jax.random.key(0))
      >>> optimizer = decay_pruned(pruner, optax.sgd(1.0), rate=0.25)
      >>> params = {'kernel': jnp.array([2.0, -1.0])}
      >>> updates, _ = optimizer.update({'kernel': jnp.ones(2)}, optimizer.init(params), params)
      >>> optax.apply_updates(params, updates)['kernel']
      Array([ 1.  , -1.75], dtype=float32)

    Reference:
      Zhou et al. 2021, Learning N:M fine-grained structured sparse neural networks from scratch.
    """
    check_finite('rate', rate, 0)

    def decay(update, weights):
        return update + rate * weights

    return _chain('decay_pruned', pruner, optimizer, before=decay)


def slow_pruned(
    pruner: optax.GradientTransformation,
    optimizer: optax.GradientTransformation,
    share: float = 0.3,
) -> optax.GradientTransformationExtraArgs:
    r"""Chains a pruner and an optimizer by which pruned weights learn slower.

    .. math::
      W \leftarrow W + (T + \beta\,(1 - T)) \odot \mathrm{optimizer}(\mathrm{clip}(G, -g, g))

    with G the gradient, and g the largest of `|G|` where T is 1: only pruned weights can have more.

    It takes the place of `optax.chain`. Adam moves every weight by about its learning rate, however
    small its gradient is: without this so many pruned weights grow past the threshold that what is
    kept never settles. A unit before a BatchNorm that lost all its inputs has a variance of 0, and
    gradients that are a few hundred times too large: in no leaf is the gradient of a pruned weight
    larger than the largest of those kept, unless that is 0.

    Args:
      pruner: any of this package; it sees the whole gradient.
      optimizer: sees the limited one, by the masks that it was taken at.
      share: β, in [0, 1].

    Returns:
      A transformation whose state is that of both.

    Raises:
      ValueError: if `share` is out of range; if `params` is missing, or `pruner` has no masks in
        its state (from `update`).

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from dns_jax import freeze
      >>> pruner = freeze({'kernel': jnp.array([True, False, False])})
      >>> optimizer = slow_pruned(pruner, optax.sgd(1.0), share=0.25)
      >>> params = {'kernel': jnp.array([4.0, 1.0, 1.0])}
      >>> gradients = {'kernel': jnp.array([2.0, 1.0, -9.0])}
      >>> updates, _ = optimizer.update(gradients, optimizer.init(params), params)
      >>> optax.apply_updates(params, updates)['kernel']
      Array([2.  , 0.75, 1.5 ], dtype=float32)

    Reference:
      `experiments/NOTES.md`, what helps surgery on networks of today.
    """
    if not 0 <= share <= 1:
        raise ValueError(f'share must be in [0, 1], but is {share!r}')
    pruner = optax.with_extra_args_support(pruner)

    def limit(mask, gradient):
        if not jnp.ndim(mask):
            return gradient
        largest = jnp.max(jnp.abs(gradient), initial=0.0, where=mask)
        # Where no kept weight has a gradient, only pruned ones can bring the layer back.
        bound = jnp.where(largest > 0, largest, jnp.inf)
        return jnp.clip(gradient, -bound, bound)

    def slow(update, weights):
        del weights
        return share * update

    def update_fn(updates, state, params=None, **extra_args):
        taken_at = get_masks(state)
        updates, state = pruner.update(updates, state, params, **extra_args)
        return jax.tree.map(limit, check_parallel(params, taken_at), updates), state

    limited = optax.GradientTransformationExtraArgs(pruner.init, update_fn)
    return _chain('slow_pruned', limited, optimizer, after=slow)


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


def _chain(
    name: str,
    pruner: optax.GradientTransformation,
    optimizer: optax.GradientTransformation,
    before: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    after: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Chains a pruner and an optimizer, and changes what pruned weights get before and after it.

    The changes are functions of an update and its weights.
    """
    pruner, optimizer = map(optax.with_extra_args_support, (pruner, optimizer))

    def init_fn(params):
        return pruner.init(params), optimizer.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        updates, pruner_state = pruner.update(updates, state[0], params, **extra_args)
        if params is None:
            raise ValueError(f'{name} needs the weights: call update(updates, state, params)')
        masks = check_parallel(params, get_masks(pruner_state))
        if before:
            updates = _where_pruned(before, masks, updates, params)
        updates, optimizer_state = optimizer.update(updates, state[1], params, **extra_args)
        if after:
            updates = _where_pruned(after, masks, updates, params)
        return updates, (pruner_state, optimizer_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _where_pruned(change, masks: Masks, updates: optax.Updates, params: Params) -> Any:
    return jax.tree.map(
        lambda mask, update, weights: (
            jnp.where(mask, update, change(update, weights)) if jnp.ndim(mask) else update
        ),
        masks,
        updates,
        params,
    )
