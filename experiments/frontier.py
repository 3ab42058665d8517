"""The error-versus-compression frontier: targets × seeds, beside what others published.

python -m experiments.frontier --flagfile=experiments/flagfiles/frontier_lenet300.flags

Seeds are vmapped into one program. Each run has a folder of its own in the workdir and goes on
with --resume as any run does; one that is finished costs no more than its evaluation.
"""

import csv
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import flags, plots, report
from experiments.files import write_whole
from experiments.flags import FrontierConfig
from experiments.run import run_together

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
    folder, rows = Path(config.workdir), []
    for target, group in itertools.groupby(config.runs(), lambda run: run.compression):
        runs = list(group)
        for begin in range(0, len(runs), config.side_by_side):
            for summary in run_together(runs[begin : begin + config.side_by_side]):
                rows.append({name: {**summary, 'target': target}[name] for name in COLUMNS})
            # After every batch, so that a sweep can be looked at while it goes on.
            write_whole(folder / 'frontier.csv', _to_csv(rows))
            picture = io.BytesIO()
            plots.frontier_figure(rows).savefig(picture, format='png')
            write_whole(folder / 'frontier.png', picture.getvalue())
    print(report.frontier_table(rows))
    print(f'\nTable and picture: {folder / "frontier.csv"}, {folder / "frontier.png"}')
    print(json.dumps(rows))
    return rows


def _to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


if __name__ == '__main__':
    flags.launch({}, sweep, FrontierConfig)
