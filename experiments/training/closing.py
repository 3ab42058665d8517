"""The end of a run: what is measured of its network, on the test images too, and written."""

import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import dns_jax
from dns_jax.files.sparse import save_sparse
from dns_jax.stacking import restack
from experiments.devices import hosts, meshes
from experiments.networks import models
from experiments.reports import run_report
from experiments.training import probes, steps
from experiments.training.task import Run
from experiments.training.workdir import NETWORK_FILE


def finish(
    run: Run,
    reference: steps.Weights,
    final: steps.TrainState,
    seconds: dict[str, float],
    returns: probes.ReturnsState | None,
) -> dict[str, Any]:
    """Measures what a run has made, and writes the pruned network and the report.

    Args:
      run: the one that ends.
      reference: the dense network.
      final: the state at the end.
      seconds: that it took, for the summary.
      returns: what was counted of connections that return, if anything.

    Raises:
      OSError: if the folder cannot be written.
    """
    pruned = run.plan.finetuning.finish(final)
    if run.plan.fresh_statistics:
        network, inputs, images = run.task.network, run.task.inputs, run.task.dataset.train
        augmentation = run.plan.finetuning.make_augmentation()
        pruned = estimate_statistics(network, inputs, pruned, images, augmentation)
    summary = _summarise(run, reference, pruned, final) | seconds
    if any(run.setbacks.values()):
        summary['setbacks'] = run.setbacks
    if returns:
        summary['returns'] = _measure_returns(run, pruned, final, returns)
    pruned, masks = meshes.to_host((pruned, final.masks))
    hosts.on_first(lambda: _write(run, pruned, masks, summary))
    return summary


def estimate_statistics(
    network: nn.Module,
    inputs: steps.Inputs,
    weights: steps.Weights,
    split: steps.Examples,
    augmentation: steps.Augmentation | None,
) -> steps.Weights:
    """Estimates the statistics of a network anew, as the mean over all batches of a split.

    Args:
      network: its running statistics have a `momentum`.
      inputs: what it takes.
      weights: to compute with.
      split: without padding.
      augmentation: that of training. A network that learnt from shifted images, with their black
        borders, errs by up to three points more under those of images as they are.

    Returns:
      The weights with new statistics.
    """
    memoryless = network.clone(momentum=0.0)

    @jax.jit
    def of_batch(number, examples):
        if augmentation:
            key = jax.random.fold_in(jax.random.key(augmentation.number), number)
            examples = augmentation.change(key, examples)
        variables = {'params': weights.params, **weights.statistics}
        options = {'train': True, 'mutable': list(weights.statistics)}
        return memoryless.apply(variables, inputs.prepare(examples), **options)[1]

    found = [of_batch(number, examples) for number, (examples, _) in enumerate(split.batches())]
    mean = jax.tree.map(lambda *each: sum(each) / len(each), *found)
    return weights._replace(statistics=mean)


def _write(run: Run, weights: steps.Weights, masks: dns_jax.Masks, summary: dict[str, Any]) -> None:
    network = summary['network']
    metadata = {'network': network, **run.task.inputs.describe()}
    if run.task.feed.options:
        metadata['options'] = json.dumps(run.task.feed.options)
    params: Any = weights.params
    if weights.statistics:
        params = {'params': params, **weights.statistics}
        dense = jax.tree.map(lambda leaf: np.array(True), weights.statistics)
        masks = {'params': masks, **dense}
    save_sparse(run.folder / NETWORK_FILE, params, masks, metadata)
    first_layer = masks.get('fc1', {}).get('kernel')
    sees_pixels = network == 'lenet300' and np.ndim(first_layer)
    run_report.write(run.folder, summary, first_layer if sees_pixels else None)


def _summarise(
    run: Run, reference: steps.Weights, pruned: steps.Weights, final: steps.TrainState
) -> dict[str, Any]:
    """Measures sizes and errors, and reads the test split."""
    task, splits = run.task, run.task.dataset
    positions = models.count_positions(task.network, task.feed.example_shape, task.inputs.dtype)
    params, masks = dns_jax.unstack(run.plan.pruning.stacked, final.params, final.masks)
    sizes = dns_jax.measure_sizes(params, masks, positions)
    return {
        'network': run.identity['network'],
        'dataset': run.identity['dataset'],
        'seed': run.identity['seed'],
        'steps': run.plan.surgery.steps,
        'unit': task.metric.unit,
        'reference_validation_error': task.measure(reference, splits.validation),
        'reference_error': task.measure(reference, splits.test),
        'validation_error': task.measure(pruned, splits.validation),
        'test_error': task.measure(pruned, splits.test),
        'part_density': _count_part(final.masks),
        **_size_summary(sizes.total),
        'per_layer': {layer: _size_summary(size) for layer, size in sizes.layers.items()},
        'state_mebibytes': sum(leaf.nbytes for leaf in jax.tree.leaves(final)) / 2**20,
        'commit': run.commit,
        'jax': jax.__version__,
        'device': jax.devices()[0].device_kind,
        'flags': run.identity,
    }


def _count_part(masks: dns_jax.Masks) -> float:
    """Counts what is kept of what takes part: kept / all."""
    part = [np.asarray(mask) for mask in jax.tree.leaves(meshes.to_host(masks)) if np.ndim(mask)]
    return sum(int(mask.sum()) for mask in part) / max(sum(mask.size for mask in part), 1)


def _measure_returns(
    run: Run, network: steps.Weights, final: steps.TrainState, returns: probes.ReturnsState
) -> dict[str, float]:
    """Says how many connections came back, and what they are good for in the end."""
    final_masks, returned = meshes.to_host((final.masks, returns.returned))
    counts = {
        'pruned': returns.pruned,
        'returned': returns.returned,
        'returned_kept': jax.tree.map(jnp.logical_and, returns.returned, final.masks),
    }
    measured: dict[str, float] = {
        name: sum(dns_jax.count_kept(masks).values()) for name, masks in counts.items()
    }
    without = jax.tree.map(lambda mask, back: mask & ~back, final.masks, returns.returned)
    # From the block that each is in, where blocks are stacked.
    stacked = run.plan.pruning.stacked
    _, *apart = dns_jax.unstack(stacked, final.params, final_masks, returned)
    others = probes.remove_others(apart[0], apart[1], run.identity['seed'])
    others = restack(stacked, final.params, others)
    removed = dns_jax.count_events(final_masks, others).values()
    measured['others_removed'] = sum(int(np.sum(event.pruned)) for event in removed)
    task = run.task
    loss = steps.make_measure(task.network, task.inputs, steps.NATS)
    # Quantised as it is kept: what is taken away changes no magnitude of the others.
    for name, masks in (*(('', final.masks), ('_without', without)), ('_without_others', others)):
        pruned = network._replace(params=dns_jax.apply_masks(network.params, masks))
        measured[f'loss{name}'] = loss(pruned.params, task.dataset.train, pruned.statistics)
        measured[f'test_error{name}'] = task.measure(pruned, task.dataset.test)
    return measured


def _size_summary(size: dns_jax.Size) -> dict[str, Any]:
    # JSON has no infinity: a layer of which nothing is kept has no compression.
    compression = size.compression if size.kept else None
    return {**size._asdict(), 'density': size.density, 'compression': compression}
