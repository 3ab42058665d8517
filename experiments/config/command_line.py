"""From a frozen dataclass to the command line, and back.

A field made by `flag` is a flag: its type makes the parser, its metadata the help text. One made by
`flags_of` holds those of another configuration. An entry script gives its own defaults.
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from absl import app, logging
from absl import flags as absl_flags

C = TypeVar('C', bound=Any)  # a dataclass of flags


def flag(default: Any, text: str, decides: bool = True, part: str = '', **options: Any) -> Any:
    """Makes a field that is a flag.

    Args:
      default: of the flag.
      text: for --help, which lists flags by the alphabet: it stands alone, and names the unit.
      decides: whether a run's numbers depend on it, as they do not on places and switches.
      part: of what the flag is about, for `names_of`.
      **options: `choices`, or options of absl's definition.
    """
    metadata = {'help': text, 'decides': decides, 'part': part, 'options': options}
    return dataclasses.field(default=default, metadata=metadata)


def flags_of(config_type: type, *without: str) -> Any:
    """Makes a field that holds the flags of another configuration, `{name: value}`.

    Args:
      config_type: the other one.
      *without: flags of it that this one says itself, or has no use for.

    Returns:
      The field of a configuration, which `make` fills.
    """
    metadata = {'flags_of': config_type, 'without': without}
    return dataclasses.field(metadata=metadata, kw_only=True)


def with_default(config_type: type, name: str, default: Any) -> Any:
    """Makes the field of a flag of another configuration over again, with another default."""
    (field,) = (each for each in dataclasses.fields(config_type) if each.name == name)
    return dataclasses.field(default=default, metadata=field.metadata)


def is_flag(field: dataclasses.Field) -> bool:
    """Says whether a field of a configuration is a flag."""
    return 'help' in field.metadata


def names_of(config_type: type, *parts: str) -> list[str]:
    """Returns the names of the flags of a configuration that are about one of some parts."""
    fields = filter(is_flag, dataclasses.fields(config_type))
    return [field.name for field in fields if field.metadata['part'] in parts]


def all_flags(config_type: type) -> Iterator[dataclasses.Field]:
    """Gives every flag of a configuration, with those of configurations that it holds."""
    for field in dataclasses.fields(config_type):
        if is_flag(field):
            yield field
        elif 'flags_of' in field.metadata:
            others = all_flags(field.metadata['flags_of'])
            yield from (other for other in others if other.name not in field.metadata['without'])


def make(config_type: type[C], **values: Any) -> C:
    """Makes a configuration, each flag in the field that holds it.

    Args:
      config_type: a frozen dataclass.
      **values: of its fields and flags; those left out have their defaults.

    Raises:
      TypeError: if a value is for no flag.
      ValueError: if flags contradict each other.
    """
    own = {}
    for field in dataclasses.fields(config_type):
        if 'flags_of' in field.metadata:
            others = all_flags(field.metadata['flags_of'])
            own[field.name] = {
                other.name: values.pop(other.name, other.default)
                for other in others
                if other.name not in field.metadata['without']
            }
    return config_type(**own, **values)


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
    fields = list(all_flags(config_type))
    known = {field.name for field in (*fields, *dataclasses.fields(config_type))}
    if unknown := sorted(defaults.keys() - known):
        raise ValueError(f'defaults names {unknown}, which are no fields of {config_type}')
    for field in fields:
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

    Raises:
      ValueError: if an argument is no flag, or flags contradict each other.
    """
    if arguments[1:]:
        raise ValueError(f'every argument must be a --flag=value, but got {list(arguments[1:])}')
    values = {field.name: flag_values[field.name].value for field in all_flags(config_type)}
    return make(config_type, **{**defaults, **values})


def read_variant(flag_name: str, text: str, config_type: type[C]) -> tuple[str, dict[str, Any]]:
    """Reads `NAME: FLAGS`, a name with flags of a configuration.

    Args:
      flag_name: the flag that the text was given for.
      text: what it has.
      config_type: whose flags may be there.

    Returns:
      The name, and the fields that the flags give.

    Raises:
      ValueError: if there is no name, or something that is no flag of the configuration.
    """
    name, colon, arguments = text.partition(':')
    if not colon or not name.strip():
        raise ValueError(f'--{flag_name}={text} must be NAME: FLAGS')
    flag_values = absl_flags.FlagValues()
    define(config_type, {}, flag_values)
    try:
        left = flag_values([flag_name, *shlex.split(arguments)])[1:]
    except (absl_flags.Error, ValueError) as error:  # the latter for an open quote
        raise ValueError(f'--{flag_name}={text}: {error}') from error
    if left:
        raise ValueError(f'--{flag_name}={text} must be NAME: FLAGS, but has {left}')
    names = [field.name for field in all_flags(config_type)]
    return name.strip(), {
        name: flag_values[name].value for name in names if flag_values[name].present
    }


def launch(defaults: Mapping[str, Any], action: Callable[[C], Any], config_type: type[C]) -> None:
    """Runs an entry script: defines the flags, parses the command line, acts.

    Args:
      defaults: as for `define`.
      action: called with the configuration. An error of the kinds it documents ends the program
        with its message and exit status 1, without a traceback.
      config_type: as for `define`.
    """
    define(config_type, defaults, absl_flags.FLAGS)
    for field in all_flags(config_type):
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

    try:
        app.run(main, flags_parser=_parse)
    except SystemExit as end:
        # All errors end with a message; what ends with 1 is the help.
        if end.code == 1:
            raise SystemExit(0) from None
        raise


def _parse(arguments: list[str]) -> list[str]:
    try:
        return absl_flags.FLAGS(arguments)
    except absl_flags.Error as error:
        raise SystemExit(f'{error}\nPass --help to see the flags.') from error


def print_result(result: Any) -> None:
    """Prints what a command found as one line of JSON, for the program that reads its output.

    Args:
      result: anything that JSON holds. On a terminal, before which nobody reads JSON, nothing is
        printed.
    """
    if not sys.stdout.isatty():
        print(json.dumps(result))


def identify(config: Any) -> dict[str, Any]:
    """Returns the fields of a configuration that decide its numbers: all but places and switches.

    Returns:
      `{name: value}`, with those of configurations that it holds.
    """
    deciding = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if 'flags_of' in field.metadata:
            others = {other.name: other for other in all_flags(field.metadata['flags_of'])}
            named = {name: number for name, number in value.items() if _decides(others[name])}
            deciding |= named
        elif _decides(field):
            deciding[field.name] = value
    return deciding


def _decides(field: dataclasses.Field) -> bool:
    return field.metadata.get('decides', True)


def check_finite(config: Any) -> None:
    """Refuses numbers that float32 cannot compute with: no bound of a flag keeps nan out.

    Raises:
      ValueError: if one of them is.
    """
    from dns_jax.schedules import check_finite as check_number  # brings JAX

    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float):
            check_number(f'--{field.name}', value)


def check_unread(config: Any, names: Sequence[str]) -> None:
    """Refuses flags that were given, though nothing reads them.

    Raises:
      ValueError: if there is one.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in names and value != field.default:
            raise ValueError(f'--{field.name}={value} has no meaning beside the other flags')


_DEFINITIONS = {
    bool: absl_flags.DEFINE_bool,
    int: absl_flags.DEFINE_integer,
    float: absl_flags.DEFINE_float,
    float | None: absl_flags.DEFINE_float,
    int | None: absl_flags.DEFINE_integer,
    tuple[str, ...]: absl_flags.DEFINE_multi_string,
}
