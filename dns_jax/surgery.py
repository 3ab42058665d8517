"""Dynamic network surgery as an optax transformation.

Stands on `layers`, `masks` and `thresholds`; the pruners to compare with stand on the contract
that is set here: updates pass through unchanged, and the state carries the masks.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dns_jax.importance import magnitude
from dns_jax.layers import as_table, group_by_layer, has_axes, match_patterns, parent
from dns_jax.masks import apply_masks, check_parallel, init_masks, update_masks
from dns_jax.schedules import check_step
from dns_jax.typing import (
    Importance,
    LayerOf,
    Masks,
    Schedule,
    TakesPart,
    ThresholdRule,
    Thresholds,
)


class Rule(NamedTuple):
    """How the layers of one group are operated on.

    Thresholds that change with the step, such as those of a density that falls, need
    `refresh_every`: by default a rule is asked once, at step 0.
    """

    thresholds: ThresholdRule  #: gives the band of each layer
    update_probability: Schedule  #: σ(iter), the chance of an update; one draw for each layer
    refresh_every: int = 0  #: steps between computations of the thresholds; at 0 once, at init


class SurgeryState(NamedTuple):
    """State of `surgery`."""

    count: jax.Array  #: shape=(), dtype=jnp.int32: updates done
    key: jax.Array  #: shape=(), typed PRNG key: never changes, each step folds its count in
    masks: Masks  #: parallel to the params, dtype=bool
    thresholds: dict[str, Thresholds]  #: by layer name


def surgery(
    rules: Rule | Mapping[str, Rule],
    key: jax.Array,
    takes_part: TakesPart = has_axes,
    layer_of: LayerOf = parent,
    importance: Importance = magnitude,
    splicing: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Prunes and splices connections while any optimizer trains the network.

    Put it into an `optax.chain`, before or after the optimizer: it leaves the updates as they
    are. The gradient must be taken at W⊙T, as `masked_value_and_grad` does, with the masks of
    the state, `optax.tree.get(state, 'masks')`. One update is one iteration of Algorithm 1:
    the masks T_k are updated from the weights W_k that the gradient was taken at, then the
    optimizer moves W_k. Thresholds are computed from the params given to `init` and, where the
    rule has `refresh_every` = N, again at steps 0, N, 2N and so on while σ > 0, just before the
    masks are updated; jit the step then, as outside jit every step would compile this branch anew.

    Args:
      rules: one rule for all layers, or `{pattern: rule}`: a layer follows the first pattern
        that its name matches (`dns_jax.layers.match_patterns`); one that matches none is left
        dense.
      key: a typed PRNG key (`jax.random.key`), the source of all coins.
      takes_part: which leaves take part; by default all but scalars, so kernels and biases.
      layer_of: which leaves form one layer, with common thresholds and a common coin; by
        default those under one parent.
      importance: what h_k and the rules see in place of the weights, from `dns_jax.importance`;
        by default the weights themselves. Thresholds are in its unit.
      splicing: whether a pruned connection may return. If not, its importance counts as zero.

    Returns:
      A transformation with state `SurgeryState`. Its `update` needs `params`.

    Raises:
      TypeError: if `key` is not a typed PRNG key, or a leaf that takes part is not floating
        point (from `init`).
      ValueError: if a rule's `refresh_every` is no step, or 0 with an importance other than
        `magnitude`, since `init` has no gradient to compute one from; if a pattern matches no
        layer or no leaf of params takes part (from `init`), or if `params` is missing (from
        `update`).

    Example:
      >>> import jax, optax
      >>> from dns_jax import mean_std, update_probability
      >>> params = {'fc1': {'kernel': jax.numpy.array([[0.1, 2.0], [-0.2, -3.0]])}}
      >>> rule = Rule(mean_std(c_rate=0.0), update_probability(stop=1000))
      >>> optimizer = optax.chain(surgery(rule, jax.random.key(0)), optax.sgd(0.1))
      >>> state = optimizer.init(params)
      >>> gradients = jax.tree.map(jax.numpy.ones_like, params)
      >>> updates, state = optimizer.update(gradients, state, params)
      >>> optax.tree.get(state, 'masks')['fc1']['kernel']
      Array([[False,  True],
             [False,  True]], dtype=bool)

    Reference:
      Guo et al. 2016, Algorithm 1.
    """
    table = as_table(rules)
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.shape:
        raise TypeError(f'key must be one typed PRNG key, from jax.random.key, but is {key!r}')
    _check_refreshing(table, importance)

    def init_fn(params):
        layers = group_by_layer(params, layer_of, takes_part)
        if table and not layers:
            structure = jax.tree.structure(params)
            raise ValueError(f'no leaf of params takes part: {structure}')
        matches = match_patterns(table, layers)
        masks = init_masks(
            params,
            lambda path, leaf: takes_part(path, leaf) and layer_of(path) in matches,
        )
        count = jnp.zeros((), jnp.int32)
        thresholds = {}
        for pattern, (weights, kept) in _group_by_pattern(table, params, masks, layer_of).items():
            rule = table[pattern].thresholds
            thresholds |= _compute_thresholds(rule, weights, kept, count)
        # A copy of the key: the first state may be donated, and init called again.
        return SurgeryState(count, jnp.copy(key), masks, thresholds)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError('surgery needs the weights: call update(updates, state, params)')
        count, thresholds, probability = state.count, {}, {}
        # No coin is thrown with a negative count.
        seen = importance(jax.random.fold_in(state.key, ~count), params, updates)
        if not splicing:
            seen = apply_masks(seen, state.masks)
        groups = _group_by_pattern(table, seen, state.masks, layer_of)
        for pattern, (weights, kept) in groups.items():
            rule = table[pattern]
            sigma = jnp.asarray(rule.update_probability(count))
            probability |= dict.fromkeys(weights, sigma)
            bands = {layer: state.thresholds[layer] for layer in weights}
            if rule.refresh_every:
                bands = jax.lax.cond(
                    (count % rule.refresh_every == 0) & (sigma > 0),
                    functools.partial(_compute_thresholds, rule.thresholds, weights, kept, count),
                    lambda bands=bands: bands,
                )
            thresholds |= bands
        masks = update_masks(
            jax.random.fold_in(state.key, count),
            seen,
            state.masks,
            thresholds,
            probability,
            layer_of=layer_of,
        )
        if not splicing:  # a threshold of 0 would let zeros in again
            masks = jax.tree.map(jnp.logical_and, state.masks, masks)
        count = jnp.asarray(optax.safe_increment(count))
        return updates, SurgeryState(count, state.key, masks, thresholds)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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


def _check_refreshing(table: Mapping[str, Rule], importance: Importance) -> None:
    for pattern, rule in table.items():
        check_step(f'refresh_every of {pattern!r}', rule.refresh_every)
        if importance is not magnitude and not rule.refresh_every:
            raise ValueError(
                f'refresh_every of {pattern!r} must be at least 1 for thresholds by '
                f'importance={importance!r}, which is not known at the start, but is 0'
            )


def _group_by_pattern(table: Mapping[str, Rule], params, masks, layer_of: LayerOf):
    """Gives for each pattern the weights and the masks of its layers, two dicts."""
    check_parallel(params, masks)
    # Where a leaf takes no part its scalar mask stands for it, which is left out as all scalars.
    taking_part = jax.tree.map(lambda leaf, mask: leaf if jnp.ndim(mask) else mask, params, masks)
    weights, kept = (group_by_layer(tree, layer_of) for tree in (taking_part, masks))
    groups = {pattern: ({}, {}) for pattern in table}
    for layer, (pattern, _) in match_patterns(table, weights).items():
        groups[pattern][0][layer], groups[pattern][1][layer] = weights[layer], kept[layer]
    return groups


def _compute_thresholds(rule: ThresholdRule, weights, masks, count) -> dict[str, Thresholds]:
    """Computes the bands of a rule's layers, and holds it to their names and type."""
    bands = rule(weights, masks, count)
    if sorted(bands) != sorted(weights):
        raise ValueError(f'thresholds must name the layers {list(weights)}, but name {list(bands)}')
    return {
        layer: Thresholds(jnp.float32(band.low), jnp.float32(band.high))
        for layer, band in bands.items()
    }
