"""The flags of a run, with a value of each that changes its numbers, and a parser."""

import dataclasses
from pathlib import Path

from absl import flags as absl_flags

from experiments import lenet5
from experiments.config.command_line import define, to_config
from experiments.training.flags import Config

ROOT = Path(__file__).resolve().parents[2]


FIELDS = [field.name for field in dataclasses.fields(Config) if field.name != 'network']


# One of these must say what to keep.
TARGETS = ('compression', 'density', 'kernel_density', 'layer_density', 'c_rate')


def parse(*arguments, defaults=lenet5.DEFAULTS | {'c_rate': '1'}, config_type=Config):
    flag_values = absl_flags.FlagValues()
    define(config_type, defaults, flag_values)
    left = flag_values(['program', *arguments])
    return to_config(config_type, defaults, flag_values, left)


EFFECTIVE = {
    'train_on_all': True,
    'seed': 1,
    'shift': 3,
    'mirror': True,
    'batch_size': 8,
    'reference_steps': 2,
    'surgery_steps': 3,
    'record_every': 2,
    'checkpoint_every': 1,
    'reference_learning_rate': 'inv:0.02,1e-4,0.75',
    'learning_rate': 'poly:0.1,1',
    'finetuning_steps': 3,
    'finetuning_learning_rate': 'fixed:0.1',
    'finetuning_weight_decay': 0.1,
    'average': 0.5,
    'reference_weight_decay': 0.1,
    'optimizer': 'sgd',
    'clip': 0.1,
    'momentum': 0.5,
    'weight_decay': 0.1,
    'bias_scale': 1.0,
    'decay_biases': False,
    'c_rate': 'fc1:1,fc2:0.5',
    'start': 'fc2:2',
    'stop': '*:1',
    'hysteresis': 0.3,
    'update_power': 1e6,
    'prune_biases': False,
    'stay_dense': 'fc1',
    'quantiser': 'signs',
    'dropout': 0.5,
    'cut': 0.3,
}


BY_DENSITY = {'compression': 4.0, 'refresh_every': 1, 'ramp_end': '50%'}


EFFECTIVE_BY_DENSITY = {
    'compression': 8.0,
    'score': 'erk',
    'ramp': 'poly:2',
    'ramp_start': '1',
    'ramp_end': '25%',
    'refresh_every': 2,
}


EFFECTIVE_WITH = {  # the flags that the flag needs, or whose pruner reads it
    'pruner': ('rigl', BY_DENSITY),
    'importance': ('taylor', BY_DENSITY),
    'structure': ('fc1:units', BY_DENSITY),
    'splicing': (False, BY_DENSITY | {'learning_rate': 'fixed:0.3'}),
    'pruned_rate': (0.0, BY_DENSITY | {'learning_rate': 'fixed:0.3'}),
    'soft_threshold': (True, BY_DENSITY),
    'refresh_statistics': (1, {'learning_rate': 'fixed:0.3'}),
    'rounds': (1, BY_DENSITY | {'pruner': 'iterative', 'rounds': 2}),
    'drop': (0.7, BY_DENSITY | {'pruner': 'set'}),
    'pruned_dropout': ('dropped', {'dropout': 0.5}),
    'cut_at': ('25%', {'cut': 0.5}),
}


# These are tried together with others, or on other networks.
TRIED_APART = {
    *('density', 'kernel_density', 'layer_density', 'update_gamma', 'count_returns'),
    'prune_embeddings',
}


# What these do is asked below, one by one.
PLACES_AND_SWITCHES = {
    *('dataset', 'data_dir', 'manual_dir', 'workdir', 'reference'),
    *('resume', 'overwrite', 'tensorboard', 'on_divergence'),
}
