"""The readers of what a run wrote, for the fuzz tests: each with valid inputs."""

import contextlib
import csv
import io
import json
import math

import numpy as np
import pytest
from reader import Reader, write_new

from dns_jax.files.sparse import save_sparse
from experiments import results, zoo
from experiments.compare import COLUMNS as COMPARE_COLUMNS
from experiments.frontier import COLUMNS as FRONTIER_COLUMNS
from experiments.reports import run_report as report
from experiments.reports import sweep_tables
from experiments.reports.records import read_records
from experiments.reports.summaries import LAYER_COUNTS, SUMMARY_KEYS
from experiments.training.workdir import read_flags
from experiments.zoo import ZooConfig

RECORD = {
    'phase': 'surgery',
    'step': 500,
    'loss': 0.25,
    'validation_error': 1.5,
    'kept': {'a': 40, 'b': 7},
    'pruned': {'a': 3, 'b': 0},
    'spliced': {'a': 1, 'b': 0},
}
LAYER = dict.fromkeys(LAYER_COUNTS, 120) | {'kept': 40, 'density': 1 / 3, 'compression': 3.0}
SUMMARY = {
    **dict.fromkeys(SUMMARY_KEYS, 1.5),
    **{'network': 'lenet300', 'dataset': 'mnist', 'commit': 'abc1234', 'jax': '0.10.2'},
    **{'seed': 0, 'steps': 3_000, 'parameters': 240, 'kept': 47, 'compression': 5.1},
    'per_layer': {'a': LAYER, 'b': {**LAYER, 'kept': 7}},
    'flags': {'network': 'lenet300', 'reference': None, 'c_rate': '1', 'train_on_all': False},
}


def flags_of_runs(folder):
    path = folder / 'flags.json'

    def read(data):
        write_new(path, data)
        assert 'network' in read_flags(folder)

    return Reader((json.dumps(SUMMARY['flags'], indent=2).encode(),), read)


def records_of_runs(folder):
    path = folder / 'metrics.jsonl'

    def read(data):
        write_new(path, data)
        assert all(isinstance(record['step'], int) for record in read_records(folder))

    lines = [{**RECORD, 'step': step} for step in (0, 500, 10_000)]
    return Reader((''.join(json.dumps(line) + '\n' for line in lines).encode(),), read)


def check_summary(summary):
    for key in SUMMARY_KEYS:
        assert not isinstance(summary[key], float) or math.isfinite(summary[key]), key


def summaries_of_runs(folder):
    """What goes into the zoo."""
    weights, mask = np.ones((5, 10), np.float32), np.arange(50).reshape(5, 10) < 47
    save_sparse(folder / 'pruned.safetensors', {'a': weights}, {'a': mask})
    config = ZooConfig(workdir=str(folder), name='small')

    def read(data):
        write_new(folder / 'summary.json', data)
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.setattr(zoo, 'FOLDER', folder / 'zoo')
            (_, written, _) = zoo.publish(config)
        check_summary(json.loads(written.read_bytes()))

    damaged = {'kept': 46}, {'flags': []}, {'per_layer': {'a': []}}, {'test_error': math.nan}
    attacks = tuple(json.dumps({**SUMMARY, **change}).encode() for change in damaged)
    return Reader((json.dumps(SUMMARY, indent=2).encode(),), read, attacks=attacks)


def summaries_of_results(folder):
    def read(data):
        write_new(folder / 'lenet300-0.json', data)
        (found,) = results.read_summaries(folder)['lenet300']
        assert report.format_table(found)
        check_summary(found)

    return Reader((json.dumps(SUMMARY).encode(),), read)


def write_csv(columns, **values):
    content = io.StringIO()
    writer = csv.DictWriter(content, columns, lineterminator='\n')
    writer.writeheader()
    for seed in range(3):
        row = {**dict.fromkeys(columns, 1.5 + seed), 'seed': seed, 'target': 30, **values}
        writer.writerow(row)
    return content.getvalue().encode()


def frontiers(folder):
    def read(data):
        write_new(folder / 'frontier_lenet5.csv', data)
        sweep_tables.frontier_tables(results.read_frontiers(folder))

    return Reader((write_csv(FRONTIER_COLUMNS, network='lenet5', commit='a,"b'),), read)


def comparisons(folder):
    path = folder / 'compare.csv'

    def read(data):
        write_new(path, data)
        for row in results.read_comparison(path):
            assert all(isinstance(name, str) for name in row)

    return Reader((write_csv(COMPARE_COLUMNS, variant='SET', state_mebibytes=''),), read)


READERS = {
    'flags.json': flags_of_runs,
    'metrics.jsonl': records_of_runs,
    'summary.json': summaries_of_runs,
    'summaries in results': summaries_of_results,
    'frontiers in results': frontiers,
    'comparisons in results': comparisons,
}
