"""What breaks training down, told before a run where it can be known, and what is done about it.

Training has broken down where a loss or a weight is not finite, or where surgery has left nothing
of a layer, so that the network answers the same to every image.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dns_jax
from experiments.training import steps

MOST_SETBACKS = 3  # in one phase; a run that needs more has flags that do not fit it


class Diverged(RuntimeError):
    """Training broke down, and the run was not to go back, or had gone back too often."""

    def __init__(self, message: str, phase: str):
        """Takes what is to be said, and the phase that it happened in."""
        super().__init__(message)
        self.phase = phase


class Breakdown(NamedTuple):
    """Where training broke down, and how."""

    step: int  # of the steps looked at, from 1
    reason: str
    emptied: bool  # whether surgery left nothing of a layer


def find_breakdown(
    chunk: steps.Chunk, kept: Mapping[str, int], params: dns_jax.Params
) -> Breakdown | None:
    """Finds the first step at which training broke down.

    Args:
      chunk: what happened in some steps.
      kept: connections that each layer had before them.
      params: the weights after them.

    Returns:
      The breakdown; None if there was none.
    """
    found = []
    if broken := np.flatnonzero(~np.isfinite(chunk.losses)).tolist():
        found.append(Breakdown(broken[0] + 1, 'the loss is not finite', False))
    for layer, events in chunk.events.items():
        left = kept[layer] + np.cumsum(np.subtract(events.spliced, events.pruned))
        if empty := np.flatnonzero(left == 0).tolist():
            found.append(Breakdown(empty[0] + 1, f'surgery has left nothing of {layer}', True))
    # The last step may break the weights, with no loss after it that would tell.
    if not found and (layers := _not_finite(params)):
        reason = f'a weight of {", ".join(layers)} is not finite'
        found.append(Breakdown(len(chunk.losses), reason, False))
    return min(found, default=None)


def _not_finite(params: dns_jax.Params) -> list[str]:
    layers = dns_jax.group_by_layer(params, takes_part=lambda path, leaf: True)
    return [layer for layer, finite in jax.device_get(_are_finite(layers)).items() if not finite]


@jax.jit
def _are_finite(layers: Mapping[str, Sequence[jax.Array]]) -> dict[str, jax.Array]:
    return {
        layer: jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
        for layer, leaves in layers.items()
    }


def after_setbacks(
    pruner: optax.GradientTransformation,
    optimizer: optax.GradientTransformation,
    setbacks: Sequence[bool],
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Makes the pruner and the optimizer that a phase goes on with after setbacks.

    Args:
      pruner: of the phase.
      optimizer: what it is chained with.
      setbacks: for each, whether surgery had emptied a layer.

    Returns:
      Both, with half the learning rate for each setback; once a layer was emptied, with masks that
      stay as they are. Their states are as before.
    """
    if not setbacks:
        return pruner, optimizer

    def prune_fn(updates, state, params: Any = None):
        updates, new_state = pruner.update(updates, state, params)
        if any(setbacks):
            kept: Any = optax.tree.get(state, 'SurgeryState')
            # Thresholds too: what the network computes with may be smaller by them.
            new_state = optax.tree.set(new_state, masks=kept.masks, thresholds=kept.thresholds)
        return updates, new_state

    def train_fn(updates, state, params: Any = None):
        updates, state = optimizer.update(updates, state, params)
        return optax.tree.scale(0.5 ** len(setbacks), updates), state

    return (
        optax.GradientTransformation(pruner.init, prune_fn),
        optax.GradientTransformation(optimizer.init, train_fn),
    )


def frozen(pruner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Makes a transformation with the state of a pruner that leaves it as it is."""
    return optax.GradientTransformation(
        pruner.init, lambda updates, state, params=None: (updates, state)
    )


def find_emptied_layers(
    rules: Mapping[str, dns_jax.Rule],
    params: dns_jax.Params,
    takes_part: Callable[[str, jax.Array], bool],
) -> list[str]:
    """Says which layers the first thresholds would leave nothing of; later ones are not known.

    Args:
      rules: by pattern, of the weights' magnitude.
      params: the weights that surgery begins with.
      takes_part: which leaves take part.
    """
    found = []
    layers = dns_jax.group_by_layer(params, takes_part=takes_part)
    patterns = {
        layer: pattern for layer, (pattern, _) in dns_jax.match_patterns(rules, layers).items()
    }
    for pattern, rule in rules.items():
        thresholds: Any = rule.thresholds
        weights = {layer: layers[layer] for layer in layers if patterns.get(layer) == pattern}
        masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), weights)
        for layer, (low, _) in thresholds(weights, masks, jnp.int32(0)).items():
            largest = max(float(jnp.abs(leaf).max()) for leaf in weights[layer])
            if largest < float(low):
                found.append(
                    f'the threshold of {layer}, {float(low):.4g}, lies above all its weights, the '
                    f'largest being {largest:.4g}: surgery would leave nothing of it'
                )
            elif not largest:
                found.append(f'all weights of {layer} are zero')
    return found
