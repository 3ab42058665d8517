"""Many runs: which are finished, which go side by side."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.flags import Config
from experiments.run import run_together

Summaries = Mapping[Config, Mapping[str, Any]]


def run_all(
    runs: Sequence[Config], side_by_side: int, on_batch: Callable[[Summaries], None]
) -> Summaries:
    """Does every run, those that differ in seed and places alone side by side.

    Args:
      runs: in the order to do them; with `resume` one that is finished is read.
      side_by_side: how many in one program, at most.
      on_batch: called with all summaries so far once some are added, so that a sweep can be
        looked at while it goes on.

    Returns:
      The summary of each run.

    Raises:
      As `experiments.run.run` does.
    """
    summaries = {run: summary for run in runs if run.resume and (summary := _finished(run))}
    for _, group in itertools.groupby(runs, _without_seed):
        left = [run for run in group if run not in summaries]
        for begin in range(0, len(left), side_by_side):
            batch = left[begin : begin + side_by_side]
            summaries |= zip(batch, run_together(batch), strict=True)
            on_batch(summaries)
    return summaries


def _without_seed(run: Config) -> dict[str, Any]:
    return {**run.identity(), 'seed': None, 'reference': None}


def _finished(run: Config) -> Mapping[str, Any] | None:
    """Reads the summary of a run that was finished with these flags, so as not to repeat it."""
    path = Path(run.workdir) / 'summary.json'
    summary = json.loads(path.read_text()) if path.exists() else {}
    return summary if summary.get('flags') == run.identity() else None
