"""The table that tests make of what works with surgery: pytest --compat=results/compat.md.

A test makes itself a row with the fixture `compat`, and becomes green by passing. In a module with
a `COMPAT_TABLE` every test function is a row of that table.
"""

import collections
import os
import platform
from importlib import metadata
from pathlib import Path

import jax
import pytest

from dns_jax.files.writing import write_whole

TABLES = {
    'optimizers': 'Optimizers of optax, after 20 steps in one trace',
    'wrappers': 'Wrappers of optax',
    'transformations': 'Transformations and modes of JAX',
    'field': 'Situations from the field',
    'recipes': 'Complete recipes of docs/libraries.md',
    'libraries': 'Model libraries, the same masks and weights from the same start',
    'faults': 'Faults survived',
    'readers': 'Readers of files and flags, under damaged input',
    'load': 'Load',
}


class CompatReport:
    """Collects the rows of a session, from all its workers."""

    def __init__(self, path):
        self.path = Path(path)
        self.rows = collections.defaultdict(dict)

    def pytest_runtest_logreport(self, report):
        if report.when != 'call' and report.outcome == 'passed':
            return
        for name, value in report.user_properties:
            if name == 'compat':
                table, row, found = value
                # A row of several tests fails with any of them.
                if self.rows[table].get(row, ('passed',))[0] != 'failed':
                    self.rows[table][row] = report.outcome, found if report.passed else ''

    def pytest_sessionfinish(self):
        if unknown := self.rows.keys() - TABLES.keys():
            raise ValueError(f'compat names the tables {sorted(unknown)}; known are {list(TABLES)}')
        write_whole(self.path, self.format())

    def format(self):
        versions = (f'{name} {metadata.version(name)}' for name in ('jax', 'optax', 'flax'))
        lines = [
            '# What works with surgery, and what a run survives',
            '',
            'Written by the tests: `make test-all`.',
            f'Python {platform.python_version()}, {", ".join(versions)}, '
            f'{jax.devices()[0].device_kind}, {os.cpu_count()} cores.',
        ]
        for table, title in TABLES.items():
            rows = self.rows[table]
            passed = sum(outcome == 'passed' for outcome, _ in rows.values())
            lines += [
                '',
                f'## {title}: {passed} of {len(rows)}',
                '',
                '| | result | |',
                '|---|---|---|',
            ]
            lines += [
                f'| {row} | {outcome} | {found} |' for row, (outcome, found) in sorted(rows.items())
            ]
        return '\n'.join(lines) + '\n'


def pytest_addoption(parser):
    parser.addoption('--compat', metavar='FILE', help='write the table of what works to FILE')


def pytest_configure(config):
    # The workers of a session in parallel send their reports to the one process that writes.
    if config.getoption('compat') and not hasattr(config, 'workerinput'):
        config.pluginmanager.register(CompatReport(config.getoption('compat')))


@pytest.fixture(autouse=True)
def row_of_module(request, record_property):
    """Makes every test a row where its module names a table."""
    if table := getattr(request.module, 'COMPAT_TABLE', None):
        name = request.node.originalname.removeprefix('test_').replace('_', ' ')
        record_property('compat', [table, name, ''])


@pytest.fixture
def compat(record_property):
    """Makes the test a row: compat(table, row), and again with what was found."""

    def record(table, row, found=''):
        record_property('compat', [table, row, found])

    return record
