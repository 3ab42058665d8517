"""A whole run: reference network, surgery, fine-tuning, evaluation, report."""

from pathlib import Path
from typing import Any

from experiments.config.command_line import identify, print_result
from experiments.devices import hosts
from experiments.training.flags import Config
from experiments.training.plan import make_plan
from experiments.training.workdir import check_claim


def run(config: Config) -> dict[str, Any]:
    """Does all that a configuration asks for and prints the result.

    Returns:
      The summary, as written to `summary.json`; where standard output is no terminal, its last
      line is the same as one JSON object.

    Raises:
      ValueError: if flags do not fit each other, the network or the folder.
      OSError: if a folder cannot be read or written.
      RuntimeError: if data are not to be had.
      Diverged: if training breaks down.
      Stopped: after SIGTERM or SIGINT.
    """
    plan, flags = make_plan(config), identify(config)
    if config.reference:
        from experiments.training import references  # brings orbax

        references.check(Path(config.reference), flags)
    folder = Path(config.workdir)
    hosts.on_first(lambda: check_claim(folder, flags, config.resume, config.overwrite))
    # What takes long to import comes once nothing is left to refuse.
    from experiments.reports import run_report
    from experiments.training.side_by_side import run_together
    from experiments.training.task import Task

    (summary,) = run_together(Task(config), [plan])
    if hosts.is_first():
        print(run_report.format_table(summary))
        print(f'\nReport: {folder / "report.html"}')
        print_result(summary)
    return summary
