"""The error-versus-compression frontier: targets × seeds, beside what others published.

python -m experiments.frontier --flagfile=experiments/flagfiles/frontier_lenet300.flags

Seeds are vmapped into one program. Each run has a folder of its own in the workdir and goes on
with --resume as any run does; one that is finished is read. So processes with seeds of their own
may share a workdir, and one with all seeds and --resume joins their tables.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import flags, plots, report
from experiments.commands import FrontierConfig
from experiments.files import write_whole
from experiments.flags import Config
from experiments.sweep import Summaries, run_all

COLUMNS = (
    *('network', 'dataset', 'target', 'seed', 'compression', 'kept', 'reference_error'),
    *('test_error', 'reference_validation_error', 'validation_error'),
    *('commit', 'jax', 'device'),
)


def sweep(config: FrontierConfig) -> list[dict[str, Any]]:
    """Does every run, writes `frontier.csv` and `frontier.png`, and prints the table.

    Args:
      config: from `experiments.flags`.

    Returns:
      One row for each run, of the columns of `frontier.csv`; the last line on standard output is
      the same as JSON.

    Raises:
      As `experiments.run.run` does.
    """
    folder, runs = Path(config.workdir), config.runs()
    summaries = run_all(
        runs, config.side_by_side, lambda done: _write(folder, _to_rows(runs, done))
    )
    rows = _to_rows(runs, summaries)
    _write(folder, rows)
    print(report.frontier_table(rows))
    print(f'\nTable and picture: {folder / "frontier.csv"}, {folder / "frontier.png"}')
    print(json.dumps(rows))
    return rows


def _to_rows(runs: Sequence[Config], summaries: Summaries) -> list[dict[str, Any]]:
    return [
        {name: {**summaries[run], 'target': run.compression}[name] for name in COLUMNS}
        for run in runs
        if run in summaries
    ]


def _write(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    table, picture = io.StringIO(), io.BytesIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    plots.frontier_figure(rows).savefig(picture, format='png')
    write_whole(folder / 'frontier.csv', table.getvalue())
    write_whole(folder / 'frontier.png', picture.getvalue())


if __name__ == '__main__':
    flags.launch({}, sweep, FrontierConfig)
