"""Tests of compare: variants side by side on the digits, their tables and picture."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import opened
import pytest
import short_sweep
from searches import parse

from experiments import compare
from experiments.config.command_line import make
from experiments.reports import plots, sweep_tables
from experiments.reports.records import read_records
from experiments.reports.tables import to_text
from experiments.sweeps import sweep, sweep_report
from experiments.sweeps.flags import CompareConfig
from experiments.training.plan import make_plan

SHORT = {**short_sweep.SHORT, 'compressions': '30,60,120', 'side_by_side': 1}
VARIANTS = (
    'surgery: --count_returns',
    'Han et al.: --pruner=han --c_rate=0.5 --rounds=2 --cut=0.2 --cut_at=49',
    'RigL: --pruner=rigl',
)


@pytest.fixture(scope='module')
def config(tmp_path_factory, data_dir):
    workdir = str(tmp_path_factory.mktemp('compare') / 'compare')
    fields = {**SHORT, 'compressions': '20', 'variant': VARIANTS}
    return make(CompareConfig, **fields, data_dir=str(data_dir), workdir=workdir)


@pytest.fixture(scope='module')
def rows(config):
    return compare.compare(config)


@pytest.mark.slow
def test_every_variant_is_run_with_every_seed(config, rows):
    assert [(row['variant'], row['target'], row['seed']) for row in rows] == [
        *(('surgery', 20.0, 0), ('surgery', 20.0, 1)),
        *(('Han et al.', '', 0), ('Han et al.', '', 1)),
        *(('RigL', 20.0, 0), ('RigL', 20.0, 1)),
    ]
    for row in rows:
        if row['target']:
            assert row['kept'] == pytest.approx(266_610 / 20, abs=4)
        assert row['pruning_seconds'] > 0
        assert row['reference_error'] == rows[row['seed']]['reference_error']
    folders = {path.parent.parent.name for path in Path(config.workdir).glob('*/*/reference')}
    assert folders == {'surgery-20-0', 'surgery-20-1'}
    # W, its momentum, T and, of the first, two more trees like T: 4 + 4 + 1 + 2 bytes a weight.
    sizes = {row['variant']: row['state_mebibytes'] * 2**20 for row in rows}
    assert sizes['surgery'] == pytest.approx(11 * 266_610, rel=0.01)
    assert sizes['RigL'] == pytest.approx(9 * 266_610, rel=0.01)


@pytest.mark.slow
def test_what_returned_and_what_was_cut_is_told(config, rows):
    for row in rows:
        assert ('returns_pruned' in row) == (row['variant'] == 'surgery')
        assert ('cut_after' in row) == (row['variant'] == 'Han et al.')
    for row in rows[:2]:
        assert row['returns_pruned'] >= row['returns_returned'] >= row['returns_returned_kept'] > 0
        assert row['returns_test_error'] == row['test_error']
        assert row['returns_loss_without'] != row['returns_loss']
    for row in rows[2:4]:
        folder = Path(config.workdir) / f'han-et-al-{row["seed"]}'
        errors = [record['validation_error'] for record in read_records(folder)]
        # The cut of step 49 falls into the record of step 50, before which there is none.
        assert (row['cut_before'], row['cut_after'], row['cut_end']) == (
            *(row['reference_validation_error'], errors[0]),
            errors[-1],
        )


@pytest.mark.slow
def test_tables_and_files_hold_the_rows(config, rows, capsys, monkeypatch):
    monkeypatch.setattr(sweep, 'run_together', None)  # all are finished
    assert compare.compare(opened.change(config, resume=True)) == rows
    printed = capsys.readouterr().out
    tables = to_text(sweep_tables.compare_tables(rows))
    assert printed.startswith(tables)
    assert json.loads(printed.splitlines()[-1]) == rows
    folder = Path(config.workdir)
    assert (folder / 'compare.md').read_text() == tables + '\n'
    assert (folder / 'compare.png').read_bytes().startswith(b'\x89PNG')
    with (folder / 'compare.csv').open(newline='') as file:
        read = list(csv.DictReader(file))
    assert [{k: v for k, v in one.items() if v} for one in read] == [
        {k: str(v) for k, v in row.items() if v != ''} for row in rows
    ]


def test_tables_give_medians_and_ranges():
    row = {'variant': 'a', 'target': 50.0, 'compression': 50.0, 'steps_to_reach': 9_000}
    row |= {'reference_error': 2.0, 'pruning_seconds': 12.3, 'state_mebibytes': 2.288}
    rows = [{**row, 'test_error': error} for error in (1.8, 2.1, 1.9)]
    rows += [{**row, 'variant': 'b', 'test_error': 3.0, 'cut_before': 2.0, 'cut_after': 9.5}]
    rows[-1]['cut_end'] = 2.25
    first, second = to_text(sweep_tables.compare_tables(rows)).split('\n\n')
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in first.splitlines()]
    assert cells[2:] == [
        ['a', '3', '50.0×', '2.00 %', '1.90 % (1.80 to 2.10)', '9,000', '12 s', '2.3 MiB'],
        ['b', '1', '50.0×', '2.00 %', '3.00 %', '9,000', '12 s', '2.3 MiB'],
    ]
    assert [cell.strip() for cell in second.splitlines()[2].strip('|').split('|')] == [
        *('b', '1', '2.00 %', '9.50 %', '2.25 %', '50.0×'),
    ]


def test_tables_pictures_and_pages_say_the_unit_of_the_rows():
    row = {'network': 'gpt', 'dataset': 'tiny_shakespeare', 'unit': 'bits/character', 'seed': 0}
    row |= {'variant': 'a', 'target': 4.0, 'compression': 4.0, 'kept': 100, 'steps_to_reach': 50}
    row |= {'reference_error': 2.0, 'pruning_seconds': 12.3, 'state_mebibytes': 2.288}
    row |= {'commit': 'abc1234', 'jax': '0.10.2', 'device': 'cpu'}
    rows = [{**row, 'test_error': error} for error in (2.5, 2.75)]
    wanted = '2.625 bits/character (2.500 to 2.750)'
    for tables_of, figure in (
        (sweep_tables.compare_tables, plots.compare_figure),
        (sweep_tables.frontier_tables, plots.frontier_figure),
    ):
        tables, picture = tables_of(rows), figure(rows)
        assert wanted in to_text(tables)
        assert '2.000 bits/character' in to_text(tables)
        assert picture.axes[0].get_ylabel() == 'test error (bits/character)'
        page = sweep_report.page('Some', rows, tables, picture, {}, {})
        assert '2.000 bits/character' in page
        assert '%' not in re.sub('<style>.*?</style>', '', page, flags=re.DOTALL).split('<body')[1]


def test_variants_of_another_size_are_trained_as_such(monkeypatch):
    options = {'network': 'gpt', 'dataset': 'tiny_shakespeare', 'optimizer': 'adamw', 'seeds': 2}
    variants = ('surgery:', 'gradual: --pruner=gradual', 'narrow: --density=1 --width=32')
    config = parse(
        *(f'--{name}={value}' for name, value in options.items()),
        *(f'--variant={variant}' for variant in variants),
        '--kernel_densities=0.1',
        config_type=CompareConfig,
    )
    sizes = []

    def open_task(run):
        sizes.append(run.network_options)
        return run.network_options

    def run_together(task, plans):
        return [{'task': task} for _ in plans]

    monkeypatch.setattr(sweep, 'Task', open_task)
    monkeypatch.setattr(sweep, 'run_together', run_together)
    plans = {run: make_plan(run) for _, run in config.named_runs()}
    summaries, _ = sweep.run_all(plans, 1, lambda summaries: None)
    assert {run: found['task'] for run, found in summaries.items()} == {
        run: run.network_options for run in plans
    }
    assert sizes == [{}, {'width': 32}]


def test_networks_of_a_density_stand_by_their_parameters():
    row = {'network': 'gpt', 'dataset': 'tiny_shakespeare', 'unit': 'bits/character'}
    row |= {'reference_error': 2.0, 'test_error': 2.5, 'pruning_seconds': 12.3}
    row |= {'state_mebibytes': 2.288, 'steps_to_reach': 50}
    pruned = {'variant': 'a', 'target': 0.1, 'compression': 4.0, 'part_density': 0.1, 'kept': 1500}
    narrow = {'variant': 'b', 'target': '', 'compression': 1.0, 'part_density': 1.0, 'kept': 1600}
    rows = [{**row, **pruned}, {**row, **narrow}]
    header, _, *lines = to_text(sweep_tables.compare_tables(rows)).splitlines()
    assert 'compression' not in header
    assert [[cell.strip() for cell in line.split('|')][3:5] for line in lines] == [
        ['10.00%', '1,500'],
        ['100.00%', '1,600'],
    ]
    (axes,) = plots.compare_figure(rows).axes
    assert axes.get_xlabel() == 'parameters kept'
    sizes = [container.lines[0].get_xdata().item() for container in axes.containers]
    assert sizes == pytest.approx([1500, 1600], rel=0.04)  # a little apart
    low, high = axes.get_xlim()
    assert high / low > 3.9  # or sizes that are alike would seem far apart
    (million,) = plots.compare_figure([{**row, **pruned, 'kept': 10**6}]).axes
    assert million.xaxis.get_major_formatter()(10**6) == '1,000,000'
    page = sweep_report.page('Some', rows, [], plots.compare_figure(rows), {}, {})
    assert 'parameters kept' in page
    assert 'compression' not in re.sub('<style>.*?</style>', '', page, flags=re.DOTALL)


def test_steps_to_reach():
    def record(phase, step, error, kept):
        return {'phase': phase, 'step': step, 'validation_error': error, 'kept': {'a': kept}}

    course = [
        record('reference', 100, 2.0, 1000),
        record('surgery', 100, 2.05, 500),
        record('surgery', 200, 2.05, 101),
        record('surgery', 300, 2.2, 100),
        record('finetuning', 50, 2.1, 100),
        record('finetuning', 100, 2.0, 100),
    ]
    assert compare.steps_to_reach(course) == 350
    course[3]['validation_error'] = 2.05
    assert compare.steps_to_reach(course) == 200
    course[2]['kept'] = {'a': 102}
    assert compare.steps_to_reach(course) == 300


def test_variants_are_flags():
    config = make(
        CompareConfig,
        **{**SHORT, 'compressions': '20,50'},
        workdir='w',
        variant=('a B: --pruner=set --drop=0.1', 'c: --c_rate=fc*:1 --nosplicing'),
    )
    runs = [
        (name, run.compression, run.seed, run.workdir, run.reference)
        for name, run in (config.named_runs())
    ]
    assert runs == [
        ('a B', 20.0, 0, 'w/a-b-20-0', None),
        ('a B', 20.0, 1, 'w/a-b-20-1', None),
        ('a B', 50.0, 0, 'w/a-b-50-0', 'w/a-b-20-0'),
        ('a B', 50.0, 1, 'w/a-b-50-1', 'w/a-b-20-1'),
        ('c', None, 0, 'w/c-0', 'w/a-b-20-0'),
        ('c', None, 1, 'w/c-1', 'w/a-b-20-1'),
    ]
    (_, first), *_, (_, last) = config.named_runs()
    assert (first.pruner, first.drop, first.splicing) == ('set', 0.1, True)
    assert (last.pruner, last.c_rate, last.splicing) == ('surgery', 'fc*:1', False)


@pytest.mark.parametrize(
    ('variants', 'message'),
    [
        ((), '--variant must be given at least once'),
        (('surgery',), '--variant=surgery must be NAME: FLAGS'),
        ((': --nosplicing',), 'must be NAME: FLAGS'),
        (('a: --nosplicing', 'a: --pruner=set'), 'must have a name of its own'),
        (('a: --pruner=magic',), '--variant=a: --pruner=magic: flag --pruner=magic'),
        (('a: --spicing',), "Unknown command line flag 'spicing'"),
        (('a: x',), r"has \['x'\]"),
        (('a: --c_rate="1',), '--variant=a: --c_rate="1: No closing quotation'),
        (('a: --seed=1',), r"not \['seed'\]"),
        (('a: --reference_steps=1',), r"not \['reference_steps'\]"),
        (
            ('c > 1: --pruner=set', 'c < 1: --nosplicing'),
            'but two make .*runs/compare/c-1-30',
        ),
        (('a: --surgery_steps=1000', 'b: --nosplicing'), r'take \[150, 1050\]'),
        (('a: --pruner=han',), '--pruner=han must go with --c_rate'),
        (('a: --pruner=set --c_rate=1',), '--pruner=set must go with a density'),
        (
            ('a: --pruner=set --hysteresis=0',),
            '--hysteresis=0.0 has no meaning .*=set',
        ),
        (('a: --pruner=rigl --importance=taylor',), '--importance=taylor has no meaning'),
    ],
)
def test_bad_variants(variants, message):
    with pytest.raises(ValueError, match=message):
        make(CompareConfig, **SHORT, variant=variants)


def test_the_figure_shows_medians_and_ranges():
    errors = {('a', 50.0): (2.0, 1.8, 2.4), ('a', 100.0): (2.5, 2.6, 3.0), ('b', ''): (5.0,)}
    rows = [
        {
            **{'network': 'lenet5', 'dataset': 'digits', 'variant': variant, 'target': target},
            **{'compression': target or 60.0, 'test_error': error},
        }
        for (variant, target), group in errors.items()
        for error in group
    ]
    (axes,) = plots.compare_figure(rows).axes
    lines = [container.lines for container in axes.containers]
    assert [container.get_label() for container in axes.containers] == ['a', 'b']
    np.testing.assert_allclose(lines[0][0].get_ydata(), [2.0, 2.6])
    np.testing.assert_allclose(lines[0][0].get_xdata(), [50.0, 100.0], rtol=0.03)
    np.testing.assert_allclose(lines[1][0].get_xdata(), [60.0], rtol=0.02)
    (segments,) = lines[0][2]
    ends = [segment[:, 1].tolist() for segment in segments.get_segments()]
    np.testing.assert_allclose(ends, [[1.8, 2.4], [2.5, 3.0]])
