"""The readers of flags for the fuzz tests: what stands in one, and whole command lines."""

import dataclasses
import math
import re
from pathlib import Path

from absl import flags as absl_flags
from reader import Reader, to_text, write_new

from experiments import bench, export, latency, scale, xor, zoo
from experiments.config.command_line import all_flags, define, to_config
from experiments.config.parsers import parse_learning_rate, parse_step, parse_table
from experiments.devices.hosts import parse_distributed
from experiments.devices.meshes import parse_mesh
from experiments.sweeps import flags, space
from experiments.training.flags import Config
from experiments.training.image_flags import ImageConfig
from experiments.training.plan import make_plan

ERRORS = ValueError, absl_flags.Error  # absl's own are what its parser ends a script by
FLAGFILES = Path(__file__).resolve().parents[2] / 'experiments' / 'flagfiles'
ENDLESS = b'--seeds=1000000000'
NOT_FINITE = b'--compression=30\n--weight_decay=nan', b'--compression=30\n--momentum=inf'


def texts(parse, *seeds, attacks=()):
    """Makes the reader of a text."""

    def make(folder):
        del folder
        seeds_of_bytes = tuple(map(str.encode, seeds))
        return Reader(seeds_of_bytes, lambda data: parse(to_text(data)), attacks=attacks)

    return make


def table(number):
    def check(text):
        for pattern, value in parse_table(text, number).items():
            assert pattern
            assert isinstance(value, number)

    return check


def step(text):
    assert isinstance(parse_step(text, 10_000), int)


def learning_rate(text):
    assert float(parse_learning_rate(text, 10_000)(0)) >= 0


def mesh(text):
    assert all(size >= 1 for size in parse_mesh(text).values())


def distributed(text):
    found = parse_distributed(text)
    assert not found or 0 <= found['process_id'] < found['num_processes']


def parse(config_type, arguments):
    """Turns arguments into a configuration as a script does."""
    needed = config_type in (Config, ImageConfig)
    defaults = {'network': 'lenet300'} if needed else {}
    # Unknown flags are let pass, and are short: what absl proposes in the place of others it finds
    # by recursion, which takes long, and ends in a RecursionError where a name has 900 letters.
    pairs = [argument.partition('=') for argument in arguments]
    names = ','.join(name[:60].lstrip('-') for name, _, _ in pairs)
    arguments = [name[:60] + equals + value for name, equals, value in pairs]
    arguments = [f'--undefok={names}', *arguments]
    flag_values = absl_flags.FlagValues()
    define(config_type, defaults, flag_values)
    return to_config(config_type, defaults, flag_values, flag_values(['program', *arguments]))


def words(config_type):
    """Returns how a line begins that sets a flag."""
    return tuple(f'--{field.name}='.encode() for field in all_flags(config_type))


def check_config(config):
    for name, value in dataclasses.asdict(config).items():
        assert not isinstance(value, float) or math.isfinite(value), f'--{name}={value}'


def command_lines(config_type, *seeds, attacks=()):
    """Makes the reader of a command line, one argument to a line."""

    def make(folder):
        del folder

        def read(data):
            check_config(parse(config_type, to_text(data).splitlines()))

        seeds_of_bytes = tuple(map(str.encode, seeds))
        return Reader(seeds_of_bytes, read, ERRORS, attacks, words(config_type))

    return make


def flagfile(name, variants=2):
    """Returns the flags in a file of the project, the first variants of a comparison alone."""
    lines = (FLAGFILES / f'{name}.flags').read_text().splitlines()
    flags = [line for line in lines if line.startswith('--')]
    left_out = [line for line in flags if line.startswith('--variant')][variants:]
    return '\n'.join(line for line in flags if line not in left_out)


def flagfiles(folder):
    path = folder / 'some.flags'

    def read(data):
        # Unknown flags are short, for the reason that `parse` gives.
        write_new(path, re.sub(rb'(?m)^(-[^=\n]{60})[^=\n]*', rb'\1', data))
        check_config(parse(Config, [f'--flagfile={path}']))

    seeds = tuple(
        (FLAGFILES / f'{name}.flags').read_bytes() + b'--compression=30\n'
        for name in ('lenet5_digits', 'lenet300_density')
    )
    return Reader(seeds, read, ERRORS, words=words(Config))


def plans(folder):
    """From the command line to the plan of a run."""
    del folder

    def read(data):
        make_plan(parse(Config, to_text(data).splitlines()))

    seeds = (
        '--layer_density=fc1:0.1,*:0.5\n--ramp=poly:3\n--ramp_start=fc*:10%\n--ramp_end=80%',
        '--c_rate=fc1:1,fc2:0.5\n--start=fc1:100\n--stop=50%\n--refresh_statistics=100',
        '--pruner=iterative\n--compression=30\n--rounds=5\n--cut=0.1\n--cut_at=60%',
        '--pruner=han\n--c_rate=*:0.8\n--rounds=4',
        '--pruner=rigl\n--density=0.05\n--drop=0.3\n--refresh_every=100',
    )
    attack = b'--pruner=iterative\n--compression=30\n--rounds=1000000000'
    return Reader(tuple(map(str.encode, seeds)), read, ERRORS, (attack,), words(Config))


def searches(folder):
    """From the command line to the run in the middle of a search."""
    del folder

    def read(data):
        config = parse(flags.SearchConfig, to_text(data).splitlines())
        check_config(space.make_config(config, space.choice_at(config, 0.5)))

    seed = flagfile('search_lenet300_digits') + '\n--ramp_start=10%\n--stop=fc1:80%,*:90%'
    return Reader((seed.encode(),), read, ERRORS, words=words(flags.SearchConfig))


READERS = {
    'numbers per layer': texts(table(float), 'conv*:2,fc1:4', '0.5', 'fc1:1e-3,*:-2.5'),
    'whole numbers per layer': texts(table(int), 'conv*:2,fc1:4', '16'),
    'steps and shares': texts(step, '12000', '80%', '0.5%'),
    'learning rates': texts(
        learning_rate,
        'inv:0.01,1e-4,0.75',
        'poly:0.04,1',
        'step:0.1,0.5,100',
        'fixed:0.1',
        'exp:1,0.9',
    ),
    'meshes': texts(mesh, 'data:4,model:2', 'model:1'),
    'where processes meet': texts(
        distributed,
        'auto',
        '10.0.0.1:9999,2,0',
        '[::1]:99,16,3',
        attacks=[b'10.0.0.1:9999,2,2', b'10.0.0.1:9999,0,0'],
    ),
    'command lines': command_lines(
        Config,
        flagfile('lenet300_mnist'),
        flagfile('lenet5_density') + '\n--compression=30',
        '--compression=30\n--nosplicing\n--seed=3\n--learning_rate=step:0.1,0.5,100',
        attacks=NOT_FINITE,
    ),
    'command lines with images': command_lines(
        ImageConfig,
        flagfile('alexnet_imagenet'),
        flagfile('alexnet_mnist'),
        '--c_rate=1\n--mesh=data:4,model:2\n--distributed=10.0.0.1:9999,2,0\n--width=0.5',
    ),
    'command lines of a frontier': command_lines(
        flags.FrontierConfig,
        flagfile('frontier_lenet300'),
        '--seeds=2\n--seed=7',
        attacks=[ENDLESS],
    ),
    'command lines of a comparison': command_lines(
        flags.CompareConfig,
        flagfile('compare_digits'),
        flagfile('repair_lenet300'),
        attacks=[ENDLESS + b'\n--variant=a: --momentum=0.5', b'--variant=a: --momentum=nan'],
    ),
    'command lines of a search': searches,
    'command lines of XOR': command_lines(xor.XorConfig, '--seeds=9\n--noise=0.2\n--solved=5'),
    'command lines of the zoo': command_lines(zoo.ZooConfig, '--name=lenet5\n--workdir=runs/a'),
    'command lines of the bench': command_lines(
        bench.BenchConfig, '--rounds=4\n--peer_rounds=2', f'--peer=python\n--peer_script={__file__}'
    ),
    'command lines of scale': command_lines(
        scale.ScaleConfig,
        '--sizes=0.3,3\n--planned_sizes=1000\n--images=64\n--xla_options=a=true,b=1\n--width=0.5',
    ),
    'command lines of latency': command_lines(
        latency.LatencyConfig, '--model=fc:800x500:0.007\n--batches=1,64\n--break_even'
    ),
    'command lines of exports': command_lines(
        export.ExportConfig, flagfile('coded_lenet5'), '--format=sparse\n--batch=4'
    ),
    'flagfiles': flagfiles,
    'plans of a run': plans,
}
