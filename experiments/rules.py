"""From flags to the rules of surgery and the optimizer around them."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax

import dns_jax
from experiments.flags import Config, parse_step, parse_table


def make_optimizer(
    config: Config,
    surgery: optax.GradientTransformation,
    learning_rate: dns_jax.Schedule,
    weight_decay: float,
) -> optax.GradientTransformation:
    """Chains surgery and Caffe's SGD.

    Args:
      config: momentum and bias_scale.
      surgery: of the phase.
      learning_rate: of the phase.
      weight_decay: of the phase.

    Returns:
      The optimizer of the phase.
    """
    sgd = dns_jax.caffe_sgd(learning_rate, config.momentum, weight_decay, config.bias_scale)
    return optax.chain(surgery, sgd)


def frozen(surgery: optax.GradientTransformation) -> optax.GradientTransformation:
    """Makes a transformation with the state of another that leaves it as it is.

    Args:
      surgery: holds the masks in its state.

    Returns:
      A transformation whose masks stay those of the state.
    """
    return optax.GradientTransformation(
        surgery.init, lambda updates, state, params=None: (updates, state)
    )


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
        thresholds = {
            layer: dns_jax.mean_std(rate, config.hysteresis) for layer, rate in rates.items()
        }
        return _rules(config, thresholds, refresh_every=0)
    if config.layer_density:
        densities = _by_layer(config, 'layer_density', dns_jax.group_by_layer(params))
        thresholds = {
            layer: dns_jax.layer_density(_ramp(config, density), config.hysteresis)
            for layer, density in densities.items()
        }
        return _rules(config, thresholds, config.refresh_every)
    ramp = _ramp(config, _density_of_participants(config, params))
    thresholds = {'*': dns_jax.global_density(ramp, config.score, config.hysteresis)}
    return _rules(config, thresholds, config.refresh_every)


def _by_layer(
    config: Config, flag: str, layers: Iterable[str], number: Callable[[str], Any] = float
) -> dict[str, Any]:
    """Reads the table of a flag for the layers that it names."""
    try:
        matches = dns_jax.match_patterns(parse_table(getattr(config, flag), number), layers)
    except ValueError as error:
        raise ValueError(f'--{flag}: {error}') from error
    return {layer: value for layer, (_, value) in matches.items()}


def _rules(config, thresholds, refresh_every) -> dict[str, dns_jax.Rule]:
    def step(text):
        return parse_step(text, config.surgery_steps)

    # A start or stop for a layer that stays dense would be a slip.
    starts = _by_layer(config, 'start', thresholds, step)
    stops = _by_layer(config, 'stop', thresholds, step)
    rules = {}
    for layer, rule in thresholds.items():
        start, stop = starts.get(layer, 0), stops.get(layer)
        if refresh_every:
            end = config.surgery_steps if stop is None else min(stop, config.surgery_steps)
            last = (end - 1) // refresh_every * refresh_every
            if last < max(start, step(config.ramp_end)):
                raise ValueError(
                    f'the last thresholds, with --refresh_every={refresh_every} those of step '
                    f'{last} of {config.surgery_steps}, come before the end of the ramp, '
                    f'--ramp_end={config.ramp_end}, or before --start={config.start}'
                )
            if not config.update_power:
                # The last update is the one with fresh thresholds: it keeps the density wanted.
                stop = last + 1
        probability = dns_jax.update_probability(
            config.update_gamma, config.update_power, stop, start
        )
        rules[layer] = dns_jax.Rule(rule, probability, refresh_every)
    return rules


def _ramp(config: Config, density: float) -> dns_jax.Schedule:
    ends = []
    for name in ('ramp_start', 'ramp_end'):
        try:
            ends.append(parse_step(getattr(config, name), config.surgery_steps))
        except ValueError as error:
            raise ValueError(f'--{name}: {error}') from error
    start, end = ends
    if not 0 < density <= 1:
        raise ValueError(f'--layer_density: a density must be in (0, 1], but is {density!r}')
    if not 0 <= start < end:
        raise ValueError(
            f'--ramp_end={config.ramp_end} must come after --ramp_start={config.ramp_start}, and '
            'that not before step 0'
        )
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
    takes_part = dns_jax.has_axes if config.prune_biases else dns_jax.is_kernel
    groups = dns_jax.group_by_layer(params, takes_part=takes_part).values()
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
