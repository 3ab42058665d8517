"""Tests of reports.records: whole records are read, damaged ones are named; little is loaded."""

import json
import re
import subprocess
import sys

import pytest
from told_runs import RECORDS, surgery_record, write_records

from experiments.reports.records import read_records


@pytest.fixture
def workdir(tmp_path):
    write_records(tmp_path, RECORDS)
    return tmp_path


def test_read_records(workdir):
    assert read_records(workdir) == RECORDS
    assert read_records(str(workdir)) == RECORDS


@pytest.mark.parametrize('torn', ['{"phase": "surg', json.dumps(surgery_record(4000))])
def test_read_records_ignores_a_torn_last_line(workdir, torn):
    with (workdir / 'metrics.jsonl').open('a') as stream:
        stream.write(torn)
    assert read_records(workdir) == RECORDS


def test_read_records_of_an_empty_file(tmp_path):
    write_records(tmp_path, [])
    assert read_records(tmp_path) == []


OTHERS = ('{"phase": "surg', '', '[1]', '{"phase": "other", "step": 1}', '{"phase": "surgery"}')
OTHERS += ('{"phase": "surgery", "step": 1.5}', '{"step": 1}', '\0\0\0')


@pytest.mark.parametrize('damaged', OTHERS)
def test_read_records_names_the_damaged_line(workdir, damaged):
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    lines.insert(2, damaged)
    path = workdir / 'metrics.jsonl'
    path.write_text('\n'.join(lines) + '\n')
    with pytest.raises(ValueError, match=re.escape(f'{path}, line 3, ')):
        read_records(workdir)


def test_read_records_of_a_missing_file(tmp_path):
    with pytest.raises(OSError, match=re.escape(str(tmp_path / 'metrics.jsonl'))):
        read_records(tmp_path)


def test_reading_results_loads_nothing_heavy():
    """And a report can be written without the part of Matplotlib that has global state."""
    heavy = {'jax', 'flax', 'optax', 'matplotlib', 'jinja2', 'tensorflow_datasets'}
    code = (
        'import sys, experiments.results, experiments.reports.records, experiments.networks.names\n'
        f'print({heavy} & sys.modules.keys())\n'
        'import experiments.reports.run_report\n'
        'print("matplotlib.pyplot" in sys.modules)'
    )
    command = [sys.executable, '-c', code]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout == 'set()\nFalse\n'
