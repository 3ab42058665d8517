"""Tests of measurements.scale_input: images decoded, by the second."""

from experiments.measurements import scale_input


def test_input_is_measured(monkeypatch):
    monkeypatch.setattr(scale_input, '_SIZE', (40, 30))
    monkeypatch.setattr(scale_input, '_BATCH', 2)
    result = scale_input.measure_input(64, 23, (0,))
    (row,) = result['rows']
    assert row['images_per_s'] == row['cores'] * row['images_per_core_s'] > 0
    assert 200 < result['bytes_per_image'] < 5_000
