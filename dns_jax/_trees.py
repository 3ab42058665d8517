"""Trees by the paths of their leaves: nested, parallel to each other, and with holes."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dns_jax._core.checks import abridge
from dns_jax.layers import named_leaves
from dns_jax.typing import Masks, PackedMask, Params

_MAX_PARTS = 100  # of a path: JAX cannot walk trees much deeper than a few times that
_HOLE = object()  # holes have no leaves, and so no paths of their own


def nest_leaves(leaves: Iterable[tuple[str, Any]]) -> Any:
    """Makes the nested dict of leaves, by the parts of their paths: `named_leaves` the other way.

    Args:
      leaves: paths and leaves, none of them a dict.

    Returns:
      The dict, or the leaf itself where its path is `''`.

    Raises:
      ValueError: if there are no leaves, one has the place of another or lies within it, or a
        path has more than 100 parts.

    Example:
      >>> nest_leaves([('fc1/bias', 1), ('fc1/kernel', 2)])
      {'fc1': {'bias': 1, 'kernel': 2}}
    """
    top: dict[str, Any] = {}
    for path, leaf in leaves:
        node, key = top, ''  # the whole tree is the one entry of `top`
        parts = path.split('/') if path else []
        if len(parts) > _MAX_PARTS:
            raise ValueError(f'the path {path[:80]!r}... has {len(parts)} parts, over {_MAX_PARTS}')
        for part in parts:
            node, key = node.setdefault(key, {}), part
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or key in node:
            raise ValueError(f'the leaf {path!r} has the place of another, or lies within it')
        node[key] = leaf
    if not top:
        raise ValueError('a network must have at least one leaf')
    return top['']


def find_holes(tree: Any) -> list[str]:
    """Finds where `optax.masked`, `optax.partition` or `optax.multi_transform` left something out.

    Example:
      >>> import optax
      >>> find_holes({'conv1': {'kernel': 1.0, 'bias': optax.MaskedNode()}})
      ['conv1/bias']
    """
    marked = jax.tree.map(lambda node: _HOLE if _is_hole(node) else node, tree, is_leaf=_is_hole)
    return [path for path, leaf in named_leaves(marked) if leaf is _HOLE]


def unpack_masks(masks: Masks) -> Masks:
    """Gives masks as bool arrays, those that are packed and those that are not.

    Args:
      masks: such as those of a state, where a `PackedMask` may stand for one (`dns_jax.packing`).

    Returns:
      The masks.

    Example:
      >>> import jax.numpy as jnp
      >>> from dns_jax.typing import PackedMask
      >>> unpack_masks(PackedMask(jnp.array([128 + 64], jnp.uint8), 3))
      Array([ True,  True, False], dtype=bool)
    """

    def is_packed(node):
        return isinstance(node, PackedMask)

    def unpack(mask):
        if not is_packed(mask):
            return mask
        return jnp.unpackbits(mask.bits, axis=-1, count=mask.length).astype(bool)

    return jax.tree.map(unpack, masks, is_leaf=is_packed)


def check_parallel(params: Params, masks: Masks) -> Masks:
    """Checks that the masks belong to the weights, by the paths of their leaves.

    So the two may be of different types, as weights in an `nnx.State` and masks from a file are.

    Args:
      params: dense weights.
      masks: masks that should be parallel to them. Where `optax.masked` or `optax.partition` left
        something out, nothing is masked.

    Returns:
      The masks, in the structure of `params`.

    Raises:
      ValueError: if the paths differ, or a mask has neither the shape of its weights nor shape
        `()`.
      TypeError: if a mask is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> check_parallel({'fc1': jnp.zeros(3)}, {'fc1': jnp.ones(2, bool)})
      Traceback (most recent call last):
        ...
      ValueError: masks['fc1'] has shape (2,); its weights have shape (3,)
    """
    masks = unpack_masks(masks)
    weights_of, masks_of, left_out = named_leaves(params), named_leaves(masks), find_holes(masks)
    if jax.tree.structure(params) != jax.tree.structure(masks) or left_out:
        masks = _in_structure_of(params, weights_of, dict(masks_of), left_out)
    for (path, weights), mask in zip(weights_of, jax.tree.leaves(masks), strict=True):
        name = f'masks[{path!r}]'
        if jnp.result_type(mask) != jnp.bool_:
            raise TypeError(f'{name} must be boolean, but its dtype is {jnp.result_type(mask)}')
        if jnp.shape(mask) not in (jnp.shape(weights), ()):
            raise ValueError(
                f'{name} has shape {jnp.shape(mask)}; its weights have shape {jnp.shape(weights)}'
            )
    return masks


def _in_structure_of(params, weights_of, masks_of, left_out) -> Masks:
    """Finds the mask of each weight by its path."""
    aligned = []
    for path, _ in weights_of:
        if path in masks_of:
            aligned.append(masks_of.pop(path))
        elif any(path == hole or not hole or path.startswith(f'{hole}/') for hole in left_out):
            aligned.append(np.ones((), bool))
        else:
            raise ValueError(
                f'masks must have the leaves of params, but lack {path!r}; they have '
                f'{abridge(masks_of)}'
            )
    if masks_of:
        raise ValueError(
            f'masks must have the leaves of params, but have {abridge(masks_of)} too, which params '
            'lack'
        )
    return jax.tree.unflatten(jax.tree.structure(params), aligned)


def _is_hole(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
