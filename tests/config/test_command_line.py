"""Tests of config.command_line: what is parsed, and into which configuration."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Mapping

import pytest
from absl import flags as absl_flags
from run_flags import PLACES_AND_SWITCHES, ROOT, parse

from experiments.config.command_line import (
    all_flags,
    define,
    flag,
    flags_of,
    identify,
    make,
    names_of,
    print_result,
)
from experiments.sweeps.flags import CompareConfig, FrontierConfig, SearchConfig
from experiments.training.flags import Config
from experiments.training.image_flags import ImageConfig


def test_identity_leaves_places_and_switches_of_every_command_out():
    left_out = PLACES_AND_SWITCHES - {'dataset', 'reference', 'on_divergence'}
    others = {'mesh', 'distributed', 'workers', 'trials', 'study', 'storage'}
    for config_type, given in (
        (ImageConfig, {'network': 'alexnet', 'c_rate': '1'}),
        (FrontierConfig, {}),
        (CompareConfig, {'variant': ('a: --nosplicing',)}),
        (SearchConfig, {}),
    ):
        identity = identify(make(config_type, **given))
        names = {field.name for field in all_flags(config_type)}
        assert names - identity.keys() == names & (left_out | others)


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
        ('--dataset=cifar100', '<digits|mnist|fashion_mnist>'),
        ('--seed=-1', '--seed=-1'),
        ('--seed=half', '--seed=half'),
        ('--momentum=much', '--momentum=much'),
        ('--resume=perhaps', '--resume=perhaps'),
        *(
            (f'--{name}={value}', f'--{name}={value}')
            for name in ('batch_size', 'surgery_steps')
            for value in (-1, 0)
        ),
        ('--reference_steps=-1', '--reference_steps=-1'),
        ('--record_every=0', '--record_every=0'),
        ('--checkpoint_every=-500', '--checkpoint_every=-500'),
    ],
)
def test_flags_that_do_not_parse(argument, message):
    with pytest.raises(absl_flags.Error, match=re.escape(message)):
        parse(argument)


def test_a_default_for_no_field_is_refused():
    with pytest.raises(ValueError, match=r"defaults names \['step'\]"):
        define(Config, {'network': 'lenet5', 'step': 1}, absl_flags.FlagValues())


@dataclasses.dataclass(frozen=True)
class Inner:
    """Flags that another configuration holds."""

    name: str  # no flag
    size: int = flag(3, 'Size.', part='shape')
    place: str = flag('here', 'Place.', decides=False)
    depth: int = flag(1, 'Depth.', part='shape')


@dataclasses.dataclass(frozen=True)
class Outer:
    """A configuration that holds others' flags, without one of them."""

    width: int = flag(2, 'Width.')
    inner: Mapping = flags_of(Inner, 'depth')


def test_a_configuration_holds_the_flags_of_another():
    config = parse('--size=5', '--width=4', defaults={'place': 'there'}, config_type=Outer)
    assert config == Outer(4, inner={'size': 5, 'place': 'there'})
    assert identify(config) == {'width': 4, 'size': 5}
    assert make(Outer) == Outer(2, inner={'size': 3, 'place': 'here'})
    assert names_of(Inner, 'shape') == ['size', 'depth']
    with pytest.raises(TypeError, match='depth'):
        make(Outer, depth=3)
    with pytest.raises(absl_flags.Error, match="Unknown command line flag 'depth'"):
        parse('--depth=3', defaults={}, config_type=Outer)


@pytest.mark.parametrize(('is_terminal', 'printed'), [(True, ''), (False, '{"a": 1}\n')])
def test_json_is_for_programs(is_terminal, printed, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: is_terminal)
    print_result({'a': 1})
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ('argument', 'status', 'stream'), [('--help', 0, 'stdout'), ('--seed=half', 1, 'stderr')]
)
def test_help_is_no_error(argument, status, stream):
    program = 'from experiments import zoo; from experiments.config import command_line; '
    program += 'command_line.launch({}, zoo.publish, zoo.ZooConfig)'
    command = [sys.executable, '-c', program, argument]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == status
    assert getattr(answer, stream)
