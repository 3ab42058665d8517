"""What `experiments.results` reads and prints."""

import pytest

from experiments import results


def test_table_row_gives_median_and_range():
    summaries = [
        {'network': 'lenet5', 'reference_error': 1.0, 'test_error': error, 'kept': kept}
        | {'compression': 431080 / kept}
        for error, kept in ((0.9, 4000), (1.1, 5000), (0.95, 4310))
    ]
    assert results.table_row('label', summaries) == (
        '| label | 3 | 1.00 % | 0.95 % (0.90 to 1.10) | 4,310 (4,000 to 5,000) | '
        '100.0× (86.2 to 107.8) |'
    )


def test_no_results_are_an_error(tmp_path):
    with pytest.raises(ValueError, match='must hold files named'):
        results.read_summaries(tmp_path)
