"""A whole run: reference network, surgery, fine-tuning, evaluation, report."""

from pathlib import Path
from typing import Any

from experiments.config.command_line import print_result
from experiments.devices import hosts
from experiments.training.flags import Config
from experiments.training.plan import make_plan


def run(config: Config) -> dict[str, Any]:
    """Does all that a configuration asks for and prints the result.

    Args:
      config: from the command line.

    Returns:
      The summary, as written to `summary.json`; where standard output is no terminal, its last
      line is the same as one JSON object.

    Raises:
      ValueError: if flags do not fit each other, the network or the folder.
      OSError: if a folder cannot be read or written.
      Diverged: if training breaks down.
      Stopped: after SIGTERM or SIGINT.
    """
    plan = make_plan(config)
    # What takes long to import comes once nothing is left to refuse.
    from experiments.reports import run_report
    from experiments.training.side_by_side import run_together
    from experiments.training.task import Task

    (summary,) = run_together(Task(config), [plan])
    if hosts.is_first():
        print(run_report.format_table(summary))
        print(f'\nReport: {Path(config.workdir) / "report.html"}')
        print_result(summary)
    return summary
