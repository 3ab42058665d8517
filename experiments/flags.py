"""The command line: every flag, once, as a field of one frozen `Config`.

Flags are defined here and, for the commands that stand on runs, in `commands`. A field's type
makes the flag's parser, its metadata the help text; an entry script gives its own defaults. What
is written within a flag is for `parsers`.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import app, logging
from absl import flags as absl_flags

from experiments import data
from experiments.parsers import parse_learning_rate

C = TypeVar('C', bound=Any)  # a dataclass of flags


def flag(default: Any, text: str, **metadata: Any) -> Any:
    """Makes a field that is a flag.

    Args:
      default: of the flag.
      text: for --help.
      **metadata: `choices`, or options of absl's definition.

    Returns:
      The field of a configuration.
    """
    return dataclasses.field(default=default, metadata={'help': text, **metadata})


PRUNERS = ('surgery', 'han', 'iterative', 'one_shot', 'gradual', 'set', 'rigl')
REGROWING = ('set', 'rigl')
_OF_SURGERY = (
    *('splicing', 'hysteresis', 'start', 'stop', 'ramp', 'update_gamma', 'update_power'),
    'count_returns',
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run does. Error rates are in percent, lengths of time in steps."""

    network: str  # chosen by the entry script, not a flag

    dataset: str = flag('mnist', 'Data set.', choices=data.DATASETS)
    data_dir: str | None = flag(None, 'TFDS folder; by default TFDS chooses.')
    manual_dir: str | None = flag(None, "Folder with the set's published files, read offline.")
    train_on_all: bool = flag(False, 'Train on the validation images too (a final run).')
    workdir: str = flag('runs/latest', 'Folder of this run.')
    reference: str | None = flag(
        None, 'Folder of a run whose reference network to start from, or a .caffemodel file.'
    )
    resume: bool = flag(False, 'Continue the run in workdir.')
    overwrite: bool = flag(False, 'Delete the run in workdir first.')
    tensorboard: bool = flag(False, 'Also write TensorBoard events (needs tensorboardX).')
    seed: int = flag(0, 'Seeds the weights, the order of the images and the coins.', lower_bound=0)

    batch_size: int = flag(64, 'Images per step.', lower_bound=1)
    reference_steps: int = flag(10_000, 'Steps of dense training.', lower_bound=1)
    surgery_steps: int = flag(16_000, 'Steps of surgery.', lower_bound=1)
    finetuning_steps: int = flag(
        10_000, 'Steps of training with frozen masks after surgery.', lower_bound=0
    )
    record_every: int = flag(500, 'Steps per record.', lower_bound=1)
    checkpoint_every: int = flag(2_000, 'Steps per checkpoint.', lower_bound=1)
    on_divergence: str = flag(
        'stop',
        'Where training breaks down: stop, or rollback to the last checkpoint and go on with half '
        'the learning rate, other batches and, once surgery emptied a layer, the masks as they '
        'are there.',
        choices=('stop', 'rollback'),
    )

    reference_learning_rate: str = flag(
        'inv:0.01,1e-4,0.75', "Caffe's policy and its numbers for dense training."
    )
    learning_rate: str = flag('inv:0.01,1e-4,0.75', 'The same for surgery.')
    finetuning_learning_rate: str = flag('poly:0.05,1', 'The same for fine-tuning.')
    reference_weight_decay: float = flag(5e-4, 'Weight decay of dense training.')
    weight_decay: float = flag(5e-4, 'Weight decay of surgery, on all dense weights.')
    finetuning_weight_decay: float = flag(0.0, 'Weight decay of fine-tuning.')
    momentum: float = flag(0.9, 'Momentum.')
    bias_scale: float = flag(2.0, 'Learning rate of biases / that of kernels.')
    decay_biases: bool = flag(True, 'Whether weight decay is for biases too.')

    compression: float | None = flag(
        None, 'All parameters / kept parameters to reach; the layers share by themselves.'
    )
    density: float | None = flag(None, 'The same, as kept / all parameters.')
    layer_density: str = flag(
        '', 'Kept / all to reach, of what takes part in a layer, as LAYER:NUMBER,…'
    )
    c_rate: str = flag('', 'c of the thresholds mean + c · std, of han c · std, as LAYER:NUMBER,…')
    refresh_statistics: int = flag(
        0, 'Steps from one reading of mean and std to the next; 0 reads them once.', lower_bound=0
    )
    score: str = flag('norm', 'How layers share one density.', choices=('norm', 'rms', 'erk'))
    ramp: str = flag('log', 'How densities fall under surgery: log, or poly:POWER.')
    ramp_start: str = flag(
        '0%',
        'Step, or share of the surgery steps, at which they begin to; the first round. With '
        '--layer_density also as LAYER:STEP,…',
    )
    ramp_end: str = flag(
        '80%', 'Step or share at which they are reached; the last round. Also as LAYER:STEP,…'
    )
    refresh_every: int = flag(
        500,
        'Steps from one choice of thresholds by density to the next, and from one round of '
        'gradual, set and rigl to the next.',
        lower_bound=1,
    )
    start: str = flag('0', 'First step, or share, with mask updates, as LAYER:STEP,…')
    stop: str = flag('100%', 'First step, or share, without mask updates, as LAYER:STEP,…')
    hysteresis: float = flag(0.1, 'Half the relative width of the band between thresholds.')
    update_gamma: float = flag(1e-4, 'Decay of the update probability, per step.')
    update_power: float = flag(0.0, 'Power of the update probability; 0 updates at every step.')
    prune_biases: bool = flag(True, 'Whether biases take part in surgery.')

    pruner: str = flag('surgery', 'What prunes in the place of surgery.', choices=PRUNERS)
    importance: str = flag(
        'magnitude',
        'What says how much a connection matters: |w|, |w · gradient| or nothing.',
        choices=('magnitude', 'taylor', 'chance'),
    )
    splicing: bool = flag(True, 'Whether surgery lets pruned connections return.')
    rounds: int = flag(5, 'Rounds of han and iterative.', lower_bound=1, upper_bound=1_000)
    drop: float = flag(0.3, 'Share of the connections that set and rigl exchange in a round.')
    dropout: float = flag(0.0, 'Rate of dropout behind all fully connected layers but the last.')
    pruned_dropout: str = flag(
        'scaled',
        'That rate once pruning begins: kept, dropped, or scaled with the root of the density.',
        choices=('kept', 'dropped', 'scaled'),
    )
    cut: float = flag(0.0, 'Share of the kept connections that is cut at random, once.')
    cut_at: str = flag('50%', 'Step or share at which it is cut.')
    count_returns: bool = flag(False, 'Whether to tell what becomes of connections that return.')

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
        for name in ('cut', 'dropout', 'drop'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'--{name}={getattr(self, name)} must be in [0, 1)')
        self._check_unread()
        if self.count_returns and self.on_divergence == 'rollback':
            raise ValueError(
                '--count_returns and --on_divergence=rollback exclude each other: what returned '
                'in an attempt that was undone would count'
            )
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
        check_finite(self)

    def _check_unread(self):
        """Refuses flags that this run would not look at, and rules that its pruner cannot have."""
        if self.pruner != 'surgery' and bool(self.c_rate) != (self.pruner == 'han'):
            wanted = '--c_rate' if self.pruner == 'han' else 'a density or a compression'
            raise ValueError(f'--pruner={self.pruner} must go with {wanted}')
        surgery = self.pruner == 'surgery'
        is_read = {
            **dict.fromkeys(_OF_SURGERY, surgery),
            'importance': self.pruner not in REGROWING,
            'rounds': self.pruner in ('han', 'iterative'),
            'drop': self.pruner in REGROWING,
            'refresh_statistics': surgery and bool(self.c_rate),
            'pruned_dropout': self.dropout > 0,
            'cut_at': self.cut > 0,
        }
        for field in dataclasses.fields(Config):
            value = getattr(self, field.name)
            if value != field.default and not is_read.get(field.name, True):
                raise ValueError(
                    f'--{field.name}={value} has no meaning beside the other flags, '
                    f'--pruner={self.pruner} among them'
                )
        is_known = self.importance == 'magnitude' or self.refresh_statistics or not self.c_rate
        if surgery and not is_known:
            raise ValueError(
                f'--importance={self.importance} is not known at the start: with --c_rate it must '
                'go with --refresh_statistics'
            )

    def identity(self) -> dict[str, Any]:
        """Returns the fields that decide a run's numbers: all but places and switches."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in _NOT_OF_THE_RUN
        }


def check_finite(config: Any) -> None:
    """Refuses numbers that cannot be computed with: no lower or upper bound keeps nan out.

    Args:
      config: a dataclass of flags.

    Raises:
      ValueError: if one of them is.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f'--{field.name}={value} must be finite')


_NOT_OF_THE_RUN = {
    *('data_dir', 'manual_dir', 'workdir', 'resume', 'overwrite', 'tensorboard'),
    *('trials', 'study', 'storage', 'mesh', 'distributed', 'workers'),
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
    for field in filter(is_flag, fields):
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
    flags = filter(is_flag, dataclasses.fields(config_type))
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
    for field in filter(is_flag, dataclasses.fields(config_type)):
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


def is_flag(field: dataclasses.Field) -> bool:
    """Says whether a field of a configuration is a flag."""
    return 'help' in field.metadata
