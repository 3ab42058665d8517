"""The one training step, and its two loops: over a data set on the device, and over a stream.

The reference network and surgery run through the same step. A network without surgery is one
whose rule table is empty: then every mask is a scalar and costs nothing.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dns_jax
from experiments.baselines.quantisers import Quantiser, quantised
from experiments.networks import models

_AHEAD = 2  # steps handed to the device before the one that is waited for


class Images(Protocol):
    """A split of a data set, as it is measured on."""

    def __len__(self) -> int:
        """Counts its images."""
        ...

    def batches(self) -> Iterable[tuple[Any, Any]]:
        """Gives images and labels in batches; labels below 0 are padding."""
        ...


class TrainState(NamedTuple):
    """All that a step changes."""

    params: dns_jax.Params
    opt_state: optax.OptState

    @property
    def masks(self) -> dns_jax.Masks:
        """The masks, from wherever in the optimizer's state surgery put them."""
        return dns_jax.get_masks(self.opt_state)


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


TrainStep = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, jax.Array]]

Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""Maps logits (batch, classes) and labels (batch,) to the loss of each image."""

CROSS_ENTROPY: Loss = optax.softmax_cross_entropy_with_integer_labels


def make_step(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    inputs: models.Input,
    dropout: Dropout | None = None,
    accumulate: int = 1,
    rounding: Rounding | None = None,
    loss: Loss = CROSS_ENTROPY,
) -> TrainStep:
    """Makes the training step: the gradient at W⊙T, surgery, the optimizer.

    Args:
      network: maps images to logits.
      optimizer: a chain with `dns_jax.surgery` in it.
      inputs: what the network takes.
      dropout: of the phase.
      accumulate: parts of one size that a batch is taken in, one after the other: memory is
        needed for the images of one, and the gradient is the mean of theirs.
      rounding: of what the network computes with; None leaves weights as they are.
      loss: of images; that of a batch is their mean.

    Returns:
      A function of the state, images (batch, height, width, channels) uint8 and labels (batch,)
      int32 that returns the new state and the loss of the batch, by default in nats.
    """

    def loss_fn(params, images, labels, **dropping_out):
        return loss(_logits(network, inputs, params, images, **dropping_out), labels).mean()

    value_and_grad = dns_jax.masked_value_and_grad(loss_fn)
    if accumulate > 1:
        value_and_grad = _in_parts(value_and_grad, accumulate)
    if rounding:
        value_and_grad = quantised(value_and_grad, rounding.quantiser)

    def step(state, images, labels):
        options = {}
        if dropout:
            key = _fold_key(state, dropout.number)
            options = {'dropout': dropout.rates(state.masks), 'rngs': {'dropout': key}}
        if rounding:
            options['key'] = _fold_key(state, rounding.number)
        value, gradients = value_and_grad(state.params, state.masks, images, labels, **options)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), value

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

    def mean(params, masks, images, labels, rngs=None, **options):
        def add_part(total, part):
            number, images, labels = part
            own = dict(options)
            if rngs:
                own['rngs'] = jax.tree.map(lambda key: jax.random.fold_in(key, number), rngs)
            new = value_and_grad(params, masks, images, labels, **own)
            return jax.tree.map(lambda sum_, term: sum_ + term / accumulate, total, new), None

        # Every part has rows of every device that the batch is spread over.
        split = (
            jnp.moveaxis(array.reshape(-1, accumulate, *array.shape[1:]), 1, 0)
            for array in (images, labels)
        )
        nothing = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
        # XLA runs convolutions inside a loop on CPU many times slower than outside of it.
        unroll = accumulate if jax.default_backend() == 'cpu' else 1
        parts = (jnp.arange(accumulate), *split)
        return jax.lax.scan(add_part, nothing, parts, unroll=unroll)[0]

    return mean


def make_run_chunk(step: TrainStep) -> Callable[..., tuple[TrainState, Chunk]]:
    """Makes the compiled call that runs many steps; it donates the state.

    Returns:
      A jitted function of the state, all images, all labels and the indices (steps, batch) of
      each step's batch that returns the new state and a `Chunk`.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def run_chunk(state, images, labels, indices):
        def body(state, batch):
            new_state, loss = step(state, images[batch], labels[batch])
            return new_state, Chunk(loss, dns_jax.count_events(state.masks, new_state.masks))

        # Two steps a turn: XLA on CPU copies weights and masks between turns, not within one.
        return jax.lax.scan(body, state, indices, unroll=2)

    return run_chunk


def make_run_chunks(step: TrainStep) -> Callable[..., tuple[tuple[TrainState, Chunk], ...]]:
    """Makes the compiled call that runs many steps of several networks, each on its own batches.

    Returns:
      As `make_run_chunk` does, but for tuples of states and of indices; the result is a tuple of
      pairs. Several networks are vmapped into one program; they must be at the same step.
    """
    run_chunk = make_run_chunk(step)

    @functools.partial(jax.jit, donate_argnums=0)
    def run_vmapped(states, images, labels, indices):
        # Whole numbers count steps, the same for all. Kept out of the vmap, they leave a `cond` on
        # them one branch instead of both.
        shared = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.integer), states[0])
        axes = jax.tree.map(lambda is_shared: None if is_shared else 0, shared)
        stacked = jax.tree.map(
            lambda is_shared, *leaves: leaves[0] if is_shared else jnp.stack(leaves),
            shared,
            *states,
        )
        run_all = jax.vmap(run_chunk, (axes, None, None, 0), (axes, 0))
        state, chunk = run_all(stacked, images, labels, jnp.stack(indices))

        def network(at):
            own = jax.tree.map(
                lambda is_shared, leaf: leaf if is_shared else leaf[at], shared, state
            )
            return own, jax.tree.map(lambda leaf: leaf[at], chunk)

        return tuple(map(network, range(len(states))))

    def run_chunks(states, images, labels, indices):
        if len(states) == 1:
            return (run_chunk(states[0], images, labels, indices[0]),)
        return run_vmapped(states, images, labels, indices)

    return run_chunks


def make_run_streamed_chunk(step: TrainStep, like: TrainState) -> Callable[..., Any]:
    """Makes the function that runs many steps on batches from a stream, one compiled call each.

    Args:
      step: from `make_step`.
      like: a state whose leaves lie where those of all states are to lie.

    Returns:
      A function of the state, which it donates, and batches (images, labels) that
      returns the new state and a `Chunk`.
    """
    stay = jax.tree.map(lambda leaf: leaf.sharding, like)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(stay, None))
    def run_step(state, images, labels):
        new_state, loss = step(state, images, labels)
        return new_state, Chunk(loss, dns_jax.count_events(state.masks, new_state.masks))

    def run_chunk(
        state: TrainState, batches: Iterable[tuple[jax.Array, jax.Array]]
    ) -> tuple[TrainState, Chunk]:
        steps = []
        for images, labels in batches:
            state, happened = run_step(state, images, labels)
            steps.append(happened)
            # Else a slow device would let batches pile up.
            steps[-_AHEAD:][0].losses.block_until_ready()
        return state, jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(steps))

    return run_chunk


def make_error(
    network: nn.Module, inputs: models.Input
) -> Callable[[dns_jax.Params, Images], float]:
    """Makes the function that measures the classification error.

    Returns:
      A function of the weights to compute with (W⊙T) and a split that returns the share of
      images it gets wrong, in percent.
    """

    @jax.jit
    def count_wrong(params, images, labels):
        logits = _logits(network, inputs, params, images)
        return jnp.sum((jnp.argmax(logits, -1) != labels) & (labels >= 0))

    def error(params, split):
        return 100 * _sum_over(split, functools.partial(count_wrong, params)) / len(split)

    return error


def make_loss(
    network: nn.Module, inputs: models.Input
) -> Callable[[dns_jax.Params, Images], float]:
    """Makes the function that measures the cross-entropy.

    Returns:
      A function of the weights to compute with (W⊙T) and a split that returns the mean over its
      images, in nats.
    """

    @jax.jit
    def sum_losses(params, images, labels):
        logits = _logits(network, inputs, params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.where(labels >= 0, losses, 0).sum()

    def loss(params, split):
        return _sum_over(split, functools.partial(sum_losses, params)) / len(split)

    return loss


def _sum_over(split: Images, measure: Callable[[Any, Any], jax.Array]) -> float:
    """Adds up what is measured of all batches of a split; labels below 0 are padding."""
    return sum(float(measure(images, labels)) for images, labels in split.batches())


def _logits(
    network: nn.Module, inputs: models.Input, params: Any, images: jax.Array, **dropping_out
) -> jax.Array:
    scaled = images.astype(jnp.float32) * inputs.scale
    if any(inputs.mean):
        scaled -= (jnp.array(inputs.mean) * inputs.scale)[None, None, None]
    return jnp.asarray(network.apply({'params': params}, scaled, **dropping_out))
