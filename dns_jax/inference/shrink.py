"""Exact shrinking of any masked network, by its traced program.

Owns the public function. The network is any function that JAX can trace. What its outputs do not
need goes; what is the same number whatever the inputs are goes too, and moves into constants.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dns_jax._trees import check_parallel
from dns_jax.inference._known import Region, sizes
from dns_jax.inference._liveness import Plan, analyze
from dns_jax.inference._program import trace
from dns_jax.inference._replay import replay
from dns_jax.layers import map_leaves, named_leaves
from dns_jax.typing import Masks, Params


class SmallNetwork(NamedTuple):
    """A function that gives what the masked one gives, and its weights."""

    apply: Callable[..., Any]  #: of the small params and the inputs, a batch of any size
    params: Params  #: the tree of the params, its leaves sliced, zero where pruned
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  #: of each leaf, before and after


def shrink(apply: Callable[..., Any], params: Params, masks: Masks, *inputs: Any) -> SmallNetwork:
    """Removes all that does not change what a masked network gives."""
    masked = _apply_masks(params, masks)
    leaves = [leaf for _, leaf in named_leaves(masked)]
    plan = analyze(trace(apply, masked, inputs), leaves)
    kept = [plan.held[number] for number in plan.program.leaves]
    small = [leaf[np.ix_(*region)] if region else leaf for leaf, region in zip(leaves, kept, strict=True)]
    structure = jax.tree.structure(masked)

    def small_apply(params: Any, *inputs: Any) -> Any:
        return jax.tree.unflatten(
            plan.program.structure, replay(plan, jax.tree.leaves(params), jax.tree.leaves(inputs))
        )

    shapes = {
        path: (leaf.shape, part.shape)
        for (path, leaf), part in zip(named_leaves(masked), small, strict=True)
    }
    return SmallNetwork(small_apply, jax.tree.unflatten(structure, small), shapes)


def _apply_masks(params: Params, masks: Masks) -> Params:
    """Masks the weights, as NumPy arrays, and refuses those that are not finite."""
    mask_of = dict(named_leaves(check_parallel(params, masks)))

    def mask(path, leaf):
        leaf, kept = np.asarray(leaf), np.asarray(mask_of[path])
        masked = np.where(kept, leaf, np.zeros((), leaf.dtype)) if kept.ndim else leaf
        if jnp.issubdtype(masked.dtype, jnp.inexact) and not np.isfinite(masked).all():
            raise ValueError(f'params[{path!r}] has a kept weight that is not finite')
        return masked

    return map_leaves(mask, params)
