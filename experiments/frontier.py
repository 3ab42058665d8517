"""The error-versus-compression frontier: targets × seeds, beside what others published.

python -m experiments.frontier --flagfile=experiments/flagfiles/frontier_lenet300.flags

Seeds are vmapped into one program. Each run has a folder of its own in the workdir and goes on
with --resume as any run does; one that is finished is read. So processes with seeds of their own
may share a workdir, and one with all seeds and --resume joins their tables.
"""

from collections.abc import Sequence
from typing import Any

from experiments.config import command_line
from experiments.config.flags import Config
from experiments.reports import plots, sweep_tables
from experiments.sweeps import sweep
from experiments.sweeps.flags import FrontierConfig

COLUMNS = (
    *('network', 'dataset', 'target', 'seed', 'compression', 'kept', 'reference_error'),
    *('test_error', 'reference_validation_error', 'validation_error'),
    *('commit', 'jax', 'device'),
)


def frontier(config: FrontierConfig) -> list[dict[str, Any]]:
    """Does every run, writes `frontier.csv`, `.md`, `.png` and `.html`, and prints the table.

    Args:
      config: from the command line.

    Returns:
      One row for each run, of the columns of `frontier.csv`; the last line on standard output is
      the same as JSON.

    Raises:
      As `experiments.training.run.run` does.
    """
    runs = config.runs()
    return sweep.report_all(
        config,
        'frontier',
        'Frontier',
        lambda summaries: _to_rows(runs, summaries),
        sweep_tables.frontier_tables,
        plots.frontier_figure,
    )


def _to_rows(runs: Sequence[Config], summaries: sweep.Summaries) -> list[dict[str, Any]]:
    return [
        {name: {**summaries[run], 'target': run.compression}[name] for name in COLUMNS}
        for run in runs
        if run in summaries
    ]


if __name__ == '__main__':
    command_line.launch({}, frontier, FrontierConfig)
