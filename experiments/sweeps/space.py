"""What a search chooses: the numbers of a trial, and the run that they stand for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.config.parsers import parse_step, parse_table, scale_learning_rate
from experiments.networks import models
from experiments.sweeps.flags import SearchConfig
from experiments.training.flags import Config
from experiments.training.plan import named

_SPACES = {  # low, high, and whether on a logarithmic scale
    'compression': (20.0, 1000.0, True),
    'layer_density': (1e-3, 1.0, True),
    'c_rate': (0.0, 6.0, False),
}


def make_ranges(config: SearchConfig) -> dict[str, tuple[float, float, bool]]:
    """Says what a trial chooses.

    Args:
      config: of the search; `space` decides.

    Returns:
      `{name: (low, high, whether on a logarithmic scale)}`.
    """
    names = [config.space]
    if config.space != 'compression':
        names = [f'{config.space} {layer}' for layer in _layers(config)]
    ranges = dict.fromkeys(names, _SPACES[config.space])
    if config.space != 'c_rate':  # which has no ramp
        ranges['ramp'] = (0.4, 0.9, False)
    return {**ranges, 'learning rate': (0.3, 3.0, True), 'weight decay': (0.1, 4.0, True)}


def choice_at(config: SearchConfig, share: float) -> dict[str, float]:
    """Returns the choice at a share, 0 to 1, of the way through all ranges."""
    return {
        name: low * (high / low) ** share if logarithmic else low + share * (high - low)
        for name, (low, high, logarithmic) in make_ranges(config).items()
    }


def make_config(config: SearchConfig, choice: Mapping[str, float]) -> Config:
    """Makes the configuration of the run that a choice stands for.

    Args:
      config: of the search.
      choice: a number for each name in `make_ranges`. Those of learning rate and weight decay are
        factors; that of the ramp is the share that it takes of the way from its start to `stop`.

    Returns:
      The configuration, with the numbers chosen as a flagfile shows them, of four digits.
    """
    run = config.base()
    rate, decay = choice['learning rate'], choice['weight decay']
    chosen: dict[str, Any] = {
        'learning_rate': named('learning_rate', scale_learning_rate, run.learning_rate, rate),
        'weight_decay': float(f'{run.weight_decay * decay:.4g}'),
    }
    if 'ramp' in choice:
        start, stop = _updates(run)
        chosen['ramp_end'] = str(int(start + choice['ramp'] * (stop - start)))
    if config.space == 'compression':
        chosen['compression'] = float(f'{choice["compression"]:.4g}')
    else:
        chosen[config.space] = ','.join(
            f'{layer}:{choice[f"{config.space} {layer}"]:.4g}' for layer in _layers(config)
        )
    return dataclasses.replace(run, **{'density': None, **chosen})


def _updates(run: Config) -> tuple[int, int]:
    """The step at which ramps start, and the first at which the masks of a layer are frozen."""
    steps = run.surgery_steps
    try:
        stops = parse_table(run.stop, lambda text: parse_step(text, steps))
        return parse_step(run.ramp_start, steps), min([*stops.values(), steps])
    except ValueError as error:
        raise ValueError(f'--ramp_start or --stop: {error}') from error


def _layers(config: SearchConfig) -> list[str]:
    network = models.NETWORKS[config.network]()
    return list(models.shapes(network, models.MNIST_INPUT.image_shape))
