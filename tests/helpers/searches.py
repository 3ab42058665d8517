"""A tiny network to search, and what is asked of its study."""

import flax.linen as nn
import optuna
from absl import flags as absl_flags

from experiments.config.command_line import define, to_config
from experiments.sweeps import studies
from experiments.sweeps.flags import SearchConfig

SPACES = ('compression', 'layer_density', 'c_rate')


class Tiny(nn.Module):
    """Two layers, quick to compile and to train."""

    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Dense(8, name='fc1')(images.reshape(images.shape[0], -1)))
        return nn.Dense(10, name='fc2')(hidden)


SIZES = {'fc1': 785 * 8, 'fc2': 9 * 10}


def parse(*arguments, defaults=None, config_type=SearchConfig):
    flag_values = absl_flags.FlagValues()
    define(config_type, defaults or {}, flag_values)
    return to_config(config_type, defaults or {}, flag_values, flag_values(['program', *arguments]))


def trials_of(config):
    url = config.storage or f'sqlite:///{config.workdir}/study.db'
    return optuna.load_study(study_name=config.study, storage=studies._open_storage(url)).trials
