"""Tests of training.flags: which flags contradict each other, and which nothing would read."""

import json
import re

import pytest
from run_flags import (
    BY_DENSITY,
    EFFECTIVE,
    EFFECTIVE_BY_DENSITY,
    EFFECTIVE_WITH,
    FIELDS,
    PLACES_AND_SWITCHES,
    TARGETS,
    parse,
)

from experiments import lenet5
from experiments.config.command_line import identify
from experiments.training.flags import Config


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'rounds': 3}, '--rounds=3 has no meaning'),
        ({'optimizer': 'sgd', 'bias_scale': 1.0}, '--bias_scale=1.0 has no meaning .*=sgd'),
        ({'optimizer': 'adamw', 'momentum': 0.5}, '--momentum=0.5 has no meaning .*=adamw'),
        ({'pruner': 'gradual', 'drop': 0.1}, '--drop=0.1 has no meaning .*=gradual'),
        ({'pruner': 'rigl', 'drop': 2.0}, r'--drop=2.0 must be in \[0, 1\)'),
        ({'refresh_statistics': 5}, '--refresh_statistics=5 has no meaning'),
        ({'pruned_dropout': 'kept'}, '--pruned_dropout=kept has no meaning'),
        ({'cut_at': '1'}, '--cut_at=1 has no meaning'),
        ({'average': 1.0}, r'--average=1.0 must be in \[0, 1\)'),
        ({'average': 0.9, 'finetuning_steps': 0}, '--average=0.9 .*--finetuning_steps=0'),
        ({'cut': 1.0}, r'--cut=1.0 must be in \[0, 1\)'),
        ({'dropout': -0.1}, r'--dropout=-0.1 must be in \[0, 1\)'),
        ({'pruner': 'set', 'count_returns': True}, '--count_returns=True has no meaning'),
        ({'pruner': 'han'}, '--pruner=han must go with --c_rate'),
        ({'pruner': 'rigl', 'refresh_every': 0}, '--refresh_every=0 must be at least 1'),
        (
            {'compression': None, 'c_rate': '1', 'importance': 'taylor'},
            '--importance=taylor is not known at the start',
        ),
    ],
)
def test_flags_that_nothing_would_read(fields, message):
    with pytest.raises(ValueError, match=message):
        Config('lenet5', **{**BY_DENSITY, **fields})


def test_identity_is_all_but_places_and_switches():
    config = Config('lenet5', resume=True, c_rate='1')
    left_out = PLACES_AND_SWITCHES - {'dataset', 'reference', 'on_divergence'}
    assert sorted(identify(config)) == sorted({'network', *FIELDS} - left_out)
    assert json.loads(json.dumps(identify(config))) == identify(config)


@pytest.mark.parametrize('name', FIELDS)
def test_a_flag_given_is_the_field_of_its_name(name):
    values = EFFECTIVE | EFFECTIVE_BY_DENSITY
    values |= {name: value for name, (value, _) in EFFECTIVE_WITH.items()} | {'pruner': 'han'}
    values |= {'density': 0.5, 'layer_density': '0.5', 'update_gamma': 1.0, 'count_returns': True}
    values |= {'kernel_density': 0.5, 'prune_embeddings': True}
    values |= {'dataset': 'digits', 'resume': True, 'overwrite': True}
    values |= {'tensorboard': True, 'checkpoint_every': 4_000, 'record_every': 250}
    values |= {'on_divergence': 'rollback'}
    value = values.get(name, f'some/{name}')
    # With the flags beside which it has a meaning.
    beside = EFFECTIVE_WITH[name][1] if name in EFFECTIVE_WITH and name != 'pruner' else {}
    if not {name, *beside} & set(TARGETS):
        beside = {**beside, 'c_rate': '1'}
    config = parse(f'--{name}={value}', defaults=lenet5.DEFAULTS | beside)
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)
    others = {field: getattr(config, field) for field in FIELDS if field not in (name, *TARGETS)}
    plain = parse(defaults=lenet5.DEFAULTS | (beside or {'c_rate': '1'}))
    assert others == {field: getattr(plain, field) for field in others}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--resume', '--overwrite'], '--resume and --overwrite exclude each other'),
        (
            ['--checkpoint_every=750', '--record_every=500'],
            '--checkpoint_every=750 must be a multiple of --record_every=500',
        ),
        (
            ['--overwrite', '--workdir=a/b', '--reference=a/../a/b'],
            '--overwrite would delete --reference=a/../a/b',
        ),
        (['--c_rate='], '--c_rate must say what to keep, as --compression=100 does, but none is'),
        (['--density=0.1'], "but {'density': 0.1, 'c_rate': '1'} is given"),
        (['--c_rate=', '--compression=0.9'], '--compression=0.9 must be finite and at least 1'),
        (['--c_rate=', '--compression=nan'], '--compression=nan must be finite and at least 1'),
        (['--c_rate=', '--density=0'], '--density=0.0 must be in (0, 1]'),
        (['--c_rate=', '--density=1.5'], '--density=1.5 must be in (0, 1]'),
        (['--c_rate=', '--kernel_density=0'], '--kernel_density=0.0 must be in (0, 1]'),
        (['--c_rate=', '--kernel_density=2'], '--kernel_density=2.0 must be in (0, 1]'),
        (['--kernel_density=0.1'], "but {'kernel_density': 0.1, 'c_rate': '1'} is given"),
    ],
)
def test_flags_that_contradict_each_other(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(*arguments)
