"""A plain training of one network on a set that fits the device: no phases, records or folders."""

import flax.linen as nn
import jax
import optax

import dns_jax
from experiments.data.resident import Split, batch_indices
from experiments.devices import progress
from experiments.networks.models import MNIST_INPUT
from experiments.training import steps as train

_CHUNK = 500  # steps of one compiled call


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
) -> dns_jax.Params:
    """Trains a network and gives it as it is to be kept.

    Args:
      network: maps images to logits.
      params: its weights at the start.
      optimizer: a chain with a pruner, `dns_jax.surgery` of no rules where nothing is pruned.
      split: the images to train on.
      steps: how many.
      batch_size: images per step.
      seed: of the order of the images.
      title: of the bar that shows progress.

    Returns:
      W⊙T, NumPy arrays.
    """
    # Copies: a compiled call takes the state over.
    state = train.TrainState(jax.tree.map(jax.numpy.array, params), optimizer.init(params))
    run_chunk = train.make_run_chunk(train.make_step(network, optimizer, MNIST_INPUT))
    images, labels = jax.device_put((split.images, split.labels))
    with progress.bar(total=steps, desc=title, unit=' steps') as bar:
        for start in range(0, steps, _CHUNK):
            count = min(_CHUNK, steps - start)
            batches = batch_indices((seed,), len(split), batch_size, start, count)
            state, _ = run_chunk(state, images, labels, batches)
            bar.update(count)
    return jax.device_get(dns_jax.apply_masks(state.params, state.masks))
