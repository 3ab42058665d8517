"""Exact shrinking of any masked network, by its traced program.

Owns the public function. The network is any function that JAX can trace. What its outputs do not
need goes; what is the same number whatever the inputs are goes too, and moves into constants.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dns_jax._core.checks import abridge
from dns_jax._trees import check_parallel
from dns_jax.inference._known import Region, is_empty
from dns_jax.inference._liveness import Plan, analyze
from dns_jax.inference._program import trace
from dns_jax.inference._reasons import find_stayed
from dns_jax.inference._replay import replay
from dns_jax.layers import map_leaves, named_leaves
from dns_jax.typing import Masks, Params


class Stayed(NamedTuple):
    """Entries of a value that nothing needs, but that stayed for one primitive."""

    shape: tuple[int, ...]  #: of the value, before
    axis: int | None  #: along which they lie; None if all of the value had to stay
    units: tuple[int, ...]  #: their indices along it; empty if all
    primitive: str
    why: str


class SmallNetwork(NamedTuple):
    """A function that gives what the masked network gives, and its weights."""

    apply: Callable[..., Any]  #: of the small params and the inputs, a batch of any size
    params: Params  #: the params, sliced: NumPy arrays of the dtypes they had, zero where pruned
    leaves: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  #: shapes before and after, by path
    stayed: list[Stayed]  #: what nothing needs but had to stay, and why


def shrink(apply: Callable[..., Any], params: Params, masks: Masks, *inputs: Any) -> SmallNetwork:
    r"""Removes all that does not change what a masked network gives.

    The program of `apply` is followed forward and backward. An entry along an axis is needed if
    an output reads it by a weight that is kept; it is constant if it is the same number c whatever
    the inputs are. What reads a constant gets, in place of it, what it adds:

    .. math::
      \sum_i x_i w_i = \sum_{i \text{ not constant}} x_i w_i
        + \sum_{i \text{ constant}} c_i w_i

    So units, filters, channels, groups and heads go, and with them their weights in all layers. An
    attention head whose values are constant goes too, for its weights sum to 1. Primitives that are
    not known (`scan`, `while`, `cond`, `sort` and others) get all they read; `stayed` names them.

    Arrays stay rectangular, so an entry goes along an axis as a whole: a feature of queries that
    one head alone does not need stays with the others.

    Constants are those of the given weights: whoever trains the small network trains what is left
    of it. Activations must be finite, since 0 · ∞ is not 0, and indices of a lookup within its
    bounds. Custom derivatives of `apply` are lost, and so is `remat`.

    Args:
      apply: any function of params and inputs that JAX can trace, without side effects.
      params: any pytree of concrete arrays, finite where they are kept.
      masks: parallel to the params.
      *inputs: the other arguments of `apply`, arrays or trees of them; only their shapes and dtypes
        are looked at.

    Returns:
      The small network, equal to the masked one but for rounding. Its outputs have the shapes they
      had, and each leaf has at least one entry along each axis. For inputs of other shapes `apply`
      is traced again, which the small network keeps the kept weights for.

    Raises:
      TypeError: if a mask is not boolean.
      ValueError: if params and masks do not fit each other, a kept weight is not finite, or `apply`
        has side effects.

    Example:
      >>> import jax, numpy as np
      >>> params = {'up': np.ones((2, 4)), 'down': np.ones((4, 3))}
      >>> masks = {name: np.ones(leaf.shape, bool) for name, leaf in params.items()}
      >>> masks['down'][:2] = False  # nothing reads units 0 and 1
      >>> apply = lambda params, x: jax.nn.gelu(x @ params['up']) @ params['down']
      >>> small = shrink(apply, params, masks, np.ones((1, 2)))
      >>> small.leaves
      {'down': ((4, 3), (2, 3)), 'up': ((2, 4), (2, 2))}
      >>> small.apply(small.params, np.ones((5, 2))).shape
      (5, 3)
    """
    masked = _apply_masks(params, masks)
    names, leaves = zip(*named_leaves(masked), strict=True) if jax.tree.leaves(masked) else ((), ())
    structure = jax.tree.structure(masked)
    plan = analyze(trace(apply, masked, inputs), leaves)
    kept = [_one_at_least(plan.held[number]) for number in plan.program.leaves]
    small = [_take(leaf, region) for leaf, region in zip(leaves, kept, strict=True)]
    shapes = [(np.shape(leaf), np.shape(part)) for leaf, part in zip(leaves, small, strict=True)]
    plans = {_signature(inputs): _hold_leaves(plan, kept, names)}
    packed = [_pack(leaf) for leaf in leaves]

    def small_apply(params: Params, *inputs: Any) -> Any:
        arrays = _check_small(params, structure, names, shapes)
        signature = _signature(inputs)
        if signature not in plans:
            original = [unpack() for unpack in packed]
            program = trace(apply, jax.tree.unflatten(structure, original), inputs)
            plans[signature] = _hold_leaves(analyze(program, original), kept, names)
        plan = plans[signature]
        outputs = replay(plan, arrays, jax.tree.leaves(inputs))
        return jax.tree.unflatten(plan.program.structure, outputs)

    return SmallNetwork(
        small_apply,
        jax.tree.unflatten(structure, small),
        dict(zip(names, shapes, strict=True)),
        [Stayed(*reason) for reason in find_stayed(plan)],
    )


def _apply_masks(params: Params, masks: Masks) -> Params:
    """Masks the weights, as NumPy arrays, and refuses those that are not finite."""
    mask_of = dict(named_leaves(check_parallel(params, masks)))

    def mask(path, leaf):
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.extended):
            return leaf  # a key of random numbers is no number
        leaf, kept = np.asarray(leaf), np.asarray(mask_of[path])
        masked = np.where(kept, leaf, np.zeros((), leaf.dtype)) if kept.ndim else leaf
        if jnp.issubdtype(masked.dtype, jnp.inexact) and not np.isfinite(masked).all():
            raise ValueError(f'params[{path!r}] has a kept weight that is not finite')
        return masked

    return map_leaves(mask, params)


def _one_at_least(needed: Region) -> Region:
    """Keeps an entry along each axis, so that no array is empty."""
    return tuple(chosen if chosen.any() else np.arange(len(chosen)) == 0 for chosen in needed)


def _take(leaf: Any, region: Region) -> Any:
    return leaf if all(chosen.all() for chosen in region) else leaf[np.ix_(*region)]


def _hold_leaves(plan: Plan, kept: Sequence[Region], names: Sequence[str]) -> Plan:
    """Tells a plan which entries the small leaves have."""
    for number, region, name in zip(plan.program.leaves, kept, names, strict=True):
        needed = plan.held[number]
        lacking = (one & ~other for one, other in zip(needed, region, strict=True))
        if not is_empty(needed) and any(each.any() for each in lacking):
            raise ValueError(
                f'inputs of these shapes need entries of params[{name!r}] that went when the '
                'network was shrunk; shrink it with inputs of these shapes'
            )
        plan.held[number] = region
    return plan


def _check_small(params: Params, structure, names, shapes) -> list[Any]:
    """Checks that params are those of the small network, or like them."""
    if jax.tree.structure(params) != structure:
        raise ValueError(
            f'params must be a tree as the small params are, with the leaves {abridge(names)}'
        )
    arrays = jax.tree.leaves(params)
    for array, name, (_, small) in zip(arrays, names, shapes, strict=True):
        if np.shape(array) != small:
            raise ValueError(
                f'params[{name!r}] must have the shape {small} of the small params, but has '
                f'{np.shape(array)}'
            )
    return arrays


def _signature(inputs: Sequence[Any]) -> Any:
    """What a trace depends on."""
    leaves, structure = jax.tree.flatten(inputs)
    return structure, tuple(map(jax.typeof, leaves))


def _pack(leaf: Any) -> Callable[[], Any]:
    """Remembers an array by its entries that are not 0, which are few in a pruned network."""
    if not isinstance(leaf, np.ndarray):
        return lambda: leaf
    there = leaf != 0
    bits, numbers, shape = np.packbits(there), leaf[there], leaf.shape

    def unpack():
        array = np.zeros(shape, numbers.dtype)
        array[np.unpackbits(bits, count=array.size).astype(bool).reshape(shape)] = numbers
        return array

    return unpack
