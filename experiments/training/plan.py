"""From flags to phases: all that is written within a flag is read here, once, before any data.

What does not fit is refused at once. Behind a plan there are numbers and functions, no text.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import dns_jax
from dns_jax import sparse_training
from experiments.config.parsers import parse_learning_rate, parse_step, parse_table
from experiments.networks import models
from experiments.reports.records import PHASES
from experiments.training import divergence
from experiments.training.flags import Config
from experiments.training.image_flags import ImageConfig
from experiments.training.pruning import PRUNERS, Wanted, Window, make_pruner
from experiments.training.steps import Dropout


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a run."""

    name: str  # of `PHASES`
    steps: int
    learning_rate: dns_jax.Schedule
    weight_decay: float
    solver: Callable[..., optax.GradientTransformation]  # of the rate and the decay
    make_pruner: Callable[[Any, jax.Array], optax.GradientTransformation]  # of weights and a key
    chain: Callable[..., optax.GradientTransformation]  # the pruner and the solver
    dropout: float = 0.0  # of dense layers
    scales_dropout: bool = False  # whether it falls with the root of the density

    def make_optimizer(
        self, params: Any, key: jax.Array, setbacks: Sequence[bool] = ()
    ) -> optax.GradientTransformation:
        """Chains the pruner and the solver.

        Args:
          params: the network's weights, or their shapes.
          key: of the pruner's coins.
          setbacks: of the phase, as of `divergence.after_setbacks`.

        Returns:
          The optimizer of the phase.

        Raises:
          ValueError: if what takes no part is more than is to be kept.
        """
        pruner = self.make_pruner(params, key)
        solver = self.solver(self.learning_rate, weight_decay=self.weight_decay)
        # Before they are chained: where what is pruned is zeroed, that is after the rate is halved.
        return self.chain(*divergence.after_setbacks(pruner, solver, setbacks))

    def make_dropout(self, params: Any) -> Dropout | None:
        """Says how the phase drops units out, None where it does not."""
        if not self.dropout:
            return None
        layers = dns_jax.group_by_layer(params)
        dense: dict[str, Any] = dict.fromkeys(layers, jnp.float32(self.dropout))
        # Above every count of steps, so no coin is thrown with this key.
        number = 2**31 + PHASES.index(self.name)
        if not self.scales_dropout:
            return Dropout(lambda masks: dense, number)
        # The masks of dense training are scalars, which scale nothing.
        return Dropout(
            lambda masks: dense | sparse_training.scale_dropout(self.dropout, masks), number
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run does: its flags, and its phases in the order of `PHASES`."""

    config: Config
    wanted: Wanted
    reference: Phase
    surgery: Phase
    finetuning: Phase


def make_plan(config: Config) -> Plan:
    """Reads the flags of a run.

    Args:
      config: from the command line.

    Returns:
      The plan. No data is opened for it, and no weight is made.

    Raises:
      ValueError: if something is written within a flag that it may not hold, or does not fit the
        network or the other flags.
    """
    shapes = _shapes(config)
    wanted = read_wanted(config, list(shapes))
    pruner = functools.partial(make_pruner, wanted)
    make_phase = functools.partial(
        Phase,
        solver=functools.partial(
            dns_jax.caffe_sgd,
            momentum=config.momentum,
            bias_scale=config.bias_scale,
            decay_biases=config.decay_biases,
        ),
        chain=PRUNERS[config.pruner].chain,
        dropout=0.0 if config.pruned_dropout == 'dropped' else config.dropout,
        scales_dropout=config.pruned_dropout == 'scaled',
    )
    reference = make_phase(
        name='reference',
        steps=config.reference_steps,
        learning_rate=_read_rate(config, 'reference_learning_rate', config.reference_steps),
        weight_decay=config.reference_weight_decay,
        make_pruner=lambda params, key: dns_jax.surgery({}, key),
        dropout=config.dropout,
    )
    surgery = make_phase(
        name='surgery',
        steps=config.surgery_steps,
        learning_rate=_read_rate(config, 'learning_rate', config.surgery_steps),
        weight_decay=config.weight_decay,
        make_pruner=pruner,
    )
    finetuning = make_phase(
        name='finetuning',
        steps=config.finetuning_steps,
        learning_rate=_read_rate(config, 'finetuning_learning_rate', config.finetuning_steps),
        weight_decay=config.finetuning_weight_decay,
        make_pruner=lambda params, key: divergence.frozen(pruner(params, key)),
    )
    surgery.make_optimizer(shapes, jax.random.key(0))  # what does not fit the network is refused
    return Plan(config, wanted, reference, surgery, finetuning)


def _shapes(config: Config) -> Any:
    """The shapes of the weights; those of streamed images may have other numbers of classes."""
    if isinstance(config, ImageConfig):
        network = models.NETWORKS[config.network](width=config.width)
        return _cached_shapes(network, (config.image_size, config.image_size, 3))
    return _cached_shapes(models.NETWORKS[config.network](), models.MNIST_INPUT.image_shape)


@functools.cache
def _cached_shapes(network: nn.Module, image_shape: tuple[int, ...]) -> Any:
    return models.shapes(network, image_shape)


def _read_rate(config: Config, flag: str, steps: int) -> dns_jax.Schedule:
    # A phase without steps has a rate all the same.
    return _named(flag, parse_learning_rate, getattr(config, flag), max(steps, 1))


def read_wanted(config: Config, layers: Sequence[str]) -> Wanted:
    """Reads all that is said of pruning, for the layers of a network."""
    steps = config.surgery_steps
    rates = _by_layer(config, 'c_rate', layers)
    densities = _by_layer(config, 'layer_density', layers)
    for density in densities.values():
        if not 0 < density <= 1:
            raise ValueError(f'--layer_density: a density must be in (0, 1], but is {density!r}')
    windows, ramps = {'*': (0, steps)}, {}
    if config.pruner == 'surgery':
        windows = _read_windows(config, rates or densities or ['*'])
    if config.pruner != 'surgery' or not rates:
        ramps = _read_ramps(config, windows)
    cut_at = _read_step(config, 'cut_at')
    if not 0 <= cut_at < steps:
        raise ValueError(f'--cut_at={config.cut_at} must be one of the {steps} steps')
    return Wanted(
        pruner=config.pruner,
        steps=steps,
        rates=rates,
        densities=densities,
        compression=config.compression,
        density=config.density,
        score=config.score,
        windows=windows,
        ramps=ramps,
        ramp=_read_ramp(config.ramp),
        every=config.refresh_every,
        refresh_statistics=config.refresh_statistics,
        hysteresis=config.hysteresis,
        update_gamma=config.update_gamma,
        update_power=config.update_power,
        splicing=config.splicing,
        rounds=config.rounds,
        drop=config.drop,
        importance=config.importance,
        prune_biases=config.prune_biases,
        cut=config.cut,
        cut_at=cut_at,
        count_returns=config.count_returns,
    )


def _named(flag: str, read: Callable[..., Any], *arguments: Any) -> Any:
    """Reads what stands in a flag, and names the flag in what is wrong with it."""
    try:
        return read(*arguments)
    except ValueError as error:
        raise ValueError(f'--{flag}: {error}') from error


def _by_layer(
    config: Config, flag: str, layers: Iterable[str], number: Callable[[str], Any] = float
) -> dict[str, Any]:
    """Reads the table of a flag for the layers that it names."""

    def read(text: str) -> dict[str, Any]:
        matches = dns_jax.match_patterns(parse_table(text, number), layers)
        return {layer: value for layer, (_, value) in matches.items()}

    return _named(flag, read, getattr(config, flag))


def _read_step(config: Config, flag: str) -> int:
    return _named(flag, parse_step, getattr(config, flag), config.surgery_steps)


def _read_windows(config: Config, layers: Iterable[str]) -> dict[str, Window]:
    """Reads the first step with updates of each layer, and the first without them again."""
    steps = config.surgery_steps
    # A start or stop for a layer that stays dense would be a slip.
    starts, stops = (
        _by_layer(config, flag, layers, lambda text: parse_step(text, steps))
        for flag in ('start', 'stop')
    )
    # None after the last step, that one of them is the last: by density that is an exact one.
    return {layer: (starts.get(layer, 0), min(stops.get(layer, steps), steps)) for layer in layers}


def _read_ramps(config: Config, windows: Mapping[str, Window]) -> dict[str, Window]:
    """Reads the first and the last step of each layer's ramp, which the last update ends."""
    starts, ends = (
        _by_layer(config, flag, windows, lambda text: parse_step(text, config.surgery_steps))
        if ':' in getattr(config, flag)
        else dict.fromkeys(windows, _read_step(config, flag))
        for flag in ('ramp_start', 'ramp_end')
    )
    ramps = {}
    for layer, (first, stop) in windows.items():
        # A layer that a table leaves out has no ramp.
        start, end = starts.get(layer, 0), min(ends.get(layer, 0), stop - 1)
        if not 0 <= start < end or first >= stop:
            raise ValueError(
                f'--ramp_end={config.ramp_end} must come after --ramp_start={config.ramp_start}, '
                f'which must not be before step 0; the masks of {layer} are updated at the steps '
                f'from {first} to {stop - 1}'
            )
        ramps[layer] = start, end
    return ramps


def _read_ramp(text: str) -> Callable[..., dns_jax.Schedule]:
    if text == 'log':
        return dns_jax.log_linear_density
    kind, _, number = text.partition(':')
    try:
        power = float(number)
    except ValueError:
        kind = ''
    if kind != 'poly':
        raise ValueError(f'--ramp must be log or poly:POWER, but is {text!r}')
    return functools.partial(dns_jax.polynomial_density, power=power)
