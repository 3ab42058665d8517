"""What many runs report: a frontier or a comparison as tables and as a page."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.networks.models import NETWORK_NAMES
from experiments.reports import published
from experiments.reports.pages import Section, render
from experiments.reports.run_report import describe_environment, to_flags
from experiments.reports.tables import Rows, Table, middle_and_range

FRONTIER_HEADER = (
    *('network', 'seeds', 'compression', 'kept'),
    *('error of the reference', 'error after surgery'),
)
# For each table of a comparison, heading: the column, its format and unit.
COMPARE_TABLES = {
    'Medians over seeds, and in brackets their ranges': {
        'compression': ('compression', '.1f', '×'),
        'error of the reference': ('reference_error', '.2f', ' %'),
        'error': ('test_error', '.2f', ' %'),
        'steps to reach it': ('steps_to_reach', ',.0f'),
        'time': ('pruning_seconds', '.0f', ' s'),
        'state': ('state_mebibytes', '.1f', ' MiB'),
    },
    'Validation error around a random cut': {
        'before the cut': ('cut_before', '.2f', ' %'),
        'after it': ('cut_after', '.2f', ' %'),
        'in the end': ('cut_end', '.2f', ' %'),
        'compression': ('compression', '.1f', '×'),
    },
    'Connections that returned, and the training loss without them': {
        'ever pruned': ('returns_pruned', ',.0f'),
        'returned': ('returns_returned', ',.0f'),
        'of these kept': ('returns_returned_kept', ',.0f'),
        'loss': ('returns_loss', '.4f'),
        'without these': ('returns_loss_without', '.4f'),
        'others': ('returns_others_removed', ',.0f'),
        'without these others': ('returns_loss_without_others', '.4f'),
    },
}


def frontier_tables(rows: Rows) -> list[Table]:
    """The runs of a sweep, a row per target: medians and ranges over seeds.

    Args:
      rows: with at least `network`, `target`, `compression`, `kept`, `reference_error` and
        `test_error`, sorted by network and target.
    """
    lines = []
    for (network, _), group in itertools.groupby(rows, lambda row: (row['network'], row['target'])):
        runs = list(group)
        lines.append(
            (
                NETWORK_NAMES.get(network) or network,
                f'{len(runs)}',
                middle_and_range(runs, 'compression', '.1f', '×'),
                middle_and_range(runs, 'kept', ',.0f'),
                middle_and_range(runs, 'reference_error', '.2f', ' %'),
                middle_and_range(runs, 'test_error', '.2f', ' %'),
            )
        )
    return [Table('Medians over seeds, and in brackets their ranges', FRONTIER_HEADER, lines)]


def compare_tables(rows: Rows) -> list[Table]:
    """The runs of a comparison, a row per variant and target: medians and ranges over seeds.

    Args:
      rows: of `experiments.compare`, those of one variant and target side by side. Where some of
        them were cut, or counted what returned, tables of that follow.
    """
    groups = [
        (name, list(group))
        for (name, _), group in itertools.groupby(rows, lambda row: (row['variant'], row['target']))
    ]

    tables = []
    for caption, columns in COMPARE_TABLES.items():
        key = next(iter(columns.values()))[0]
        lines = [
            (name, f'{len(runs)}', *(middle_and_range(runs, *cell) for cell in columns.values()))
            for name, runs in groups
            if runs[0].get(key, '') != ''
        ]
        if lines:
            tables.append(Table(caption, ('variant', 'seeds', *columns), lines))
    return tables


def page(
    title: str,
    rows: Rows,
    tables: Sequence[Table],
    figure: Figure,
    flags: Mapping[str, Any],
    left_out: Mapping[str, str],
) -> str:
    """Many runs as a page: tables, picture, what others published, flags and environment.

    Args:
      title: what the runs are for, such as 'Frontier'.
      rows: one for each run, of one network and data set, with at least `network`, `dataset`,
        `reference_error`, `compression`, `test_error`, `commit`, `jax` and `device`.
      tables: of the rows.
      figure: of the rows.
      flags: of the sweep, name to value.
      left_out: runs that did not come to their end, folder to reason.

    Returns:
      HTML.
    """
    network, dataset = rows[0]['network'], rows[0]['dataset']
    sections = [Section('Result', tables=tables, figures=[figure])]
    if left_out:
        lines = [f'{folder}: {reason}' for folder, reason in left_out.items()]
        sections.append(Section('Left out', lines=lines))
    if errors := published.find_errors(rows):
        lines = [
            (who, f'{compression:g}×', 'no drop' if error is None else f'{error:.2f} %')
            for who, compression, error in errors
        ]
        table = Table('On MNIST, every parameter counted', ('by', 'compression', 'error'), lines)
        sections.append(Section('Published results', tables=[table]))
    sections.append(Section('Flags', lines=to_flags(flags)))
    sections.append(Section('Environment', lines=describe_environment(rows)))
    return render(
        f'{title}: {NETWORK_NAMES.get(network) or network} on {dataset}',
        'Errors are on the test set; every parameter counts, biases included.',
        [
            (f'{len(rows)}', 'runs'),
            (middle_and_range(rows, 'compression', '.0f', '×'), 'compression'),
            (
                f'{statistics.median(row["reference_error"] for row in rows):.2f} %',
                'error of the references, median',
            ),
        ],
        sections,
    )
