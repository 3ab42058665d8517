"""How far a long command is, for who watches: bars on standard error."""

import sys
from typing import Any

from absl import logging
from tqdm import tqdm

from experiments.devices import hosts


def bar(*arguments: Any, **options: Any) -> tqdm:
    """Makes a progress bar; with others around it, it goes when it is done.

    Args:
      *arguments: of tqdm: what to go through, if anything.
      **options: of tqdm, such as `total`, `desc` and `unit`.

    Returns:
      The bar: on standard error where that is a terminal, in the first process alone, and unless
      --verbosity leaves warnings out.
    """
    return tqdm(*arguments, **options, leave=None, dynamic_ncols=True, disable=not are_wanted())


def are_wanted() -> bool:
    """Says whether bars are shown, which libraries with bars of their own have to be told."""
    is_heard = logging.get_verbosity() >= logging.WARNING
    return hosts.is_first() and is_heard and sys.stderr.isatty()


def say(line: str) -> None:
    """Prints a line on standard output, above the bars.

    Args:
      line: without its end.
    """
    with tqdm.external_write_mode():
        print(line, flush=True)
