"""A plain training of one network on a set that fits the device: no phases, records or folders."""

import flax.linen as nn
import jax
import optax

import dns_jax
from experiments.baselines.quantisers import Quantiser
from experiments.data.resident import Split, batch_indices
from experiments.devices import progress
from experiments.networks.models import MNIST_INPUT
from experiments.training import steps as train

_CHUNK = 500  # steps of one compiled call
_COINS = 2**31  # the number of their random bits, above any count of steps


def train_network(
    network: nn.Module,
    params: dns_jax.Params,
    optimizer: optax.GradientTransformation,
    split: Split,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    title: str,
    quantiser: Quantiser | None = None,
    loss: train.Loss = train.CROSS_ENTROPY,
) -> dns_jax.Params:
    """Trains a network and gives it as it is to be kept.

    Args:
      network: maps images to logits.
      params: its weights at the start.
      optimizer: a chain with a pruner, `dns_jax.surgery` of no rules where nothing is pruned, and
        what the quantiser has to stand last.
      split: the images to train on.
      steps: how many.
      batch_size: images per step.
      seed: of the order of the images.
      title: of the bar that shows progress.
      quantiser: of what the network computes with; its coins are thrown by the key of the pruner,
        and a count of steps that the schedule of the learning rate has.
      loss: of images.

    Returns:
      W⊙T, or what the quantiser makes of it, NumPy arrays.
    """
    # Copies: a compiled call takes the state over.
    state = train.TrainState(jax.tree.map(jax.numpy.array, params), optimizer.init(params))
    rounding = train.Rounding(quantiser, _COINS) if quantiser else None
    step = train.make_step(network, optimizer, MNIST_INPUT, rounding=rounding, loss=loss)
    run_chunk = train.make_run_chunk(step)
    images, labels = jax.device_put((split.images, split.labels))
    with progress.bar(total=steps, desc=title, unit=' steps') as bar:
        for start in range(0, steps, _CHUNK):
            count = min(_CHUNK, steps - start)
            batches = batch_indices((seed,), len(split), batch_size, start, count)
            state, _ = run_chunk(state, images, labels, batches)
            bar.update(count)
    finish = quantiser.finish if quantiser else dns_jax.apply_masks
    return jax.device_get(finish(state.params, state.masks))
