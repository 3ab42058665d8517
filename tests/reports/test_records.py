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


@pytest.mark.parametrize(
    'damaged',
    [
        '{"phase": "surg',
        '',
        '[1]',
        '3',
        '{"phase": "other", "step": 1}',
        '{"phase": "surgery"}',
        '{"phase": "surgery", "step": 1.5}',
        '{"step": 1}',
        '\0\0\0',
    ],
)
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


@pytest.mark.parametrize(
    'module', ['experiments.results', 'experiments.reports.records', 'experiments.networks.names']
)
def test_reading_results_loads_nothing_heavy(module):
    heavy = {'jax', 'flax', 'optax', 'matplotlib', 'jinja2', 'tensorflow_datasets'}
    code = f'import sys, {module}; print({heavy} & sys.modules.keys())'
    command = [sys.executable, '-c', code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == 'set()\n'
