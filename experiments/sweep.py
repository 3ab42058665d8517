"""Many runs: which are finished, which go side by side, what is written of them."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from absl import logging
from matplotlib.figure import Figure

from dns_jax.files import write_whole
from experiments import plots, progress, sweep_report
from experiments.divergence import Diverged
from experiments.flags import Config
from experiments.run import run_together
from experiments.summaries import read_summary
from experiments.sweep_flags import FrontierConfig
from experiments.tables import Table, to_text, write_csv
from experiments.workdir import SUMMARY_FILE

Rows = list[dict[str, Any]]
Summaries = Mapping[Config, Mapping[str, Any]]


def run_all(
    runs: Sequence[Config], side_by_side: int, on_batch: Callable[[Summaries], Any]
) -> Summaries:
    """Does every run, those that differ in seed and places alone side by side.

    Args:
      runs: in the order to do them; with `resume` one that is finished is read.
      side_by_side: how many in one program, at most.
      on_batch: called with all summaries so far once some are added, so that a sweep can be
        looked at while it goes on.

    Returns:
      The summary of each run, but for those that broke down, and those whose reference did.

    Raises:
      RuntimeError: if all of them broke down.
      As `experiments.run.run` does.
    """
    summaries = {run: summary for run in runs if run.resume and (summary := _finished(run))}
    broken: set[str | None] = set()  # folders
    batches = []
    for _, group in itertools.groupby(runs, _without_seed):
        left = [run for run in group if run not in summaries]
        batches += [left[at : at + side_by_side] for at in range(0, len(left), side_by_side)]
    with progress.bar(total=len(runs), initial=len(summaries), desc='sweep', unit=' runs') as bar:
        for batch in batches:
            bar.set_postfix_str(', '.join(Path(run.workdir).name for run in batch))
            found = _run_batch(batch, broken)
            broken |= {run.workdir for run in batch if run not in found}
            summaries |= found
            bar.update(len(batch))
            if found:
                on_batch(summaries)
    if not summaries:
        raise RuntimeError(f'none of {len(runs)} runs came to its end; the warnings say why')
    return summaries


def _run_batch(batch: Sequence[Config], broken: Set[str | None]) -> Summaries:
    """Does some runs side by side; one that breaks down is left out, or whose reference did."""
    try:
        return dict(zip(batch, run_together(batch), strict=True))
    except (Diverged, FileNotFoundError) as error:
        is_known = any(run.reference in broken for run in batch)
        if isinstance(error, FileNotFoundError) and not is_known:
            raise
        if len(batch) == 1:
            logging.warning('%s is left out: %s', batch[0].workdir, error)
            return {}
    # One by one, so that the others come to their end.
    alone = [
        _run_batch([dataclasses.replace(run, resume=True, overwrite=False)], broken)
        for run in batch
    ]
    return {
        run: next(iter(found.values())) for run, found in zip(batch, alone, strict=True) if found
    }


def report_all(
    config: FrontierConfig,
    name: str,
    to_rows: Callable[[Summaries], Rows],
    to_tables: Callable[[Rows], list[Table]],
    to_figure: Callable[[Rows], Figure],
) -> Rows:
    """Does every run of a sweep, writes `NAME.csv`, `.md`, `.png` and `.html`, prints the tables.

    Args:
      config: of the sweep.
      name: of the files.
      to_rows: gives a row for each run that has a summary; the columns are all that a row has.
      to_tables: makes tables of rows.
      to_figure: draws rows.

    Returns:
      The rows; the last line on standard output is the same as JSON.

    Raises:
      As `run_all` does.
    """
    path = Path(config.workdir) / name

    def write(summaries):
        rows = to_rows(summaries)
        tables, figure = to_tables(rows), to_figure(rows)
        page = sweep_report.page(name.capitalize(), rows, tables, figure, config.identity())
        write_csv(path.with_suffix('.csv'), rows)
        write_whole(path.with_suffix('.md'), to_text(tables) + '\n')
        plots.save(figure, path.with_suffix('.png'))
        write_whole(path.with_suffix('.html'), page)
        return rows

    rows = write(run_all(config.runs(), config.side_by_side, write))
    print(to_text(to_tables(rows)))
    print(f'\nReport: {path}.html')
    print(json.dumps(rows))
    return rows


def _without_seed(run: Config) -> dict[str, Any]:
    # Of two neighbours the second may start from the reference that the first trains.
    return {**run.identity(), 'seed': None, 'reference': run.reference is None}


def _finished(run: Config) -> Mapping[str, Any] | None:
    """Reads the summary of a run that was finished with these flags, so as not to repeat it."""
    path = Path(run.workdir) / SUMMARY_FILE
    summary = read_summary(path) if path.exists() else {}
    return summary if summary.get('flags') == run.identity() else None
