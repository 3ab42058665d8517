"""How far a long command is: bars on a terminal, now and then a plain line elsewhere."""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging
from tqdm import tqdm

from experiments.devices import hosts

_SECONDS = 30.0  # between plain lines


def bar(*arguments: Any, **options: Any) -> Any:
    """Makes a progress bar; with others around it, it goes when it is done.

    Args:
      *arguments: of tqdm: what to go through, if anything.
      **options: of tqdm: `total`, `initial`, `desc` and `unit`.

    Returns:
      The bar, as of tqdm: on standard error where that is a terminal, else `_Lines`; in the first
      process alone, and unless --verbosity leaves warnings out.
    """
    if sys.stderr.isatty():
        return tqdm(*arguments, **options, leave=None, dynamic_ncols=True, disable=not _is_heard())
    return _Lines(*arguments, **options)


class _Lines:
    """What a bar would show, as plain lines on standard error.

    There is one about every half minute, and a last one at the end. What takes less than half a
    minute shows none.
    """

    def __init__(
        self, items: Any = (), desc: str = '', total: int | None = None, initial: int = 0, unit=''
    ):
        self.n = initial
        self._items, self._desc, self._unit = items, desc, unit
        self._total = len(items) if total is None else total
        self._postfix = ''
        self._last = ''  # line
        self._next = time.monotonic() + (_SECONDS if _is_heard() else math.inf)

    def __enter__(self):
        return self

    def __exit__(self, *error: Any):
        if self._last:
            self._say()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def update(self, n: int = 1):
        self.n += n
        if not self._postfix:  # else a new one follows
            self._say_in_time()

    def set_postfix(self, values: Mapping[str, Any] | None = None, **more: Any):
        pairs = {**(values or {}), **more}
        self.set_postfix_str(', '.join(f'{name}={value}' for name, value in pairs.items()))

    def set_postfix_str(self, postfix: str):
        self._postfix = postfix
        self._say_in_time()

    def _say_in_time(self):
        if time.monotonic() >= self._next:
            self._say()
            self._next = time.monotonic() + _SECONDS

    def _say(self):
        line = f'{self._desc}: {self.n:,} of {self._total:,}{self._unit}'
        line = ', '.join(filter(None, [line, self._postfix]))
        if line != self._last:
            print(line, file=sys.stderr, flush=True)
        self._last = line


def are_wanted() -> bool:
    """Says whether bars are shown, which libraries with bars of their own have to be told."""
    return _is_heard() and sys.stderr.isatty()


def _is_heard() -> bool:
    return hosts.is_first() and logging.get_verbosity() >= logging.WARNING


def say(line: str) -> None:
    """Prints a line on standard output, above the bars.

    Args:
      line: without its end.
    """
    with tqdm.external_write_mode():
        print(line, flush=True)
