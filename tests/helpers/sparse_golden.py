"""A sparse file in full, and what is compared with it."""

import numpy as np

KERNEL = np.array([[0.0, 1.5, 0.0], [-2.0, 0.0, 0.25]], np.float32)
GOLDEN = {'fc': {'kernel': KERNEL, 'bias': np.array([7, 8], np.float32)}}
# The 0 at [1, 1] is kept; the bias takes no part.
GOLDEN_MASKS = {
    'fc': {'kernel': np.array([[False, True, False], [True, True, False]]), 'bias': np.array(True)}
}
GOLDEN_TENSORS = {
    'fc/bias:values': np.array([7, 8], np.float32),
    'fc/kernel:values': np.array([1.5, -2, 0], np.float32),
    'fc/kernel:indices': np.array([1, 3, 4], np.uint32),
}
# Before files said what took part, they had all indices of a leaf that took none.
OLD_TENSORS = {**GOLDEN_TENSORS, 'fc/bias:indices': np.array([0, 1], np.uint32)}
GOLDEN_SHAPES = {'fc/bias:shape': '[2]', 'fc/kernel:shape': '[2, 3]'}
FREE = {
    'network': 'tiny',
    'input_scale': '0.00390625',
    'input_shape': '28',
    'Überschrift': 'σ\n"\0😀',
    '': '',
}


def bits(array):
    return np.asarray(array).view(np.uint32)


def bytes_of(weights, mask):
    """A value for each kept weight, and where the leaf takes part or is a scalar its index."""
    kept = int(mask.sum()) if mask.ndim else weights.size
    return (8 if mask.ndim == weights.ndim else 4) * kept


def f32(*values):
    return np.array(values, np.float32)


def u32(*values):
    return np.array(values, np.uint32)
