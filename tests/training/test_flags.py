"""Tests of config.flags: what is parsed, what is refused, and what every flag does."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags as absl_flags

import dns_jax
from experiments import alexnet, lenet5, lenet300, vgg16
from experiments.training import flags
from experiments.config.command_line import define, is_flag, to_config
from experiments.training.flags import Config
from experiments.training.image_flags import ImageConfig
from experiments.config.parsers import parse_learning_rate, parse_step, parse_table
from experiments.data import resident
from experiments.networks import models
from experiments.own_loops.runs import OwnLoopConfig
from experiments.sweeps.flags import CompareConfig, FrontierConfig, SearchConfig
from experiments.tool_flags import (
    BenchConfig,
    ExportConfig,
    LatencyConfig,
    ScaleConfig,
    XorConfig,
    ZooConfig,
)
from experiments.training import pruning, run

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {'lenet300': lenet300, 'lenet5': lenet5}
IMAGE_SCRIPTS = {'alexnet': alexnet, 'vgg16': vgg16}
FLAGFILES = sorted((ROOT / 'experiments' / 'flagfiles').glob('*.flags'))
FIELDS = [field.name for field in dataclasses.fields(Config) if field.name != 'network']


# One of these must say what to keep.
TARGETS = ('compression', 'density', 'layer_density', 'c_rate')


def parse(*arguments, defaults=lenet5.DEFAULTS | {'c_rate': '1'}, config_type=Config):
    flag_values = absl_flags.FlagValues()
    define(config_type, defaults, flag_values)
    left = flag_values(['program', *arguments])
    return to_config(config_type, defaults, flag_values, left)


def shapes(name):
    """Returns the shapes of a network's parameters, without making them."""
    size = models.INPUTS[name].size
    images = jnp.zeros((1, size, size, len(models.INPUTS[name].mean)))
    return jax.eval_shape(lambda: models.NETWORKS[name]().init(jax.random.key(0), images))['params']


def main(*arguments, script='lenet5'):
    """Runs an entry script as a user does."""
    command = [sys.executable, '-m', f'experiments.{script}', *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


class Tiny(nn.Module):
    """Two layers, small enough to compile in no time."""

    @nn.compact
    def __call__(self, images, dropout=None):
        hidden = nn.relu(nn.Dense(8, name='fc1')(images.reshape(images.shape[0], -1)))
        hidden = models.drop_out(self, hidden, dropout, 'fc1')
        return nn.Dense(10, name='fc2')(hidden)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """A folder with the caches of two data sets, of random images, and so no need for TFDS."""
    folder = tmp_path_factory.mktemp('data')
    (folder / 'dns_jax_cache').mkdir()
    random = np.random.default_rng(0)
    for name in ('digits', 'fashion_mnist'):
        source, arrays = resident._SOURCES[name], {}
        for split, count in (('train', source.train), ('test', source.test)):
            arrays[f'{split}_labels'] = random.integers(0, 10, count, np.int32)
            arrays[f'{split}_images'] = random.integers(0, 256, (count, 28, 28, 1), np.uint8)
        np.savez(folder / 'dns_jax_cache' / f'{name}-{source.version}.npz', **arrays)
    return folder


@pytest.fixture(scope='module')
def make_config(data_dir, tmp_path_factory):
    """Makes the configuration of a tiny run with some fields of its own, in a new folder."""

    def make(**fields):
        fields.setdefault('workdir', str(tmp_path_factory.mktemp('run') / 'run'))
        short = {'reference_steps': 3, 'surgery_steps': 4, 'record_every': 1, 'batch_size': 16}
        short |= {'checkpoint_every': 2, 'learning_rate': 'inv:0.1,1e-4,0.75', 'dataset': 'digits'}
        short |= {'finetuning_steps': 2}
        if not any(name in fields for name in TARGETS):
            short |= {'c_rate': '1'}
        return Config(**{'network': 'tiny', 'data_dir': str(data_dir), **short, **fields})

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.NETWORKS, 'tiny', Tiny)
        yield make


def outcome(config):
    """Runs both phases; returns the records, the last state and which checkpoints there are."""
    trainer = run.Trainer(config)
    # To compile the two loops takes longer than such runs: here their operations go one by one.
    with jax.disable_jit():
        references = run.train_references([trainer], [])
        (final,) = run.finetune([trainer], run.train_surgery([trainer], references, []), [])
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((final.params, final.masks))]
    checkpoints = sorted(
        str(path.relative_to(config.workdir)) for path in Path(config.workdir).glob('*/*/*')
    )
    return (Path(config.workdir) / 'metrics.jsonl').read_text(), leaves, checkpoints


@pytest.fixture(scope='module')
def plain(make_config):
    config = make_config()
    return config, outcome(config)


@pytest.fixture(scope='module')
def plain_by_density(make_config):
    config = make_config(**BY_DENSITY)
    return config, outcome(config)


EFFECTIVE = {
    'train_on_all': True,
    'seed': 1,
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
    'reference_weight_decay': 0.1,
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
    'splicing': (False, BY_DENSITY | {'learning_rate': 'fixed:0.3'}),
    'refresh_statistics': (1, {'learning_rate': 'fixed:0.3'}),
    'rounds': (1, BY_DENSITY | {'pruner': 'iterative', 'rounds': 2}),
    'drop': (0.7, BY_DENSITY | {'pruner': 'set'}),
    'pruned_dropout': ('dropped', {'dropout': 0.5}),
    'cut_at': ('25%', {'cut': 0.5}),
}
# These are tried together with others, below.
TRIED_APART = {'density', 'layer_density', 'update_gamma', 'count_returns'}
# What these do is asked below, one by one.
PLACES_AND_SWITCHES = {
    *('dataset', 'data_dir', 'manual_dir', 'workdir', 'reference'),
    *('resume', 'overwrite', 'tensorboard', 'on_divergence'),
}


def test_every_flag_is_tried():
    tried = [*EFFECTIVE, *EFFECTIVE_BY_DENSITY, *EFFECTIVE_WITH, *TRIED_APART, *PLACES_AND_SWITCHES]
    assert sorted(tried) == sorted(FIELDS)


def test_a_run_repeats_itself(make_config, plain):
    assert outcome(make_config()) == plain[1]


@pytest.mark.parametrize(('name', 'value'), EFFECTIVE.items())
@pytest.mark.slow
def test_a_flag_has_an_effect(make_config, plain, name, value):
    assert getattr(plain[0], name) != value
    assert outcome(make_config(**{name: value})) != plain[1]


@pytest.mark.parametrize(('name', 'value'), EFFECTIVE_BY_DENSITY.items())
@pytest.mark.slow
def test_a_flag_of_densities_has_an_effect(make_config, plain_by_density, name, value):
    assert getattr(plain_by_density[0], name) != value
    assert outcome(make_config(**{**BY_DENSITY, name: value})) != plain_by_density[1]


@pytest.mark.parametrize(('name', 'value', 'others'), [(k, *v) for k, v in EFFECTIVE_WITH.items()])
@pytest.mark.slow
def test_a_flag_has_an_effect_beside_others(make_config, name, value, others):
    config = make_config(**others)
    assert getattr(config, name) != value
    assert outcome(make_config(**{**others, name: value})) != outcome(config)


@pytest.mark.slow
def test_every_pruner_is_another(make_config):
    outcomes = {
        'han': outcome(make_config(pruner='han', c_rate='0.5', rounds=2, ramp_end='50%'))[0]
    }
    for name in flags.PRUNERS:
        if name != 'han':
            rounds = {'rounds': 2} if name == 'iterative' else {}
            outcomes[name] = outcome(make_config(**BY_DENSITY, **rounds, pruner=name))[0]
            last = json.loads(outcomes[name].splitlines()[-1])
            assert sum(last['kept'].values()) == (784 * 8 + 8 + 90) // 4, name
    assert len(set(outcomes.values())) == len(flags.PRUNERS)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'rounds': 3}, '--rounds=3 has no meaning'),
        ({'pruner': 'gradual', 'drop': 0.1}, '--drop=0.1 has no meaning .*=gradual'),
        ({'pruner': 'rigl', 'drop': 2.0}, r'--drop=2.0 must be in \[0, 1\)'),
        ({'refresh_statistics': 5}, '--refresh_statistics=5 has no meaning'),
        ({'pruned_dropout': 'kept'}, '--pruned_dropout=kept has no meaning'),
        ({'cut_at': '1'}, '--cut_at=1 has no meaning'),
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
def test_flags_that_nothing_would_read(make_config, fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**{**BY_DENSITY, **fields})


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'cut': 0.5, 'cut_at': '200%'}, '--cut_at=200% must be one of the 4 steps'),
        ({'cut': 0.5, 'cut_at': '-1'}, '--cut_at=-1 must be one of the 4 steps'),
    ],
)
def test_steps_that_never_come(make_config, fields, message):
    with pytest.raises(ValueError, match=message):
        run.Trainer(make_config(**{**BY_DENSITY, **fields}))


@pytest.mark.slow
def test_what_a_cut_prunes_counts_as_pruned(make_config):
    config = make_config(**BY_DENSITY, cut=0.5, cut_at='3', count_returns=True)
    (summary,) = run.run_together([config])
    returns = summary['returns']
    assert returns['pruned'] >= returns['returned'] >= returns['returned_kept']
    # 6,370 parameters, of which a quarter was kept and half of that cut.
    assert returns['pruned'] == pytest.approx(6_370 * 7 / 8, rel=0.02)


@pytest.mark.parametrize('dropout', ['kept', 'scaled'])
@pytest.mark.slow
def test_dropout_in_surgery(make_config, dropout):
    """Where nothing is pruned yet, scaled is kept; where much is, it is less."""
    weights = {}
    for rate, c_rate in ((dropout, '-9'), (dropout, '1'), ('kept', '-9'), ('kept', '1')):
        config = make_config(dropout=0.5, pruned_dropout=rate, c_rate=c_rate)
        weights[rate, c_rate] = outcome(config)
    assert weights[dropout, '-9'] == weights['kept', '-9']
    assert (weights[dropout, '1'] == weights['kept', '1']) == (dropout == 'kept')


def final_states(configs):
    trainers = [run.Trainer(config) for config in configs]
    with jax.disable_jit():
        references = run.train_references(trainers, [])
        return run.finetune(trainers, run.train_surgery(trainers, references, []), [])


@pytest.mark.slow
def test_side_by_side_each_run_drops_out_what_it_does_alone(make_config):
    seeds = [{**BY_DENSITY, 'dropout': 0.5, 'finetuning_steps': 3, 'seed': seed} for seed in (0, 1)]
    together = final_states([make_config(**fields) for fields in seeds])
    for state, fields in zip(together, seeds, strict=True):
        (alone,) = final_states([make_config(**fields)])
        for one, other in zip(*map(jax.tree.leaves, (state.params, alone.params)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_density_is_the_inverse_of_compression(make_config, plain_by_density):
    fields = {**BY_DENSITY, 'compression': None, 'density': 0.25}
    assert outcome(make_config(**fields)) == plain_by_density[1]


def test_layer_density_is_reached_in_each_layer(make_config):
    densities = {'layer_density': 'fc1:0.5,fc2:0.25', 'ramp_end': '50%', 'refresh_every': 1}
    config = make_config(**densities)
    outcome(config)
    last = json.loads((Path(config.workdir) / 'metrics.jsonl').read_text().splitlines()[-1])
    # fc1: 784 · 8 + 8 parameters; fc2: 8 · 10 + 10, of which 22.5 rounds to the even 22.
    assert last['kept'] == {'fc1': 3_140, 'fc2': 22}
    assert last['phase'] == 'finetuning'


@pytest.mark.parametrize('prune_biases', [True, False])
def test_compression_counts_all_parameters(make_config, prune_biases):
    config = make_config(**BY_DENSITY, prune_biases=prune_biases)
    outcome(config)
    last = json.loads((Path(config.workdir) / 'metrics.jsonl').read_text().splitlines()[-1])
    assert sum(last['kept'].values()) == (784 * 8 + 8 + 90) // 4


def test_what_takes_no_part_may_be_too_much(make_config):
    config = make_config(density=0.001, prune_biases=False)
    with pytest.raises(ValueError, match=r'asks to keep 6 of 6370 parameters, of which 18 take no'):
        run.Trainer(config)


def test_update_gamma_needs_a_power(make_config):
    power = {'update_power': 1.0}
    outcomes = [outcome(make_config(update_gamma=gamma, **power)) for gamma in (1e-9, 1e9)]
    assert outcomes[0] != outcomes[1]


# Where each mark of the rate's policy, of σ and of the data enters: not only somewhere.
@pytest.mark.parametrize(
    ('name', 'phase'),
    [('reference_', 'reference'), ('', 'surgery'), ('finetuning_', 'finetuning')],
)
def test_each_learning_rate_is_that_of_its_phase(make_config, plain, name, phase):
    records, _, _ = outcome(make_config(**{f'{name}learning_rate': 'fixed:0.03'}))
    changed = [
        json.loads(one)['phase']
        for one, other in zip(records.splitlines(), plain[1][0].splitlines(), strict=True)
        if one != other
    ]
    assert changed[0] == phase


def test_start_and_stop_bound_the_updates_of_their_layers(make_config):
    config = make_config(start='fc1:1', stop='fc2:2', checkpoint_every=1)
    outcome(config)
    pruned = {}
    for line in (Path(config.workdir) / 'metrics.jsonl').read_text().splitlines():
        record = json.loads(line)
        for layer, count in record['pruned'].items():
            pruned.setdefault(layer, []).append(count > 0)
    assert pruned['fc1'][:2] == [False, True]
    assert pruned['fc2'][0]
    assert not any(pruned['fc2'][2:])


def test_biases_are_pruned_only_where_asked(make_config):
    for prune_biases, axes in ((True, 1), (False, 0)):
        trainer = run.Trainer(make_config(prune_biases=prune_biases))
        with jax.disable_jit():
            (state,) = run.train_surgery([trainer], [trainer.initial], [])
            masks = state.masks
        assert masks['fc1']['bias'].ndim == axes


def test_the_data_set_is_that_of_the_flag(make_config):
    for name, train, validation in (('digits', 1_237, 200), ('fashion_mnist', 55_000, 5_000)):
        dataset = run.Trainer(make_config(dataset=name)).dataset
        assert dataset.name == name
        assert (len(dataset.train.labels), len(dataset.validation.labels)) == (train, validation)


def test_data_dir_is_where_the_data_are_read(make_config, tmp_path):
    (tmp_path / 'file').write_text('text')
    with pytest.raises(OSError, match=r'data_dir=.*file'):
        run.Trainer(make_config(data_dir=str(tmp_path / 'file')))


def test_manual_dir_is_looked_at(make_config, tmp_path):
    with pytest.raises(ValueError, match=r'manual_dir=.*missing'):
        run.Trainer(make_config(manual_dir=str(tmp_path / 'missing')))


def test_workdir_is_where_all_is_written(plain):
    config, _ = plain
    names = {path.name for path in Path(config.workdir).iterdir()}
    assert names == {'.lock', 'flags.json', 'metrics.jsonl', 'checkpoints'}


def test_reference_takes_the_place_of_dense_training(make_config, plain):
    config, (records, leaves, _) = plain
    again = make_config(reference=config.workdir)
    new_records, new_leaves, checkpoints = outcome(again)
    assert new_leaves == leaves
    assert records.endswith(new_records)
    assert not any(json.loads(line)['phase'] == 'reference' for line in new_records.splitlines())
    assert not any('reference' in path for path in checkpoints)


def test_resume_and_overwrite_do_what_they_say(make_config, plain):
    config = make_config()
    first = outcome(config)
    assert first == plain[1]
    metrics = Path(config.workdir) / 'metrics.jsonl'
    written = metrics.stat().st_mtime_ns
    with pytest.raises(ValueError, match='already holds a run'):
        outcome(config)
    # Both phases are done, so that there is nothing left to train, and no record to write.
    assert outcome(dataclasses.replace(config, resume=True)) == first
    foreign, own = (Path(config.workdir) / name for name in ('thesis.txt', 'tensorboard/old'))
    own.parent.mkdir()
    for path in (foreign, own):
        path.touch()
    assert outcome(dataclasses.replace(config, overwrite=True)) == first
    assert foreign.exists()
    assert not own.exists()
    assert metrics.stat().st_mtime_ns > written


def test_tensorboard_writes_events(make_config):
    config = make_config(tensorboard=True)
    outcome(config)
    events = list((Path(config.workdir) / 'tensorboard').iterdir())
    assert len(events) == 1
    assert b'surgery/kept/fc1' in events[0].read_bytes()


def test_identity_is_all_but_places_and_switches():
    config = Config('lenet5', resume=True, c_rate='1')
    left_out = PLACES_AND_SWITCHES - {'dataset', 'reference', 'on_divergence'}
    assert sorted(config.identity()) == sorted({'network', *FIELDS} - left_out)
    assert json.loads(json.dumps(config.identity())) == config.identity()


def test_identity_leaves_places_and_switches_of_every_command_out():
    left_out = PLACES_AND_SWITCHES - {'dataset', 'reference', 'on_divergence'}
    others = {'mesh', 'distributed', 'workers', 'trials', 'study', 'storage'}
    for config_type, given in (
        (ImageConfig, {'network': 'alexnet', 'c_rate': '1'}),
        (FrontierConfig, {}),
        (CompareConfig, {'variant': ('a: --nosplicing',)}),
        (SearchConfig, {}),
    ):
        identity = config_type(**given).identity()
        names = {field.name for field in dataclasses.fields(config_type)}
        assert names - identity.keys() == names & (left_out | others)


@pytest.mark.parametrize('script', SCRIPTS)
def test_the_defaults_of_the_scripts(script):
    defaults = SCRIPTS[script].DEFAULTS
    config = parse('--compression=100', defaults=defaults)
    for field in dataclasses.fields(Config):
        if field.name != 'compression':
            assert getattr(config, field.name) == defaults.get(field.name, field.default)
    assert config.network == script
    assert list(pruning.make_rules(config, shapes(script))) == ['*']


@pytest.mark.parametrize('name', FIELDS)
def test_a_flag_given_is_the_field_of_its_name(name):
    values = EFFECTIVE | EFFECTIVE_BY_DENSITY
    values |= {name: value for name, (value, _) in EFFECTIVE_WITH.items()} | {'pruner': 'han'}
    values |= {'density': 0.5, 'layer_density': '0.5', 'update_gamma': 1.0, 'count_returns': True}
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


def test_the_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse().seed = 1


def test_the_last_flag_counts_and_flagfiles_are_read(tmp_path):
    path = tmp_path / 'some.flags'
    path.write_text('# A comment.\n--seed=3\n--batch_size=32\n')
    config = parse(f'--flagfile={path}', '--batch_size=8')
    assert (config.seed, config.batch_size) == (3, 8)


@pytest.mark.parametrize('arguments', [['extra'], ['--seed=1', 'extra'], ['--', '--seed=1']])
def test_stray_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=rf"every argument must be .* \['{arguments[-1]}'\]"):
        parse(*arguments)


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('--steps=3', "Unknown command line flag 'steps'"),
        ('--dataset=cifar10', 'should be one of <digits|mnist|fashion_mnist>'),
        ('--seed=-1', '--seed=-1'),
        ('--seed=half', '--seed=half'),
        ('--momentum=much', '--momentum=much'),
        ('--resume=perhaps', '--resume=perhaps'),
        *(
            (f'--{name}={value}', f'--{name}={value}')
            for name in ('batch_size', 'reference_steps', 'surgery_steps')
            for value in (-1, 0)
        ),
        ('--record_every=0', '--record_every=0'),
        ('--checkpoint_every=-500', '--checkpoint_every=-500'),
    ],
)
def test_flags_that_do_not_parse(argument, message):
    with pytest.raises(absl_flags.Error, match=re.escape(message)):
        parse(argument)


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
    ],
)
def test_flags_that_contradict_each_other(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(*arguments)


def test_a_default_for_no_field_is_refused():
    with pytest.raises(ValueError, match=r"defaults names \['step'\]"):
        define(Config, {'network': 'lenet5', 'step': 1}, absl_flags.FlagValues())


@pytest.mark.parametrize(
    ('text', 'number', 'expected'),
    [
        ('', float, {}),
        ('2', float, {'*': 2.0}),
        ('conv*:2,fc1:-0.5', float, {'conv*': 2.0, 'fc1': -0.5}),
        ('fc1:3,*:4,', int, {'fc1': 3, '*': 4}),
        ('a:b:1', int, {'a:b': 1}),
        ('fc1:2,3', int, {'fc1': 2, '*': 3}),
    ],
)
def test_tables(text, number, expected):
    table = parse_table(text, number)
    assert list(table.items()) == list(expected.items())
    assert all(type(value) is number for value in table.values())


@pytest.mark.parametrize(
    ('text', 'number', 'message'),
    [
        ('conv1:x', float, "'conv1:x' in 'conv1:x' is not PATTERN:NUMBER"),
        ('a:1,b', float, "'b' in 'a:1,b' is not PATTERN:NUMBER"),
        ('a:', float, "'a:' in 'a:' is not PATTERN:NUMBER"),
        (':1', float, "':1' in ':1' is not PATTERN:NUMBER"),
        ('a:1.5', int, "'a:1.5' in 'a:1.5' is not PATTERN:NUMBER"),
        ('a:1,a:2', float, "'a' stands twice in 'a:1,a:2'"),
        ('1,2', float, 'stands twice'),
        ('*:1,2', float, 'stands twice'),
    ],
)
def test_malformed_tables(text, number, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_table(text, number)


@pytest.mark.parametrize('name', ['c_rate', 'layer_density', 'start', 'stop'])
@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('conv1:1', "pattern 'conv1' is the first match of no layer"),
        ('*:1,fc1:2', "pattern 'fc1' is the first match of no layer"),
        ('fc1:x', 'is not PATTERN:NUMBER'),
        ('fc1:1,fc1:2', 'stands twice'),
    ],
)
def test_tables_that_do_not_fit_the_network_name_their_flag(name, text, message):
    params = {layer: {'kernel': jnp.ones((2, 2))} for layer in ('fc1', 'fc2')}
    others = {} if name in TARGETS else {'c_rate': '1'}
    with pytest.raises(ValueError, match=rf'^--{name}: .*{re.escape(message)}'):
        pruning.make_rules(Config('tiny', **{name: text}, **others), params)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'c_rate': 'nan'}, 'c_rate must be finite in float32'),
        ({'hysteresis': 2.0}, 'hysteresis must be in [0, 1)'),
        ({'weight_decay': np.nan}, '--weight_decay must be finite in float32, but is nan'),
        ({'weight_decay': 1e39}, '--weight_decay must be finite in float32, but is 1e'),
        ({'update_gamma': -1.0}, 'gamma must be finite in float32 and at least 0'),
        ({'update_power': -1.0}, 'power must be finite in float32 and at least 0'),
        ({'start': '-1'}, 'start must be a whole number from 0'),
        ({'start': '5', 'stop': '4'}, 'stop must be a whole number from 5'),
        ({'layer_density': '0'}, '--layer_density: a density must be in (0, 1], but is 0.0'),
        ({'layer_density': '1.5'}, '--layer_density: a density must be in (0, 1], but is 1.5'),
        (
            {'density': 0.5, 'ramp_start': '50%', 'ramp_end': '40%'},
            '--ramp_end=40% must come after --ramp_start=50%',
        ),
        ({'density': 0.5, 'ramp_start': '-1'}, '--ramp_end=80% must come after --ramp_start=-1'),
        ({'density': 0.5, 'ramp_end': '0%'}, '--ramp_end=0% must come after --ramp_start=0%'),
        ({'density': 0.5, 'ramp_end': 'inf%'}, "--ramp_end: 'inf%' must be a step or a share"),
        (
            {'density': 0.5, 'ramp_start': '50%', 'stop': '50%'},
            'for *, whose masks are updated at the steps from 0 to 7999',
        ),
        ({'density': 0.5, 'start': '95%', 'stop': '95%'}, 'at the steps from 15200 to 15199'),
        ({'density': 0.5, 'ramp': 'poly'}, "--ramp must be log or poly:POWER, but is 'poly'"),
        ({'density': 0.5, 'ramp': 'poly:x'}, "--ramp must be log or poly:POWER, but is 'poly:x'"),
        ({'density': 0.5, 'ramp': 'log:2'}, "--ramp must be log or poly:POWER, but is 'log:2'"),
        ({'density': 0.5, 'ramp': 'poly:0'}, 'power must be finite in float32 and above 0'),
        ({'density': 0.5, 'ramp_end': 'soon'}, "--ramp_end: 'soon' must be a step or a share"),
        ({'density': 0.5, 'ramp_end': 'x%'}, "--ramp_end: 'x%' must be a step or a share"),
    ],
)
def test_numbers_out_of_range(fields, message):
    params = {'fc1': {'kernel': jnp.ones((2, 2))}}
    others = {} if fields.keys() & set(TARGETS) else {'c_rate': '1'}
    with pytest.raises(ValueError, match=re.escape(message)):
        pruning.make_rules(Config('tiny', **fields, **others), params)


def test_a_layer_without_c_rate_stays_dense():
    params = {layer: {'kernel': jnp.ones((2, 2))} for layer in ('fc1', 'fc2')}
    assert list(pruning.make_rules(Config('tiny', c_rate='fc2:1'), params)) == ['fc2']


@pytest.mark.parametrize(
    ('text', 'step'), [('0', 0), ('120', 120), ('0%', 0), ('80%', 960), ('33.3%', 400)]
)
def test_steps_and_shares(text, step):
    assert parse_step(text, 1_200) == step


@pytest.mark.parametrize(
    ('stop', 'last'), [('100%', 99), ('95', 94), ('200', 99), ('3000000000', 99), ('', 99)]
)
def test_there_is_a_last_update(stop, last):
    params = {'fc1': {'kernel': jnp.ones((2, 2))}}
    for what in ({'density': 0.5}, {'layer_density': '0.5'}, {'c_rate': '1'}):
        config = Config('tiny', **what, surgery_steps=100, stop=stop, update_power=0.5)
        (rule,) = pruning.make_rules(config, params).values()
        assert max(step for step in range(201) if rule.update_probability(step) > 0) == last


@pytest.mark.parametrize(
    ('fields', 'last'),
    [
        ({}, 90),
        ({'stop': '95'}, 90),
        ({'stop': '91'}, 90),
        ({'stop': ''}, 90),
        ({'ramp_end': '91'}, 99),
        ({'start': '93'}, 99),
        ({'refresh_every': 0}, 99),
    ],
)
def test_masks_stay_from_the_last_refresh_on_if_the_density_is_reached_by_then(fields, last):
    params = {'fc1': {'kernel': jnp.ones((2, 2))}}
    fields = {'refresh_every': 10, **fields}
    (rule,) = pruning.make_rules(
        Config('tiny', density=0.5, surgery_steps=100, **fields), params
    ).values()
    assert max(step for step in range(100) if rule.update_probability(step) > 0) == last


@pytest.mark.parametrize(
    'fields',
    [
        {'refresh_every': 500},
        {'refresh_every': 7},
        {'refresh_every': 0},
        {'ramp_end': '100%'},
        {'ramp_end': '200%', 'stop': '13'},
        {'stop': '50%', 'update_power': 2.0, 'update_gamma': 9.0},
        {'start': '9', 'ramp_end': '5'},
        *({'pruner': name, 'ramp_end': '100%'} for name in ('iterative', 'gradual')),
        *({'pruner': name, 'ramp_end': '100%', 'refresh_every': 3} for name in ('set', 'rigl')),
    ],
)
def test_the_density_is_reached_whatever_fits_the_steps(fields):
    params = {'fc1': {'kernel': jax.random.normal(jax.random.key(0), (10, 20))}}
    for what in ({'density': 0.1}, {'layer_density': '0.1'}):
        config = Config('tiny', **what, surgery_steps=20, **fields)
        pruner = pruning.make_pruner(config, params, jax.random.key(0))
        state, update = pruner.init(params), jax.jit(pruner.update)
        for step in range(20):
            moved = jax.tree.map(lambda leaf, step=step: leaf * (1 + jnp.sin(leaf * step)), params)
            _, state = update(params, state, moved)
        assert dns_jax.count_kept(state.masks) == {'fc1': 20}


def test_bench_flags_parse():
    config = parse('--rounds=5', '--peer_rounds=2', defaults={}, config_type=BenchConfig)
    assert (config.rounds, config.peer_rounds) == (5, 2)


def test_help_lists_every_flag():
    answer = main('--help')
    for name in FIELDS:
        assert re.search(rf'--(\[no\])?{name}:', answer.stdout), name
    assert lenet5.__doc__.splitlines()[0] in answer.stdout


@pytest.mark.parametrize('config_type', [FrontierConfig, CompareConfig, SearchConfig])
def test_what_says_by_itself_how_much_to_keep_has_no_flags_for_it(config_type):
    flags = {field.name for field in filter(is_flag, dataclasses.fields(config_type))}
    assert not flags & {*TARGETS}


CONFIGS = (
    *(Config, ImageConfig, FrontierConfig, CompareConfig, SearchConfig),
    *(BenchConfig, ExportConfig, LatencyConfig, OwnLoopConfig, ScaleConfig, XorConfig, ZooConfig),
)
TEXTS = {
    f'{config_type.__name__}.{field.name}': (field, field.metadata['help'])
    for config_type in CONFIGS
    for field in dataclasses.fields(config_type)
    if is_flag(field)
}


def test_every_entry_script_has_its_help_looked_at():
    scripts = (ROOT / 'experiments').glob('*.py')
    launched = re.findall(r'\.launch\(.*, (\w+)\)', '\n'.join(path.read_text() for path in scripts))
    assert {*launched} == {config_type.__name__ for config_type in CONFIGS}


@pytest.mark.parametrize(('field', 'text'), TEXTS.values(), ids=TEXTS)
def test_the_help_of_a_flag_stands_alone(field, text):
    """Flags are listed by the alphabet, so no text may lean on that of a neighbour."""
    assert text.endswith(('.', '…'))
    assert not re.search(r'\b(the same|that rate|these|those|this one|also as)\b', text.lower())
    assert not re.match(r'(it|they|them|its|their)\b', text.lower())
    if field.default in (None, ''):
        assert re.search('(?i)by default|must be given', text)


UNITS = (
    r'steps?|share|parts?|percent\w*|images?|pixels|parameters|standard deviations?|trials?|'
    r'calls?|turns|rounds|runs?|seeds|networks|examples|processes|learning rate|channels|'
    r'weight decay|power|0\.9·t'
)


@pytest.mark.parametrize(('field', 'text'), TEXTS.values(), ids=TEXTS)
def test_the_help_of_a_number_names_its_unit(field, text):
    if field.type in (int, float, float | None):
        assert re.search(rf'(?i)\b({UNITS})', text)


def test_the_script_ends_with_one_message_and_no_traceback():
    answer = main('extra')
    assert answer.returncode == 1
    message = "ValueError: every argument must be a --flag=value, but got ['extra']"
    assert answer.stderr.strip() == message
    assert answer.stdout == ''


@pytest.mark.parametrize(('name', 'script'), (SCRIPTS | IMAGE_SCRIPTS).items())
def test_entry_scripts_are_short(name, script):
    text = Path(script.__file__).read_text()
    assert len(text.splitlines()) < 60
    assert f'python -m experiments.{name} --flagfile=' in script.__doc__


@pytest.mark.parametrize('path', FLAGFILES, ids=lambda path: path.stem)
def test_flagfiles_parse_and_say_what_they_are_for(path):
    head = '\n'.join(
        line for line in path.read_text().split('\n--')[0].splitlines() if line.startswith('#')
    )
    command = re.search(
        rf'python -m experiments\.(\w+) .*--flagfile=\S*{re.escape(path.name)}.*', head
    )
    assert command, 'the head names the command'
    for label in ('Command: ', r'Time\b.*: ', r'Expected result\b'):
        assert re.search(rf'^# {label}', head, re.MULTILINE), f'the head lacks the label {label}'
    given = re.findall(r'--(?!flagfile)\S+', command[0])
    if command[1] in SCRIPTS:
        config = parse(f'--flagfile={path}', *given, defaults=SCRIPTS[command[1]].DEFAULTS)
        assert pruning.make_rules(config, shapes(config.network))
    elif command[1] in IMAGE_SCRIPTS:
        defaults = IMAGE_SCRIPTS[command[1]].DEFAULTS
        config = parse(f'--flagfile={path}', *given, defaults=defaults, config_type=ImageConfig)
        assert sorted(pruning.make_rules(config, shapes(config.network))) == sorted(
            shapes(config.network)
        )
    else:
        config_type = {
            'compare': CompareConfig,
            'export': ExportConfig,
            'frontier': FrontierConfig,
            'own_loop': OwnLoopConfig,
            'search': SearchConfig,
        }[command[1]]
        config = parse(f'--flagfile={path}', *given, defaults={}, config_type=config_type)
    # A folder of one machine has no place in a committed file.
    places = (getattr(config, name, None) for name in ('workdir', 'data_dir', 'output'))
    assert not any(os.path.isabs(place or '') for place in places)


def test_learning_rate_policies_are_those_of_the_library():
    for text, at_50 in (
        ('fixed:0.1', 0.1),
        ('exp:0.1,0.99', 0.1 * 0.99**50),
        ('inv:0.1,0.02,0.5', 0.1 * 2**-0.5),
        ('poly:0.1,2', 0.1 * 0.5**2),
        ('step:0.1,0.5,20', 0.1 * 0.5**2),
    ):
        assert float(parse_learning_rate(text, 100)(50)) == pytest.approx(at_50)


@pytest.mark.parametrize(
    'text',
    [
        '',
        'inv',
        'inv:0.1',
        'poly:0.1,x',
        'fixed:0.1,0.2',
        'warp:9',
        'step:1,0.1',
        'step:1,0.1,0.5',
        'step:1,0.1,inf',
        'step:1,1e39,5',
        'fixed:1e39',
    ],
)
def test_malformed_learning_rates_are_refused(text):
    with pytest.raises(ValueError, match=f'--learning_rate: {text!r} must'):
        Config(network='lenet5', c_rate='1', learning_rate=text)
