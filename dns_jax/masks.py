"""Masks T: made, applied, updated by h_k, and counted.

Pure functions on parallel trees of weights and masks. `surgery` decides when they are updated,
`thresholds` by what.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer

from dns_jax._core.checks import abridge
from dns_jax._core.counts import count_all, to_int
from dns_jax._trees import check_parallel, unpack_masks
from dns_jax.layers import group_by_layer, is_kernel, map_leaves, named_leaves, parent_path
from dns_jax.stacking import restack, unstack
from dns_jax.typing import LayerOf, Masks, Params, TakesPart, Thresholds

_Tree = TypeVar('_Tree')


class Events(NamedTuple):
    """How many connections of one layer changed sides in an update."""

    pruned: jax.typing.ArrayLike  #: True -> False; int, under jit an int32 scalar
    spliced: jax.typing.ArrayLike  #: False -> True; int, under jit an int32 scalar


def init_masks(params: Params, takes_part: TakesPart = is_kernel) -> Masks:
    """Makes the masks that keep every connection, T = 1.

    Args:
      params: dense weights, any pytree of floating-point arrays.
      takes_part: which leaves get a mask of their own; the others, and those without an element,
        get a scalar True.

    Returns:
      A tree with the structure of `params`. The mask of a leaf that takes part has its shape
      and, where the leaf is a concrete array, its sharding; any other has shape `()`.

    Raises:
      TypeError: if a leaf that takes part is not of a real floating-point type.
      ValueError: if `params` has no leaves, or a scalar is to take part.

    Example:
      >>> import jax.numpy as jnp
      >>> init_masks({'kernel': jnp.zeros((1, 3)), 'bias': jnp.zeros(3)})
      {'bias': Array(True, dtype=bool), 'kernel': Array([[ True,  True,  True]], dtype=bool)}
    """
    if not jax.tree.leaves(params):
        raise ValueError(f'params must have at least one leaf, but is {params!r}')

    def init(path, weights):
        if not takes_part(path, weights) or 0 in jnp.shape(weights):
            return jnp.ones((), bool)
        dtype = jnp.result_type(weights)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f'params[{path!r}] must hold floating-point weights to take part in surgery, but '
                f'its dtype is {dtype}; a predicate takes_part can leave it out'
            )
        if jnp.ndim(weights) == 0:
            raise ValueError(f'params[{path!r}] is a scalar, which cannot take part in surgery')
        return jnp.ones_like(weights, dtype=bool)

    return map_leaves(init, params)


def apply_masks(params: _Tree, masks: Masks) -> _Tree:
    """Masks the weights: W⊙T, what the network computes with.

    Pruned weights are exact zeros, also where the dense weight is negative or not finite, so
    this is also how to finish: the result is the network to keep.

    Args:
      params: dense weights W.
      masks: the parallel masks T.

    Returns:
      A tree like `params`, with 0 where the mask is False.

    Raises:
      ValueError: if the trees do not match.
      TypeError: if a mask is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> apply_masks(jnp.array([3.0, -2.0]), jnp.array([True, False]))
      Array([3., 0.], dtype=float32)

    Reference:
      Guo et al. 2016, equation (1).
    """
    return jax.tree.map(
        lambda weights, mask: jnp.where(mask, weights, 0) if jnp.ndim(mask) else weights,
        params,
        check_parallel(params, masks),
    )


def soft_threshold(
    params: _Tree,
    masks: Masks,
    thresholds: Mapping[str, Thresholds],
    layer_of: LayerOf = parent_path,
    stacked: Mapping[str, int] | None = None,
) -> _Tree:
    r"""Masks the weights and makes the kept ones smaller by their threshold, so that none jumps.

    .. math::
      \mathrm{sign}(W_k) \max(|W_k| - a_k, 0) \odot T_k

    A weight that h_k prunes at a_k is zero already, and one that is spliced at b_k comes back as
    b_k − a_k. Take the gradient there in place of W⊙T, meant for all of W as in equation (2). Once
    the masks stay as they are, so do the thresholds, and this is the network to keep.

    Args:
      params: dense weights W.
      masks: the parallel masks T.
      thresholds: `{layer name: (a_k, b_k)}`, as in the state of `surgery`, in the unit of the
        weights. A layer that is not named, or has no threshold yet, is masked alone.
      layer_of: as for `surgery`, to which the same must be given.
      stacked: likewise.

    Returns:
      A tree like `params`. A kept weight that has fallen below a_k since is 0.

    Raises:
      ValueError: if the trees do not match, or `thresholds` names a layer that `params` lacks.
      TypeError: if a mask is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from dns_jax import Thresholds
      >>> weights, mask = jnp.array([3.0, -2.0, 1.5]), jnp.array([True, True, False])
      >>> soft_threshold(weights, mask, {'': Thresholds(1.0, 2.0)})
      Array([ 2., -1.,  0.], dtype=float32)

    Reference:
      Donoho 1995, De-noising by soft-thresholding, for the function.
    """
    (apart,) = unstack(stacked or {}, params)
    layers = {layer_of(path) for path, _ in named_leaves(apart)}
    if unknown := sorted(thresholds.keys() - layers):
        raise ValueError(
            f'thresholds names {abridge(unknown)}, but the layers of params are '
            f'{abridge(sorted(layers))}: stacked and layer_of must be those of surgery'
        )

    def cut(path, leaf):
        low = thresholds[layer_of(path)].low if layer_of(path) in thresholds else 0.0
        # One that is not known yet is below 0.
        low = jnp.maximum(low, 0.0).astype(jnp.result_type(leaf))
        return jnp.reshape(low, (1,) * jnp.ndim(leaf))

    def apply(weights, mask, cut):
        if not jnp.ndim(mask):
            return weights
        return jnp.where(mask, jnp.sign(weights) * jnp.maximum(jnp.abs(weights) - cut, 0), 0)

    cuts = restack(stacked or {}, params, map_leaves(cut, apart))
    return jax.tree.map(apply, params, check_parallel(params, masks), cuts)


@functools.partial(jax.jit, static_argnames='layer_of')
def update_masks(
    key: jax.Array,
    params: Params,
    masks: Masks,
    thresholds: Mapping[str, Thresholds],
    update_probability: Mapping[str, jax.typing.ArrayLike],
    layer_of: LayerOf = parent_path,
) -> Masks:
    r"""Updates the masks by the discriminative function h_k, layer by layer, with probability σ.

    .. math::
      h_k(W_k^{(i,j)}) = \begin{cases}
        0 & \text{if } |W_k^{(i,j)}| < a_k \\
        T_k^{(i,j)} & \text{if } a_k \le |W_k^{(i,j)}| < b_k \\
        1 & \text{if } b_k \le |W_k^{(i,j)}|
      \end{cases}

    Each layer makes one draw; where it fails, its masks stay as they are.
    The coins are `uniform(key, (layers,)) < update_probability`, layers sorted by name. A weight
    that is NaN counts as above every threshold.

    Args:
      key: a typed PRNG key, used once.
      params: dense weights W, float32, bfloat16 or float16; compared in float32.
      masks: the parallel masks T.
      thresholds: `{layer name: (a_k, b_k)}` for every layer with a mask that is not a scalar.
      update_probability: `{layer name: σ}` for the same layers, each in [0, 1].
      layer_of: maps the path of a leaf to the name of its layer.

    Returns:
      The new masks, a tree like `masks`.

    Raises:
      ValueError: if the trees do not match, or `thresholds` or `update_probability` do not
        name exactly the layers that take part.
      TypeError: if a mask is not boolean.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from dns_jax import Thresholds
      >>> weights, mask = jnp.array([0.1, 1.0, -1.0, 9.0]), jnp.array([True, True, False, False])
      >>> update_masks(
      ...     jax.random.key(0), weights, mask, {'': Thresholds(0.9, 1.1)}, {'': 1.0}
      ... )
      Array([False,  True, False,  True], dtype=bool)

    Reference:
      Guo et al. 2016, equation (3) and Algorithm 1.
    """
    masks = check_parallel(params, masks)
    layers = list(group_by_layer(masks, layer_of))
    for name, table in (('thresholds', thresholds), ('update_probability', update_probability)):
        if sorted(table) != layers:
            raise ValueError(
                f'{name} must name the layers {abridge(layers)}, but names {abridge(sorted(table))}'
            )
    coins = throw_coins(key, update_probability)
    leaves = iter(jax.tree.leaves(params))

    def update(path, mask):
        weights, layer = next(leaves), layer_of(path)
        if mask.ndim == 0:
            return mask
        return jnp.where(coins[layer], discriminate(weights, mask, thresholds[layer]), mask)

    return map_leaves(update, masks)


def throw_coins(
    key: jax.Array, update_probability: Mapping[str, jax.typing.ArrayLike]
) -> dict[str, jax.Array]:
    """Draws for each layer whether its masks are updated.

    Args:
      key: a typed PRNG key, used once.
      update_probability: `{layer name: σ}`, each in [0, 1].

    Returns:
      ``{layer name: bool scalar}``, from `uniform(key, (layers,)) < σ`, layers sorted by name.

    Example:
      >>> import jax
      >>> {layer: bool(coin) for layer, coin in throw_coins(jax.random.key(0), {'fc': 1.0}).items()}
      {'fc': True}
    """
    layers = sorted(update_probability)
    if not layers:
        return {}
    probability = jnp.stack([jnp.float32(update_probability[layer]) for layer in layers])
    coins = jax.lax.cond(
        ((probability <= 0) | (probability >= 1)).all(),
        lambda: probability >= 1,  # what any draw would say, and drawing takes time
        lambda: jax.random.uniform(key, (len(layers),), jnp.float32) < probability,
    )
    return dict(zip(layers, coins, strict=True))


def discriminate(weights: jax.Array, mask: jax.Array, thresholds: Thresholds) -> jax.Array:
    """Applies h_k to one array: the equation of `update_masks`, without its coin.

    Args:
      weights: dense weights, floating point.
      mask: their mask, bool of the same shape.
      thresholds: (a_k, b_k) of their layer.

    Returns:
      The mask that h_k gives, bool.

    Example:
      >>> import jax.numpy as jnp
      >>> from dns_jax import Thresholds
      >>> weights, mask = jnp.array([0.1, 1.0, -1.0, 9.0]), jnp.array([True, True, False, False])
      >>> discriminate(weights, mask, Thresholds(0.9, 1.1))
      Array([False,  True, False,  True], dtype=bool)

    Reference:
      Guo et al. 2016, equation (3).
    """
    # A kept connection must reach a_k, a pruned one b_k. Put as "not below" it keeps a NaN, so
    # that a broken weight breaks the loss instead of hiding. Two comparisons in place of |w|, which
    # XLA would compute outside of the loop that `surgery` stands in, at every step.
    threshold = jnp.where(mask, jnp.float32(thresholds.low), jnp.float32(thresholds.high))
    wide = weights.astype(jnp.float32)
    return ~((wide < threshold) & (wide > -threshold))


def count_kept(masks: Masks, layer_of: LayerOf = parent_path) -> dict[str, Any]:
    """Counts the kept connections of each layer that takes part.

    Args:
      masks: the masks T.
      layer_of: maps the path of a leaf to the name of its layer.

    Returns:
      ``{layer name: how many masks are True}``: ints; under jit, int32 scalars.

    Raises:
      ValueError: if a layer has 2^31 connections or more under jit, where an int32 cannot count
        them.

    Example:
      >>> import jax.numpy as jnp
      >>> count_kept({'fc1': {'kernel': jnp.array([True, False, True])}})
      {'fc1': 2}
    """
    layers = group_by_layer(unpack_masks(masks), layer_of)
    return {layer: _count(layer, leaves) for layer, leaves in layers.items()}


def find_empty_layers(masks: Masks, layer_of: LayerOf = parent_path) -> list[str]:
    """Names the layers of which surgery has left nothing: a network with one answers all alike.

    Cheap enough for every record of one's own loop; NaN never tells. Of layers that are stacked in
    one array, `unstack` the masks first.

    Args:
      masks: the masks T, concrete.
      layer_of: maps the path of a leaf to the name of its layer.

    Returns:
      The names, sorted.

    Example:
      >>> import jax.numpy as jnp
      >>> find_empty_layers({'conv1': {'kernel': jnp.zeros((2, 2), bool)}})
      ['conv1']
    """
    return [layer for layer, kept in count_kept(masks, layer_of).items() if not kept]


def count_events(before: Masks, after: Masks, layer_of: LayerOf = parent_path) -> dict[str, Events]:
    """Counts the connections that an update pruned and spliced.

    Args:
      before: the masks before the update.
      after: the masks after it.
      layer_of: maps the path of a leaf to the name of its layer.

    Returns:
      ``{layer name: Events(pruned, spliced)}``: ints; under jit, int32 scalars.

    Raises:
      ValueError: if the trees do not match, or as `count_kept` does.
      TypeError: if a mask is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> count_events(jnp.array([True, True, False]), jnp.array([False, True, True]))
      {'': Events(pruned=1, spliced=1)}
    """
    before, after = unpack_masks(before), unpack_masks(after)
    # Each as the masks of the other, so that neither may be a scalar or an integer alone.
    after = check_parallel(before, after)
    check_parallel(after, before)
    pruned = count_kept(jax.tree.map(lambda old, new: old & ~new, before, after), layer_of)
    spliced = count_kept(jax.tree.map(lambda old, new: new & ~old, before, after), layer_of)
    return {layer: Events(pruned[layer], spliced[layer]) for layer in pruned}


def _count(layer: str, masks: Sequence[Any]) -> Any:
    count = count_all(masks)
    if not isinstance(count.low, Tracer):
        return to_int(count)
    if sum(mask.size for mask in masks) >= 2**31:
        raise ValueError(
            f'the layer {layer!r} has 2**31 connections or more, which an int32 cannot count: '
            'count outside of jit, or divide the layer by layer_of'
        )
    return (count.high << 16) + count.low
