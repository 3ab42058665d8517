"""Dynamic network surgery as an optax transformation.

Stands on `layers`, `masks` and the rules of thresholds; the pruners to compare with stand on the
contract that is set here: updates pass through unchanged, and the state carries the masks.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from dns_jax._core.checks import as_table
from dns_jax._core.loops import once_if
from dns_jax._rules import LayersByRule, complete_rule, having_mask
from dns_jax._trees import check_parallel, find_holes, nest_leaves, unpack_masks
from dns_jax.importance import magnitude
from dns_jax.layers import is_kernel, named_leaves, parent_path
from dns_jax.masks import apply_masks, init_masks
from dns_jax.stacking import restack, unstack
from dns_jax.typing import (
    Importance,
    LayerOf,
    Masks,
    Params,
    Rule,
    TakesPart,
    Thresholds,
)


class SurgeryState(NamedTuple):
    """State of `surgery`."""

    count: jax.Array  #: shape=(), dtype=jnp.int32: updates done
    key: jax.Array  #: shape=(), typed PRNG key: never changes, each step folds its count in
    masks: Masks  #: parallel to the params, dtype=bool; or packed (`dns_jax.packing`)
    thresholds: dict[str, Thresholds]  #: by layer name


class _Init(Protocol):
    def __call__(self, params: Params) -> SurgeryState: ...


class Surgery(optax.GradientTransformationExtraArgs):
    """An optax transformation whose state is a `SurgeryState`."""

    init: _Init


def surgery(
    rules: Rule | Mapping[str, Rule],
    key: jax.Array,
    takes_part: TakesPart = is_kernel,
    layer_of: LayerOf = parent_path,
    importance: Importance = magnitude,
    splicing: bool = True,
    masks: Masks | None = None,
    stacked: Mapping[str, int] | None = None,
) -> Surgery:
    """Prunes and splices connections while any optimizer trains the network.

    Put it into `slow_pruned` with the optimizer, or into an `optax.chain`, before or after the
    optimizer: it leaves the updates as they are. The gradient must be taken at W⊙T, as
    `masked_value_and_grad` does, with the masks of the state (`get_masks`). One update is one
    iteration of Algorithm 1: the masks T_k are updated from the weights W_k that the gradient was
    taken at, then the optimizer moves W_k.

    A rule is asked for thresholds from the params given to `init`, and where it has
    `refresh_every` = N again at steps 0, N, 2N and so on while σ > 0, just before the masks are
    updated. Densities are followed at every step instead: the thresholds move by what they kept,
    and are searched for anew where that, or a layer at its floor, is off by more than one in 128,
    and at every 16th step if layers have units. The last update, after which σ is 0, has thresholds
    that are asked anew, but for `refresh_every=0`. By density it is made in every layer, so what
    was wanted is met then, whatever the steps are, up to weights that tie: zeros, or many of a
    narrow type. `update` belongs under `jit`.

    Args:
      rules: one rule for all layers, or `{pattern: rule}`: a layer follows the first pattern
        that its name matches (`dns_jax.layers.match_patterns`); one that matches none is left
        dense, or as `masks` has it.
      key: a typed PRNG key (`jax.random.key`), the source of all coins.
      takes_part: which leaves take part, by default kernels (`dns_jax.role`). The paper prunes
        biases too: `has_axes`. Not asked where `masks` are given.
      layer_of: which leaves form one layer, with common thresholds and a common coin; by
        default those under one parent.
      importance: what h_k and the rules see in place of the weights, from `dns_jax.importance`;
        by default the weights themselves. Thresholds are in its unit.
      splicing: whether a pruned connection may return. If not, its importance counts as zero.
      masks: where to start, such as those of an earlier surgery or of a file; a leaf takes part if
        its mask has axes. By default everything is kept.
      stacked: `{path of a node: axis}`, where scans or vmapped ensembles hold many layers in one
        array (`dns_jax.unstack`): each slice is a layer of its own then, as if it were not stacked.

    Returns:
      A transformation with state `SurgeryState`. Its `update` needs `params`.

    Raises:
      TypeError: if `key` is not a typed PRNG key, a rule's σ neither a number nor callable, or a
        leaf that takes part is not floating point (from `init`).
      ValueError: if a rule's `refresh_every` is no step, its σ a number outside [0, 1], or the two
        would prune nothing; if a pattern matches no layer or no leaf of params takes part (from
        `init`); if `params` is missing, are not those of the state, or are shards of them under
        `shard_map` (from `update`).

    Example:
      >>> import jax, optax
      >>> from dns_jax import Rule, mean_std, update_probability
      >>> params = {'fc1': {'kernel': jax.numpy.array([[0.1, 2.0], [-0.2, -3.0]])}}
      >>> rule = Rule(mean_std(c_rate=0.0), update_probability(stop=1000))
      >>> optimizer = optax.chain(surgery(rule, jax.random.key(0)), optax.sgd(0.1))
      >>> state = optimizer.init(params)
      >>> gradients = jax.tree.map(jax.numpy.ones_like, params)
      >>> updates, state = optimizer.update(gradients, state, params)
      >>> get_masks(state)['fc1']['kernel']
      Array([[False,  True],
             [False,  True]], dtype=bool)

    Reference:
      Guo et al. 2016, Algorithm 1.
    """
    table = {
        pattern: complete_rule(pattern, rule, importance, splicing)
        for pattern, rule in as_table(rules).items()
    }
    _check_key(key)
    if masks is not None:
        masks = unpack_masks(masks)
        takes_part = having_mask(masks, stacked or {})
    assign = functools.partial(
        LayersByRule, table, takes_part, layer_of, may_be_empty=masks is not None
    )

    def init_fn(params):
        _refuse_shards(params)
        weights = unstack(stacked, params)[0] if stacked else params
        layers = assign(weights)
        if masks is None:
            own = init_masks(weights, lambda path, leaf: path in layers.paths)
            start = restack(stacked, params, own) if stacked else own
        else:
            start = check_parallel(params, masks)
            own = unstack(stacked, params, start)[1] if stacked else start
            own = layers.spread_groups(layers.gather_groups(own), own)
            start = restack(stacked, params, own) if stacked else own
        count = jnp.zeros((), jnp.int32)
        thresholds = layers.start(weights, own, count)
        # Copies: the first state may be donated, and init called again.
        start = jax.tree.map(lambda mask: jnp.array(mask, bool), start)
        return SurgeryState(count, jnp.copy(key), start, thresholds)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError('surgery needs the weights: call update(updates, state, params)')
        _refuse_shards(params)
        weights, own, gradients = params, check_parallel(params, state.masks), updates
        if stacked:
            weights, own, gradients = unstack(stacked, weights, own, gradients)
        layers = assign(weights)
        layers.check_state(state.masks, state.thresholds, stacked)
        # No coin is thrown with a negative count.
        seen = importance(jax.random.fold_in(state.key, ~state.count), weights, gradients)
        if not splicing:
            seen = apply_masks(seen, own)
        seen = jax.lax.stop_gradient(seen)  # a loop of unknown length has no gradient
        updates, own, thresholds = _operate(layers, seen, own, state, updates, splicing)
        masks = restack(stacked, params, own) if stacked else own
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, SurgeryState(count, state.key, masks, thresholds)

    return Surgery(init_fn, update_fn)


def freeze(masks: Masks) -> Surgery:
    """Holds masks as they are, to fine-tune the connections that are kept.

    Put it into the chain in place of `surgery`: the masks are found in the state as before.

    Args:
      masks: from an earlier state (`get_masks`) or a file.

    Returns:
      A transformation as of `surgery` that never changes the masks.

    Example:
      >>> import jax, optax
      >>> params = {'fc': {'kernel': jax.numpy.ones((1, 2))}}
      >>> masks = {'fc': {'kernel': jax.numpy.array([[True, False]])}}
      >>> state = optax.chain(freeze(masks), optax.sgd(0.1)).init(params)
      >>> get_masks(state)['fc']['kernel']
      Array([[ True, False]], dtype=bool)
    """
    return surgery({}, jax.random.key(0), masks=masks)


def get_masks(state: Any) -> Masks:
    """Finds the masks in the state of any optimizer, wherever its wrappers put them.

    Args:
      state: of a chain, a wrapper, or `nnx.Optimizer.opt_state`. It is searched for a
        `SurgeryState`, and where there is none for another tuple with a field `masks`.

    Returns:
      The masks. Where `optax.partition` or its like deals the network to several surgeries, those
      of all.

    Raises:
      ValueError: if there are none, or two of one leaf.

    Example:
      >>> import jax, optax
      >>> from dns_jax import Rule, mean_std
      >>> params = {'kernel': jax.numpy.ones((1, 2))}
      >>> pruner = surgery(Rule(mean_std(0.0)), jax.random.key(0))
      >>> get_masks(optax.chain(pruner, optax.adam(1e-3)).init(params))
      {'kernel': Array([[ True,  True]], dtype=bool)}
    """
    for is_state in (_is_surgery_state, _has_field_masks):
        nodes = jax.tree.leaves(state, is_leaf=is_state)
        if found := [unpack_masks(node.masks) for node in nodes if is_state(node)]:
            return found[0] if len(found) == 1 else _merge(found)
    raise ValueError(f'the state has no masks: {type(state).__name__} without a SurgeryState')


def masked_value_and_grad(
    loss_fn: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    r"""Makes a function for the loss at W⊙T and its gradient, meant for all of W.

    .. math::
      \frac{\partial L(W \odot T)}{\partial (W \odot T)}

    The derivative is not multiplied by T: a pruned weight gets the gradient it would have were
    it kept at zero, so it keeps learning and can return.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)`, as for `jax.value_and_grad`.
      has_aux: whether `loss_fn` returns a pair (loss, anything).

    Returns:
      A function of `(params, masks, *args, **kwargs)` that returns what
      `jax.value_and_grad(loss_fn, has_aux=has_aux)` returns at `apply_masks(params, masks)`: the
      loss, and a tree of the shapes and dtypes of `params`.

    Raises:
      As `apply_masks` and `jax.value_and_grad` do, when the function is called.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = lambda weights, x: jnp.sum(weights * x) ** 2
      >>> weights, mask = jnp.array([1.0, 5.0]), jnp.array([True, False])
      >>> masked_value_and_grad(loss)(weights, mask, jnp.array([2.0, 3.0]))
      (Array(4., dtype=float32), Array([ 8., 12.], dtype=float32))

    Reference:
      Guo et al. 2016, equation (2).
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=has_aux)

    def masked(params, masks, *args, **kwargs):
        return value_and_grad(apply_masks(params, masks), *args, **kwargs)

    return masked


def _check_key(key: Any) -> None:
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.shape:
        raise TypeError(f'key must be one typed PRNG key, from jax.random.key, but is {key!r}')


def _operate(layers: LayersByRule, seen, masks, state: SurgeryState, updates, splicing: bool):
    """Updates masks and thresholds where that is due, and gives them behind the updates."""

    def operate(turn, carry):
        masks, thresholds = carry
        count = state.count + turn
        return layers.operate(seen, state.key, count, masks, thresholds, splicing)

    # After the gradient, which is taken with the old masks, and before the optimizer, which writes
    # over the weights: unordered, XLA copies both at every step.
    due = _after(updates, layers.is_due(state.count), state.count)
    turns, (masks, thresholds) = once_if(due, operate, (masks, state.thresholds))
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(updates)):
        updates = jax.tree.map(lambda leaf: _after(turns, leaf, state.count), updates)
    return updates, masks, thresholds


def _refuse_shards(params: Params) -> None:
    """Refuses what would take one threshold for each shard."""
    way_out = 'thresholds need whole layers: call update under jit with sharded arrays instead'
    for axis in jax.sharding.get_abstract_mesh().manual_axes:
        if not _varying(jax.lax.axis_index(axis)):
            raise ValueError(
                'surgery cannot tell shards from whole weights under shard_map with '
                f'check_vma=False, or pmap, and {way_out}, or under shard_map with check_vma=True'
            )
    for path, leaf in named_leaves(params):
        if axes := _varying(leaf):
            raise ValueError(
                f'params[{path!r}] is a shard along {sorted(axes)} under shard_map, but {way_out}'
            )


def _varying(leaf: jax.typing.ArrayLike) -> Any:
    """Finds the mesh axes along which shards differ, by what JAX 0.10 and others before call it."""
    aval = jax.typeof(leaf)
    return getattr(getattr(aval, 'manual_axis_type', aval), 'varying', getattr(aval, 'vma', ()))


def _after(first: Any, value: jax.Array, count: jax.Array) -> jax.Array:
    """Gives a value of a traced step as it is, but not before others are known."""
    known = min(filter(jnp.size, jax.tree.leaves(first)), key=jnp.size, default=None)
    # Narrow floats pay for a copy: in what XLA makes of the select they may round otherwise.
    narrow = jnp.issubdtype(value.dtype, jnp.floating) and jnp.finfo(value.dtype).bits < 32
    if known is None or narrow or not isinstance(value, Tracer):
        return value
    never = (known != 0).any() & (count < 0)
    return jnp.where(never, jnp.zeros_like(value), value)


def _is_surgery_state(node: Any) -> bool:
    return isinstance(node, SurgeryState)


def _has_field_masks(node: Any) -> bool:
    return isinstance(node, tuple) and 'masks' in getattr(node, '_fields', ())


def _merge(found: Sequence[Masks]) -> Masks:
    """Puts the masks of several surgeries together, each with holes where others have theirs."""
    merged: dict[str, Any] = {}
    for masks in found:
        for path, mask in named_leaves(masks):
            if path in merged:
                raise ValueError(f'the state has two masks of {path!r}')
            merged[path] = mask
    left_out = [path for masks in found for path in find_holes(masks)]
    for path in left_out:  # in no surgery at all
        if not any(not path or name == path or name.startswith(f'{path}/') for name in merged):
            merged[path] = optax.MaskedNode()
    return nest_leaves(merged.items())
