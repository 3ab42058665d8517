"""The flags of what does many runs: frontiers, comparisons, searches.

Each configuration has those of its runs, and its own.
"""

import collections
import dataclasses
import re
import shlex
from typing import Any

from absl import flags as absl_flags

from experiments.config.command_line import check_finite, define, flag, is_flag
from experiments.config.flags import Config

# What all variants of a comparison have in common.
_SHARED = {
    *('dataset', 'data_dir', 'manual_dir', 'train_on_all', 'workdir', 'reference', 'resume'),
    *('overwrite', 'tensorboard', 'seed', 'batch_size', 'compression', 'dropout'),
    *('reference_steps', 'reference_learning_rate', 'reference_weight_decay'),
}


@dataclasses.dataclass(frozen=True)
class FrontierConfig(Config):
    """What `experiments.frontier` sweeps: the flags of its runs, and these."""

    network: str = flag('lenet300', 'Network.', choices=('lenet300', 'lenet5'))
    workdir: str = flag(
        'runs/frontier',
        'Folder that the sweep writes to, with one folder for each run.',
        decides=False,
    )
    compressions: str = flag('30,60,120', 'All / kept parameters to reach, with commas between.')
    seeds: int = flag(
        5,
        'Runs of each compression, with the seeds from --seed on.',
        lower_bound=1,
        upper_bound=1_000,
    )
    side_by_side: int = flag(
        5, 'Seeds trained in one program, side by side, at most.', lower_bound=1
    )

    # What --compressions, or a variant, says in their place: fields, but no flags.
    compression: float | None = None
    density: float | None = None
    layer_density: str = ''
    c_rate: str = ''

    def __post_init__(self):
        self.runs()  # each checks itself

    def runs(self) -> list[Config]:
        """Returns the configuration of every run, by compression, then seed.

        The first compression trains the references, those after it start from them.
        """
        compressions = self.targets()
        runs = []
        for number, compression in enumerate(compressions):
            for seed in range(self.seed, self.seed + self.seeds):
                first = f'{self.workdir}/{compressions[0]:g}-{seed}'
                own = {
                    'seed': seed,
                    'compression': compression,
                    'workdir': f'{self.workdir}/{compression:g}-{seed}',
                    'reference': first if number and not self.reference else self.reference,
                }
                runs.append(to_run(self, **own))
        return runs

    def targets(self) -> list[float]:
        """Returns the compressions to reach."""
        try:
            compressions = [float(text) for text in self.compressions.split(',')]
        except ValueError as error:
            raise ValueError(
                f'--compressions={self.compressions} must be numbers with commas between'
            ) from error
        if len(set(compressions)) < len(compressions):
            raise ValueError(f'--compressions={self.compressions} names one twice')
        if self.compression is not None:
            raise ValueError(f'compression={self.compression} has no place beside compressions')
        return compressions


@dataclasses.dataclass(frozen=True)
class CompareConfig(FrontierConfig):
    """What `experiments.compare` compares: the flags that its runs share, and these."""

    workdir: str = flag(
        'runs/compare',
        'Folder that the comparison writes to, with one folder for each run.',
        decides=False,
    )
    variant: tuple[str, ...] = flag(
        (),
        'NAME: FLAGS of one of the things to compare, as "no splicing: --nosplicing"; to be given '
        'again for each. One that says by itself what to keep is run once for all compressions.',
    )

    def __post_init__(self):
        lengths = {run.surgery_steps + run.finetuning_steps for _, run in self.named_runs()}
        if len(lengths) > 1:
            raise ValueError(f'--variant: all must take as many steps, but take {sorted(lengths)}')
        folders = collections.Counter(run.workdir for run in self.runs())
        twice = sorted(folder for folder, count in folders.items() if count > 1)
        if twice:
            raise ValueError(
                f'--variant: names must differ in letters and digits, but two make {twice}'
            )

    def runs(self) -> list[Config]:
        """Returns the configuration of every run, by variant, compression, then seed.

        The first of each seed trains its reference, those after it start from that.
        """
        return [run for _, run in self.named_runs()]

    def named_runs(self) -> list[tuple[str, Config]]:
        """Returns the same with the name of the variant."""
        runs, first = [], {}
        for name, changed in self._variants().items():
            slug = re.sub(r'\W+', '-', name.lower()).strip('-')
            says_itself = changed.keys() & {'density', 'layer_density', 'c_rate'}
            for target in [None] if says_itself else self.targets():
                for seed in range(self.seed, self.seed + self.seeds):
                    label = f'{slug}-{seed}' if target is None else f'{slug}-{target:g}-{seed}'
                    folder = f'{self.workdir}/{label}'
                    own = {
                        'seed': seed,
                        'compression': target,
                        'workdir': folder,
                        'reference': self.reference or first.get(seed),
                    }
                    first.setdefault(seed, folder)
                    runs.append((name, to_run(self, **{**changed, **own})))
        return runs

    def _variants(self) -> dict[str, dict[str, Any]]:
        """Returns the fields that each variant changes, by its name."""
        variants = {}
        for text in self.variant:
            name, colon, arguments = text.partition(':')
            if not colon or not name.strip() or name.strip() in variants:
                raise ValueError(f'--variant={text} must be NAME: FLAGS, with a name of its own')
            flag_values = absl_flags.FlagValues()
            define(Config, {}, flag_values)
            try:
                left = flag_values(['--variant', *shlex.split(arguments)])[1:]
            except (absl_flags.Error, ValueError) as error:  # the latter for an open quote
                raise ValueError(f'--variant={text}: {error}') from error
            names = [field.name for field in filter(is_flag, dataclasses.fields(Config))]
            changed = {name: flag_values[name].value for name in names if flag_values[name].present}
            if left or changed.keys() & _SHARED:
                raise ValueError(
                    f'--variant={text} may change how is pruned and fine-tuned, but not '
                    f'{left or sorted(changed.keys() & _SHARED)}'
                )
            variants[name.strip()] = changed
        if not variants:
            raise ValueError('--variant must be given at least once')
        return variants


@dataclasses.dataclass(frozen=True)
class SearchConfig(Config):
    """What `experiments.search` searches: the flags of its runs, and these."""

    network: str = flag('lenet300', 'Network.', choices=('lenet300', 'lenet5'))
    workdir: str = flag('runs/search', 'Folder that the search writes to.', decides=False)
    space: str = flag(
        'layer_density',
        'What is chosen: compression, one for the network, 20 to 1000; layer_density, 0.001 to 1 '
        'each; or c_rate, 0 to 6 each. Chosen beside: the end of the ramp, at 40 to 90 % of the '
        'way to --stop, and factors on the learning rate, 0.3 to 3, and the weight decay, 0.1 to '
        '4.',
        choices=('compression', 'layer_density', 'c_rate'),
    )
    trials: int = flag(
        100,
        'Trials of --study in all, after which no worker begins another.',
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
        None, 'URL of the database of --study; by default study.db in --workdir.', decides=False
    )

    # What the search chooses by itself or has no use for: fields, but no flags.
    compression: float | None = None
    density: float | None = None
    layer_density: str = ''
    c_rate: str = ''
    ramp_end: str = '80%'
    refresh_statistics: int = 0
    cut: float = 0.0
    cut_at: str = '50%'
    count_returns: bool = False
    on_divergence: str = 'stop'
    train_on_all: bool = False
    resume: bool = dataclasses.field(default=False, metadata={'decides': False})
    overwrite: bool = dataclasses.field(default=False, metadata={'decides': False})

    def __post_init__(self):
        to_run(self, density=1.0)  # checks what runs and the search have in common
        check_finite(self)


def to_run(config: Config, **changed: Any) -> Config:
    """Makes the configuration of one run.

    Args:
      config: of many.
      **changed: fields that are others in this run.

    Returns:
      The configuration, without the fields that a run does not have.
    """
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}
    return Config(**{**fields, **changed})
