"""Many runs: which are finished, which go side by side, what is written of them."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from matplotlib.figure import Figure

from dns_jax.files.writing import write_whole
from experiments.config.command_line import identify, names_of, print_result
from experiments.devices import progress
from experiments.reports import plots
from experiments.reports.records import SUMMARY_FILE
from experiments.reports.summaries import read_summary
from experiments.reports.tables import Table, to_csv, to_text
from experiments.sweeps import sweep_report
from experiments.sweeps.flags import SweepConfig
from experiments.training.divergence import Diverged
from experiments.training.flags import Config
from experiments.training.plan import Plan
from experiments.training.side_by_side import run_together
from experiments.training.task import Task

Rows = list[dict[str, Any]]
Summaries = Mapping[Config, Mapping[str, Any]]
Plans = Mapping[Config, Plan]


def run_all(
    plans: Plans, side_by_side: int, on_batch: Callable[[Summaries], Any]
) -> tuple[Summaries, dict[str, str]]:
    """Does every run, those that differ in seed and places alone side by side.

    Args:
      plans: of each run, in the order to do them; with `resume` one that is finished is read.
      side_by_side: how many in one program, at most.
      on_batch: called with all summaries so far once some are added, so that a sweep can be
        looked at while it goes on.

    Returns:
      The summary of each run that came to its end, and of the others, by folder, why they did not:
      they broke down, or their reference did.

    Raises:
      RuntimeError: if none came to its end.
      As `experiments.training.run.run` does.
    """
    runs = list(plans)
    summaries = {run: summary for run in runs if run.resume and (summary := _finished(run))}
    left_out: dict[str, str] = {}
    without_reference = set()  # folders
    batches: list[list[Config]] = []
    task = of_task = None
    for _, group in itertools.groupby(runs, _without_seed):
        left = [run for run in group if run not in summaries]
        batches += [left[at : at + side_by_side] for at in range(0, len(left), side_by_side)]
    with progress.bar(total=len(runs), initial=len(summaries), desc='sweep', unit=' runs') as bar:
        for batch in batches:
            bar.set_postfix_str(', '.join(Path(run.workdir).name for run in batch))
            able = [run for run in batch if run.reference not in without_reference]
            found, broken = {}, {}
            if able:
                if task is None or _task_of(able[0]) != of_task:
                    task = None  # before the next: it holds the data
                    task, of_task = Task(able[0]), _task_of(able[0])
                found, broken = _run_batch(task, [plans[run] for run in able])
            reasons = {run: f'{error}' for run, error in broken.items()}
            without_reference |= {r.workdir for r, e in broken.items() if e.phase == 'reference'}
            for run in batch:
                if run not in able:
                    reasons[run] = f'the reference of {run.reference} broke down'
            for run, reason in reasons.items():
                # At once: the rest may take hours.
                logging.warning('%s is left out: %s', run.workdir, reason)
                left_out[run.workdir] = reason
            summaries |= found
            bar.update(len(batch))
            if found:
                on_batch(summaries)
    if not summaries:
        raise RuntimeError(f'none of {len(runs)} runs came to its end: {left_out}')
    return summaries, left_out


def _run_batch(task: Task, batch: Sequence[Plan]) -> tuple[Summaries, Mapping[Config, Diverged]]:
    """Does some runs side by side; gives the summaries, and the errors of those that break down."""
    runs = [plan.config for plan in batch]
    try:
        return dict(zip(runs, run_together(task, batch), strict=True)), {}
    except Diverged as error:
        if len(batch) == 1:
            return {}, {runs[0]: error}
    # One by one, so that the others come to their end: all have begun, so each goes on.
    summaries, broken = {}, {}
    for run, plan in zip(runs, batch, strict=True):
        again = dataclasses.replace(run, resume=True, overwrite=False)
        own, errors = _run_batch(task, [dataclasses.replace(plan, config=again)])
        # Their keys are the runs continued.
        summaries |= zip([run] * len(own), own.values(), strict=True)
        broken |= zip([run] * len(errors), errors.values(), strict=True)
    return summaries, broken


def report_all(
    config: SweepConfig,
    plans: Plans,
    name: str,
    title: str,
    to_rows: Callable[[Summaries], Rows],
    to_tables: Callable[[Rows], list[Table]],
    to_figure: Callable[[Rows], Figure],
) -> Rows:
    """Does every run of a sweep, writes `NAME.csv`, `.md`, `.png` and `.html`, prints the tables.

    Args:
      config: of the sweep.
      plans: of its runs.
      name: of the files.
      title: of the page.
      to_rows: gives a row for each run that has a summary; the columns are all that a row has.
      to_tables: makes tables of rows.
      to_figure: draws rows.

    Returns:
      The rows; where standard output is no terminal, its last line is the same as JSON.

    Raises:
      As `run_all` does.
    """
    path = Path(config.workdir) / name

    def write(summaries, left_out=None):
        rows = to_rows(summaries)
        tables = to_tables(rows)
        write_whole(path.with_suffix('.csv'), to_csv(rows))
        write_whole(path.with_suffix('.md'), to_text(tables) + '\n')
        figure = to_figure(rows)
        plots.save(figure, path.with_suffix('.png'))
        page = sweep_report.page(title, rows, tables, figure, identify(config), left_out or {})
        write_whole(path.with_suffix('.html'), page)
        return rows

    rows = write(*run_all(plans, config.side_by_side, write))
    print(to_text(to_tables(rows)))
    print(f'\nReport: {path}.html')
    print_result(rows)
    return rows


def _task_of(run: Config) -> tuple[Any, ...]:
    return tuple(getattr(run, name) for name in names_of(type(run), 'task') if name != 'seed')


def _without_seed(run: Config) -> dict[str, Any]:
    # Of two neighbours the second may start from the reference that the first trains.
    return {**identify(run), 'seed': None, 'reference': run.reference is None}


def _finished(run: Config) -> Mapping[str, Any] | None:
    """Reads the summary of a run that was finished with these flags, so as not to repeat it."""
    path = Path(run.workdir) / SUMMARY_FILE
    summary = read_summary(path) if path.exists() else {}
    return summary if summary.get('flags') == identify(run) else None
