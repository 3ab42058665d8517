"""The tables of many runs: of a frontier and of a comparison."""

from experiments.networks.names import NETWORK_NAMES
from experiments.reports.tables import (
    Rows,
    Table,
    format_of,
    group_rows,
    is_by_density,
    middle_and_range,
)

FRONTIER_HEADER = (
    *('network', 'seeds', 'compression', 'kept'),
    *('error of the reference', 'error after surgery'),
)
# For each table of a comparison, heading: the column, its format and unit; without these it is a
# measurement of the network, in the unit of its rows.
COMPARE_TABLES = {
    'Medians over seeds, and in brackets their ranges': {
        'compression': ('compression', '.1f', '×'),
        'density': ('part_density', '.2%'),
        'parameters': ('kept', ',.0f'),
        'error of the reference': ('reference_error',),
        'error': ('test_error',),
        'steps to reach it': ('steps_to_reach', ',.0f'),
        'time': ('pruning_seconds', '.0f', ' s'),
        'state': ('state_mebibytes', '.1f', ' MiB'),
    },
    'Validation error around a random cut': {
        'before the cut': ('cut_before',),
        'after it': ('cut_after',),
        'in the end': ('cut_end',),
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
        `test_error`.
    """
    lines = []
    for (network, _), runs in group_rows(rows, 'network', 'target').items():
        lines.append(
            (
                NETWORK_NAMES.get(network) or network,
                f'{len(runs)}',
                middle_and_range(runs, 'compression', '.1f', '×'),
                middle_and_range(runs, 'kept', ',.0f'),
                _cell(runs, 'reference_error'),
                _cell(runs, 'test_error'),
            )
        )
    return [Table('Medians over seeds, and in brackets their ranges', FRONTIER_HEADER, lines)]


def compare_tables(rows: Rows) -> list[Table]:
    """The runs of a comparison, a row per variant and target: medians and ranges over seeds.

    Args:
      rows: of `experiments.compare`. Where some of them were cut, or counted what returned, tables
        of that follow.
    """
    groups = group_rows(rows, 'variant', 'target')
    # By density, the kept parameters say which network is smaller.
    others = {'compression'} if is_by_density(rows) else {'density', 'parameters'}
    tables = []
    for caption, every in COMPARE_TABLES.items():
        columns = {name: cell for name, cell in every.items() if name not in others}
        key = next(iter(columns.values()))[0]
        lines = [
            (name, f'{len(runs)}', *(_cell(runs, *cell) for cell in columns.values()))
            for (name, _), runs in groups.items()
            if runs[0].get(key, '') != ''
        ]
        if lines:
            tables.append(Table(caption, ('variant', 'seeds', *columns), lines))
    return tables


def _cell(runs: Rows, column: str, *form: str) -> str:
    return middle_and_range(runs, column, *(form or format_of(runs[0].get('unit', '%'))))
