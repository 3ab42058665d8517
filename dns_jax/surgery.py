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

from dns_jax.densities import DensityRule
from dns_jax.importance import magnitude
from dns_jax.layers import (
    as_table,
    find_holes,
    map_leaves,
    match_patterns,
    named_leaves,
    nest_leaves,
    parent,
)
from dns_jax.masks import apply_masks, check_parallel, discriminate, init_masks, throw_coins
from dns_jax.roles import is_kernel
from dns_jax.schedules import check_step
from dns_jax.stacking import restack, unstack
from dns_jax.typing import (
    Importance,
    LayerOf,
    Masks,
    Params,
    Schedule,
    TakesPart,
    ThresholdRule,
    Thresholds,
)


class Rule(NamedTuple):
    """How the layers of one group are operated on."""

    thresholds: ThresholdRule  #: gives the band of each layer
    #: σ(iter), the chance of an update, one draw for each layer: a number in [0, 1] or a schedule
    update_probability: float | Schedule = 1.0
    #: steps from one asking of the thresholds to the next; 0 asks once, at init. By default
    #: densities are followed at every step, and all other rules asked once.
    refresh_every: int | None = None


class SurgeryState(NamedTuple):
    """State of `surgery`."""

    count: jax.Array  #: shape=(), dtype=jnp.int32: updates done
    key: jax.Array  #: shape=(), typed PRNG key: never changes, each step folds its count in
    masks: Masks  #: parallel to the params, dtype=bool
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
    layer_of: LayerOf = parent,
    importance: Importance = magnitude,
    splicing: bool = True,
    masks: Masks | None = None,
    stacked: Mapping[str, int] | None = None,
) -> Surgery:
    """Prunes and splices connections while any optimizer trains the network.

    Put it into an `optax.chain`, before or after the optimizer: it leaves the updates as they
    are. The gradient must be taken at W⊙T, as `masked_value_and_grad` does, with the masks of
    the state (`get_masks`). One update is one iteration of Algorithm 1: the masks T_k are updated
    from the weights W_k that the gradient was taken at, then the optimizer moves W_k.

    A rule is asked for thresholds from the params given to `init`, and where it has
    `refresh_every` = N again at steps 0, N, 2N and so on while σ > 0, just before the masks are
    updated. Densities are followed at every step instead: the last thresholds stay while they keep
    the number wanted to one in 128, and of every layer its floor, else it is asked anew. The last
    update, after which σ is 0, always has thresholds that are asked anew and, by density, is made
    in every layer: what was wanted is met then, whatever the steps are.

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
      >>> from dns_jax import mean_std, update_probability
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
        pattern: _check_rule(pattern, rule, importance, splicing)
        for pattern, rule in as_table(rules).items()
    }
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.shape:
        raise TypeError(f'key must be one typed PRNG key, from jax.random.key, but is {key!r}')
    if masks is not None:
        takes_part = _has_mask(masks, stacked)
    plan = functools.partial(_Plan, table, takes_part, layer_of, may_be_empty=masks is not None)

    def init_fn(params):
        weights = unstack(stacked, params)[0] if stacked else params
        layers = plan(weights)
        if masks is None:
            own = init_masks(weights, lambda path, leaf: path in layers.paths)
            start = restack(stacked, params, own) if stacked else own
        else:
            start = check_parallel(params, masks)
            own = unstack(stacked, params, start)[1] if stacked else start
        count, thresholds = jnp.zeros((), jnp.int32), {}
        for pattern, arrays, kept in layers.arrays(weights, own):
            # A followed density begins anew in the first update; what is jitted compiles in one.
            compute = (
                _no_thresholds if table[pattern].refresh_every is None else _compute_thresholds
            )
            compute = jax.jit(functools.partial(compute, table[pattern].thresholds))
            thresholds |= compute(arrays, kept, count)
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
        layers = plan(weights)
        layers.check_state(own, state.thresholds)
        # No coin is thrown with a negative count.
        seen = importance(jax.random.fold_in(state.key, ~state.count), weights, gradients)
        if not splicing:
            seen = apply_masks(seen, own)
        seen = jax.lax.stop_gradient(seen)  # a loop of unknown length has no gradient

        def update(count, masks, bands):
            chances = {
                layer: _chance(table[pattern], count)[0]
                for pattern, names in layers.patterns.items()
                for layer in names
            }
            coins = throw_coins(jax.random.fold_in(state.key, count), chances)
            return layers.decide(seen, masks, bands, coins, splicing)

        def ask_and_update(turn, carry):
            (masks, bands), count = carry, state.count + turn
            for pattern, arrays, kept in layers.arrays(seen, masks):
                own_bands = {layer: bands[layer] for layer in arrays}
                bands = bands | _ask(table[pattern], arrays, kept, count, own_bands)
            return update(count, masks, bands), bands

        def correct(turn, carry):
            (masks, bands), count = carry, state.count + turn
            new, wrong = {}, jnp.array(False)
            for pattern, arrays, kept in layers.arrays(seen, masks):
                if _is_followed(table[pattern]):
                    own_bands = {layer: bands[layer] for layer in arrays}
                    asked, solved = _correct(table[pattern], arrays, kept, count, own_bands)
                    new, wrong = new | solved, wrong | asked
            masks = _once_if(wrong, lambda turn, masks: update(count + turn, masks, new), masks)[1]
            return masks, bands | new

        due = [_chance(table[pattern], state.count)[0] > 0 for pattern in layers.patterns]
        due = functools.reduce(jnp.logical_or, due, jnp.array(False))
        changing = own, state.thresholds
        # After the gradient, which is taken with the old masks, and before the optimizer, which
        # writes over the weights: unordered, XLA copies both at every step.
        turns, changing = _once_if(_after(updates, due, state.count), ask_and_update, changing)
        if any(map(_is_followed, table.values())):
            turns, changing = _once_if(due, correct, changing)
        updates = jax.tree.map(lambda leaf: _after(turns, leaf, state.count), updates)
        own, thresholds = changing
        masks = restack(stacked, state.masks, own) if stacked else own
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
      >>> from dns_jax import mean_std
      >>> params = {'kernel': jax.numpy.ones((1, 2))}
      >>> pruner = surgery(Rule(mean_std(0.0)), jax.random.key(0))
      >>> get_masks(optax.chain(pruner, optax.adam(1e-3)).init(params))
      {'kernel': Array([[ True,  True]], dtype=bool)}
    """
    for is_state in (_is_surgery_state, _has_field_masks):
        nodes = jax.tree.leaves(state, is_leaf=is_state)
        if found := [node.masks for node in nodes if is_state(node)]:
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


class _Plan:
    """Which layers follow which rule, and which leaves they have."""

    def __init__(
        self,
        table: Mapping[str, Rule],
        takes_part: TakesPart,
        layer_of: LayerOf,
        weights: Params,
        may_be_empty: bool,
    ):
        paths: dict[str, list[str]] = {}
        for path, leaf in named_leaves(weights):
            if jnp.size(leaf) and takes_part(path, leaf):
                paths.setdefault(layer_of(path), []).append(path)
        if table and not paths and not may_be_empty:
            names = [path for path, _ in named_leaves(weights)]
            raise ValueError(
                f'no leaf of params takes part, of {names}; takes_part=dns_jax.has_axes takes all '
                'that have axes'
            )
        self.weights, self.takes_part = weights, takes_part
        self.layers = dict(sorted(paths.items()))
        matches = match_patterns(table, self.layers)
        self.patterns = {
            pattern: [layer for layer, (own, _) in matches.items() if own == pattern]
            for pattern in table
        }
        #: of the leaves under a rule, the layer of each
        self.paths = {path: layer for layer in matches for path in self.layers[layer]}

    def arrays(self, weights, masks):
        """Gives for each pattern the weights and the masks of its layers."""
        weights, masks = dict(named_leaves(weights)), dict(named_leaves(masks))
        for pattern, layers in self.patterns.items():
            yield (
                pattern,
                {layer: [weights[path] for path in self.layers[layer]] for layer in layers},
                {layer: [masks[path] for path in self.layers[layer]] for layer in layers},
            )

    def check_state(self, masks, thresholds) -> None:
        """Refuses a state that was made under other rules, another `takes_part` or `layer_of`."""
        if set(self.paths.values()) != set(thresholds):
            raise ValueError(
                f'the state has thresholds of the layers {sorted(thresholds)}, but by rules, '
                f'takes_part and layer_of they are {sorted(set(self.paths.values()))}; to go on '
                'from its masks under others, give them to surgery(masks=…)'
            )
        for path, mask in named_leaves(masks):
            if path in self.paths and not jnp.ndim(mask):
                raise ValueError(
                    f'{path!r} takes part by takes_part, but not in the state; to go on from its '
                    'masks, give them to surgery(masks=…)'
                )

    def decide(self, weights, masks, bands, coins, splicing):
        """Applies h_k to the layers that have a band and whose coin says so."""
        weights = dict(named_leaves(weights))

        def of_leaf(path, mask):
            layer = self.paths.get(path)
            if layer not in bands:
                return mask
            new = discriminate(weights[path], mask, bands[layer])
            if not splicing:  # a threshold of 0 would let zeros in again
                new &= mask
            return jnp.where(coins[layer], new, mask)

        return map_leaves(of_leaf, masks)


def _check_rule(pattern: str, rule: Any, importance: Importance, splicing: bool) -> Rule:
    """Checks a rule of the table and completes what it leaves open."""
    if not isinstance(rule, Rule):
        raise TypeError(f'the rule of {pattern!r} must be a dns_jax.Rule, but is {rule!r}')
    sigma, every = rule.update_probability, rule.refresh_every
    if not callable(sigma):
        if not isinstance(sigma, (int, float)) or not 0 <= sigma <= 1:
            raise TypeError(
                f'update_probability of {pattern!r} must be a number in [0, 1] or a schedule, but '
                f'is {sigma!r}'
            )
        rule = rule._replace(update_probability=lambda step, number=float(sigma): number)
    by_density = isinstance(rule.thresholds, DensityRule)
    if every is None and not by_density:
        every = 0
    if every is None and not splicing:
        every = 1  # what a threshold prunes too much would not come back
    if every is not None:
        check_step(f'refresh_every of {pattern!r}', every)
    if every == 0 and by_density and rule.thresholds.changes:
        raise ValueError(
            f'refresh_every of {pattern!r} is 0, so its density would be asked once, at init, and '
            'stay at the first value of its schedule; leave refresh_every out to follow it'
        )
    if every == 0 and importance is not magnitude:
        raise ValueError(
            f'refresh_every of {pattern!r} must be at least 1 for thresholds by '
            f'importance={importance!r}, which is not known at the start, but is 0'
        )
    return rule._replace(refresh_every=every)


def _has_mask(masks: Masks, stacked: Mapping[str, int] | None) -> TakesPart:
    """Says that those leaves take part whose mask has axes."""
    if stacked:  # a scalar stands for all slices, whose names are not asked for then
        with_axes = {path: mask for path, mask in named_leaves(masks) if jnp.ndim(mask)}
        masks = unstack(stacked, nest_leaves(with_axes.items()))[0]
    paths = {path for path, mask in named_leaves(masks) if jnp.ndim(mask)}
    return lambda path, leaf: path in paths


def _refuse_shards(params: Params) -> None:
    """Refuses what would take one threshold for each shard."""
    for path, leaf in named_leaves(params):
        if axes := getattr(jax.typeof(leaf), 'vma', None):
            raise ValueError(
                f'params[{path!r}] is a shard along {sorted(axes)} under shard_map, but thresholds '
                'and counts are of whole layers: update outside of shard_map, under jit with '
                'sharded arrays'
            )


def _chance(rule: Rule, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gives σ of a step, and whether it is the last: by density that is made for certain."""
    sigma: Any = rule.update_probability
    now, then = (jnp.asarray(sigma(step), jnp.float32) for step in (count, count + 1))
    last = (now > 0) & (then <= 0)
    if isinstance(rule.thresholds, DensityRule):
        now = jnp.where(last, 1.0, now)
    return now, last


def _is_followed(rule: Rule) -> bool:
    return rule.refresh_every is None


def _ask(rule: Rule, weights, masks, count, bands) -> dict[str, Thresholds]:
    """Asks a rule for thresholds, where it is not followed and that is due."""
    if not rule.refresh_every:
        return bands
    sigma, last = _chance(rule, count)
    due = (count % rule.refresh_every == 0) & (sigma > 0)
    if isinstance(rule.thresholds, DensityRule):
        due |= last
    compute = functools.partial(_compute_thresholds, rule.thresholds, weights, masks, count)
    return jax.lax.cond(due, compute, lambda: bands)


def _correct(rule: Rule, weights, masks, count, bands) -> tuple[jax.Array, dict[str, Thresholds]]:
    """Corrects thresholds that kept another number than wanted; says whether they did."""
    density: Any = rule.thresholds
    sigma, last = _chance(rule, count)
    wrong = (sigma > 0) & ~density.is_near(weights, masks, count, last)
    solve = functools.partial(density.solve, weights, masks, count, bands, last)
    return wrong, jax.lax.cond(wrong, solve, lambda: bands)


def _once_if(
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


def _after(first: Any, value: jax.Array, count: jax.Array) -> jax.Array:
    """Gives a value as it is, but not before others are known."""
    smallest = min(jax.tree.leaves(first), key=jnp.size)
    never = (jnp.ravel(smallest)[:1] != 0).any() & (count < 0)
    return jnp.where(never, jnp.zeros_like(value), value)


def _compute_thresholds(rule: ThresholdRule, weights, masks, count) -> dict[str, Thresholds]:
    """Computes the bands of a rule's layers, and holds it to their names and type."""
    bands = rule(weights, masks, count)
    if sorted(bands) != sorted(weights):
        raise ValueError(f'thresholds must name the layers {list(weights)}, but name {list(bands)}')
    return {
        layer: Thresholds(jnp.float32(band.low), jnp.float32(band.high))
        for layer, band in bands.items()
    }


def _no_thresholds(rule: ThresholdRule, weights, masks, count) -> dict[str, Thresholds]:
    """Starts a density at 0, and lets it refuse what it could not keep."""
    return jax.tree.map(jnp.zeros_like, jax.eval_shape(rule, weights, masks, count))


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
        if not any(name == path or name.startswith(f'{path}/') for name in merged):
            merged[path] = optax.MaskedNode()
    return nest_leaves(merged.items())
