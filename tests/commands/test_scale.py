"""Tests of scale: what it measures and writes."""

import json

import pytest

from experiments import scale
from experiments.measurements import scale_programs
from experiments.scale import ScaleConfig

SMALL = {'width': 0.02, 'batch_size': 2, 'rounds': 2, 'sizes': '0.002,0.004', 'images': 0}


@pytest.mark.slow
def test_scale_measures_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(scale._MACHINES, True, scale.Machine(2, 1.1, side=32, floats=1_000))
    task = scale_programs.sized_task(3_000, 'float32', 2)  # AlexNet takes a minute to compile
    monkeypatch.setattr(scale_programs, 'image_task', lambda *fields: task)
    monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1')
    output = tmp_path / 'new' / 'scale'
    config = ScaleConfig(**SMALL, planned_sizes='0.01', output=str(output))
    result = scale.measure(config)
    assert json.loads(output.with_suffix('.json').read_text()) == result
    assert output.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
    page = output.with_suffix('.md').read_text()
    assert capsys.readouterr().out == page + '\n'
    step = result['step']
    assert min(step['ms'].values()) > 0
    assert step['ms'].keys() == step['memory'].keys() == {'dense', 'surgery', 'density'}
    assert ['ms' in row for row in result['sizes']] == [True, True, False]
    assert result['sizes'][-1]['memory']['surgery']['masks'] == result['sizes'][-1]['weights']
    assert f'takes {step["ratio"]:.3f}× as long' in page
    assert '![Time of a step against weights](scale.png)' in page
    assert '`GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m experiments.scale' in page
    assert '--width=0.02 --batch_size=2 --rounds=2 --sizes=0.002,0.004' in page
    assert '## Input' not in page


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'width': 0.0}, '--width=0.0 must be above 0'),
        ({'sizes': '3,x'}, '--sizes=3,x must be numbers with commas'),
        ({'planned_sizes': '-1'}, '--planned_sizes=-1 must be numbers of 0.001 or more'),
        ({'images': 3}, '--images=3 must be 0 or at least 64'),
        ({'xla_options': 'fast'}, '--xla_options=fast must be NAME=VALUE'),
    ],
)
def test_bad_flags(fields, message):
    with pytest.raises(ValueError, match=message):
        ScaleConfig(**fields)
