"""Tests of training.closing beside those of whole runs in test_run."""

import json

import pytest

from experiments.training import run
from experiments.training.flags import Config


@pytest.mark.slow
def test_lenet5_runs_and_its_report_has_no_map_of_pixels(data_dir, tmp_path, capsys):
    short = {'reference_steps': 2, 'surgery_steps': 2, 'record_every': 1, 'checkpoint_every': 1}
    tables = {'c_rate': 'conv*:1,fc*:1', 'stop': 'fc1:1'}
    places = {'data_dir': str(data_dir), 'workdir': str(tmp_path / 'run')}
    fields = {'dataset': 'digits', 'batch_size': 16, 'finetuning_steps': 0, **short, **tables}
    summary = run.run(Config('lenet5', **places, **fields))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary
    assert (summary['parameters'], summary['network']) == (431_080, 'lenet5')
    positions = {'conv1': 576, 'conv2': 64, 'fc1': 1, 'fc2': 1}
    weights = {'conv1': 500, 'conv2': 25_000, 'fc1': 400_000, 'fc2': 5_000}
    for layer, size in summary['per_layer'].items():
        assert size['multiply_adds'] == positions[layer] * weights[layer]
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert page.count('<img ') == 3
    assert 'First layer' not in page
