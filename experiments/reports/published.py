"""What others published, to set beside our own results."""

from collections.abc import Mapping, Sequence
from typing import Any

# What others published on MNIST: (who, compression, test error in percent); an error that they
# give only as "no drop" is None.
Errors = tuple[tuple[str, float, float | None], ...]
PUBLISHED_ERRORS: dict[str, Errors] = {
    'lenet300': (
        ('Han et al. 2015', 12, 1.59),
        ('Guo et al. 2016 (the paper)', 56, 1.99),
        ('Guo et al. 2016 (their file)', 53.45, 1.99),
        ('Sparse VD 2017', 68, 1.92),
        ('OLMP 2018', 113.5, 2.18),
    ),
    'lenet5': (
        ('Han et al. 2015', 12, 0.77),
        ('Guo et al. 2016 (the paper)', 108, 0.91),
        ('Sparse VD 2017', 280, 0.75),
        ('OLMP 2018', 297.7, 0.91),
        ('AutoPrune 2019 ("no drop")', 310, None),
    ),
}

# Percent of its parameters that each layer keeps in the paper's table 4 and in table 5 of Han et
# al. 2015, and of the whole network.
LAYER_SHARES = {
    'alexnet': {
        'Guo et al.': {
            **{'conv1': 53.8, 'conv2': 40.6, 'conv3': 29.0, 'conv4': 32.3, 'conv5': 32.5},
            **{'fc6': 3.7, 'fc7': 6.6, 'fc8': 4.6, 'total': 5.7},
        },
        'Han et al.': {
            **{'conv1': 84, 'conv2': 38, 'conv3': 35, 'conv4': 37, 'conv5': 37},
            **{'fc6': 9, 'fc7': 9, 'fc8': 25, 'total': 11},
        },
    },
    'vgg16': {
        'Han et al.': {
            **{'conv1_1': 58, 'conv1_2': 22, 'conv2_1': 34, 'conv2_2': 36},
            **{'conv3_1': 53, 'conv3_2': 24, 'conv3_3': 42},
            **{'conv4_1': 32, 'conv4_2': 27, 'conv4_3': 34},
            **{'conv5_1': 35, 'conv5_2': 29, 'conv5_3': 36},
            **{'fc6': 4, 'fc7': 4, 'fc8': 23, 'total': 7.5},
        }
    },
}


def find_errors(rows: Sequence[Mapping[str, Any]]) -> Errors:
    """Returns what others have on the network and data set of some runs; nothing off MNIST."""
    return PUBLISHED_ERRORS.get(rows[0]['network'], ()) if rows[0]['dataset'] == 'mnist' else ()
