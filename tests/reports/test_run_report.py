"""Reports, their tables and their pictures."""

import copy
import html
import json
import math
import os
import re

import numpy as np
import pytest
from told_runs import (
    LAYER_TABLE,
    RECORDS,
    RESULT_TABLE,
    SUMMARY,
    reference_record,
    surgery_record,
    write_records,
)

from experiments.reports import plots
from experiments.reports import run_report as report


@pytest.fixture
def workdir(tmp_path):
    write_records(tmp_path, RECORDS)
    return tmp_path


# Tables.


def result_row(summary):
    return re.sub(' +', ' ', report.format_table(summary).splitlines()[2])


def sizes(parameters, kept, compression):
    return {'parameters': parameters, 'kept': kept, 'compression': compression}


@pytest.mark.parametrize(
    ('change', 'row'),
    [
        (
            {'network': 'lenet300', 'reference_error': 2.28, 'test_error': 1.994},
            '| LeNet-300-100 | 431K → 4.0K | 2.28 % → 1.99 % | 108× |',
        ),
        (
            {'network': 'other', **sizes(60965224, 999500, 60.995)},
            '| other | 61M → 1.0M | 0.91 % → 0.91 % | 61.0× |',
        ),
        (sizes(999499, 999, 1234.5), '| LeNet-5 | 999K → 999 | 0.91 % → 0.91 % | 1,234× |'),
        (sizes(9960, 1000, 9.96), '| LeNet-5 | 10K → 1.0K | 0.91 % → 0.91 % | 10.0× |'),
        (
            {'network': 'gpt', 'unit': 'bits/character', 'reference_error': 2.2, 'test_error': 2.5},
            '| GPT | 431K → 4.0K | 2.200 bits/character → 2.500 bits/character | 108× |',
        ),
        (sizes(431080, 0, None), '| LeNet-5 | 431K → 0 | 0.91 % → 0.91 % | ∞ |'),
    ],
)
def test_result_row_of_other_runs(change, row):
    assert result_row({**SUMMARY, **change}) == row


def test_format_table():
    assert report.format_table(SUMMARY) == f'{RESULT_TABLE}\n\n{LAYER_TABLE}'


@pytest.mark.parametrize(
    'function',
    [report.format_table, lambda summary: report.write('nowhere', summary)],
)
def test_a_missing_key_is_named(function):
    for key in SUMMARY:
        with pytest.raises(ValueError, match=f"summary lacks the key '{key}'"):
            function({name: value for name, value in SUMMARY.items() if name != key})
    for key in SUMMARY['per_layer']['ip1']:
        broken = copy.deepcopy(SUMMARY)
        del broken['per_layer']['ip1'][key]
        with pytest.raises(ValueError, match=rf"per_layer\['ip1'\] lacks the key '{key}'"):
            function(broken)


# Counts and figures.


def test_binned_counts():
    borders, pruned = plots.binned_counts(RECORDS, 'pruned')
    np.testing.assert_array_equal(borders, [0, 1000, 2000, 3000])
    # The last record's 8 connections belong to 2,000 steps.
    np.testing.assert_array_equal(pruned, [100, 4, 4])
    np.testing.assert_array_equal(plots.binned_counts(RECORDS, 'spliced')[1], [10, 2, 2])


def test_binned_counts_share_a_record_over_a_border_and_end_at_the_last_step():
    records = [surgery_record(80, 10), surgery_record(180, 50), surgery_record(250, 7)]
    borders, pruned = plots.binned_counts(records, 'pruned', width=100)
    np.testing.assert_array_equal(borders, [0, 100, 200, 250])
    np.testing.assert_allclose(pruned, [10 + 10, 40 + 2, 5])


def test_binned_counts_without_events():
    record = surgery_record(1000)
    del record['pruned']
    for records in ([record], [{**record, 'pruned': {}}]):
        np.testing.assert_array_equal(plots.binned_counts(records, 'pruned')[1], [0])
    for records in ([], [reference_record(500)], [surgery_record(0, 1)]):
        borders, counts = plots.binned_counts(records, 'pruned')
        assert list(borders) == [0]
        assert counts.size == 0


def test_density_figure_shows_percent_and_zero():
    (axes,) = plots.density_figure(RECORDS, SUMMARY).axes
    first, second = axes.get_lines()
    np.testing.assert_array_equal(first.get_ydata(), [0, 0, 0])
    np.testing.assert_allclose(second.get_ydata(), [100 * 4000 / 430560] * 3)
    np.testing.assert_array_equal(second.get_xdata(), [500, 1000, 3000])
    assert axes.get_yscale() == 'symlog'
    assert axes.get_ylim()[0] < 0
    assert [first.get_label(), second.get_label()] == ['conv1: 0 %', 'ip1: 0.929 %']


def test_density_figure_of_many_layers_with_long_names():
    entry = SUMMARY['per_layer']['ip1']
    names = [f'features/block_{index}/convolution_{index}' for index in range(21)]
    records = [surgery_record(100, kept=dict.fromkeys(names, 400000))]
    figure = plots.density_figure(records, {'per_layer': dict.fromkeys(names, entry)})
    (axes,) = figure.axes
    assert axes.get_yscale() == 'log'
    low, high = axes.get_ylim()
    assert low < 10
    assert high > 100
    lines = axes.get_lines()
    assert lines[20].get_label() == '…k_20/convolution_20: 92.9 %'
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 21
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().y1 <= axes.get_window_extent().y0
    assert legend.get_window_extent().y0 >= 0
    assert axes.get_window_extent().height > 200


def test_surgery_figure_draws_the_counts():
    (axes,) = plots.surgery_figure(RECORDS).axes
    pruned, spliced = (patch.get_data().values for patch in axes.patches)
    np.testing.assert_array_equal(pruned, [100, 4, 4])
    np.testing.assert_array_equal(spliced, [10, 2, 2])
    assert axes.get_yscale() == 'symlog'


def test_training_figure_joins_the_phases_and_marks_the_border():
    error, loss = plots.training_figure(RECORDS).axes
    for axes, first in ((error, 40.0), (loss, 2.3)):
        reference, border, surgery = axes.get_lines()
        np.testing.assert_array_equal(reference.get_xdata(), [250, 500])
        np.testing.assert_array_equal(surgery.get_xdata(), [1000, 1500, 3500])
        np.testing.assert_array_equal(border.get_xdata(), [500, 500])
        assert reference.get_ydata()[0] == first
    assert error.get_yscale() == 'log'
    assert loss.get_yscale() == 'linear'


def test_training_figure_shows_every_step_where_one_measure_is_rarer():
    records = [
        surgery_record(100),
        *(surgery_record(step, validation_error=None) for step in (200, 9000)),
    ]
    records.append(surgery_record(9500, loss=0.0, validation_error=0.0))
    error, loss = plots.training_figure(records).axes
    np.testing.assert_array_equal(error.get_lines()[0].get_xdata(), [100, 9500])
    np.testing.assert_array_equal(loss.get_lines()[0].get_ydata(), [0.3, 0.3, 0.3, 0.0])
    assert error.get_xlim() == loss.get_xlim()
    assert error.get_xlim()[0] == 0
    assert error.get_xlim()[1] >= 9500


def test_first_layer_figure_counts_per_pixel():
    mask = np.zeros((784, 5), bool)
    mask[28 * 2 + 7, :3] = True
    axes = plots.first_layer_figure(mask).axes[0]
    image = np.asarray(axes.get_images()[0].get_array())
    assert image.shape == (28, 28)
    assert image[2, 7] == 3
    assert image.sum() == 3
    assert axes.get_title().startswith('First layer: 1 of 784')


# Writing.


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


def test_write(workdir):
    flags = {'network': 'lenet5', 'seed': 3, 'c_rate': 'fc1:2', 'note': None}
    summary = {**SUMMARY, 'flags': flags}
    paths = report.write(str(workdir), summary, np.ones((784, 20), bool))
    assert paths == [workdir / 'summary.json', workdir / 'report.html']
    assert names_in(workdir) == ['metrics.jsonl', 'report.html', 'summary.json']
    assert json.loads(paths[0].read_text()) == summary
    page = paths[1].read_text()
    text = re.sub(r'<[^>]+>', ' ', re.sub(r'<style>.*?</style>', '', page, flags=re.DOTALL))
    text = ' '.join(html.unescape(text).split())
    for part in (
        'LeNet-5 on mnist, seed 3',
        '108× ',
        'Parameters: 431,080 → 3,986 (0.92 %)',
        'ip1 430,560 3,986 0.93 108× 400,000 3,950 1,722,240 23,916',
        '--seed=3 --c_rate=fc1:2 Environment',
        'the validation error after surgery is 1.05 %.',
        '3,000 steps of surgery; 1,312 s since the program was last started.',
        'commit: abc1234 jax: 0.10.2',
    ):
        assert part in text
    assert re.findall(r'<img [^>]*alt="([^"]+)', page) == [
        'Validation error and loss; validation error (%), training loss, steps; '
        'reference, surgery begins, surgery',
        'Connections kept in each layer; connections kept (%), steps of surgery; '
        'conv1: 0 %, ip1: 0.929 %',
        'Connections pruned and spliced per 1,000 steps; connections per 1,000 steps, '
        'steps of surgery; pruned, spliced',
        'First layer: 784 of 784 pixels keep a connection; row (pixels), column (pixels), '
        'connections kept, of 20',
    ]


def test_write_without_surgery_flags_and_mask(workdir):
    write_records(workdir, RECORDS[:1])
    text = report.write(workdir, SUMMARY)[1].read_text()
    assert text.count('<img') == 1
    assert 'Flags' not in text


def test_flags_are_lines_of_a_flagfile():
    values = {'seed': 3, 'variant': ('a: --momentum=0.5', 'b:'), 'note': None, 'fast': True}
    lines = ['--seed=3', '--variant=a: --momentum=0.5', '--variant=b:', '--fast=True']
    assert report.to_flags(values) == lines


@pytest.mark.parametrize(
    'change',
    [
        {'kept': {'conv1': 0, 'ip1': 0}, 'loss': math.nan, 'validation_error': 0.0},
        {'pruned': {}, 'spliced': {}, 'loss': math.inf},
        {'step': 0, 'validation_error': None},
    ],
)
def test_write_of_a_single_odd_record(workdir, change):
    write_records(workdir, [surgery_record(250, 5, 5, **{'loss': 1.0}) | change])
    assert report.write(workdir, SUMMARY)[1].read_text().count('<img') == 3


@pytest.mark.parametrize('shape', [(784,), (783, 20), (5, 5, 1, 20)])
def test_write_refuses_another_mask_and_writes_nothing(workdir, shape):
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        report.write(workdir, SUMMARY, np.ones(shape, bool))
    assert names_in(workdir) == ['metrics.jsonl']


@pytest.mark.parametrize('content', ['', '{"phase": "surgery"', 'damaged\n'])
def test_write_keeps_the_summary_where_the_records_fail(tmp_path, content):
    (tmp_path / 'metrics.jsonl').write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / 'metrics.jsonl'))):
        report.write(tmp_path, SUMMARY)
    assert names_in(tmp_path) == ['metrics.jsonl', 'summary.json']


@pytest.mark.parametrize('name', ['missing', 'file'])
def test_write_names_a_folder_that_it_cannot_write(tmp_path, name):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match=re.escape(str(tmp_path / name))):
        report.write(tmp_path / name, SUMMARY)


def test_write_is_whole_or_not_at_all(workdir, monkeypatch):
    report.write(workdir, SUMMARY)
    before = {name: (workdir / name).read_bytes() for name in names_in(workdir)}

    def find_the_disk_full(*arguments):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', find_the_disk_full)
        with pytest.raises(OSError, match=re.escape(str(workdir / 'summary.json'))):
            report.write(workdir, {**SUMMARY, 'seed': 4})
    assert {name: (workdir / name).read_bytes() for name in names_in(workdir)} == before
