"""A loop of one turn or none, in place of a branch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def once_if(
    due: jax.Array, step: Callable[[jax.Array, Any], Any], carry: Any
) -> tuple[jax.Array, Any]:
    """Takes a step or none, as a loop of one turn or none.

    Not by a cond, for which XLA copies what is carried even where nothing is due.

    Args:
      due: whether the step is taken.
      step: of the number of the turn, always 0, and the carry. XLA does not know the turn: what
        depends on it is not computed before the loop, where nothing may be due.
      carry: what the step changes.

    Returns:
      How many turns there were, and the carry.
    """
    return jax.lax.while_loop(
        lambda state: state[0] < due.astype(jnp.int32),
        lambda state: (state[0] + 1, step(*state)),
        (jnp.int32(0), carry),
    )
