"""Tests of sweeps.flags: which runs a sweep makes, and which it refuses to make."""

import dataclasses

import pytest
from searches import parse

from experiments.sweeps.flags import CompareConfig, FrontierConfig
from experiments.training.flags import Config
from experiments.training.sized_flags import SizedConfig

VARIANTS = ('--variant=surgery:', '--variant=gradual: --pruner=gradual')
GPT = ('--network=gpt', '--dataset=tiny_shakespeare', '--optimizer=adamw')


def runs_of(*arguments, config_type=CompareConfig):
    return [run for _, run in parse(*arguments, config_type=config_type).named_runs()]


def targets_of(runs):
    return [(run.compression, run.kernel_density, run.seed) for run in runs]


def test_a_comparison_may_be_of_kernel_densities():
    arguments = ('--kernel_densities=0.5,0.2', '--seeds=2', '--seed=3', '--depth=1', '--width=16')
    config = parse(*GPT, *VARIANTS, *arguments, '--heads=2', config_type=CompareConfig)
    names, runs = zip(*config.named_runs(), strict=True)
    assert names == ('surgery',) * 4 + ('gradual',) * 4
    targets = [(None, density, seed) for density in (0.5, 0.2) for seed in (3, 4)]
    assert targets_of(runs) == 2 * targets
    assert [run.pruner for run in runs] == ['surgery'] * 4 + ['gradual'] * 4
    folders = [
        f'runs/compare/{name}-{density}-{seed}'
        for name in ('surgery', 'gradual')
        for density in (0.5, 0.2)
        for seed in (3, 4)
    ]
    assert [run.workdir for run in runs] == folders
    # The first of each seed trains its reference.
    assert [run.reference for run in runs] == [None, None, *(3 * folders[:2])]
    for run in runs:
        assert type(run) is SizedConfig
        assert (run.network, run.dataset) == ('gpt', 'tiny_shakespeare')
        assert run.network_options == {'depth': 1, 'width': 16, 'heads': 2}


def test_a_frontier_may_be_of_a_residual_network():
    arguments = ('--network=resnet', '--dataset=cifar10', '--depth=8', '--shift=4', '--seeds=1')
    runs = runs_of(*arguments, '--kernel_densities=0.2,0.1', config_type=FrontierConfig)
    assert targets_of(runs) == [(None, 0.2, 0), (None, 0.1, 0)]
    assert [run.workdir for run in runs] == ['runs/frontier/0.2-0', 'runs/frontier/0.1-0']
    assert [run.reference for run in runs] == [None, 'runs/frontier/0.2-0']
    assert all(run.network_options == {'depth': 8} and run.shift == 4 for run in runs)


@pytest.mark.parametrize(
    ('config_type', 'arguments', 'names'),
    [(FrontierConfig, (), ['']), (CompareConfig, VARIANTS, ['surgery', 'gradual'])],
)
def test_the_defaults_are_those_of_runs_of_lenets(config_type, arguments, names):
    config = parse(*arguments, config_type=config_type)
    compressions, seeds = (30.0, 60.0, 120.0), range(5)
    found = config.named_runs()
    assert [name for name, _ in found] == [name for name in names for _ in range(15)]
    assert targets_of(run for _, run in found) == [
        (compression, None, seed) for _ in names for compression in compressions for seed in seeds
    ]
    own = {'workdir', 'reference', 'seed', 'compression', 'pruner'}
    for _, run in found:
        assert type(run) is Config
        plain = Config('lenet300', compression=run.compression)
        for field in dataclasses.fields(Config):
            if field.name not in own:
                assert getattr(run, field.name) == getattr(plain, field.name), field.name


@pytest.mark.parametrize('network', ['lenet300', 'lenet5'])
@pytest.mark.parametrize(
    'argument',
    [
        *('--depth=20', '--width=0.5', '--heads=2', '--context=8', '--tied', '--fresh_statistics'),
        '--variant=some: --fresh_statistics',
    ],
)
def test_lenets_have_no_size_to_choose(network, argument):
    name = argument.rpartition('--')[2].partition('=')[0]
    with pytest.raises(ValueError, match=f'--{name} has no meaning with --network={network}'):
        runs_of(f'--network={network}', *VARIANTS, argument)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--kernel_densities=0.5,x',), '--kernel_densities=0.5,x must be numbers with commas'),
        (('--kernel_densities=0.5,0.50',), '--kernel_densities=0.5,0.50 names one twice'),
        (('--kernel_densities=1.5',), r'--kernel_density=1.5 must be in \(0, 1\]'),
        (('--compressions=9,',), '--compressions=9, must be numbers with commas'),
        (('--compressions=9,9.0',), '--compressions=9,9.0 names one twice'),
        (('--network=gpt', '--shift=2'), '--shift=2 has no meaning .*--network=gpt'),
        (('--network=resnet', '--heads=2'), '--heads=2 has no meaning .*--network=resnet'),
        (
            ('--kernel_densities=0.5', '--variant=own: --kernel_density=0.1'),
            r"but not \['kernel_density'\]",
        ),
        (('--variant=own: --context=8',), r"but not \['context'\]"),
        (
            ('--network=resnet', '--reference=some', '--variant=own: --width=2'),
            'own: --width=2 has a size of its own, which the network of --reference=some has not',
        ),
        (('--variant=own: --optimizer=warp',), 'optimizer'),
        (
            (*GPT, '--kernel_densities=0.1', '--compressions=9'),
            '--compressions=9 has no meaning beside --kernel_densities',
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        runs_of(*VARIANTS, *arguments)


def test_a_variant_may_have_a_target_of_its_own():
    runs = runs_of(*VARIANTS, '--variant=own: --c_rate=1', '--compressions=9', '--seeds=1')
    assert targets_of(runs) == [(9.0, None, 0), (9.0, None, 0), (None, None, 0)]


def test_a_variant_of_another_size_has_references_of_its_own():
    arguments = ('--kernel_densities=0.1', '--seeds=2', '--width=16', '--variant=same: --width=16')
    arguments += ('--variant=narrow: --density=1 --width=8', '--variant=thin: --width=8')
    runs = runs_of(*GPT, '--variant=surgery:', *arguments)
    wide = [f'runs/compare/surgery-0.1-{seed}' for seed in (0, 1)]
    narrow = [f'runs/compare/narrow-{seed}' for seed in (0, 1)]
    assert [run.width for run in runs] == [16] * 4 + [8] * 4
    assert [run.reference for run in runs] == [None, None, *wide, None, None, *narrow]
