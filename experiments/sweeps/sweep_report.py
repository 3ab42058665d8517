"""The page of many runs: of a frontier or a comparison."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.networks.names import NETWORK_NAMES
from experiments.reports import published
from experiments.reports.pages import Section, render
from experiments.reports.run_report import describe_environment, to_flags
from experiments.reports.tables import Rows, Table, format_of, is_by_density, middle_and_range


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
    """
    network, dataset = rows[0]['network'], rows[0]['dataset']
    number, unit = format_of(rows[0].get('unit', '%'))
    reference_error = statistics.median(row['reference_error'] for row in rows)
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
    sections.append(Section('Flags', lines=to_flags(flags), is_folded=True))
    sections.append(Section('Environment', lines=describe_environment(rows)))
    size = middle_and_range(rows, 'compression', '.0f', '×'), 'compression'
    if is_by_density(rows):
        size = middle_and_range(rows, 'kept', ',.0f'), 'parameters kept'
    return render(
        f'{title}: {NETWORK_NAMES.get(network) or network} on {dataset}',
        'Errors are on the test set; every parameter counts, biases included.',
        [
            (f'{len(rows)}', 'runs'),
            size,
            (f'{reference_error:{number}}{unit}', 'error of the references, median'),
        ],
        sections,
    )
