"""Masks T: made, applied, updated by h_k, and counted.

Pure functions on parallel trees of weights and masks. `surgery` decides when they are updated,
`thresholds` by what.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dns_jax.layers import group_by_layer, has_axes, layer_names, leaf_path, parent
from dns_jax.typing import LayerOf, Masks, Params, TakesPart, Thresholds


class Events(NamedTuple):
    """How many connections of one layer changed sides in an update."""

    pruned: jax.Array  #: shape=(), dtype=jnp.int32: True -> False
    spliced: jax.Array  #: shape=(), dtype=jnp.int32: False -> True


def init_masks(params: Params, takes_part: TakesPart = has_axes) -> Masks:
    """Makes the masks that keep every connection, T = 1.

    Args:
      params: dense weights, any pytree of floating-point arrays.
      takes_part: which leaves get a mask of their own; the others get a scalar True.

    Returns:
      A tree with the structure of `params`. The mask of a leaf that takes part has its shape
      and, where the leaf is a concrete array, its sharding; any other has shape `()`.

    Raises:
      TypeError: if a leaf that takes part is not of a real floating-point type.
      ValueError: if `params` has no leaves, or a scalar is to take part.

    Example:
      >>> import jax.numpy as jnp
      >>> init_masks({'kernel': jnp.zeros(3)})
      {'kernel': Array([ True,  True,  True], dtype=bool)}
    """
    if not jax.tree.leaves(params):
        raise ValueError(f'params must have at least one leaf, but is {params!r}')

    def init(key_path, weights):
        path = leaf_path(key_path)
        if not takes_part(path, weights):
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

    return jax.tree.map_with_path(init, params)


def apply_masks(params: Params, masks: Masks) -> Params:
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
    check_parallel(params, masks)
    return jax.tree.map(
        lambda weights, mask: jnp.where(mask, weights, 0) if jnp.ndim(mask) else weights,
        params,
        masks,
    )


@functools.partial(jax.jit, static_argnames='layer_of')
def update_masks(
    key: jax.Array,
    params: Params,
    masks: Masks,
    thresholds: Mapping[str, Thresholds],
    update_probability: Mapping[str, jax.typing.ArrayLike],
    layer_of: LayerOf = parent,
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
    check_parallel(params, masks)
    layers = list(group_by_layer(masks, layer_of))
    for name, table in (('thresholds', thresholds), ('update_probability', update_probability)):
        if sorted(table) != layers:
            raise ValueError(f'{name} must name the layers {layers}, but names {sorted(table)}')
    if not layers:
        return masks

    probability = jnp.stack([jnp.float32(update_probability[layer]) for layer in layers])
    coins = jax.random.uniform(key, (len(layers),), jnp.float32) < probability
    coin_of = dict(zip(layers, coins, strict=True))

    def update(layer, weights, mask):
        if mask.ndim == 0:
            return mask
        return jnp.where(coin_of[layer], discriminate(weights, mask, thresholds[layer]), mask)

    return jax.tree.map(update, layer_names(masks, layer_of), params, masks)


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
    # One comparison says it: a kept connection must reach a_k, a pruned one b_k. Put as "not
    # below" it keeps a NaN, so that a broken weight breaks the loss instead of hiding.
    threshold = jnp.where(mask, jnp.float32(thresholds.low), jnp.float32(thresholds.high))
    return ~(jnp.abs(weights).astype(jnp.float32) < threshold)


def count_kept(masks: Masks, layer_of: LayerOf = parent) -> dict[str, jax.Array]:
    """Counts the kept connections of each layer that takes part.

    Args:
      masks: the masks T.
      layer_of: maps the path of a leaf to the name of its layer.

    Returns:
      ``{layer name: how many masks are True}``, int32 scalars.

    Example:
      >>> import jax.numpy as jnp
      >>> int(count_kept({'fc1': jnp.array([True, False, True])})[''])
      2
    """
    layers = group_by_layer(masks, layer_of)
    return {layer: sum(map(count_true, leaves), jnp.int32(0)) for layer, leaves in layers.items()}


def count_events(before: Masks, after: Masks, layer_of: LayerOf = parent) -> dict[str, Events]:
    """Counts the connections that an update pruned and spliced.

    Args:
      before: the masks before the update.
      after: the masks after it.
      layer_of: maps the path of a leaf to the name of its layer.

    Returns:
      ``{layer name: Events(pruned, spliced)}``, int32 scalars.

    Raises:
      ValueError: if the trees do not match.
      TypeError: if a mask is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> events = count_events(jnp.array([True, True, False]), jnp.array([False, True, True]))
      >>> int(events[''].pruned), int(events[''].spliced)
      (1, 1)
    """
    # Each as the masks of the other, so that neither may be a scalar or an integer alone.
    check_parallel(before, after)
    check_parallel(after, before)
    pruned = count_kept(jax.tree.map(lambda old, new: old & ~new, before, after), layer_of)
    spliced = count_kept(jax.tree.map(lambda old, new: new & ~old, before, after), layer_of)
    return {layer: Events(pruned[layer], spliced[layer]) for layer in pruned}


def check_parallel(params: Params, masks: Masks) -> None:
    """Checks that the masks belong to the weights.

    Args:
      params: dense weights.
      masks: masks that should be parallel to them.

    Raises:
      ValueError: if the structures differ, or a mask has neither the shape of its weights nor
        shape `()`.
      TypeError: if a mask is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> check_parallel(jnp.zeros(3), jnp.ones(2, bool))
      Traceback (most recent call last):
        ...
      ValueError: masks[''] has shape (2,); its weights have shape (3,)
    """
    structure, mask_structure = jax.tree.structure(params), jax.tree.structure(masks)
    if structure != mask_structure:
        raise ValueError(
            f'masks must have the structure of params, {structure}, but have {mask_structure}'
        )
    mask_leaves = jax.tree.leaves(masks)
    for (path, weights), mask in zip(jax.tree.leaves_with_path(params), mask_leaves, strict=True):
        name = f'masks[{leaf_path(path)!r}]'
        if jnp.result_type(mask) != jnp.bool_:
            raise TypeError(f'{name} must be boolean, but its dtype is {jnp.result_type(mask)}')
        if jnp.shape(mask) not in (jnp.shape(weights), ()):
            raise ValueError(
                f'{name} has shape {jnp.shape(mask)}; its weights have shape {jnp.shape(weights)}'
            )


def count_true(mask: jax.Array) -> jax.Array:
    """Counts the True entries of one boolean array.

    Args:
      mask: bool, of any shape.

    Returns:
      How many are True, an int32 scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> int(count_true(jnp.array([True, False, True])))
      2
    """
    if any(jax.typeof(mask).sharding.spec):
        return mask.sum(dtype=jnp.int32)  # explicitly sharded axes cannot be flattened
    # Sums of 128 at a time fit a byte, which XLA on CPU adds up five times faster than int32.
    whole = mask.size // 128 * 128
    flat = mask.reshape(-1).astype(jnp.uint8)
    blocks = flat[:whole].reshape(128, -1).sum(0, dtype=jnp.uint8)
    return blocks.sum(dtype=jnp.int32) + flat[whole:].sum(dtype=jnp.int32)
