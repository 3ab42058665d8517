"""Tables of text, and numbers over seeds, for the terminal, for Markdown and for pages."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Rows = Sequence[Mapping[str, Any]]


class Table(NamedTuple):
    """Rows of text under a header; the first cell of a row names it."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def to_text(tables: Sequence[Table]) -> str:
    """Writes tables without their captions in Markdown, an empty line between them."""
    return '\n\n'.join(table(one.header, one.rows) for one in tables)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table padded to straight columns, so that it reads as well on a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(' | '.join([f'| {first.ljust(widths[0])}', *cells]) + ' |')
    rule = ['-' * (widths[0] + 2), *('-' * (width + 1) + ':' for width in widths[1:])]
    lines.insert(1, f'|{"|".join(rule)}|')
    return '\n'.join(lines)


def is_by_density(rows: Rows) -> bool:
    """Says whether densities were asked for: variants may then be networks of several sizes."""
    return any(row['target'] != '' and row['target'] < 1 for row in rows)


def format_of(unit: str) -> tuple[str, str]:
    """Says how a measurement is written: the format of the number, and what follows it."""
    return ('.2f', ' %') if unit == '%' else ('.3f', f' {unit}')


def to_csv(rows: Rows) -> str:
    """Writes rows as CSV; the columns are all that a row has."""
    text = io.StringIO()
    columns = dict.fromkeys(column for row in rows for column in row)
    writer = csv.DictWriter(text, list(columns), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def group_rows(rows: Rows, *names: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Groups rows that are alike in some columns, in the order of their first.

    A column that a row leaves out counts as None.

    Example:
      >>> rows = [{'seed': 0, 'size': 2}, {'seed': 0, 'size': 5}, {'seed': 1, 'size': 2}]
      >>> {size: len(own) for (size,), own in group_rows(rows, 'size').items()}
      {2: 2, 5: 1}
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return groups


def middle_and_range(rows: Rows, name: str, form: str, unit: str = '') -> str:
    """The median of a quantity over runs, and in brackets its range."""
    values = [row[name] for row in rows]
    middle, low, high = statistics.median(values), min(values), max(values)
    if f'{low:{form}}' == f'{high:{form}}':
        return f'{middle:{form}}{unit}'
    return f'{middle:{form}}{unit} ({low:{form}} to {high:{form}})'
