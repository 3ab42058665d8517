"""The command line: every flag, once, as a field of one frozen `Config`.

The only module that defines flags. A field's type makes the flag's parser, its metadata the
help text; an entry script gives its own defaults.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from absl import app, logging
from absl import flags as absl_flags

from experiments import data

T = TypeVar('T', int, float)


def _flag(default: Any, text: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={'help': text, **metadata})


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run does. Error rates are in percent, lengths of time in steps."""

    network: str  # chosen by the entry script, not a flag

    dataset: str = _flag('mnist', 'Data set.', choices=data.DATASETS)
    data_dir: str | None = _flag(None, 'TFDS folder; by default TFDS chooses.')
    manual_dir: str | None = _flag(None, "Folder with the set's published files, read offline.")
    train_on_all: bool = _flag(False, 'Train on the validation images too (a final run).')
    workdir: str = _flag('', 'Folder of this run; runs/NETWORK_DATASET by default.')
    reference: str | None = _flag(None, 'Folder of a run whose reference network to start from.')
    resume: bool = _flag(False, 'Continue the run in workdir.')
    overwrite: bool = _flag(False, 'Delete the run in workdir first.')
    tensorboard: bool = _flag(False, 'Also write TensorBoard events (needs tensorboardX).')
    seed: int = _flag(0, 'Seeds the weights, the order of the images and the coins.')

    batch_size: int = _flag(64, 'Images per step.', least=1)
    reference_steps: int = _flag(10_000, 'Steps of dense training.', least=1)
    surgery_steps: int = _flag(16_000, 'Steps of surgery.', least=1)
    record_every: int = _flag(500, 'Steps per record, and per compiled call.', least=1)
    checkpoint_every: int = _flag(2_000, 'Steps per checkpoint.', least=1)

    reference_learning_rate: float = _flag(0.01, 'Learning rate at step 0 of dense training.')
    learning_rate: float = _flag(0.01, 'Learning rate at step 0 of surgery.')
    learning_rate_policy: str = _flag(
        'inv', "Caffe's policy, in both phases; poly ends at 0.", choices=('inv', 'poly')
    )
    learning_rate_gamma: float = _flag(1e-4, "Gamma of Caffe's policy inv, per step.")
    learning_rate_power: float = _flag(0.75, 'Power of the policy.')
    momentum: float = _flag(0.9, 'Momentum.')
    weight_decay: float = _flag(5e-4, 'Weight decay on all dense weights.')
    bias_scale: float = _flag(2.0, 'Learning rate of biases / that of kernels.')

    c_rate: str = _flag('1', 'c of the thresholds mean + c · std, as LAYER:NUMBER,…')
    start: str = _flag('0', 'First step with mask updates, as LAYER:STEP,…')
    stop: str = _flag('', 'First step without mask updates, as LAYER:STEP,…; never if empty.')
    hysteresis: float = _flag(0.1, 'Half the relative width of the band between thresholds.')
    update_gamma: float = _flag(1e-4, 'Decay of the update probability, per step.')
    update_power: float = _flag(1.0, 'Power of the update probability.')
    prune_biases: bool = _flag(True, 'Whether biases take part in surgery.')

    def identity(self) -> dict[str, Any]:
        """Returns the fields that decide a run's numbers: all but places and switches."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in _NOT_OF_THE_RUN
        }


_NOT_OF_THE_RUN = {'data_dir', 'manual_dir', 'workdir', 'resume', 'overwrite', 'tensorboard'}


def parse_table(text: str, number: Callable[[str], T] = float) -> dict[str, T]:
    """Reads numbers per layer, such as `conv*:2,fc1:4`; a lone number is for every layer.

    Args:
      text: `PATTERN:NUMBER` entries with commas between; the first that matches a layer counts.
      number: reads a number, `float` or `int`.

    Returns:
      `{pattern: number}` in the order of the text.

    Raises:
      ValueError: if an entry has another form, or a pattern stands twice.
    """
    table: dict[str, T] = {}
    for entry in filter(None, text.split(',')):
        pattern, _, digits = entry.rpartition(':')
        if (pattern or '*') in table:
            raise ValueError(f'pattern {pattern!r} stands twice in {text!r}')
        try:
            table[pattern or '*'] = number(digits)
        except ValueError as error:
            raise ValueError(f'{entry!r} in {text!r} is not PATTERN:NUMBER') from error
    return table


def define(defaults: Mapping[str, Any], flag_values: absl_flags.FlagValues) -> None:
    """Defines every flag.

    Args:
      defaults: the network, and the fields whose defaults differ for this entry script.
      flag_values: where the flags go.

    Raises:
      ValueError: if a default is for no field.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    if unknown := sorted(defaults.keys() - fields.keys()):
        raise ValueError(f'defaults names {unknown}, which are no flags')
    for name, field in fields.items():
        if name == 'network':
            continue
        default = defaults.get(name, field.default)
        text, options = field.metadata['help'], field.metadata
        common = {'flag_values': flag_values}
        if 'choices' in options:
            absl_flags.DEFINE_enum(name, default, options['choices'], text, **common)
        elif field.type is bool:
            absl_flags.DEFINE_bool(name, default, text, **common)
        elif field.type is int:
            least = options.get('least')
            absl_flags.DEFINE_integer(name, default, text, lower_bound=least, **common)
        elif field.type is float:
            absl_flags.DEFINE_float(name, default, text, **common)
        else:
            absl_flags.DEFINE_string(name, default, text, **common)


def to_config(
    defaults: Mapping[str, Any], flag_values: absl_flags.FlagValues, arguments: Sequence[str]
) -> Config:
    """Turns parsed flags into the configuration.

    Args:
      defaults: as for `define`.
      flag_values: the parsed flags.
      arguments: what the parser left over, the program's name first.

    Returns:
      The configuration, with the default workdir filled in.

    Raises:
      ValueError: if an argument is no flag, or flags contradict each other.
    """
    if arguments[1:]:
        raise ValueError(f'every argument must be a --flag=value, but got {list(arguments[1:])}')
    values = {
        field.name: flag_values[field.name].value
        for field in dataclasses.fields(Config)
        if field.name != 'network'
    }
    config = Config(network=defaults['network'], **values)
    if config.resume and config.overwrite:
        raise ValueError('--resume and --overwrite exclude each other')
    if config.checkpoint_every % config.record_every:
        raise ValueError(
            f'--checkpoint_every={config.checkpoint_every} must be a multiple of '
            f'--record_every={config.record_every}'
        )
    workdir = config.workdir or f'runs/{config.network}_{config.dataset}'
    return dataclasses.replace(config, workdir=workdir)


def run(defaults: Mapping[str, Any], action: Callable[[Config], None]) -> None:
    """Runs an entry script: defines the flags, parses the command line, acts.

    Args:
      defaults: as for `define`.
      action: called with the configuration. An error of the kinds it documents ends the program
        with its message and exit status 1, without a traceback.
    """
    define(defaults, absl_flags.FLAGS)

    def main(arguments):
        if not absl_flags.FLAGS['verbosity'].present:
            # At level INFO, orbax and TFDS tell of every file they touch.
            logging.set_verbosity(logging.WARNING)
        try:
            action(to_config(defaults, absl_flags.FLAGS, arguments))
        except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
            raise SystemExit(f'{type(error).__name__}: {error}') from error

    app.run(main)
