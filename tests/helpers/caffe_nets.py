"""Networks of Caffe, byte by byte."""

import numpy as np
from wire import blob, delimited, layer


def counting(*axes):
    return np.arange(np.prod(axes), dtype=np.float32).reshape(axes)


CONVOLUTION = counting(3, 2, 5, 4)
PRODUCT = counting(6, 12)  # of three maps, two by two
BIAS = np.array([7, -8, 9], np.float32)
DATA_LAYER = layer('mnist', 'Data')
NET = (
    delimited(1, b'a net')
    + DATA_LAYER
    + layer('conv1', 'Convolution', blob(CONVOLUTION), blob(BIAS))
    + layer('ip1', 'InnerProduct', blob(PRODUCT))
)


def with_blob(content):
    """A file with one blob of this content."""
    return layer('ip', 'InnerProduct', content)


NO_BIAS, WHOLE = {'bias_term': 0}, {'num_output': 1}
