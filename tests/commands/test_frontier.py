"""Tests of frontier: a sweep end to end on the digits, and its table and picture."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import opened
import pytest
from short_sweep import SHORT

from experiments import frontier
from experiments.config.command_line import make
from experiments.reports import plots, published, sweep_tables
from experiments.reports.records import read_records
from experiments.reports.tables import to_text
from experiments.sweeps import sweep
from experiments.sweeps.flags import FrontierConfig
from experiments.training.divergence import Diverged
from experiments.training.flags import Config
from experiments.training.plan import make_plan


def runs_of(config):
    return [run for _, run in config.named_runs()]


@pytest.fixture(scope='module')
def config(tmp_path_factory, data_dir):
    workdir = str(tmp_path_factory.mktemp('frontier') / 'sweep')
    return make(FrontierConfig, **SHORT, data_dir=str(data_dir), workdir=workdir, side_by_side=2)


@pytest.fixture(scope='module')
def rows(config):
    return frontier.frontier(config)


@pytest.mark.slow
def test_every_run_reaches_its_target_from_the_reference_of_its_seed(config, rows):
    assert [(row['target'], row['seed']) for row in rows] == [(5, 0), (5, 1), (20, 0), (20, 1)]
    for row in rows:
        assert row['kept'] == 266_610 // row['target']
        assert row['compression'] == pytest.approx(266_610 / row['kept'])
        assert row['reference_error'] == rows[row['seed']]['reference_error']
    folder = Path(config.workdir)
    assert {path.parent.parent.name for path in folder.glob('*/*/reference')} == {'5-0', '5-1'}
    with (folder / 'frontier.csv').open() as file:
        read = list(csv.DictReader(file))
    assert [list(row) for row in read] == [list(frontier.COLUMNS)] * 4
    assert read == [{name: str(value) for name, value in row.items()} for row in rows]
    assert (folder / 'frontier.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_a_finished_sweep_is_read_again(config, rows, capsys, monkeypatch):
    # With other seeds before: what another process did in the workdir is joined.
    monkeypatch.setattr(sweep, 'run_together', None)
    second = frontier.frontier(opened.change(config, resume=True, seed=1, seeds=1))
    assert second == [row for row in rows if row['seed'] == 1]
    capsys.readouterr()
    assert frontier.frontier(opened.change(config, resume=True)) == rows
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == rows
    assert '\n'.join(table).startswith(to_text(sweep_tables.frontier_tables(rows)))


@pytest.mark.slow
def test_runs_side_by_side_that_stopped_at_different_steps_meet_again(config, rows, tmp_path):
    runs = runs_of(opened.change(config, workdir=str(tmp_path), compressions='5'))
    records = []

    def stop_in_the_middle(record):
        records.append((record['phase'], record['step']))
        if records.count(('surgery', 50)) == 2:
            raise OSError('no space left')

    with pytest.raises(OSError, match='no space left'):
        opened.do(*runs, on_record=stop_in_the_middle)
    # As after a kill between the two saves of the step.
    shutil.rmtree(tmp_path / '5-1' / 'checkpoints' / 'reference' / '100')
    again = opened.do(*(dataclasses.replace(one, resume=True) for one in runs))
    for summary, row, config_of_run in zip(again, rows[:2], runs, strict=True):
        assert summary['kept'] == row['kept']
        assert summary['reference_error'] == pytest.approx(row['reference_error'], abs=0.6)
        assert summary['test_error'] == pytest.approx(row['test_error'], abs=2)
        steps = [(one['phase'], one['step']) for one in read_records(Path(config_of_run.workdir))]
        assert steps == [
            *(('reference', 50), ('reference', 100), ('surgery', 50), ('surgery', 100)),
            ('finetuning', 50),
        ]


@pytest.mark.slow
def test_a_run_with_other_flags_is_not_taken_for_finished(config, rows):
    with pytest.raises(ValueError, match=r'holds a run with other flags: momentum was 0\.9'):
        frontier.frontier(opened.change(config, resume=True, momentum=0.8))


def test_runs_are_those_of_the_flags():
    config = make(
        FrontierConfig, network='lenet5', workdir='w', compressions='10,20.5', seeds=2, seed=3
    )
    runs = runs_of(config)
    assert all(type(run) is Config and run.network == 'lenet5' for run in runs)
    assert [(run.compression, run.seed, run.workdir, run.reference) for run in runs] == [
        (10.0, 3, 'w/10-3', None),
        (10.0, 4, 'w/10-4', None),
        (20.5, 3, 'w/20.5-3', 'w/10-3'),
        (20.5, 4, 'w/20.5-4', 'w/10-4'),
    ]


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'compressions': ''}, '--compressions= must be numbers with commas between'),
        ({'compressions': '10;20'}, '--compressions=10;20 must be numbers'),
        ({'compressions': '10,0.5'}, '--compression=0.5 must be finite and at least 1'),
        ({'compressions': '10,10'}, '--compressions=10,10 names one twice'),
        ({'learning_rate': 'warp:9'}, '--learning_rate'),
    ],
)
def test_bad_flags(fields, message):
    with pytest.raises(ValueError, match=message):
        frontier.frontier(make(FrontierConfig, **fields))


def test_table_gives_medians_and_ranges():
    row = {'network': 'lenet5', 'compression': 100.0, 'kept': 4311, 'reference_error': 0.9}
    rows = [{**row, 'target': 100, 'test_error': error} for error in (0.8, 1.1, 0.9)]
    rows.append({**row, 'target': 200, 'test_error': 1.25})
    lines = to_text(sweep_tables.frontier_tables(rows)).splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]]
    assert cells == [
        ['LeNet-5', '3', '100.0×', '4,311', '0.90 %', '0.90 % (0.80 to 1.10)'],
        ['LeNet-5', '1', '100.0×', '4,311', '0.90 %', '1.25 %'],
    ]


@pytest.mark.parametrize(
    ('network', 'dataset'),
    [('lenet300', 'mnist'), ('lenet5', 'mnist'), ('lenet5', 'digits'), ('another', 'mnist')],
)
def test_figure_shows_runs_medians_and_published_points(network, dataset):
    errors = {50: (2.0, 1.8, 2.4), 100: (2.5, 2.6, 3.0)}
    rows = [
        {'network': network, 'dataset': dataset, 'target': target, 'test_error': error}
        | {'compression': target + 1.0}
        for target, group in errors.items()
        for error in group
    ]
    (axes,) = plots.frontier_figure(rows).axes
    line = axes.get_lines()[0]
    assert (*line.get_xdata(), *line.get_ydata()) == (51.0, 101.0, 2.0, 2.6)
    dots = axes.collections[0].get_offsets()
    np.testing.assert_allclose(dots, [(r['compression'], r['test_error']) for r in rows])
    labels = axes.get_legend_handles_labels()[1]
    errors_of = published.PUBLISHED_ERRORS.get(network, ()) if dataset == 'mnist' else ()
    assert sorted(labels[1:]) == sorted(['here, each run', *(who for who, _, _ in errors_of)])
    places = [tuple(*collection.get_offsets()) for collection in axes.collections[1:]]
    wanted = [(x, error) for _, x, error in errors_of if error is not None]
    np.testing.assert_allclose(np.array(places).reshape(-1, 2), np.array(wanted).reshape(-1, 2))


@pytest.fixture
def play(config, monkeypatch):
    """Makes runs of a sweep and plays them; those with a seed of `broken` break down in a phase."""

    def play(phase, broken, **fields):
        batches = []

        def run_together(task, batch):
            batches.append([(p.config.seed, p.config.resume, p.config.overwrite) for p in batch])
            if any(plan.config.seed in broken for plan in batch):
                raise Diverged('the loss is not finite', phase)
            return [{'seed': plan.config.seed} for plan in batch]

        monkeypatch.setattr(sweep, 'Task', lambda config: 'a task')
        monkeypatch.setattr(sweep, 'run_together', run_together)
        fields = {'seeds': 3, 'side_by_side': 3, 'overwrite': True, **fields}
        runs = runs_of(opened.change(config, **fields))
        return {run: make_plan(run) for run in runs}, batches

    return play


@pytest.mark.parametrize('phase', ['reference', 'surgery'])
def test_a_run_that_breaks_down_does_not_end_the_sweep(play, phase):
    plans, batches = play(phase, [1], compressions='5,9')
    runs, counts = list(plans), []
    summaries, left_out = sweep.run_all(plans, 3, lambda summaries: counts.append(len(summaries)))
    assert list(summaries) == [runs[0], runs[2], runs[3], runs[5]]
    assert counts == [2, 4]
    # All of a batch have begun, so that each goes on by itself.
    first = [(seed, False, True) for seed in range(3)]
    alone = [[(seed, True, False)] for seed in range(3)]
    assert batches[:4] == [first, *alone]
    found = [left_out.pop(runs[at].workdir) for at in (1, 4)]
    assert not left_out
    if phase == 'surgery':  # its reference was well: the run that starts from it is tried
        assert found == ['the loss is not finite'] * 2
        assert batches[4:] == [first, *alone]
    else:  # the others of its second batch begin anew, as --overwrite asks
        assert found[1] == f'the reference of {runs[1].workdir} broke down'
        assert batches[4:] == [[first[0], first[2]]]


def test_a_sweep_without_a_result_says_so(play):
    plans, _ = play('surgery', [0, 1], compressions='5', seeds=2)
    with pytest.raises(RuntimeError, match='none of 2 runs'):
        sweep.run_all(plans, 2, None)
