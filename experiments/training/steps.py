"""The one training step, and its two loops: over a data set on the device, and over a stream.

The reference network and surgery run through the same step. A network without surgery is one
whose rule table is empty: then every mask is a scalar and costs nothing.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dns_jax
from experiments.baselines.quantisers import Quantiser, quantised
from experiments.networks import models
from experiments.networks.inputs import Tokens

_AHEAD = 2  # steps handed to the device before the one that is waited for

Statistics = Mapping[str, Any]
"""What a network has beside its weights, by Flax's collection: BatchNorm's running means."""

NO_STATISTICS: Statistics = {}
UNSTACKED: Mapping[str, int] = {}


class Examples(Protocol):
    """A split of a data set, as it is measured on."""

    def batches(self) -> Iterable[tuple[Any, Any]]:
        """Gives examples and labels in batches; labels below 0 are padding."""
        ...


class Inputs(Protocol):
    """What a network takes."""

    def prepare(self, examples: Any, /) -> jax.Array:
        """Makes it of a batch as the data set has it."""
        ...


class TrainState(NamedTuple):
    """All that a step changes."""

    params: dns_jax.Params
    opt_state: optax.OptState
    statistics: Statistics = NO_STATISTICS

    @property
    def masks(self) -> dns_jax.Masks:
        """The masks, from wherever in the optimizer's state surgery put them."""
        return dns_jax.get_masks(self.opt_state)


class Weights(NamedTuple):
    """What a network computes with: dense weights, or W⊙T."""

    params: dns_jax.Params
    statistics: Statistics = NO_STATISTICS


class Chunk(NamedTuple):
    """What happened in the steps of one compiled call."""

    losses: jax.Array  # shape=(steps,), dtype=jnp.float32
    events: dict[str, dns_jax.Events]  # by layer, of arrays of shape=(steps,), dtype=jnp.int32


class Dropout(NamedTuple):
    """How units are dropped out in one phase."""

    rates: Callable[[dns_jax.Masks], models.DropoutRates]
    number: int  # of the phase's random bits; below 2**32, above any count of steps


class Rounding(NamedTuple):
    """How weights are quantised in one phase."""

    quantiser: Quantiser
    number: int  # of the phase's coins; no count of steps, nor the number of a `Dropout`


class Augmentation(NamedTuple):
    """How the images of a step are changed at random."""

    change: Callable[[jax.Array, jax.Array], jax.Array]  # of a key and images
    number: int  # of the random bits, as of `Rounding`


TrainStep = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, jax.Array]]

Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""Maps logits (…, classes) and labels (…) to the loss of each label."""

CROSS_ENTROPY: Loss = optax.softmax_cross_entropy_with_integer_labels


class Metric(NamedTuple):
    """What a network is measured by; less is better."""

    unit: str
    of_labels: Loss  # whose mean it is, over all labels of a split


ERROR = Metric('%', lambda logits, labels: jnp.where(jnp.argmax(logits, -1) == labels, 0.0, 100.0))
NATS = Metric('nats', CROSS_ENTROPY)
BITS = Metric('bits/character', lambda logits, labels: CROSS_ENTROPY(logits, labels) / jnp.log(2))


def metric_of(inputs: Inputs) -> Metric:
    """Says what a network is measured by, from what it takes."""
    return BITS if isinstance(inputs, Tokens) else ERROR


def make_step(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    inputs: Inputs,
    dropout: Dropout | None = None,
    accumulate: int = 1,
    rounding: Rounding | None = None,
    loss: Loss = CROSS_ENTROPY,
    augmentation: Augmentation | None = None,
    soften: Callable[[TrainState], Any] | None = None,
) -> TrainStep:
    """Makes the training step: the gradient at W⊙T, surgery, the optimizer.

    Args:
      network: maps examples, such as images, to logits.
      optimizer: a chain with `dns_jax.surgery` in it.
      inputs: what the network takes.
      dropout: of the phase.
      accumulate: parts of one size that a batch is taken in, one after the other: memory is
        needed for the images of one, and the gradient is the mean of theirs.
      rounding: of what the network computes with; None leaves weights as they are.
      loss: of labels; that of a batch is their mean.
      augmentation: of images; None leaves them as they are.
      soften: gives the weights to compute with, before they are masked; None leaves them as
        they are. The gradient there is meant for all weights.

    Returns:
      A function of the state, examples, such as images (batch, height, width, channels) uint8, and
      labels (batch, …) int32 that returns the new state and the loss of the batch, by default in
      nats.
    """

    def loss_fn(params, statistics, examples, labels, **options):
        variables, prepared = {'params': params, **statistics}, inputs.prepare(examples)
        if statistics:
            options |= {'train': True, 'mutable': list(statistics)}
            logits, statistics = network.apply(variables, prepared, **options)
        else:
            logits = network.apply(variables, prepared, **options)
        return loss(jnp.asarray(logits), labels).mean(), statistics

    value_and_grad = dns_jax.masked_value_and_grad(loss_fn, has_aux=True)
    if accumulate > 1:
        value_and_grad = _in_parts(value_and_grad, accumulate)
    if rounding:
        value_and_grad = quantised(value_and_grad, rounding.quantiser)

    def step(state, examples, labels):
        options = {}
        if augmentation:
            examples = augmentation.change(_fold_key(state, augmentation.number), examples)
        if dropout:
            key = _fold_key(state, dropout.number)
            options = {'dropout': dropout.rates(state.masks), 'rngs': {'dropout': key}}
        if rounding:
            options['key'] = _fold_key(state, rounding.number)
        params = soften(state) if soften else state.params
        (value, statistics), gradients = value_and_grad(
            params, state.masks, state.statistics, examples, labels, **options
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, statistics), value

    return step


def _fold_key(state: TrainState, number: int) -> jax.Array:
    """Makes the key of a step for one use of random bits."""
    # The schedule's count: surgery's stands still while it is frozen.
    count = optax.tree.get(
        state.opt_state,
        'count',
        filtering=lambda path, _: getattr(path[-1], 'tuple_name', '') == 'ScaleByScheduleState',
    )
    key = optax.tree.get(state.opt_state, 'key')
    return jax.random.fold_in(jax.random.fold_in(key, number), count)


def _in_parts(value_and_grad: Callable[..., Any], accumulate: int) -> Callable[..., Any]:
    """Takes a batch in parts, one after the other; the mean of their losses and gradients."""

    def mean(params, masks, statistics, examples, labels, rngs=None, **options):
        def add_part(carry, part):
            (total, statistics), (number, examples, labels) = carry, part
            own = dict(options)
            if rngs:
                own['rngs'] = jax.tree.map(lambda key: jax.random.fold_in(key, number), rngs)
            (value, statistics), gradients = value_and_grad(
                params, masks, statistics, examples, labels, **own
            )
            new = value, gradients
            total = jax.tree.map(lambda sum_, term: sum_ + term / accumulate, total, new)
            return (total, statistics), None

        # Every part has rows of every device that the batch is spread over.
        split = (
            jnp.moveaxis(array.reshape(-1, accumulate, *array.shape[1:]), 1, 0)
            for array in (examples, labels)
        )
        nothing = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
        # XLA runs convolutions inside a loop on CPU many times slower than outside of it.
        unroll = accumulate if jax.default_backend() == 'cpu' else 1
        parts = (jnp.arange(accumulate), *split)
        start = nothing, statistics
        ((value, gradients), statistics), _ = jax.lax.scan(add_part, start, parts, unroll=unroll)
        return (value, statistics), gradients

    return mean


Gather = Callable[[tuple[jax.Array, ...], jax.Array], tuple[jax.Array, jax.Array]]
"""Takes the examples and labels of some numbers out of the arrays of a split."""


def make_run_chunk(
    step: TrainStep, gather: Gather, stacked: Mapping[str, int] = UNSTACKED
) -> Callable[..., tuple[TrainState, Chunk]]:
    """Makes the compiled call that runs many steps; it donates the state.

    Args:
      step: from `make_step`.
      gather: of the split.
      stacked: nodes that hold many layers, whose events are told apart.

    Returns:
      A jitted function of the state, the arrays of the split and the numbers (steps, batch) of
      each step's batch that returns the new state and a `Chunk`.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def run_chunk(state, arrays, numbers):
        def body(state, batch):
            new_state, loss = step(state, *gather(arrays, batch))
            return new_state, Chunk(loss, _count_events(stacked, state, new_state))

        # Two steps a turn: XLA on CPU copies weights and masks between turns, not within one.
        return jax.lax.scan(body, state, numbers, unroll=2)

    return run_chunk


def _count_events(
    stacked: Mapping[str, int], old: TrainState, new: TrainState
) -> dict[str, dns_jax.Events]:
    _, before, after = dns_jax.unstack(stacked, old.params, old.masks, new.masks)
    return dns_jax.count_events(before, after)


def make_run_chunks(
    step: TrainStep, gather: Gather, stacked: Mapping[str, int] = UNSTACKED
) -> Callable[..., tuple[tuple[TrainState, Chunk], ...]]:
    """Makes the compiled call that runs many steps of several networks, each on its own batches.

    Args:
      step: from `make_step`.
      gather: of the split.
      stacked: as for `make_run_chunk`.

    Returns:
      As `make_run_chunk` does, but for tuples of states and of numbers; the result is a tuple of
      pairs. Several networks are vmapped into one program; they must be at the same step.
    """
    run_chunk = make_run_chunk(step, gather, stacked)

    @functools.partial(jax.jit, donate_argnums=0)
    def run_vmapped(states, arrays, numbers):
        # Whole numbers count steps, the same for all. Kept out of the vmap, they leave a `cond` on
        # them one branch instead of both.
        shared = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.integer), states[0])
        axes = jax.tree.map(lambda is_shared: None if is_shared else 0, shared)
        stacked = jax.tree.map(
            lambda is_shared, *leaves: leaves[0] if is_shared else jnp.stack(leaves),
            shared,
            *states,
        )
        run_all = jax.vmap(run_chunk, (axes, None, 0), (axes, 0))
        state, chunk = run_all(stacked, arrays, jnp.stack(numbers))

        def network(at):
            own = jax.tree.map(
                lambda is_shared, leaf: leaf if is_shared else leaf[at], shared, state
            )
            return own, jax.tree.map(lambda leaf: leaf[at], chunk)

        return tuple(map(network, range(len(states))))

    def run_chunks(states, arrays, numbers):
        if len(states) == 1:
            return (run_chunk(states[0], arrays, numbers[0]),)
        return run_vmapped(states, arrays, numbers)

    return run_chunks


def make_run_streamed_chunk(step: TrainStep, like: TrainState) -> Callable[..., Any]:
    """Makes the function that runs many steps on batches from a stream, one compiled call each.

    Args:
      step: from `make_step`.
      like: a state whose leaves lie where those of all states are to lie.

    Returns:
      A function of the state, which it donates, and batches (examples, labels) that
      returns the new state and a `Chunk`.
    """
    stay = jax.tree.map(lambda leaf: leaf.sharding, like)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(stay, None))
    def run_step(state, examples, labels):
        new_state, loss = step(state, examples, labels)
        return new_state, Chunk(loss, dns_jax.count_events(state.masks, new_state.masks))

    def run_chunk(
        state: TrainState, batches: Iterable[tuple[jax.Array, jax.Array]]
    ) -> tuple[TrainState, Chunk]:
        steps = []
        for examples, labels in batches:
            state, happened = run_step(state, examples, labels)
            steps.append(happened)
            # Else a slow device would let batches pile up.
            steps[-_AHEAD:][0].losses.block_until_ready()
        return state, jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(steps))

    return run_chunk


def make_measure(
    network: nn.Module, inputs: Inputs, metric: Metric = ERROR
) -> Callable[..., float]:
    """Makes the function that measures a network.

    Returns:
      A function of the weights to compute with (W⊙T), a split and the `Statistics`, by default
      none, that returns the metric, in its unit.
    """

    @jax.jit
    def add_up(variables, examples, labels):
        logits = jnp.asarray(network.apply(variables, inputs.prepare(examples)))
        measured = metric.of_labels(logits, jnp.maximum(labels, 0))
        return jnp.where(labels >= 0, measured, 0).sum(), (labels >= 0).sum()

    def measure(params: Any, split: Examples, statistics: Statistics = NO_STATISTICS) -> float:
        variables = {'params': params, **statistics}
        sums = [jax.device_get(add_up(variables, *batch)) for batch in split.batches()]
        total, count = (math.fsum(map(float, each)) for each in zip(*sums, strict=True))
        return total / count

    return measure
