"""From flags to phases: all that is written within a flag is read here, once, before any data.

What does not fit is refused at once. Nothing behind a plan reads what is written within a flag.
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
from dns_jax.layers import named_leaves, parent_path
from experiments.baselines.quantisers import Quantiser
from experiments.config.parsers import parse_learning_rate, parse_step, parse_structure, parse_table
from experiments.data import resident, texts
from experiments.data.augmentation import shift_and_mirror
from experiments.networks import models
from experiments.networks.inputs import Tokens
from experiments.reports.records import PHASES
from experiments.training import divergence
from experiments.training.flags import Config
from experiments.training.image_flags import ImageConfig
from experiments.training.pruning import (
    IMPORTANCES,
    PRUNERS,
    QUANTISERS,
    Pruning,
    Window,
    make_no_pruner,
    make_pruner,
    make_takes_part,
)
from experiments.training.sized_flags import SizedConfig
from experiments.training.solvers import Numbers, make_solver
from experiments.training.steps import Augmentation, Dropout, Rounding, TrainState, Weights


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a run."""

    name: str  # of `PHASES`
    steps: int
    solver: optax.GradientTransformation  # with the phase's rate and decay
    make_pruner: Callable[[Any], optax.GradientTransformation]  # of weights, or their shapes
    chain: Callable[..., optax.GradientTransformation]  # the pruner and the solver
    dropout: float  # of dense layers
    scales_dropout: bool  # whether it falls with the root of the density
    quantiser: Quantiser | None  # of the weights that the network computes with
    shift: int  # pixels that images are moved by at most
    mirror: bool  # whether half of them are mirrored
    average: float  # of the weights: share that a step keeps; 0 is none
    soften: Callable[[TrainState], Any] | None = None  # of the kept weights, in surgery

    def make_optimizer(
        self, params: Any, setbacks: Sequence[bool] = ()
    ) -> optax.GradientTransformation:
        """Chains the pruner and the solver.

        Args:
          params: the network's weights, or their shapes.
          setbacks: of the phase, as of `divergence.after_setbacks`.

        Returns:
          The optimizer of the phase, for all runs: the key of a run's coins is in its state.

        Raises:
          ValueError: if what takes no part is more than is to be kept.
        """
        pruner, solver = self.make_pruner(params), self.solver
        if self.quantiser:
            solver = optax.chain(solver, self.quantiser.constrain)
        # Before they are chained: where what is pruned is zeroed, that is after the rate is halved.
        optimizer = self.chain(*divergence.after_setbacks(pruner, solver, setbacks))
        if self.average:
            optimizer = optax.chain(optimizer, dns_jax.average_weights(self.average))
        return optimizer

    def finish(self, state: TrainState) -> Weights:
        """Gives the network that the phase makes: W⊙T, after what it does to the weights."""
        apply = self.quantiser.finish if self.quantiser else dns_jax.apply_masks
        params: Any = state.params
        if self.soften:
            params = self.soften(state)
        if self.average:
            params = optax.tree.get(state.opt_state, 'average')
        return Weights(apply(params, state.masks), state.statistics)

    def make_rounding(self) -> Rounding | None:
        """Says how the phase quantises weights, None where it does not."""
        # Above the numbers of dropout.
        number = 2**31 + 2**30 + PHASES.index(self.name)
        return Rounding(self.quantiser, number) if self.quantiser else None

    def make_augmentation(self) -> Augmentation | None:
        """Says how the phase changes images at random, None where it does not."""
        if not (self.shift or self.mirror):
            return None
        change = functools.partial(shift_and_mirror, pixels=self.shift, mirror=self.mirror)
        return Augmentation(change, 2**31 + 2**29 + PHASES.index(self.name))

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
    pruning: Pruning
    reference: Phase
    surgery: Phase
    finetuning: Phase
    fresh_statistics: bool  # whether those of BatchNorm are estimated anew in the end


def make_plan(config: Config) -> Plan:
    """Reads the flags of a run.

    Returns:
      The plan. No data is opened for it, and no weight is made.

    Raises:
      ValueError: if something is written within a flag that it may not hold, or does not fit the
        network or the other flags.
    """
    _check_dataset(config)
    shapes = _shapes(config)
    stacked = models.STACKED.get(config.network, {})
    (apart,) = jax.eval_shape(lambda shapes: dns_jax.unstack(stacked, shapes), shapes)
    could = make_takes_part(config.prune_biases, config.prune_embeddings)
    pruning = read_pruning(config, list(dns_jax.group_by_layer(apart, takes_part=could)))
    pruner = functools.partial(make_pruner, pruning)
    dropout = 0.0 if config.pruned_dropout == 'dropped' else config.dropout
    reference = _make_phase(config, 'reference', 'reference_', make_no_pruner, config.dropout)
    surgery = _make_phase(config, 'surgery', '', pruner, dropout)
    if pruning.soft_threshold:
        surgery = dataclasses.replace(surgery, soften=_make_soften(pruning))

    def make_frozen(params):
        return divergence.frozen(pruner(params))

    finetuning = _make_phase(config, 'finetuning', 'finetuning_', make_frozen, dropout)
    surgery.make_optimizer(shapes)  # what does not fit the network is refused
    for path, leaf in named_leaves(apart):
        structure = pruning.structures.get(parent_path(path))
        if structure and leaf.ndim > 1 and pruning.takes_part(path, leaf):
            named('structure', structure.check, path, leaf.shape)
    fresh = isinstance(config, SizedConfig) and config.fresh_statistics
    return Plan(config, pruning, reference, surgery, finetuning, fresh)


def _make_phase(
    config: Config, name: str, prefix: str, make: Callable[[Any], Any], dropout: float
) -> Phase:
    """Makes a phase of the flags whose names begin so."""
    steps = getattr(config, f'{name}_steps')
    rate_flag, decay_flag = f'{prefix}learning_rate', f'{prefix}weight_decay'
    # A phase without steps has a rate all the same.
    rate = named(rate_flag, parse_learning_rate, getattr(config, rate_flag), max(steps, 1))
    decay = getattr(config, decay_flag)
    if decay < 0:
        raise ValueError(f'--{decay_flag}={decay} must be at least 0')
    own = config.momentum, config.bias_scale, config.decay_biases
    solver = make_solver(config.optimizer, Numbers(rate, decay, *own), config.clip)
    pruner, scales = PRUNERS[config.pruner], config.pruned_dropout == 'scaled'
    chain = pruner.chain
    if name == 'surgery' and 'pruned_rate' in pruner.reads and config.pruned_rate != 1:
        chain = functools.partial(sparse_training.slow_pruned, share=config.pruned_rate)
    quantiser = None if name == 'reference' else QUANTISERS[config.quantiser]
    average = config.average if name == 'finetuning' else 0.0
    changes = config.shift, config.mirror, average
    return Phase(name, steps, solver, make, chain, dropout, scales, quantiser, *changes)


def _check_dataset(config: Config) -> None:
    """Refuses a data set that does not fit the network; streamed images are made to fit."""
    if isinstance(config, ImageConfig):
        return
    inputs = models.inputs_of(config.network)
    is_text = config.dataset in texts.DATASETS
    if is_text != isinstance(inputs, Tokens):
        raise ValueError(
            f'--dataset={config.dataset} holds {"a text" if is_text else "images"}, but '
            f'--network={config.network} takes {"images" if is_text else "a text"}'
        )
    if not isinstance(inputs, Tokens):
        named('dataset', resident.check_image_shape, config.dataset, inputs.image_shape)


def _shapes(config: Config) -> Any:
    """The shapes of the weights; how many classes streamed images have, their data say."""
    make, options = models.NETWORKS[config.network], config.network_options
    if isinstance(config, ImageConfig):
        # Fewer classes keep fewer weights that take no part: nothing that fits the data is refused.
        network, shape = make(**options, classes=1), (config.image_size, config.image_size, 3)
    else:
        network = make(**options)
        shape = models.example_shape(config.network, network)
    return _cached_shapes(network, shape, models.inputs_of(config.network).dtype)


@functools.cache
def _cached_shapes(network: nn.Module, shape: tuple[int, ...], dtype: Any) -> Any:
    return models.shapes(network, shape, dtype)


def _make_soften(pruning: Pruning) -> Callable[[TrainState], Any]:
    """Makes the function of a state that makes its kept weights smaller by their thresholds."""

    def soften(state: TrainState) -> Any:
        surgery: Any = optax.tree.get(state.opt_state, 'SurgeryState')
        return dns_jax.soft_threshold(
            state.params, state.masks, surgery.thresholds, stacked=pruning.stacked
        )

    return soften


def read_pruning(config: Config, layers: Sequence[str]) -> Pruning:
    """Reads all that is said of pruning, for the layers of a network that could take part."""
    steps = config.surgery_steps
    stay = dict.fromkeys(filter(None, config.stay_dense.split(',')), True)
    dense = named('stay_dense', dns_jax.match_patterns, stay, layers)
    layers = [layer for layer in layers if layer not in dense]
    rates = _by_layer(config, 'c_rate', layers)
    densities = _by_layer(config, 'layer_density', layers)
    for density in densities.values():
        if not 0 < density <= 1:
            raise ValueError(f'--layer_density: a density must be in (0, 1], but is {density!r}')
    pruner, windows, ramps = PRUNERS[config.pruner], {'*': (0, steps)}, {}
    if 'stop' in pruner.reads:
        windows = _read_windows(config, rates or densities or ['*'])
    if '*' in windows or not rates:
        ramps = _read_ramps(config, windows)
    wanted = 'STRUCTURE, as units, inputs, 4x4 or 2of4 are'
    structures = _by_layer(config, 'structure', layers, parse_structure, wanted)
    if config.cut and structures:
        raise ValueError('--cut prunes single weights, and does not go with --structure')
    cut_at = _read_step(config, 'cut_at')
    if not 0 <= cut_at < steps:
        raise ValueError(f'--cut_at={config.cut_at} must be one of the {steps} steps')
    return Pruning(
        pruner=pruner,
        steps=steps,
        rates=rates,
        densities=densities,
        compression=config.compression,
        density=config.density,
        kernel_density=config.kernel_density,
        score=config.score,
        windows=windows,
        ramps=ramps,
        ramp=_read_ramp(config.ramp),
        every=config.refresh_every,
        refresh_statistics=config.refresh_statistics,
        hysteresis=config.hysteresis,
        soft_threshold=config.soft_threshold,
        update_gamma=config.update_gamma,
        update_power=config.update_power,
        splicing=config.splicing,
        rounds=config.rounds,
        drop=config.drop,
        importance=IMPORTANCES[config.importance],
        structures=structures,
        takes_part=make_takes_part(config.prune_biases, config.prune_embeddings, dense),
        stacked=models.STACKED.get(config.network, {}),
        cut=config.cut,
        cut_at=cut_at,
        count_returns=config.count_returns,
    )


def named(flag: str, read: Callable[..., Any], *arguments: Any) -> Any:
    """Reads what stands in a flag, and names the flag in what is wrong with it."""
    try:
        return read(*arguments)
    except ValueError as error:
        raise ValueError(f'--{flag}: {error}') from error


def _by_layer(
    config: Config,
    flag: str,
    layers: Iterable[str],
    number: Callable[[str], Any] = float,
    wanted: str = 'NUMBER',
) -> dict[str, Any]:
    """Reads the table of a flag for the layers that it names."""

    def read(text: str) -> dict[str, Any]:
        matches = dns_jax.match_patterns(parse_table(text, number, wanted), layers)
        return {layer: value for layer, (_, value) in matches.items()}

    return named(flag, read, getattr(config, flag))


def _read_step(config: Config, flag: str) -> int:
    return named(flag, parse_step, getattr(config, flag), config.surgery_steps)


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
