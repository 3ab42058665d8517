"""Tests of measurements.scale_report: what a page and its picture say of one result."""

import json
from pathlib import Path

import pytest

from experiments.measurements import scale_report

RESULT = json.loads((Path(__file__).parents[2] / 'results' / 'scale.json').read_text())


@pytest.mark.parametrize(('ratio', 'verdict'), [(1.05, 'within'), (9.0, 'above')])
def test_a_ratio_is_within_what_is_wanted_or_above(ratio, verdict):
    page = scale_report.page({**RESULT, 'step': {**RESULT['step'], 'ratio': ratio}}, 'scale')
    bar = RESULT['step']['bar']
    assert f'Surgery takes {ratio:.3f}× as long' in page
    assert f'This is {verdict} the {bar:.2f} that we wanted' in page


@pytest.mark.parametrize(('ms', 'keeps'), [(1e6, 'keeps'), (1e-6, 'does not keep')])
def test_decoding_keeps_up_with_a_slow_step(ms, keeps):
    step = {**RESULT['step'], 'ms': {**RESULT['step']['ms'], 'dense': ms}}
    assert f'so decoding {keeps} up with it' in scale_report.page({**RESULT, 'step': step}, 'scale')


def test_the_picture_has_the_sizes_that_were_run():
    times, ratios = scale_report.figure(RESULT).axes
    run = [row for row in RESULT['sizes'] if 'ms' in row]
    dense, surgery, network = times.get_lines()
    assert [*dense.get_ydata()] == [row['ms']['dense'] for row in run]
    assert [*surgery.get_ydata()] == [row['ms']['surgery'] for row in run]
    assert [*network.get_xdata()] == [RESULT['step']['weights']]
    assert [*ratios.get_lines()[0].get_ydata()] == [row['ratio'] for row in run]
