"""What trains the weights: a row of `SOLVERS` for each optimizer that a run can be asked for."""

from collections.abc import Callable
from typing import NamedTuple

import optax

import dns_jax
from dns_jax.layers import map_leaves, role

_BIASES = ('bias', 'scale')


class Numbers(NamedTuple):
    """What the optimizer of a phase is made of; not every one reads all."""

    rate: dns_jax.Schedule  # by the step of the phase
    decay: float  # of weights
    momentum: float
    bias_scale: float  # rate of biases / that of kernels
    decay_biases: bool  # whether they decay too, and the scales of norms


class Solver(NamedTuple):
    """A way to train that a run can be asked for."""

    make: Callable[[Numbers], optax.GradientTransformation]
    reads: tuple[str, ...] = ()  # the flags that not every optimizer reads


def make_solver(name: str, numbers: Numbers, clip: float = 0.0) -> optax.GradientTransformation:
    """Makes the optimizer of a phase.

    Args:
      name: one of `SOLVERS`.
      numbers: of the phase.
      clip: norm that the gradients of all weights together are cut down to; 0 leaves them.
    """
    solver = SOLVERS[name].make(numbers)
    return optax.chain(optax.clip_by_global_norm(clip), solver) if clip else solver


def _make_caffe(numbers):
    return dns_jax.caffe_sgd(
        numbers.rate, numbers.momentum, numbers.decay, numbers.bias_scale, numbers.decay_biases
    )


def _make_sgd(numbers):
    if not 0 <= numbers.momentum < 1:  # as dns_jax.caffe_sgd asks by itself
        raise ValueError(f'momentum must be in [0, 1), but is {numbers.momentum!r}')
    return optax.chain(
        optax.add_decayed_weights(numbers.decay, _decayed(numbers)),
        optax.sgd(numbers.rate, numbers.momentum),
    )


def _make_adamw(numbers):
    return optax.adamw(numbers.rate, weight_decay=numbers.decay, mask=_decayed(numbers))


def _decayed(numbers):
    """Says which leaves decay: all, or kernels and embeddings alone."""
    if numbers.decay_biases:
        return None
    return lambda tree: map_leaves(lambda path, leaf: role(path, leaf) not in _BIASES, tree)


SOLVERS = {
    'caffe': Solver(_make_caffe, ('momentum', 'bias_scale')),
    'sgd': Solver(_make_sgd, ('momentum',)),
    'adamw': Solver(_make_adamw),
}
