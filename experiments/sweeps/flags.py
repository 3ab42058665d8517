"""The flags of what does many runs: frontiers, comparisons, searches.

Each configuration holds the flags of its runs, as `shared`, beside its own.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from experiments.config.command_line import (
    check_finite,
    flag,
    flags_of,
    names_of,
    read_variant,
)
from experiments.training.flags import Config
from experiments.training.sized_flags import SizedConfig

_TARGETS = names_of(Config, 'target')
_LENETS = ('lenet300', 'lenet5')
_SIZED = ('resnet', 'gpt')  # whose size is chosen
_OWN_SIZES = ('depth', 'width', 'heads')  # that a variant may have


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """What sweeps have in common: targets × seeds."""

    workdir: str
    network: str = flag('lenet300', 'Network.', choices=(*_LENETS, *_SIZED))
    compressions: str = flag(
        '30,60,120', 'Compressions to reach (all / kept parameters), separated by commas.'
    )
    kernel_densities: str = flag(
        '',
        'Values of --kernel_density to reach, separated by commas, in place of --compressions, '
        'which says by default what to reach.',
    )
    seeds: int = flag(
        5,
        'Runs of each compression, with the seeds from --seed upwards.',
        lower_bound=1,
        upper_bound=1_000,
    )
    side_by_side: int = flag(
        5, 'Most seeds that are trained in one program, side by side.', lower_bound=1
    )
    shared: Mapping[str, Any] = flags_of(SizedConfig, 'workdir', *_TARGETS)

    def __post_init__(self):
        default = SweepConfig.__dataclass_fields__['compressions'].default
        if self.kernel_densities and self.compressions != default:
            raise ValueError(
                f'--compressions={self.compressions} has no meaning beside --kernel_densities'
            )
        self.named_runs()  # each checks itself

    def named_runs(self) -> list[tuple[str, Config]]:
        """Returns the configuration of every run, with the name of its variant."""
        raise NotImplementedError

    @property
    def target(self) -> str:
        """Which flag of a run the targets are values of."""
        return 'kernel_density' if self.kernel_densities else 'compression'

    def targets(self) -> list[float]:
        """Returns the compressions or densities to reach."""
        name = 'kernel_densities' if self.kernel_densities else 'compressions'
        text = getattr(self, name)
        try:
            targets = [float(number) for number in text.split(',')]
        except ValueError as error:
            raise ValueError(f'--{name}={text} must be numbers with commas between') from error
        if len(set(targets)) < len(targets):
            raise ValueError(f'--{name}={text} names one twice')
        return targets

    def all_seeds(self) -> range:
        """Returns the seeds of each target."""
        return range(self.shared['seed'], self.shared['seed'] + self.seeds)

    def make_run(self, label: str, **own: Any) -> Config:
        """Makes the configuration of one run, in the folder of that label."""
        folder = f'{self.workdir}/{label}'
        values = {**self.shared, 'network': self.network, 'workdir': folder, **own}
        if self.network in _SIZED:
            return SizedConfig(**values)
        sized = {field.name: field.default for field in dataclasses.fields(SizedConfig)}
        known = {field.name for field in dataclasses.fields(Config)}
        for name in values.keys() - known:
            if values.pop(name) != sized[name]:
                raise ValueError(f'--{name} has no meaning with --network={self.network}')
        return Config(**values)


@dataclasses.dataclass(frozen=True)
class FrontierConfig(SweepConfig):
    """What `experiments.frontier` sweeps."""

    workdir: str = flag(
        'runs/frontier',
        'Folder that the sweep writes to, with one folder for each run.',
        decides=False,
    )

    def named_runs(self):
        """Returns the runs, by compression, then seed.

        The first compression trains the references, those after it start from them.
        """
        first, *_ = targets = self.targets()
        runs = []
        for target in targets:
            for seed in self.all_seeds():
                reference = self.shared['reference']
                if target != first and not reference:
                    reference = f'{self.workdir}/{first:g}-{seed}'
                own = {'seed': seed, self.target: target, 'reference': reference}
                runs.append(('', self.make_run(f'{target:g}-{seed}', **own)))
        return runs


@dataclasses.dataclass(frozen=True)
class CompareConfig(SweepConfig):
    """What `experiments.compare` compares: variants of the flags that its runs share."""

    workdir: str = flag(
        'runs/compare',
        'Folder that the comparison writes to, with one folder for each run.',
        decides=False,
    )
    variant: tuple[str, ...] = flag(
        (),
        'NAME: FLAGS of a variant to compare, as in "no splicing: --nosplicing". Give this flag '
        'once for each variant. A variant with a target of its own, such as --c_rate, is run once '
        'and not for each compression. One of another size has references of its own.',
    )

    def named_runs(self):
        """Returns the runs, by variant, compression, then seed.

        The first of each seed and size trains its reference, those after it start from that.
        """
        runs, first = [], {}
        for name, changed in self._variants().items():
            values = {**self.shared, **changed}
            sizes = [values[size] for size in _OWN_SIZES]
            slug = re.sub(r'\W+', '-', name.lower()).strip('-')
            says_itself = changed.keys() & {*_TARGETS}
            for target in [None] if says_itself else self.targets():
                for seed in self.all_seeds():
                    label = f'{slug}-{seed}' if target is None else f'{slug}-{target:g}-{seed}'
                    start = seed, *sizes
                    own = {
                        'seed': seed,
                        self.target: target,
                        'reference': self.shared['reference'] or first.get(start),
                    }
                    first.setdefault(start, f'{self.workdir}/{label}')
                    runs.append((name, self.make_run(label, **{**changed, **own})))
        lengths = {run.surgery_steps + run.finetuning_steps for _, run in runs}
        if len(lengths) > 1:
            raise ValueError(f'--variant: all must take as many steps, but take {sorted(lengths)}')
        folders = collections.Counter(run.workdir for _, run in runs)
        twice = sorted(folder for folder, count in folders.items() if count > 1)
        if twice:
            raise ValueError(
                f'--variant: names must differ in letters and digits, but two make {twice}'
            )
        return runs

    def _variants(self) -> dict[str, dict[str, Any]]:
        """Returns the fields that each variant changes, by its name."""
        variants = {}
        for text in self.variant:
            name, changed = read_variant('variant', text, SizedConfig)
            if name in variants:
                raise ValueError(f'--variant={text} must have a name of its own')
            common = {*names_of(SizedConfig, 'place', 'task'), self.target} - {*_OWN_SIZES}
            if unwanted := changed.keys() & common:
                raise ValueError(
                    f'--variant={text} may change how a network is pruned and fine-tuned, and its '
                    f'size, but not {sorted(unwanted)}'
                )
            if self.shared['reference'] and changed.keys() & {*_OWN_SIZES}:
                raise ValueError(
                    f'--variant={text} has a size of its own, which the network of '
                    f'--reference={self.shared["reference"]} has not'
                )
            variants[name] = changed
        if not variants:
            raise ValueError('--variant must be given at least once')
        return variants


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """What `experiments.search` searches."""

    network: str = flag('lenet300', 'Network.', choices=_LENETS)
    workdir: str = flag('runs/search', 'Folder that the search writes to.', decides=False)
    space: str = flag(
        'layer_density',
        'What the search chooses: one compression for the network, 20 to 1000; a layer_density for '
        'each layer, 0.001 to 1; or a c_rate for each layer, 0 to 6. It also chooses the end of '
        'the ramp, at 40 to 90 % of the way to --stop, and factors on the learning rate, 0.3 to 3, '
        'and on the weight decay, 0.1 to 4.',
        choices=('compression', 'layer_density', 'c_rate'),
    )
    trials: int = flag(
        100,
        'Trials of --study in all; after the last, no worker begins another.',
        decides=False,
        lower_bound=1,
    )
    tolerance: float = flag(
        0.1, 'Percentage points of validation error allowed above the reference.'
    )
    study: str = flag(
        'search', 'Name of the study; workers with one name work together.', decides=False
    )
    storage: str | None = flag(
        None,
        'URL of the database of --study, as postgresql+psycopg://user:password@host/name, which '
        'needs the package psycopg; by default study.db in --workdir.',
        decides=False,
    )
    # Without what the search chooses by itself or has no use for.
    shared: Mapping[str, Any] = flags_of(
        Config,
        *(*_TARGETS, 'workdir', 'ramp_end', 'refresh_statistics', 'cut', 'cut_at'),
        *('count_returns', 'on_divergence', 'train_on_all', 'resume', 'overwrite'),
    )

    def __post_init__(self):
        check_finite(self)
        self.base()  # checks what its runs have in common

    def base(self) -> Config:
        """The run that every trial changes: all weights are kept."""
        return Config(
            **{**self.shared, 'network': self.network, 'workdir': self.workdir, 'density': 1.0}
        )

    def reference_run(self, folder: str) -> Config:
        """Makes the run of the dense network.

        Without what is searched: another study in the folder may start from the same network.
        """
        names = {*names_of(Config, 'place', 'task', 'solver')} & self.shared.keys()
        own = {'network': self.network, 'workdir': folder, 'density': 1.0}
        own |= {'reference': None, 'resume': True}
        return Config(**{**{name: self.shared[name] for name in names}, **own})
