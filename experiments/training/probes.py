"""What is done to a pruner to learn about it: a wrong cut, and a count of what returns."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dns_jax
from dns_jax import importance


def cut(
    pruner: optax.GradientTransformation, share: float, step: int
) -> optax.GradientTransformation:
    """Cuts a random share of the kept connections, once.

    Args:
      pruner: what to do it to, with a `dns_jax.SurgeryState`.
      share: of the kept connections, in [0, 1).
      step: when, after the masks of that step are updated.
    """

    def update_fn(updates, state, params: Any = None):
        count = optax.tree.get(state, 'count')
        updates, state = pruner.update(updates, state, params)
        # Above every count of steps, so no coin is thrown with this key.
        key = jax.random.fold_in(optax.tree.get(state, 'key'), 2**31 + 100)

        def cut_some(masks):
            numbers = importance.chance(key, params, updates)
            return jax.tree.map(
                lambda mask, number: mask & (number > share) if mask.ndim else mask, masks, numbers
            )

        masks = dns_jax.get_masks(state)
        masks = jax.lax.cond(count == step, cut_some, lambda masks: masks, masks)
        return updates, optax.tree.set(state, masks=masks)

    return optax.GradientTransformation(pruner.init, update_fn)


class ReturnsState(NamedTuple):
    """State of `count_returns`."""

    pruner: optax.OptState
    pruned: dns_jax.Masks  # parallel to the masks: whether the connection was ever pruned
    returned: dns_jax.Masks  # the same: whether it was ever spliced after that


def count_returns(pruner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Remembers which connections were pruned and which of them returned.

    Returns:
      The pruner with a `ReturnsState` around its state.
    """

    def init_fn(params):
        state = pruner.init(params)
        masks = dns_jax.get_masks(state)
        # Two trees, as no array can be donated twice.
        return ReturnsState(state, *(jax.tree.map(jnp.zeros_like, masks) for _ in range(2)))

    def update_fn(updates, state, params=None):
        before = dns_jax.get_masks(state.pruner)
        updates, inner = pruner.update(updates, state.pruner, params)
        after = dns_jax.get_masks(inner)
        pruned = jax.tree.map(
            lambda seen, old, new: seen | (old & ~new), state.pruned, before, after
        )
        returned = jax.tree.map(
            lambda seen, old, new: seen | (new & ~old), state.returned, before, after
        )
        return updates, ReturnsState(inner, pruned, returned)

    return optax.GradientTransformation(init_fn, update_fn)


def find_returns(opt_state: optax.OptState) -> ReturnsState | None:
    """Finds what `count_returns` remembers.

    Returns:
      Its state, None where nothing was counted.
    """
    return optax.tree.get(opt_state, 'ReturnsState')


def remove_others(masks: dns_jax.Masks, returned: dns_jax.Masks, seed: int) -> dns_jax.Masks:
    """Prunes, for every kept connection that returned, one kept connection that never left.

    Args:
      masks: the masks T.
      returned: a parallel tree, whether a connection returned.
      seed: of the choice.

    Returns:
      The masks without as many others, chosen at random from each leaf, or without all others
      where these are fewer.
    """
    random = np.random.default_rng(seed)

    def of_leaf(mask, back):
        mask, back = np.array(mask), np.asarray(back)
        others = np.flatnonzero(mask & ~back)
        number = min((mask & back).sum(), others.size)
        mask.flat[random.choice(others, number, replace=False)] = False
        return mask

    return jax.tree.map(of_leaf, masks, returned)
