"""Fine-tuning of shared weights: gradient descent on the codebooks, or on weights that choose.

Which weights are kept stays as it is. Where the codebooks alone are tuned, all weights of a cluster
move together, and which are in it stays too. Where the weights move as well, each is at the
nearest centroid in every step, so that it may go over to another cluster; its gradient
is taken as if it were not moved there (straight through).
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dns_jax
from dns_jax.files.sharing import SharedNetwork, expand, round_codebooks
from dns_jax.layers import map_leaves, parent_path
from experiments.data.resident import batch_indices
from experiments.devices import progress
from experiments.networks.inputs import Input, Tokens


def tune(
    network: nn.Module,
    params: dns_jax.Params,
    shared: SharedNetwork,
    split: Any,
    *,
    inputs: Input | Tokens,
    tuned: Literal['codebooks', 'weights'],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    chunk: int = 200,
) -> SharedNetwork:
    """Fine-tunes a network with codebooks by Adam, at a rate that falls to 0 along a line.

    Args:
      network: maps images, or what else it takes, to logits.
      params: the dense weights that `shared` was made of; of no concern where `tuned` is
        'codebooks'.
      shared: from `dns_jax.files.sharing.share_weights`; its layers are those of the network.
      split: of a data set, to train on.
      inputs: what the network takes.
      tuned: 'codebooks' for the centroids alone, 'weights' for the centroids and the weights
        that choose among them.
      steps: how many.
      batch_size: examples per step.
      learning_rate: at the start; Adam moves a centroid or weight by about that much in a step.
      seed: of the order of the examples.
      chunk: steps of one compiled call.

    Returns:
      The network with other codebooks, rounded as its file will hold them; where weights are
      tuned, with other assignments too. Running statistics are taken as they are.

    Raises:
      FloatingPointError: if a centroid or weight is no longer finite.

    Reference:
      Han, Mao and Dally 2016, section 3.3.
    """
    variables = (shared.codebooks, params) if tuned == 'weights' else (shared.codebooks,)
    variables = jax.tree.map(jnp.asarray, variables)
    optimizer = optax.adam(dns_jax.caffe_poly(learning_rate, 1.0, steps))
    arrays = jax.device_put(split.arrays)

    def loss_fn(variables, examples, labels):
        weights = _hold_statistics(_expand(shared, *variables))
        logits = jnp.asarray(network.apply(weights, inputs.prepare(examples)))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def run_chunk(state, arrays, indices):
        def body(state, batch):
            variables, opt_state = state
            gradients = jax.grad(loss_fn)(variables, *split.gather(arrays, batch))
            updates, opt_state = optimizer.update(gradients, opt_state)
            return (optax.apply_updates(variables, updates), opt_state), None

        return jax.lax.scan(body, state, indices)[0]

    state = variables, optimizer.init(variables)
    with progress.bar(total=steps, desc='tuning', unit=' steps') as bar:
        for start in range(0, steps, chunk):
            amount = min(chunk, steps - start)
            indices = batch_indices((seed,), len(split), batch_size, start, amount)
            state = jax.block_until_ready(run_chunk(state, arrays, indices))
            bar.update(amount)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state[0])):
        raise FloatingPointError(
            f'learning_rate={learning_rate} left weights or centroids that are not finite'
        )
    codebooks, *weights = jax.device_get(state[0])
    codebooks = round_codebooks(codebooks)
    assignments = shared.assignments
    if weights:
        assignments = jax.tree.map(np.asarray, nearest(codebooks, *weights))
    return shared._replace(codebooks=codebooks, assignments=assignments)


def _expand(shared: SharedNetwork, codebooks: Any, weights: Any = None) -> Any:
    """Makes what the network computes with: of weights that choose where there are such."""
    if weights is None:
        return expand(codebooks, shared.assignments, shared.masks)
    nowhere = jax.tree.map(lambda leaf: leaf - jax.lax.stop_gradient(leaf), weights)
    return jax.tree.map(
        jnp.add,
        expand(codebooks, nearest(codebooks, weights), shared.masks),
        dns_jax.apply_masks(nowhere, shared.masks),
    )


def _hold_statistics(weights: Any) -> Any:
    """Makes Flax's variables of the weights of a file; what is beside the params, none moves."""
    if 'params' not in weights:
        return {'params': weights}
    return {**jax.lax.stop_gradient(weights), 'params': weights['params']}


def nearest(codebooks: Any, params: dns_jax.Params) -> Any:
    """Finds for each weight, kept or not, the nearest value of its layer's codebook.

    Args:
      codebooks: `{layer: its values}`.
      params: dense weights.

    Returns:
      A tree like `params` of int32 places in the codebooks; 0 where a codebook is empty.
    """

    def find(path, weights):
        book = jnp.asarray(codebooks[parent_path(path)])
        if not book.size:
            return jnp.zeros(weights.shape, jnp.int32)
        return jnp.argmin(jnp.abs(jnp.subtract.outer(weights, book)), -1).astype(jnp.int32)

    return map_leaves(find, params)
