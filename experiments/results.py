"""The table of the README from the summaries in results/: medians and ranges over seeds.

python -m experiments.results
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.report import NETWORK_NAMES

FOLDER = Path(__file__).parents[1] / 'results'
_HEADER = '| network | seeds | error of the reference | error after surgery | kept | compression |'


def read_summaries(folder: Path = FOLDER) -> dict[str, list[dict[str, Any]]]:
    """Reads the summaries of runs.

    Args:
      folder: with files named NETWORK-SEED.json.

    Returns:
      `{network: its summaries}`, sorted by network and seed.

    Raises:
      ValueError: if the folder holds none.
    """
    paths = sorted(folder.glob('*-[0-9]*.json'))
    if not paths:
        raise ValueError(f'{folder} must hold files named NETWORK-SEED.json, but holds none')
    networks: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        summary = json.loads(path.read_text())
        networks.setdefault(summary['network'], []).append(summary)
    return networks


def table_row(summaries: Sequence[dict[str, Any]]) -> str:
    """Writes the runs of one network as a row in Markdown.

    Args:
      summaries: of runs that differ in the seed alone.

    Returns:
      The row: number of seeds, then the median of each quantity and its range.
    """

    def cell(name: str, form: str, unit: str) -> str:
        values = [summary[name] for summary in summaries]
        middle, low, high = statistics.median(values), min(values), max(values)
        return f'{middle:{form}}{unit} ({low:{form}} to {high:{form}})'

    cells = (
        NETWORK_NAMES[summaries[0]['network']],
        f'{len(summaries)}',
        cell('reference_error', '.2f', ' %'),
        cell('test_error', '.2f', ' %'),
        cell('kept', ',.0f', ''),
        cell('compression', '.1f', '×'),
    )
    return f'| {" | ".join(cells)} |'


def table(networks: dict[str, list[dict[str, Any]]]) -> str:
    """Writes the table of all networks in Markdown."""
    rows = [table_row(summaries) for summaries in networks.values()]
    return '\n'.join([_HEADER, '|---' * _HEADER.count(' |') + '|', *rows])


if __name__ == '__main__':
    print(table(read_summaries()))
