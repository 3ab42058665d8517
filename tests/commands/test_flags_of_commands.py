"""Tests of what all commands share: their flags, their help, their flagfiles."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
from run_flags import FIELDS, ROOT, TARGETS, parse

from experiments import alexnet, gpt, lenet5, lenet300, resnet, vgg16
from experiments.bench import BenchConfig
from experiments.config.command_line import all_flags, is_flag
from experiments.diversity import DiversityConfig
from experiments.export import ExportConfig
from experiments.latency import LatencyConfig
from experiments.low_rank import LowRankConfig
from experiments.mixed import MixedConfig
from experiments.networks import models
from experiments.one_bit import OneBitConfig
from experiments.own_loops.runs import OwnLoopConfig
from experiments.scale import ScaleConfig
from experiments.sizes import SizesConfig
from experiments.sweeps.flags import CompareConfig, FrontierConfig, SearchConfig
from experiments.training.flags import Config
from experiments.training.image_flags import ImageConfig
from experiments.training.plan import make_plan
from experiments.training.pruning import make_rules
from experiments.training.sized_flags import ShortConfig, SizedConfig
from experiments.xor import XorConfig
from experiments.zoo import ZooConfig

SCRIPTS = {'lenet300': lenet300, 'lenet5': lenet5}


IMAGE_SCRIPTS = {'alexnet': alexnet, 'vgg16': vgg16}


SIZED_SCRIPTS = {'resnet': resnet, 'gpt': gpt}


FLAGFILES = sorted((ROOT / 'experiments' / 'flagfiles').glob('*.flags'))


def shapes(name):
    """Returns the shapes of a network's parameters, without making them."""
    return models.shapes(models.NETWORKS[name](), models.INPUTS[name].image_shape)


def main(*arguments, script='lenet5'):
    """Runs an entry script as a user does."""
    command = [sys.executable, '-m', f'experiments.{script}', *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize('script', SCRIPTS)
def test_the_defaults_of_the_scripts(script):
    defaults = SCRIPTS[script].DEFAULTS
    config = parse('--compression=100', defaults=defaults)
    for field in dataclasses.fields(Config):
        if field.name != 'compression':
            assert getattr(config, field.name) == defaults.get(field.name, field.default)
    assert config.network == script
    assert list(make_rules(make_plan(config).pruning, shapes(script))) == ['*']


@pytest.mark.parametrize('script', SIZED_SCRIPTS)
def test_the_defaults_of_the_scripts_of_sized_networks(script):
    defaults = SIZED_SCRIPTS[script].DEFAULTS
    config = parse('--kernel_density=0.1', defaults=defaults, config_type=ShortConfig)
    assert config.network == script
    # Those of dns_jax.prune_to and slow_pruned.
    own = {'prune_biases': False, 'ramp': 'poly:3', 'ramp_end': '50%', 'stop': '60%'}
    own |= {'refresh_every': 0, 'hysteresis': 0.5, 'finetuning_steps': 0, 'kernel_density': 0.1}
    own |= {'pruned_rate': 0.3}
    for field in dataclasses.fields(SizedConfig):
        wanted = {**own, **defaults}.get(field.name, field.default)
        assert getattr(config, field.name) == wanted, field.name
    assert list(make_rules(make_plan(config).pruning, None)) == ['*']


def test_help_lists_every_flag():
    answer = main('--help')
    for name in FIELDS:
        assert re.search(rf'--(\[no\])?{name}:', answer.stdout), name
    assert lenet5.__doc__.splitlines()[0] in answer.stdout


@pytest.mark.parametrize('config_type', [FrontierConfig, CompareConfig, SearchConfig])
def test_what_says_by_itself_how_much_to_keep_has_no_flags_for_it(config_type):
    flags = {field.name for field in all_flags(config_type)}
    assert not flags & {*TARGETS}


CONFIGS = (
    *(Config, ImageConfig, FrontierConfig, CompareConfig, SearchConfig, DiversityConfig),
    *(BenchConfig, ExportConfig, LatencyConfig, LowRankConfig, MixedConfig, OneBitConfig),
    *(OwnLoopConfig, ShortConfig, ScaleConfig, SizesConfig, XorConfig, ZooConfig),
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


UNITS = (
    r'steps?|share|parts?|percent\w*|images?|pixels|parameters|standard deviations?|trials?|'
    r'calls?|turns|rounds|runs?|seeds|networks|examples|processes|learning rate|channels|'
    r'weight decay|power|0\.9·t'
)


@pytest.mark.parametrize(('field', 'text'), TEXTS.values(), ids=TEXTS)
def test_the_help_of_a_flag_stands_alone_and_names_its_unit(field, text):
    """Flags are listed by the alphabet, so no text may lean on that of a neighbour."""
    assert text.endswith(('.', '…'))
    assert not re.search(r'\b(the same|that rate|these|those|this one|also as)\b', text.lower())
    assert not re.match(r'(it|they|them|its|their)\b', text.lower())
    if field.default in (None, ''):
        assert re.search('(?i)by default|must be given', text)
    if field.type in (int, float, float | None):
        assert re.search(rf'(?i)\b({UNITS})', text)


def test_the_script_ends_with_one_message_and_no_traceback():
    answer = main('extra')
    assert answer.returncode == 1
    message = "ValueError: every argument must be a --flag=value, but got ['extra']"
    assert answer.stderr.strip() == message
    assert answer.stdout == ''


@pytest.mark.parametrize(('name', 'script'), (SCRIPTS | IMAGE_SCRIPTS | SIZED_SCRIPTS).items())
def test_entry_scripts_say_how_they_are_called(name, script):
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
        assert make_rules(make_plan(config).pruning, shapes(config.network))
    elif command[1] in IMAGE_SCRIPTS:
        defaults = IMAGE_SCRIPTS[command[1]].DEFAULTS
        config = parse(f'--flagfile={path}', *given, defaults=defaults, config_type=ImageConfig)
        assert sorted(make_rules(make_plan(config).pruning, shapes(config.network))) == sorted(
            shapes(config.network)
        )
    elif command[1] in SIZED_SCRIPTS:
        defaults = SIZED_SCRIPTS[command[1]].DEFAULTS
        config = parse(f'--flagfile={path}', *given, defaults=defaults, config_type=ShortConfig)
        make_plan(config)
    else:
        config_type = {
            'compare': CompareConfig,
            'diversity': DiversityConfig,
            'export': ExportConfig,
            'frontier': FrontierConfig,
            'low_rank': LowRankConfig,
            'mixed': MixedConfig,
            'one_bit': OneBitConfig,
            'own_loop': OwnLoopConfig,
            'search': SearchConfig,
            'sizes': SizesConfig,
        }[command[1]]
        config = parse(f'--flagfile={path}', *given, defaults={}, config_type=config_type)
    # A folder of one machine has no place in a committed file.
    places = (getattr(config, name, None) for name in ('workdir', 'data_dir', 'output'))
    assert not any(os.path.isabs(place or '') for place in places)
