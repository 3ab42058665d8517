"""From flags to a pruner, its rules, and the optimizer around it."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dns_jax
from dns_jax import importance, pruners, sparse_training
from experiments.config.flags import REGROWING, Config
from experiments.config.parsers import parse_step, parse_table
from experiments.training import divergence, probes


def make_optimizer(
    config: Config,
    pruner: optax.GradientTransformation,
    learning_rate: dns_jax.Schedule,
    weight_decay: float,
    setbacks: Sequence[bool] = (),
) -> optax.GradientTransformation:
    """Chains a pruner and Caffe's SGD.

    Args:
      config: momentum and what is said of biases; under set and rigl pruned weights are zero and do
        not learn.
      pruner: of the phase.
      learning_rate: of the phase.
      weight_decay: of the phase.
      setbacks: of the phase, as of `divergence.after_setbacks`.

    Returns:
      The optimizer of the phase.
    """
    sgd = dns_jax.caffe_sgd(
        learning_rate, config.momentum, weight_decay, config.bias_scale, config.decay_biases
    )
    chain = sparse_training.train_kept if config.pruner in REGROWING else optax.chain
    # Before they are chained: under set and rigl what is pruned is zeroed after the rate is halved.
    return chain(*divergence.after_setbacks(pruner, sgd, setbacks))


def make_pruner(
    config: Config, params: dns_jax.Params, key: jax.Array
) -> optax.GradientTransformation:
    """Makes what prunes: surgery or what is compared with it, and probes around it.

    Args:
      config: which pruner, what to keep and when.
      params: the network's weights.
      key: of its coins.

    Returns:
      A transformation as of `dns_jax.surgery`.

    Raises:
      ValueError: if a pattern matches no layer, or a number is out of range.
    """
    options = {
        'takes_part': takes_part(config),
        'importance': getattr(importance, config.importance),
    }
    if config.pruner == 'surgery':
        rules = make_rules(config, params)
        pruner = dns_jax.surgery(rules, key, splicing=config.splicing, **options)
    else:
        pruner = _make_baseline(config, params, key, options)
    if config.cut:
        step = _step_of_flag(config, 'cut_at')
        if not 0 <= step < config.surgery_steps:
            raise ValueError(
                f'--cut_at={config.cut_at} must be one of the {config.surgery_steps} steps'
            )
        pruner = probes.cut(pruner, config.cut, step)
    # Around the cut, which prunes too.
    return probes.count_returns(pruner) if config.count_returns else pruner


def _make_baseline(config, params, key, options) -> optax.GradientTransformation:
    start, end = _ramp_steps(config, {'*': (0, config.surgery_steps)})['*']
    rounds = [
        start + round((end - start) * number / max(config.rounds - 1, 1))
        for number in range(config.rounds)
    ]
    if config.pruner == 'han':
        rates = _by_layer(config, 'c_rate', dns_jax.group_by_layer(params))
        return pruners.han(rates, rounds, key, **options)
    if config.layer_density:
        densities = _by_layer(config, 'layer_density', dns_jax.group_by_layer(params))
        divide = functools.partial(dns_jax.layer_density, hysteresis=0.0)
    else:
        densities = _density_of_participants(config, params)
        divide = functools.partial(dns_jax.global_density, score=config.score, hysteresis=0.0)
    if config.pruner in REGROWING:
        is_set = config.pruner == 'set'
        return pruners.regrow(
            densities,
            config.refresh_every,
            end,
            key,
            config.drop if is_set else _cosine(config.drop, end),
            importance.chance if is_set else importance.gradient,
            # Papers begin at random; here the network is a trained one.
            initial=importance.magnitude,
            density_rule=divide,
            takes_part=options['takes_part'],
        )
    if config.pruner == 'gradual':
        every = config.refresh_every
        return pruners.gradual(densities, start, end, every, key, divide, **options)
    if config.pruner == 'one_shot':
        return pruners.one_shot(densities, start, key, density_rule=divide, **options)
    return pruners.iterative(densities, rounds, key, divide, **options)


def takes_part(config: Config) -> Callable[[str, jax.Array], bool]:
    """Says which leaves surgery is done on, as a predicate of path and leaf."""
    return dns_jax.has_axes if config.prune_biases else dns_jax.is_kernel


def make_rules(config: Config, params: dns_jax.Params) -> dict[str, dns_jax.Rule]:
    """Turns the flags into a table of rules.

    Args:
      config: what to keep, by `compression`, `density`, `layer_density` or `c_rate`, and when; a
        layer that the last two do not name stays dense.
      params: the network's weights.

    Returns:
      `{layer name: rule}`, or one rule for all layers where these share one density.

    Raises:
      ValueError: if a pattern matches no layer, or a number is out of range.
    """
    if config.c_rate:
        rates = _by_layer(config, 'c_rate', dns_jax.group_by_layer(params))
        windows, every, ramps = _update_steps(config, rates), config.refresh_statistics, {}
        thresholds = {
            layer: dns_jax.mean_std(rate, config.hysteresis) for layer, rate in rates.items()
        }
    else:
        if config.layer_density:
            densities = _by_layer(config, 'layer_density', dns_jax.group_by_layer(params))
            make = dns_jax.layer_density
        else:
            densities = {'*': _density_of_participants(config, params)}
            make = functools.partial(dns_jax.global_density, score=config.score)
        windows, every = _update_steps(config, densities), config.refresh_every or None
        ramps = _ramp_steps(config, windows)
        thresholds = {
            layer: make(
                _density_schedule(config, density, *ramps[layer]), hysteresis=config.hysteresis
            )
            for layer, density in densities.items()
        }
    rules = {}
    for layer, (start, stop) in windows.items():
        if layer in ramps and every and not config.update_power:
            last = (stop - 1) // every * every
            if last >= max(start, ramps[layer][1]):
                stop = last + 1  # training settles under the last thresholds that fit
        probability = dns_jax.update_probability(
            config.update_gamma, config.update_power, stop, start
        )
        rules[layer] = dns_jax.Rule(thresholds[layer], probability, every)
    return rules


def _by_layer(
    config: Config, flag: str, layers: Iterable[str], number: Callable[[str], Any] = float
) -> dict[str, Any]:
    """Reads the table of a flag for the layers that it names."""
    try:
        matches = dns_jax.match_patterns(parse_table(getattr(config, flag), number), layers)
    except ValueError as error:
        raise ValueError(f'--{flag}: {error}') from error
    return {layer: value for layer, (_, value) in matches.items()}


def _update_steps(config: Config, layers: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Reads the first step with updates of each layer, and the first without them again."""
    # A start or stop for a layer that stays dense would be a slip.
    starts, stops = (
        _by_layer(config, flag, layers, lambda text: parse_step(text, config.surgery_steps))
        for flag in ('start', 'stop')
    )
    # None after the last step, that one of them is the last: by density that is an exact one.
    steps = config.surgery_steps
    return {layer: (starts.get(layer, 0), min(stops.get(layer, steps), steps)) for layer in layers}


def _step_of_flag(config: Config, flag: str) -> int:
    try:
        return parse_step(getattr(config, flag), config.surgery_steps)
    except ValueError as error:
        raise ValueError(f'--{flag}: {error}') from error


def _ramp_steps(
    config: Config, windows: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """Reads the first and the last step of each layer's ramp, which the last update ends."""
    starts, ends = (
        _by_layer(config, flag, windows, lambda text: parse_step(text, config.surgery_steps))
        if ':' in getattr(config, flag)
        else dict.fromkeys(windows, _step_of_flag(config, flag))
        for flag in ('ramp_start', 'ramp_end')
    )
    ramps = {}
    for layer, (first, stop) in windows.items():
        # A layer that a table leaves out has no ramp.
        start, end = starts.get(layer, 0), min(ends.get(layer, 0), stop - 1)
        if not 0 <= start < end or first >= stop:
            raise ValueError(
                f'--ramp_end={config.ramp_end} must come after --ramp_start={config.ramp_start}, '
                f'and that not before step 0, for {layer}, whose masks are updated at the steps '
                f'from {first} to {stop - 1}'
            )
        ramps[layer] = start, end
    return ramps


def _density_schedule(config: Config, density: float, start: int, end: int) -> dns_jax.Schedule:
    if not 0 < density <= 1:
        raise ValueError(f'--layer_density: a density must be in (0, 1], but is {density!r}')
    if config.ramp == 'log':
        return dns_jax.log_linear_density(density, start, end)
    kind, _, text = config.ramp.partition(':')
    try:
        power = float(text)
    except ValueError:
        kind = ''
    if kind != 'poly':
        raise ValueError(f'--ramp must be log or poly:POWER, but is {config.ramp!r}')
    return dns_jax.polynomial_density(density, start, end, power=power)


def _density_of_participants(config: Config, params: dns_jax.Params) -> float:
    """The density of what takes part with which the whole network reaches the one wanted."""
    groups = dns_jax.group_by_layer(params, takes_part=takes_part(config)).values()
    part = sum(leaf.size for leaves in groups for leaf in leaves)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    # Rounded down: a network as small as asked for, or smaller.
    if config.compression:
        wanted = math.floor(total / config.compression)
    else:
        wanted = math.floor(total * (config.density or 1.0))
    if wanted <= total - part:
        raise ValueError(
            f'--compression or --density asks to keep {wanted} of {total} parameters, of which '
            f'{total - part} take no part in surgery and one more must be kept'
        )
    return (wanted - (total - part)) / part


def _cosine(drop: float, steps: int) -> dns_jax.Schedule:
    """The share that RigL exchanges, α/2 · (1 + cos(π·step/steps))."""
    schedule = optax.cosine_decay_schedule(drop, steps)
    return lambda step: jnp.asarray(schedule(jnp.float32(step)))
