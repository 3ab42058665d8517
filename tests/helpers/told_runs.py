"""Runs as their files tell of them, made up: a summary, and records."""

import json
import math

SUMMARY = {
    'network': 'lenet5',
    'dataset': 'mnist',
    'seed': 3,
    'steps': 3000,
    'reference_error': 0.912,
    'test_error': 0.91,
    'validation_error': 1.05,
    'parameters': 431080,
    'kept': 3986,
    'compression': 431080 / 3986,
    'seconds': 1312.4,
    'commit': 'abc1234',
    'jax': '0.10.2',
    'per_layer': {
        'conv1': {
            **{'parameters': 520, 'kept': 0, 'density': 0.0, 'compression': math.inf},
            **{'multiply_adds': 288000, 'kept_multiply_adds': 0, 'bytes': 2080, 'kept_bytes': 0},
        },
        'ip1': {
            **{'parameters': 430560, 'kept': 3986, 'density': 3986 / 430560},
            **{'compression': 430560 / 3986, 'multiply_adds': 400000, 'kept_multiply_adds': 3950},
            **{'bytes': 1722240, 'kept_bytes': 23916},
        },
    },
}

RESULT_TABLE = """\
| network | parameters → kept | error: reference → after surgery | compression |
|---------|------------------:|---------------------------------:|------------:|
| LeNet-5 |       431K → 4.0K |                  0.91 % → 0.91 % |        108× |"""

LAYER_TABLE = """\
| layer | parameters |  kept | kept % | compression | multiply-adds | of these kept |     bytes | bytes kept |
|-------|-----------:|------:|-------:|------------:|--------------:|--------------:|----------:|-----------:|
| conv1 |        520 |     0 |   0.00 |           ∞ |       288,000 |             0 |     2,080 |          0 |
| ip1   |    430,560 | 3,986 |   0.93 |        108× |       400,000 |         3,950 | 1,722,240 |     23,916 |
| total |    431,080 | 3,986 |   0.92 |        108× |       688,000 |         3,950 | 1,724,320 |     23,916 |
""".rstrip()  # noqa: E501


def reference_record(step, **more):
    own = {'phase': 'reference', 'step': step, 'loss': 0.3}
    return {**own, 'learning_rate': 0.01, 'validation_error': 1.2, **more}


def surgery_record(step, pruned=0, spliced=0, **more):
    """A record of surgery with the counts in the second layer, and one of each in the first."""
    counts = {'kept': {'conv1': 0, 'ip1': 4000}, 'pruned': {'conv1': 1, 'ip1': pruned - 1}}
    counts['spliced'] = {'conv1': 1, 'ip1': spliced - 1}
    return {**reference_record(step), 'phase': 'surgery', **counts, **more}


RECORDS = [
    reference_record(250, loss=2.3, validation_error=40.0),
    reference_record(500),
    surgery_record(500, 70, 7),
    surgery_record(1000, 30, 3),
    surgery_record(3000, 8, 4),
]


def write_records(folder, records):
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(one) + '\n' for one in records))
