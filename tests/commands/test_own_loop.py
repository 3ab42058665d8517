"""Tests of own_loop: networks pruned in a loop of their own, and the rows of it."""

import pytest
from small_loops import config, rows_in, small

from experiments import own_loop
from experiments.own_loops import runs as own_runs

__all__ = ['config', 'small']  # fixtures, which pytest finds here by name
pytestmark = pytest.mark.usefixtures('promotion')


def test_a_cnn_is_pruned_once_for_each_row(config, capsys, monkeypatch):
    own_loop.compare(config)
    table = capsys.readouterr().out
    rows = rows_in(config)
    assert [(row['method'], row['target'], row['seed']) for row in rows] == [
        ('surgery', '2.0', '0'),
        ('gradual', '2.0', '0'),
    ]
    for row in rows:
        assert tuple(row) == tuple(own_runs.COLUMNS)
        assert float(row['compression']) == pytest.approx(2, rel=0.01)
        assert int(row['parameters']) == 472
        assert int(row['kept']) == pytest.approx(236, abs=1)
        assert row['unit'] == '%'
        for name in ('validation_before', 'validation', 'test'):
            assert 0 <= float(row[name]) <= 100
    assert len({row['validation_before'] for row in rows}) == 1  # from the same dense network

    monkeypatch.setattr(own_runs, 'train', None)  # a second call trains nothing
    own_loop.compare(config)
    assert capsys.readouterr().out == table
    assert rows_in(config) == rows
