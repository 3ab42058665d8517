"""From a frozen dataclass to the command line, and back.

A field made by `flag` is a flag: its type makes the parser, its metadata the help text. An entry
script gives its own defaults.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from absl import app, logging
from absl import flags as absl_flags

from dns_jax import schedules

C = TypeVar('C', bound=Any)  # a dataclass of flags


def flag(default: Any, text: str, decides: bool = True, **options: Any) -> Any:
    """Makes a field that is a flag.

    Args:
      default: of the flag.
      text: for --help, which lists flags by the alphabet: it stands alone, and names the unit.
      decides: whether a run's numbers depend on it, as they do not on places and switches.
      **options: `choices`, or options of absl's definition.

    Returns:
      The field of a configuration.
    """
    return dataclasses.field(
        default=default, metadata={'help': text, 'decides': decides, 'options': options}
    )


def is_flag(field: dataclasses.Field) -> bool:
    """Says whether a field of a configuration is a flag."""
    return 'help' in field.metadata


def define(
    config_type: type[C], defaults: Mapping[str, Any], flag_values: absl_flags.FlagValues
) -> None:
    """Defines every flag of a configuration.

    Args:
      config_type: a frozen dataclass, some of whose fields are made by `flag`.
      defaults: the fields that are no flags, and those with other defaults in this script.
      flag_values: where the flags go.

    Raises:
      ValueError: if a default is for no field.
    """
    fields = dataclasses.fields(config_type)
    if unknown := sorted(defaults.keys() - {field.name for field in fields}):
        raise ValueError(f'defaults names {unknown}, which are no fields of {config_type}')
    for field in filter(is_flag, fields):
        default, options = defaults.get(field.name, field.default), dict(field.metadata['options'])
        if 'choices' in options:
            definition, options['enum_values'] = absl_flags.DEFINE_enum, options.pop('choices')
        else:
            definition = _DEFINITIONS.get(field.type, absl_flags.DEFINE_string)
        definition(
            field.name, default, help=field.metadata['help'], flag_values=flag_values, **options
        )


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
    names = [field.name for field in filter(is_flag, dataclasses.fields(config_type))]
    return config_type(**{**defaults, **{name: flag_values[name].value for name in names}})


def launch(defaults: Mapping[str, Any], action: Callable[[C], Any], config_type: type[C]) -> None:
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


def check_finite(config: Any) -> None:
    """Refuses numbers that float32 cannot compute with: no bound of a flag keeps nan out.

    Args:
      config: a dataclass of flags.

    Raises:
      ValueError: if one of them is.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float):
            schedules.check_finite(f'--{field.name}', value)


_DEFINITIONS = {
    bool: absl_flags.DEFINE_bool,
    int: absl_flags.DEFINE_integer,
    float: absl_flags.DEFINE_float,
    float | None: absl_flags.DEFINE_float,
    tuple[str, ...]: absl_flags.DEFINE_multi_string,
}
