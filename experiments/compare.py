"""Surgery against the others, and against itself with one thing changed: variants × seeds.

python -m experiments.compare --flagfile=experiments/flagfiles/compare_digits.flags

All variants of a size start from the same reference network of their seed, and all take as many
steps. Each run has a folder of its own in the workdir; with --resume those that are finished are
read, so processes with seeds of their own may share a workdir. The time of a run is that of all
that went side by side with it, after --resume without what was done before.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.config import command_line
from experiments.reports.records import read_records
from experiments.sweeps.flags import CompareConfig
from experiments.training.flags import Config
from experiments.training.plan import Plan, make_plan

COLUMNS = (
    *('variant', 'network', 'dataset', 'target', 'seed', 'compression', 'part_density', 'kept'),
    *('unit', 'reference_error'),
    *('reference_validation_error', 'test_error', 'validation_error'),
    *('steps_to_reach', 'pruning_seconds', 'state_mebibytes'),
    *('commit', 'jax', 'device'),
)


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """Does every run, writes `compare.csv`, `.md`, `.png` and `.html`, and prints the table.

    Returns:
      One row for each run, of the columns of `compare.csv`.

    Raises:
      As `experiments.sweeps.sweep.run_all` does.
    """
    runs = config.named_runs()
    plans = {run: make_plan(run) for _, run in runs}
    # What takes long to import comes once nothing is left to refuse.
    from experiments.reports import plots, sweep_tables
    from experiments.sweeps import sweep

    to_rows = functools.partial(_to_rows, {run: name for name, run in runs}, plans)
    tables, figure = sweep_tables.compare_tables, plots.compare_figure
    return sweep.report_all(config, plans, 'compare', 'Comparison', to_rows, tables, figure)


def _to_rows(
    variants: Mapping[Config, str],
    plans: Mapping[Config, Plan],
    summaries: Mapping[Config, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    rows = []
    for run, variant in variants.items():
        if run in summaries:
            records = read_records(run.workdir)
            target = run.kernel_density or run.compression or ''
            row = {'unit': '%', **summaries[run], 'variant': variant, 'target': target}
            tolerance = 0.1 if row['unit'] == '%' else 0.02
            row['steps_to_reach'] = steps_to_reach(records, tolerance)
            returns = {f'returns_{key}': value for key, value in row.get('returns', {}).items()}
            errors = _errors_of_cut(plans[run], row, records)
            rows.append({key: row.get(key, '') for key in COLUMNS} | errors | returns)
    return rows


def steps_to_reach(records: Sequence[Mapping[str, Any]], tolerance: float = 0.1) -> int:
    """Says after how many steps of pruning and fine-tuning a run was where it ended.

    Returns:
      The steps of the first record from which on its validation error is never more than the
      tolerance above the last, and what it keeps never more than a hundredth.
    """
    reached, before = 0, 0
    course = [record for record in records if record['phase'] != 'reference']
    error, kept = course[-1]['validation_error'], sum(course[-1]['kept'].values())
    for at, record in enumerate(course):
        if at and record['phase'] != course[at - 1]['phase']:
            before = course[at - 1]['step']
        steps = before + record['step']
        is_there = (
            record['validation_error'] <= error + tolerance
            and sum(record['kept'].values()) <= 1.01 * kept
        )
        if not is_there:
            reached = 0
        elif not reached:
            reached = steps
    return reached


def _errors_of_cut(plan: Plan, summary, records) -> dict[str, float]:
    """Says what a cut did to the validation error, by the records beside it."""
    if not plan.pruning.cut:
        return {}
    step = plan.pruning.cut_at
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
