"""Surgery against the others, and against itself with one thing changed: variants × seeds.

python -m experiments.compare --flagfile=experiments/flagfiles/compare_digits.flags

All variants start from the same reference network of their seed and take as many steps. Each run
has a folder of its own in the workdir; with --resume those that are finished are read, so
processes with seeds of their own may share a workdir. The time of a run is that of all that went
side by side with it, after --resume without what was done before.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.config import command_line
from experiments.config.flags import Config
from experiments.config.parsers import parse_step
from experiments.reports import plots, sweep_tables
from experiments.reports.records import read_records
from experiments.sweeps import sweep
from experiments.sweeps.flags import CompareConfig

COLUMNS = (
    *('variant', 'network', 'dataset', 'target', 'seed', 'compression', 'kept', 'reference_error'),
    *('reference_validation_error', 'test_error', 'validation_error'),
    *('steps_to_reach', 'pruning_seconds', 'state_mebibytes'),
    *('commit', 'jax', 'device'),
)


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """Does every run, writes `compare.csv`, `.md`, `.png` and `.html`, and prints the table.

    Args:
      config: from the command line.

    Returns:
      One row for each run, of the columns of `compare.csv`; the last line on standard output is
      the same as JSON.

    Raises:
      As `experiments.training.run.run` does.
    """
    runs = config.named_runs()
    return sweep.report_all(
        config,
        'compare',
        'Comparison',
        lambda summaries: _to_rows(runs, summaries),
        sweep_tables.compare_tables,
        plots.compare_figure,
    )


def _to_rows(
    runs: Sequence[tuple[str, Config]], summaries: sweep.Summaries
) -> list[dict[str, Any]]:
    rows = []
    for name, run in runs:
        if run in summaries:
            records = read_records(run.workdir)
            row = {**summaries[run], 'variant': name, 'target': run.compression or ''}
            row['steps_to_reach'] = steps_to_reach(records)
            returns = {f'returns_{key}': value for key, value in row.get('returns', {}).items()}
            rows.append(
                {key: row[key] for key in COLUMNS} | _errors_of_cut(run, row, records) | returns
            )
    return rows


def steps_to_reach(records: Sequence[Mapping[str, Any]]) -> int:
    """Says after how many steps of pruning and fine-tuning a run was where it ended.

    Args:
      records: of the run.

    Returns:
      The steps of the first record from which on its validation error is never more than a tenth
      of a point above the last, and what it keeps never more than a hundredth.
    """
    reached, before = 0, 0
    course = [record for record in records if record['phase'] != 'reference']
    error, kept = course[-1]['validation_error'], sum(course[-1]['kept'].values())
    for at, record in enumerate(course):
        if at and record['phase'] != course[at - 1]['phase']:
            before = course[at - 1]['step']
        steps = before + record['step']
        is_there = (
            record['validation_error'] <= error + 0.1
            and sum(record['kept'].values()) <= 1.01 * kept
        )
        if not is_there:
            reached = 0
        elif not reached:
            reached = steps
    return reached


def _errors_of_cut(run, summary, records) -> dict[str, float]:
    """Says what a cut did to the validation error, by the records beside it."""
    if not run.cut:
        return {}
    step = parse_step(run.cut_at, run.surgery_steps)
    surgery = [record for record in records if record['phase'] == 'surgery']
    before = [record['validation_error'] for record in surgery if record['step'] <= step]
    after = [record['validation_error'] for record in surgery if record['step'] > step]
    return {
        'cut_before': [summary['reference_validation_error'], *before][-1],
        'cut_after': after[0],
        'cut_end': records[-1]['validation_error'],
    }


if __name__ == '__main__':
    command_line.launch({}, compare, CompareConfig)
