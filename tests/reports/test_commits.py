"""Tests of reports.commits."""

from experiments.reports import commits


def test_a_commit_is_named_or_unknown(monkeypatch, tmp_path):
    assert commits.describe_commit()
    # A machine without git must not fail a run at its end.
    monkeypatch.setenv('PATH', str(tmp_path))
    assert commits.describe_commit() == 'unknown'
