"""Masks held packed, one bit a weight, in the state of an optimizer and in its checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp

from dns_jax._trees import unpack_masks
from dns_jax.transformation import Surgery
from dns_jax.typing import Masks, PackedMask


def pack(pruner: Surgery) -> Surgery:
    """Holds the masks of a pruner packed, and unpacks them inside its update.

    Results are the same, bit for bit, in an eighth of the bytes. `get_masks` unpacks them, and so
    does every function here that takes masks.

    Args:
      pruner: `surgery`, `prune_to`, one of `dns_jax.pruners`, or `freeze`.

    Returns:
      A transformation as of `surgery`, in whose state a `PackedMask` stands for each mask that has
      axes.

    Example:
      >>> import jax, optax
      >>> from dns_jax import Rule, get_masks, mean_std, surgery
      >>> params = {'kernel': jax.numpy.arange(32.0).reshape(2, 16)}
      >>> pruner = pack(surgery(Rule(mean_std(0.0)), jax.random.key(0)))
      >>> _, state = pruner.update(params, pruner.init(params), params)
      >>> state.masks['kernel'].bits
      Array([[  0,   1],
             [255, 255]], dtype=uint8)
      >>> get_masks(state)['kernel'].sum(1)
      Array([ 1, 16], dtype=int32)
    """

    def init_fn(params):
        state: Any = pruner.init(params)
        return state._replace(masks=_pack_masks(state.masks))

    def update_fn(updates, state: Any, params=None, **extra_args):
        unpacked = state._replace(masks=unpack_masks(state.masks))
        result: Any = pruner.update(updates, unpacked, params, **extra_args)
        updates, new = result
        return updates, new._replace(masks=_pack_masks(new.masks))

    return Surgery(init_fn, update_fn)


def _pack_masks(masks: Masks) -> Masks:
    def pack_leaf(mask):
        return PackedMask(jnp.packbits(mask, axis=-1), mask.shape[-1]) if mask.ndim else mask

    return jax.tree.map(pack_leaf, masks)
