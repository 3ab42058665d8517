"""Tests of artefacts.caffe_names: files of Caffe with its names and its order of colours."""

import numpy as np
import pytest

from dns_jax.files.caffe import read_caffemodel
from experiments.artefacts import caffe_names


@pytest.mark.parametrize(
    ('network', 'layer', 'theirs', 'swapped'),
    [
        ('alexnet', 'conv1', 'conv1', True),
        ('vgg16', 'conv1_1', 'conv1_1', True),
        ('lenet5', 'conv1', 'conv1', False),
        ('lenet300', 'fc1', 'ip1', None),
    ],
)
def test_what_is_written_comes_back(tmp_path, network, layer, theirs, swapped):
    shape = (12, 4) if swapped is None else (2, 2, 3, 4)
    kernel = np.arange(1, 49, dtype=np.float32).reshape(shape)
    params = {layer: {'kernel': kernel, 'bias': np.ones(4, np.float32)}}
    masks = {layer: {'kernel': kernel % 3 > 0, 'bias': np.ones(4, bool)}}
    path = tmp_path / 'net.caffemodel'
    caffe_names.write_caffemodel(path, network, params, masks)
    (name, content), *none = read_caffemodel(path).items()
    assert (name, none) == (theirs, [])
    if swapped is not None:
        own = kernel[:, :, ::-1] if swapped else kernel
        kept = content.blobs[0] != 0
        wanted = own.transpose(3, 2, 0, 1)
        np.testing.assert_array_equal(content.blobs[0][kept], wanted[kept])
    found = caffe_names.read_caffemodel(path, network)
    np.testing.assert_array_equal(found.masks[layer]['kernel'], masks[layer]['kernel'])
    pruned = np.where(masks[layer]['kernel'], kernel, 0)
    np.testing.assert_array_equal(
        np.where(found.masks[layer]['kernel'], found.params[layer]['kernel'], 0), pruned
    )
