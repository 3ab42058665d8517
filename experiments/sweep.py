"""Many runs: which are finished, which go side by side, what is written of them."""

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from matplotlib.figure import Figure

from dns_jax.files import write_whole
from experiments.commands import FrontierConfig
from experiments.divergence import Diverged
from experiments.flags import Config
from experiments.run import run_together
from experiments.summaries import read_summary

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
      The summary of each run, but for those that broke down.

    Raises:
      As `experiments.run.run` does.
    """
    summaries = {run: summary for run in runs if run.resume and (summary := _finished(run))}
    for _, group in itertools.groupby(runs, _without_seed):
        left = [run for run in group if run not in summaries]
        for begin in range(0, len(left), side_by_side):
            batch = left[begin : begin + side_by_side]
            summaries |= _run_batch(batch)
            on_batch(summaries)
    return summaries


def _run_batch(batch: Sequence[Config]) -> Summaries:
    """Does some runs side by side; one that breaks down is left out."""
    try:
        return dict(zip(batch, run_together(batch), strict=True))
    except Diverged as error:
        if len(batch) == 1:
            logging.warning('%s is left out: %s', batch[0].workdir, error)
            return {}
    # One by one, so that the others come to their end.
    alone = [_run_batch([dataclasses.replace(run, resume=True, overwrite=False)]) for run in batch]
    return {
        run: next(iter(found.values())) for run, found in zip(batch, alone, strict=True) if found
    }


def report_all(
    config: FrontierConfig,
    name: str,
    to_rows: Callable[[Summaries], Rows],
    to_table: Callable[[Rows], str],
    to_figure: Callable[[Rows], Figure],
) -> Rows:
    """Does every run of a sweep, writes `NAME.csv`, `.md` and `.png`, and prints the table.

    Args:
      config: of the sweep.
      name: of the files.
      to_rows: gives a row for each run that has a summary; the columns are all that a row has.
      to_table: writes rows in Markdown.
      to_figure: draws rows.

    Returns:
      The rows; the last line on standard output is the same as JSON.

    Raises:
      As `run_all` does.
    """
    path = Path(config.workdir) / name

    def write(summaries):
        rows, text, picture = to_rows(summaries), io.StringIO(), io.BytesIO()
        columns = dict.fromkeys(column for row in rows for column in row)
        writer = csv.DictWriter(text, list(columns), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
        to_figure(rows).savefig(picture, format='png')
        write_whole(path.with_suffix('.csv'), text.getvalue())
        write_whole(path.with_suffix('.md'), to_table(rows) + '\n')
        write_whole(path.with_suffix('.png'), picture.getvalue())
        return rows

    rows = write(run_all(config.runs(), config.side_by_side, write))
    print(to_table(rows))
    print(f'\nTable and picture: {path}.md, {path}.png')
    print(json.dumps(rows))
    return rows


def _without_seed(run: Config) -> dict[str, Any]:
    return {**run.identity(), 'seed': None, 'reference': None}


def _finished(run: Config) -> Mapping[str, Any] | None:
    """Reads the summary of a run that was finished with these flags, so as not to repeat it."""
    path = Path(run.workdir) / 'summary.json'
    summary = read_summary(path) if path.exists() else {}
    return summary if summary.get('flags') == run.identity() else None
