"""A tiny network to search, and what is asked of its study."""

import types

import numpy as np
import optuna
from absl import flags as absl_flags

from experiments.config.command_line import define, to_config
from experiments.config.parsers import parse_table
from experiments.sweeps import studies
from experiments.sweeps.flags import SearchConfig

SPACES = ('compression', 'layer_density', 'c_rate')


SIZES = {'fc1': 785 * 8, 'fc2': 9 * 10}


def parse(*arguments, defaults=None, config_type=SearchConfig):
    flag_values = absl_flags.FlagValues()
    define(config_type, defaults or {}, flag_values)
    return to_config(config_type, defaults or {}, flag_values, flag_values(['program', *arguments]))


def trials_of(config):
    url = config.storage or f'sqlite:///{config.workdir}/study.db'
    return optuna.load_study(study_name=config.study, storage=studies._open_storage(url)).trials


REFERENCE_ERROR = 60.0


class PlayedTask:
    """What a search asks of its task, without the seconds that it takes to make one."""

    parameters = sum(SIZES.values())
    dataset = types.SimpleNamespace(validation=None)

    def __init__(self, config):
        del config

    def measure(self, weights, split):
        return REFERENCE_ERROR


class PlayedRun:
    """The same of a run."""

    def __init__(self, task, plan, on_record):
        self.config, self.on_record = plan.config, on_record


def error_of(config):
    """What a played training ends with: errors come below some density of each layer."""
    densities = parse_table(config.layer_density)
    lacking = [np.log10(least / densities[layer]) for layer, least in (('fc1', 0.03), ('fc2', 0.3))]
    return REFERENCE_ERROR + 10 * sum(max(0.0, lack) for lack in lacking)


def number_of(config):
    return int(config.workdir.rpartition('-')[2])
