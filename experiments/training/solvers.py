"""What trains the weights: a row of `SOLVERS` for each optimizer that a run can be asked for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import dns_jax
from dns_jax.layers import map_leaves, role


class Solver(NamedTuple):
    """An optimizer, and what it is made of."""

    #: of flags, the learning rate and the weight decay of a phase.
    make: Callable[[Any, dns_jax.Schedule, float], optax.GradientTransformation]
    reads: tuple[str, ...] = ()  # the flags that not every optimizer reads


def make_solver(config: Any, rate: dns_jax.Schedule, decay: float) -> optax.GradientTransformation:
    """Makes the optimizer of a phase.

    Args:
      config: the flags of the run, `flags.Config`.
      rate: the learning rate of the phase, by its step.
      decay: its weight decay.
    """
    solver = SOLVERS[config.optimizer].make(config, rate, decay)
    if not config.clip:
        return solver
    return optax.chain(optax.clip_by_global_norm(config.clip), solver)


def _make_caffe(config, rate, decay):
    return dns_jax.caffe_sgd(rate, config.momentum, decay, config.bias_scale, config.decay_biases)


def _make_sgd(config, rate, decay):
    return optax.chain(
        optax.add_decayed_weights(decay, _decayed(config)), optax.sgd(rate, config.momentum)
    )


def _make_adamw(config, rate, decay):
    return optax.adamw(rate, weight_decay=decay, mask=_decayed(config))


def _decayed(config):
    """Says which leaves decay: all, or kernels and embeddings alone."""
    if config.decay_biases:
        return None
    return lambda tree: map_leaves(lambda path, leaf: role(path, leaf) not in _BIASES, tree)


_BIASES = ('bias', 'scale')
SOLVERS = {
    'caffe': Solver(_make_caffe, ('momentum', 'bias_scale')),
    'sgd': Solver(_make_sgd, ('momentum',)),
    'adamw': Solver(_make_adamw),
}
