"""The error-versus-compression frontier: targets × seeds, beside what others published.

python -m experiments.frontier --flagfile=experiments/flagfiles/frontier_lenet300.flags

Seeds are vmapped into one program. Each run has a folder of its own in the workdir and goes on
with --resume as any run does; one that is finished is read. So processes with seeds of their own
may share a workdir, and one with all seeds and --resume joins their tables.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.config import command_line
from experiments.sweeps.flags import FrontierConfig
from experiments.training.flags import Config
from experiments.training.plan import make_plan

COLUMNS = (
    *('network', 'dataset', 'target', 'seed', 'compression', 'kept'),
    *('unit', 'reference_error', 'test_error'),
    *('reference_validation_error', 'validation_error'),
    *('commit', 'jax', 'device'),
)


def frontier(config: FrontierConfig) -> list[dict[str, Any]]:
    """Does every run, writes `frontier.csv`, `.md`, `.png` and `.html`, and prints the table.

    Returns:
      One row for each run, of the columns of `frontier.csv`.

    Raises:
      As `experiments.sweeps.sweep.run_all` does.
    """
    plans = {run: make_plan(run) for _, run in config.named_runs()}
    # What takes long to import comes once nothing is left to refuse.
    from experiments.reports import plots, sweep_tables
    from experiments.sweeps import sweep

    to_rows = functools.partial(_to_rows, list(plans))
    tables, figure = sweep_tables.frontier_tables, plots.frontier_figure
    return sweep.report_all(config, plans, 'frontier', 'Frontier', to_rows, tables, figure)


def _to_rows(
    runs: Sequence[Config], summaries: Mapping[Config, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    rows = []
    for run in runs:
        if run in summaries:
            row = {'unit': '%', **summaries[run], 'target': run.compression or run.kernel_density}
            rows.append({name: row[name] for name in COLUMNS})
    return rows


if __name__ == '__main__':
    command_line.launch({}, frontier, FrontierConfig)
