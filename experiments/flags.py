"""The command line: every flag, once, as a field of one frozen `Config`.

The only module that defines flags. A field's type makes the flag's parser, its metadata the
help text; an entry script gives its own defaults. Texts within a flag are for `parsers`.
"""

import dataclasses
import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import app, logging
from absl import flags as absl_flags

from experiments import data
from experiments.parsers import parse_learning_rate

C = TypeVar(
    'C',
    'Config',
    'BenchConfig',
    'CompareConfig',
    'FrontierConfig',
    'SearchConfig',
    'XorConfig',
    'ZooConfig',
)


def _flag(default: Any, text: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={'help': text, **metadata})


PRUNERS = ('surgery', 'han', 'iterative', 'one_shot', 'gradual', 'set', 'rigl')
REGROWING = ('set', 'rigl')
_OF_SURGERY = (
    *('splicing', 'hysteresis', 'start', 'stop', 'ramp', 'update_gamma', 'update_power'),
    *('refresh_statistics', 'count_returns'),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run does. Error rates are in percent, lengths of time in steps."""

    network: str  # chosen by the entry script, not a flag

    dataset: str = _flag('mnist', 'Data set.', choices=data.DATASETS)
    data_dir: str | None = _flag(None, 'TFDS folder; by default TFDS chooses.')
    manual_dir: str | None = _flag(None, "Folder with the set's published files, read offline.")
    train_on_all: bool = _flag(False, 'Train on the validation images too (a final run).')
    workdir: str = _flag('runs/latest', 'Folder of this run.')
    reference: str | None = _flag(
        None, 'Folder of a run whose reference network to start from, or a .caffemodel file.'
    )
    resume: bool = _flag(False, 'Continue the run in workdir.')
    overwrite: bool = _flag(False, 'Delete the run in workdir first.')
    tensorboard: bool = _flag(False, 'Also write TensorBoard events (needs tensorboardX).')
    seed: int = _flag(0, 'Seeds the weights, the order of the images and the coins.', lower_bound=0)

    batch_size: int = _flag(64, 'Images per step.', lower_bound=1)
    reference_steps: int = _flag(10_000, 'Steps of dense training.', lower_bound=1)
    surgery_steps: int = _flag(16_000, 'Steps of surgery.', lower_bound=1)
    finetuning_steps: int = _flag(
        10_000, 'Steps of training with frozen masks after surgery.', lower_bound=0
    )
    record_every: int = _flag(500, 'Steps per record, and per compiled call.', lower_bound=1)
    checkpoint_every: int = _flag(2_000, 'Steps per checkpoint.', lower_bound=1)

    reference_learning_rate: str = _flag(
        'inv:0.01,1e-4,0.75', "Caffe's policy and its numbers for dense training."
    )
    learning_rate: str = _flag('inv:0.01,1e-4,0.75', 'The same for surgery.')
    finetuning_learning_rate: str = _flag('poly:0.05,1', 'The same for fine-tuning.')
    reference_weight_decay: float = _flag(5e-4, 'Weight decay of dense training.')
    weight_decay: float = _flag(5e-4, 'Weight decay of surgery, on all dense weights.')
    finetuning_weight_decay: float = _flag(0.0, 'Weight decay of fine-tuning.')
    momentum: float = _flag(0.9, 'Momentum.')
    bias_scale: float = _flag(2.0, 'Learning rate of biases / that of kernels.')

    compression: float | None = _flag(
        None, 'All parameters / kept parameters to reach; the layers share by themselves.'
    )
    density: float | None = _flag(None, 'The same, as kept / all parameters.')
    layer_density: str = _flag(
        '', 'Kept / all to reach, of what takes part in a layer, as LAYER:NUMBER,…'
    )
    c_rate: str = _flag('', 'c of the thresholds mean + c · std, of han c · std, as LAYER:NUMBER,…')
    refresh_statistics: int = _flag(
        0, 'Steps from one reading of mean and std to the next; 0 reads them once.', lower_bound=0
    )
    score: str = _flag('norm', 'How layers share one density.', choices=('norm', 'std', 'erk'))
    ramp: str = _flag('log', 'How densities fall under surgery: log, or poly:POWER.')
    ramp_start: str = _flag(
        '0%', 'Step, or share of the surgery steps, at which they begin to; the first round.'
    )
    ramp_end: str = _flag('80%', 'Step or share at which they are reached; the last round.')
    refresh_every: int = _flag(
        500,
        'Steps from one choice of thresholds by density to the next, and from one round of '
        'gradual, set and rigl to the next.',
        lower_bound=1,
    )
    start: str = _flag('0', 'First step, or share, with mask updates, as LAYER:STEP,…')
    stop: str = _flag('100%', 'First step, or share, without mask updates, as LAYER:STEP,…')
    hysteresis: float = _flag(0.1, 'Half the relative width of the band between thresholds.')
    update_gamma: float = _flag(1e-4, 'Decay of the update probability, per step.')
    update_power: float = _flag(0.0, 'Power of the update probability; 0 updates at every step.')
    prune_biases: bool = _flag(True, 'Whether biases take part in surgery.')

    pruner: str = _flag('surgery', 'What prunes in the place of surgery.', choices=PRUNERS)
    importance: str = _flag(
        'magnitude',
        'What says how much a connection matters: |w|, |w · gradient| or nothing.',
        choices=('magnitude', 'taylor', 'chance'),
    )
    splicing: bool = _flag(True, 'Whether surgery lets pruned connections return.')
    rounds: int = _flag(5, 'Rounds of han and iterative.', lower_bound=1)
    drop: float = _flag(0.3, 'Share of the connections that set and rigl exchange in a round.')
    dropout: float = _flag(0.0, 'Rate of dropout behind all fully connected layers but the last.')
    pruned_dropout: str = _flag(
        'scaled',
        'That rate once pruning begins: kept, dropped, or scaled with the root of the density.',
        choices=('kept', 'dropped', 'scaled'),
    )
    cut: float = _flag(0.0, 'Share of the kept connections that is cut at random, once.')
    cut_at: str = _flag('50%', 'Step or share at which it is cut.')
    count_returns: bool = _flag(False, 'Whether to tell what becomes of connections that return.')

    def __post_init__(self):
        if self.resume and self.overwrite:
            raise ValueError('--resume and --overwrite exclude each other')
        if self.overwrite and self.reference and _same(self.reference, self.workdir):
            raise ValueError(f'--overwrite would delete --reference={self.reference}')
        wanted = {
            name: getattr(self, name)
            for name in ('compression', 'density', 'layer_density', 'c_rate')
            if getattr(self, name) not in (None, '')
        }
        if len(wanted) != 1:
            raise ValueError(
                'one of --compression, --density, --layer_density and --c_rate must say what to '
                f'keep, as --compression=100 does, but {wanted or "none"} is given'
            )
        if self.compression is not None and not 1 <= self.compression < math.inf:
            raise ValueError(f'--compression={self.compression} must be finite and at least 1')
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f'--density={self.density} must be in (0, 1]')
        if self.pruner != 'surgery':
            self._check_pruner()
        for name in ('cut', 'dropout'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'--{name}={getattr(self, name)} must be in [0, 1)')
        if self.checkpoint_every % self.record_every:
            raise ValueError(
                f'--checkpoint_every={self.checkpoint_every} must be a multiple of '
                f'--record_every={self.record_every}'
            )
        for name in ('reference_learning_rate', 'learning_rate', 'finetuning_learning_rate'):
            try:
                parse_learning_rate(getattr(self, name), steps=1)
            except ValueError as error:
                raise ValueError(f'--{name}: {error}') from error

    def _check_pruner(self):
        """Refuses what the pruner would not look at."""
        if bool(self.c_rate) != (self.pruner == 'han'):
            raise ValueError(
                f'--pruner={self.pruner} must go with '
                + ('--c_rate' if self.pruner == 'han' else 'a density or a compression')
            )
        own = {field.name: field.default for field in dataclasses.fields(Config)}
        unread = [*_OF_SURGERY, 'importance'] if self.pruner in REGROWING else _OF_SURGERY
        for name in unread:
            if getattr(self, name) != own[name]:
                raise ValueError(
                    f'--{name}={getattr(self, name)} has no meaning for --pruner={self.pruner}'
                )

    def identity(self) -> dict[str, Any]:
        """Returns the fields that decide a run's numbers: all but places and switches."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in _NOT_OF_THE_RUN
        }


@dataclasses.dataclass(frozen=True)
class FrontierConfig(Config):
    """What `experiments.frontier` sweeps: the flags of its runs, and these."""

    network: str = _flag('lenet300', 'Network.', choices=('lenet300', 'lenet5'))
    workdir: str = _flag('runs/frontier', 'Folder of the sweep, with one folder for each run.')
    compressions: str = _flag('30,60,120', 'The compressions to reach, with commas between.')
    seeds: int = _flag(5, 'Runs of each, with the seeds from --seed on.', lower_bound=1)
    side_by_side: int = _flag(5, 'Seeds trained in one program, at most.', lower_bound=1)

    def __post_init__(self):
        self.runs()  # each checks itself

    def runs(self) -> list[Config]:
        """Returns the configuration of every run, by compression, then seed.

        The first compression trains the references, those after it start from them.
        """
        compressions = self.targets()
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Config)}
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
                runs.append(Config(**{**fields, **own}))
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
            raise ValueError(f'--compression={self.compression} has no place beside --compressions')
        return compressions


@dataclasses.dataclass(frozen=True)
class CompareConfig(FrontierConfig):
    """What `experiments.compare` compares: the flags that its runs share, and these."""

    workdir: str = _flag('runs/compare', 'Folder of the comparison, one folder in it for each run.')
    variant: tuple[str, ...] = _flag(
        (),
        'NAME: FLAGS of one of the things to compare, as "no splicing: --nosplicing"; to be given '
        'again for each. One that says by itself what to keep is run once for all compressions.',
    )

    def __post_init__(self):
        lengths = {run.surgery_steps + run.finetuning_steps for _, run in self.named_runs()}
        if len(lengths) > 1:
            raise ValueError(f'--variant: all must take as many steps, but take {sorted(lengths)}')

    def runs(self) -> list[Config]:
        """Returns the configuration of every run, by variant, compression, then seed.

        The first of each seed trains its reference, those after it start from that.
        """
        return [run for _, run in self.named_runs()]

    def named_runs(self) -> list[tuple[str, Config]]:
        """Returns the same with the name of the variant."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Config)}
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
                    runs.append((name, Config(**{**fields, **changed, **own})))
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
            except absl_flags.Error as error:
                raise ValueError(f'--variant={text}: {error}') from error
            names = [field.name for field in filter(_is_flag, dataclasses.fields(Config))]
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

    network: str = _flag('lenet300', 'Network.', choices=('lenet300', 'lenet5'))
    workdir: str = _flag('runs/search', 'Folder of the search.')
    space: str = _flag(
        'layer_density',
        'What is chosen: compression, one for the network, 20 to 1000; layer_density, 0.001 to 1 '
        'each; or c_rate, 0 to 6 each. With it go the end of the ramp, at 40 to 90 % of the way to '
        '--stop, and factors on the learning rate, 0.3 to 3, and the weight decay, 0.1 to 4.',
        choices=('compression', 'layer_density', 'c_rate'),
    )
    trials: int = _flag(
        100, 'Trials of the study in all, after which no worker begins another.', lower_bound=1
    )
    tolerance: float = _flag(0.1, 'Points of validation error allowed above the reference.')
    study: str = _flag('search', 'Name of the study; workers that give the same work together.')
    storage: str | None = _flag(None, 'URL of the database; by default study.db in the workdir.')

    # What the search chooses by itself or has no use for: fields, but no flags.
    compression: float | None = None
    density: float | None = None
    layer_density: str = ''
    c_rate: str = ''
    ramp_end: str = '80%'
    train_on_all: bool = False
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self):
        self.to_run(density=1.0)  # checks what runs and the search have in common
        if not math.isfinite(self.tolerance):
            raise ValueError(f'--tolerance={self.tolerance} must be finite')

    def to_run(self, **chosen: Any) -> Config:
        """Returns the configuration of a run with these flags and what was chosen."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Config)}
        return Config(**{**fields, **chosen})


@dataclasses.dataclass(frozen=True)
class XorConfig:
    """What `experiments.xor` does."""

    workdir: str = _flag('runs/xor', 'Folder of the result.')
    seed: int = _flag(0, 'Seeds the points and all networks.', lower_bound=0)
    seeds: int = _flag(100, 'Networks under each pruner.', lower_bound=1)
    steps: int = _flag(8_000, 'Steps of dense training, and again of pruning.', lower_bound=100)
    noise: float = _flag(0.16, 'Standard deviation of the points around the four corners.')
    solved: float = _flag(1.0, 'The largest error, in percent, that counts as solved.')

    def __post_init__(self):
        if not 0 < self.noise < math.inf:
            raise ValueError(f'--noise={self.noise} must be finite and above 0')
        if not 0 <= self.solved <= 100:
            raise ValueError(f'--solved={self.solved} must be a percentage')


@dataclasses.dataclass(frozen=True)
class ZooConfig:
    """What `experiments.zoo` publishes."""

    workdir: str = _flag('runs/latest', 'Folder of a finished run.')
    name: str = _flag('', 'Name of the network in the zoo.')

    def __post_init__(self):
        if not self.name.isidentifier():
            raise ValueError(f'--name={self.name!r} must be letters, digits and underscores')


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What `experiments.bench` measures."""

    rounds: int = _flag(30, 'Timed calls of each program, in alternation.', lower_bound=1)
    peer: str | None = _flag(None, 'A Python that can run the peer; no peer by default.')
    peer_script: str = _flag('../shared/peers/torch_step.py', 'The script of the peer.')
    peer_rounds: int = _flag(3, 'How often the peer runs, between our rounds.', lower_bound=1)

    def __post_init__(self):
        if self.peer and not Path(self.peer_script).is_file():
            raise ValueError(f'--peer_script must be a file, but is {self.peer_script!r}')
        if self.peer_rounds > self.rounds:
            raise ValueError(
                f'--peer_rounds={self.peer_rounds} must be at most --rounds={self.rounds}'
            )


# What all variants of a comparison have in common.
_SHARED = {
    *('dataset', 'data_dir', 'manual_dir', 'train_on_all', 'workdir', 'reference', 'resume'),
    *('overwrite', 'tensorboard', 'seed', 'batch_size', 'compression', 'dropout'),
    *('reference_steps', 'reference_learning_rate', 'reference_weight_decay'),
}
_NOT_OF_THE_RUN = {
    *('data_dir', 'manual_dir', 'workdir', 'resume', 'overwrite', 'tensorboard'),
    *('trials', 'study', 'storage'),
}


def define(
    config_type: type[C], defaults: Mapping[str, Any], flag_values: absl_flags.FlagValues
) -> None:
    """Defines every flag of a configuration.

    Args:
      config_type: `Config`, or one of those of the other commands.
      defaults: the fields that are no flags, and those with other defaults in this script.
      flag_values: where the flags go.

    Raises:
      ValueError: if a default is for no field.
    """
    fields = dataclasses.fields(config_type)
    if unknown := sorted(defaults.keys() - {field.name for field in fields}):
        raise ValueError(f'defaults names {unknown}, which are no fields of {config_type}')
    for field in filter(_is_flag, fields):
        options = dict(field.metadata)
        default, text = defaults.get(field.name, field.default), options.pop('help')
        if 'choices' in options:
            definition, options['enum_values'] = absl_flags.DEFINE_enum, options.pop('choices')
        else:
            definition = _DEFINITIONS.get(field.type, absl_flags.DEFINE_string)
        definition(field.name, default, help=text, flag_values=flag_values, **options)


def to_config(
    config_type: type[C],
    defaults: Mapping[str, Any],
    flag_values: absl_flags.FlagValues,
    arguments: Sequence[str],
) -> C:
    """Turns parsed flags into the configuration.

    Args:
      config_type: as for `define`.
      defaults: as for `define`.
      flag_values: the parsed flags.
      arguments: what the parser left over, the program's name first.

    Returns:
      The configuration.

    Raises:
      ValueError: if an argument is no flag, or flags contradict each other.
    """
    if arguments[1:]:
        raise ValueError(f'every argument must be a --flag=value, but got {list(arguments[1:])}')
    flags = filter(_is_flag, dataclasses.fields(config_type))
    return config_type(
        **{**defaults, **{flag.name: flag_values[flag.name].value for flag in flags}}
    )


def launch(defaults: Mapping[str, Any], action: Callable[[C], Any], config_type: type[C] = Config):
    """Runs an entry script: defines the flags, parses the command line, acts.

    Args:
      defaults: as for `define`.
      action: called with the configuration. An error of the kinds it documents ends the program
        with its message and exit status 1, without a traceback.
      config_type: as for `define`.
    """
    define(config_type, defaults, absl_flags.FLAGS)
    for field in filter(_is_flag, dataclasses.fields(config_type)):
        # --help lists the flags of the script alone, so they must count as its own.
        absl_flags.FLAGS.register_key_flag_for_module(sys.argv[0], absl_flags.FLAGS[field.name])

    def main(arguments):
        if not absl_flags.FLAGS['verbosity'].present:
            # At level INFO, orbax and TFDS tell of every file they touch.
            logging.set_verbosity(logging.WARNING)
        try:
            action(to_config(config_type, defaults, absl_flags.FLAGS, arguments))
        except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
            logging.debug('where it came from:', exc_info=True)  # with --verbosity=1
            raise SystemExit(f'{type(error).__name__}: {error}') from error

    app.run(main)


_DEFINITIONS = {
    bool: absl_flags.DEFINE_bool,
    int: absl_flags.DEFINE_integer,
    float: absl_flags.DEFINE_float,
    float | None: absl_flags.DEFINE_float,
    tuple[str, ...]: absl_flags.DEFINE_multi_string,
}


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _is_flag(field: dataclasses.Field) -> bool:
    return 'help' in field.metadata
