"""Tests of sweeps.space and the flags of a search: what is chosen, and what is handed on."""

import dataclasses

import opened
import pytest
from absl import flags as absl_flags
from run_flags import EFFECTIVE, EFFECTIVE_BY_DENSITY, EFFECTIVE_WITH
from searches import parse

from experiments.config.command_line import define, make
from experiments.config.parsers import parse_table
from experiments.sweeps import space
from experiments.sweeps.flags import SearchConfig
from experiments.training.flags import Config


def test_what_is_chosen():
    config = parse('--space=compression', '--learning_rate=inv:0.01,1e-4,0.75')
    assert space.make_ranges(config) == {
        'compression': (20, 1000, True),
        'ramp': (0.4, 0.9, False),
        'learning rate': (0.3, 3, True),
        'weight decay': (0.1, 4, True),
    }
    choice = {'compression': 123.456, 'ramp': 0.5, 'learning rate': 2.0, 'weight decay': 0.33333}
    own = space.make_config(config, choice)
    assert (own.compression, own.ramp_end) == (123.5, '8000')
    assert (own.learning_rate, own.weight_decay) == ('inv:0.02,1e-4,0.75', 0.0001667)
    late = opened.change(config, ramp_start='50%')
    assert space.make_config(late, choice).ramp_end == '12000'
    late = opened.change(config, ramp_start='4001', stop='fc1:90%,*:8000')
    assert space.make_config(late, choice).ramp_end == '6000'


@pytest.mark.parametrize('name', ['layer_density', 'c_rate'])
@pytest.mark.parametrize(
    ('network', 'layers'),
    [('lenet300', ['fc1', 'fc2', 'fc3']), ('lenet5', ['conv1', 'conv2', 'fc1', 'fc2'])],
)
def test_what_is_chosen_for_each_layer(name, network, layers):
    config = parse(f'--space={name}', f'--network={network}')
    ranges = space.make_ranges(config)
    low, high, logarithmic = {'layer_density': (1e-3, 1, True), 'c_rate': (0, 6, False)}[name]
    assert all(ranges[f'{name} {layer}'] == (low, high, logarithmic) for layer in layers)
    assert ('ramp' in ranges) == (name == 'layer_density')
    assert len(ranges) == len(layers) + 2 + ('ramp' in ranges)
    choice = {**space.choice_at(config, 0.5), f'{name} {layers[1]}': 0.123456}
    own = space.make_config(config, choice)
    middle = (low * high) ** 0.5 if logarithmic else 3
    expected = {layer: pytest.approx(middle, rel=1e-3) for layer in layers}
    assert parse_table(getattr(own, name)) == {**expected, layers[1]: 0.1235}
    assert own.network == network
    ends = [
        parse_table(getattr(space.make_config(config, space.choice_at(config, at)), name))
        for at in (0, 1)
    ]
    assert ends == [dict.fromkeys(layers, low), dict.fromkeys(layers, high)]


SCALED = {'learning_rate': 'fixed:0.1', 'weight_decay': 0.1}
CHOSEN = ('compression', 'density', 'kernel_density', 'layer_density', 'c_rate', 'ramp_end')
PROBES = ('refresh_statistics', 'cut', 'cut_at', 'count_returns')
NO_FLAGS = (*CHOSEN, *PROBES, 'on_divergence', 'train_on_all', 'resume', 'overwrite')
# Flags of runs that trials have as well, and values that are not their defaults.
HANDED_ON = EFFECTIVE | EFFECTIVE_BY_DENSITY
HANDED_ON |= {name: value for name, (value, _) in EFFECTIVE_WITH.items()}
HANDED_ON |= {'dataset': 'digits', 'reference': 'some', 'tensorboard': True, 'update_gamma': 0.5}
HANDED_ON |= {'data_dir': 'some', 'manual_dir': 'some', 'start': '10', 'stop': '80%'}
HANDED_ON |= {'prune_embeddings': True}
HANDED_ON |= {'record_every': 250, 'checkpoint_every': 4_000, 'rounds': 3, 'pruner': 'gradual'}
HANDED_ON = {name: HANDED_ON[name] for name in HANDED_ON.keys() - {*SCALED, *NO_FLAGS}}
# The flags beside which some of them have a meaning.
BESIDE = {'rounds': '--pruner=iterative', 'drop': '--pruner=set', 'pruned_dropout': '--dropout=0.5'}
# What these do is asked above, one by one.
OWN = ('network', 'workdir', 'space', 'trials', 'tolerance', 'study', 'storage')


def test_every_flag_is_tried():
    flag_values = absl_flags.FlagValues()
    define(SearchConfig, {}, flag_values)
    assert sorted(flag_values) == sorted([*HANDED_ON, *SCALED, *OWN])
    names = {field.name for field in dataclasses.fields(Config)}
    assert names - set(flag_values) == set(NO_FLAGS)


@pytest.mark.parametrize(('name', 'value'), sorted((HANDED_ON | SCALED).items()))
def test_trials_have_the_flags_of_the_search(name, value):
    beside = [BESIDE[name]] if name in BESIDE else []
    plain, config = parse(*beside), parse(*beside, f'--{name}={value}')
    choice = space.choice_at(plain, 0.4)
    own = space.make_config(config, choice)
    assert getattr(own, name) != getattr(space.make_config(plain, choice), name)
    if name in HANDED_ON:
        assert getattr(own, name) == value


def test_what_is_said_of_dense_training_reaches_the_reference():
    fields = {name: value for name, value in HANDED_ON.items() if name.startswith('reference_')}
    fields |= {'momentum': 0.5, 'bias_scale': 1.0, 'decay_biases': False, 'dropout': 0.5}
    own = make(SearchConfig, **fields, surgery_steps=3, reference='some').reference_run('w')
    assert {name: getattr(own, name) for name in fields} == fields
    assert (own.surgery_steps, own.reference, own.resume) == (16_000, None, True)
