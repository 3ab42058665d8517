"""What the pages say, and what the committed results hold."""

import json
import statistics
from pathlib import Path

from experiments import results

ROOT = Path(__file__).parents[2]


def page(name):
    """A page as it is written, with single spaces for its line breaks."""
    return ' '.join((ROOT / name).read_text(encoding='utf-8').split())


def read(name):
    return json.loads((ROOT / 'results' / name).read_text(encoding='utf-8'))


def median(name, variant, target=None, column='test_error'):
    """The median of a comparison over its seeds, of one target or of all."""
    rows = results.read_comparison(ROOT / 'results' / f'{name}.csv')
    return statistics.median(
        row[column] for row in rows if row['variant'] == variant and target in (None, row['target'])
    )
