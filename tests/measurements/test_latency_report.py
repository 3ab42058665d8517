"""Tests of measurements.latency_report: what bounds a layer."""

from experiments.measurements import latency_report


def test_bounds_are_those_of_the_machine():
    layer = {'inputs': 10, 'units': 20, 'weights': 200, 'kept': 50, 'numbers': 30}
    layer |= {'multiply_adds': 200, 'kept_multiply_adds': 50}
    batch = {'seconds': {'JAX and C++': {'fc': {'dense': 2e-6, 'native': 3e-6}}}}
    batch['kinds'] = {'JAX and C++': {'fc': 'native'}}
    batch['ways'] = {'dense JAX': {'median_us': 1, 'least_us': 1, 'ratio': 1}}
    result = {'model': 'm', 'command': 'c', 'device': 'd', 'layers': {'fc': layer}}
    result |= {'batches': {'1': batch, '1000': batch}}
    text = latency_report.latency_tables({**result, 'multiply_adds_per_s': 1e9, 'bytes_per_s': 1e9})
    row = text.splitlines()[-1]
    # Bytes: 30 · 4 + 200 · 4 and 30 · 4 + 50 · 8; of 1,000 examples, multiply-adds count more.
    assert [cell.strip() for cell in row.split('|')[5:-1]] == [
        *('0.92', '0.52', '3.0 (native)', '200.00', '120.40', '3.0 (native)')
    ]
