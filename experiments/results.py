"""The tables of docs/results.md from the files in results/: medians and ranges over seeds.

python -m experiments.results
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.config import command_line
from experiments.reports.summaries import read_whole_summary
from experiments.reports.sweep_tables import frontier_tables
from experiments.reports.tables import middle_and_range, to_text

_NUMBERS = ('target', 'compression', 'kept', 'reference_error', 'test_error')
FOLDER = Path(__file__).parents[1] / 'results'
_HEADER = '| flagfile | seeds | error of the reference | error after surgery | kept | compression |'


def read_summaries(folder: Path = FOLDER) -> dict[str, list[dict[str, Any]]]:
    """Reads the summaries of runs.

    Args:
      folder: with files named FLAGFILE-SEED.json.

    Returns:
      `{flagfile: the summaries of its runs}`, sorted by flagfile and seed.

    Raises:
      ValueError: if the folder holds none, or one of them is damaged.
    """
    paths = sorted(folder.glob('*-[0-9]*.json'))
    if not paths:
        raise ValueError(f'{folder} must hold files named FLAGFILE-SEED.json, but holds none')
    flagfiles: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        flagfile = path.stem.rpartition('-')[0]
        flagfiles.setdefault(flagfile, []).append(read_whole_summary(path))
    return flagfiles


def read_frontiers(folder: Path = FOLDER, kind: str = 'frontier') -> list[dict[str, Any]]:
    """Reads the sweeps of `experiments.frontier`.

    Args:
      folder: with files named KIND_NETWORK.csv.
      kind: `frontier`, or `authors` for those from the authors' networks.

    Returns:
      Their rows, sorted by network.

    Raises:
      ValueError: if a file is damaged.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob(f'{kind}_*.csv')):
        for row in _read_rows(path):
            try:
                numbers = {name: float(row[name]) for name in _NUMBERS}
                rows.append({**row, 'network': row['network'], **numbers})
            except (KeyError, ValueError) as error:
                raise ValueError(f'{path} has the row {row}: {error!r}') from error
    return rows


def read_comparison(path: Path) -> list[dict[str, Any]]:
    """Reads a table of `experiments.compare`.

    Returns:
      Its rows, what is a number as one, without the columns that a row leaves empty.

    Raises:
      ValueError: if the file is damaged.
    """

    def number(text):
        try:
            return float(text)
        except ValueError:
            return text

    return [
        {name: number(text) for name, text in row.items() if text or name == 'target'}
        for row in _read_rows(path)
    ]


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline='', encoding='utf-8') as file:
            rows = list(csv.DictReader(file, strict=True))
    except (ValueError, csv.Error) as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(f'{path} is damaged: row {number} has more or fewer columns')
    return rows


def table_row(name: str, summaries: Sequence[dict[str, Any]]) -> str:
    """Writes the runs of one flagfile as a row in Markdown.

    Args:
      name: what the row begins with.
      summaries: of runs that differ in the seed alone.

    Returns:
      The row: number of seeds, then the median of each quantity and its range.
    """
    cells = (
        name,
        f'{len(summaries)}',
        middle_and_range(summaries, 'reference_error', '.2f', ' %'),
        middle_and_range(summaries, 'test_error', '.2f', ' %'),
        middle_and_range(summaries, 'kept', ',.0f'),
        middle_and_range(summaries, 'compression', '.1f', '×'),
    )
    return f'| {" | ".join(cells)} |'


def table(flagfiles: dict[str, list[dict[str, Any]]]) -> str:
    """Writes the table of all runs in Markdown."""
    rows = [table_row(f'`{name}`', summaries) for name, summaries in flagfiles.items()]
    return '\n'.join([_HEADER, '|---' * _HEADER.count(' |') + '|', *rows])


if __name__ == '__main__':
    summaries = read_summaries()
    print(table(summaries), to_text(frontier_tables(read_frontiers())), sep='\n\n')
    command_line.print_result(summaries)
