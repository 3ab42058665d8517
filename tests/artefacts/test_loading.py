"""Tests of artefacts.loading: files of networks, and layers made up."""

import numpy as np
import pytest
from networks import LENET5, LENET300

from dns_jax.files.sparse import save_sparse
from experiments.artefacts.loading import load_model
from experiments.zoo import FOLDER

ZOO = str(FOLDER / 'lenet300.safetensors')


def test_models_of_the_zoo():
    for name, chain in (('lenet300', LENET300), ('lenet5', LENET5)):
        model = load_model(str(FOLDER / f'{name}.safetensors'))
        assert model.chain == chain
        assert model.input_shape == (28, 28, 1)
        assert model.metadata['network'] == model.name == name


def test_synthetic_layer():
    model = load_model('fc:80x50:0.1')
    kernel = model.params['fc']['kernel']
    assert kernel.shape == (80, 50)
    assert 0.05 < np.count_nonzero(kernel) / kernel.size < 0.15
    np.testing.assert_array_equal(kernel != 0, model.masks['fc']['kernel'])
    np.testing.assert_array_equal(kernel, load_model('fc:80x50:0.1').params['fc']['kernel'])


@pytest.mark.parametrize('name', ['fc:', 'fc:3x4', 'fc:0x4:0.1', 'fc:3x4:2', 'fc:3x4:1.5'])
def test_synthetic_layer_of_no_shape(name):
    with pytest.raises(ValueError, match='must be fc:INPUTSxUNITS:DENSITY'):
        load_model(name)


def test_synthetic_layer_of_too_many_weights():
    with pytest.raises(ValueError, match='has 999998000001 weights, over'):
        load_model('fc:999999x999999:0.1')


def test_file_of_an_unknown_network(tmp_path):
    save_sparse(tmp_path / 'w', np.ones(2, np.float32), np.array(True), {'network': 'resnet'})
    with pytest.raises(ValueError, match='w holds no network to run: it has no chain'):
        load_model(str(tmp_path / 'w'))


EMPTY = np.ones((5, 5, 1, 0), np.float32)
KEPT = {'kernel': np.array(True), 'bias': np.array(True)}


@pytest.mark.parametrize(
    ('params', 'masks'),
    [
        (np.ones(2, np.float32), np.array(True)),
        ({'conv1': np.ones(2, np.float32)}, {'conv1': np.array(True)}),
        ({'conv1': {'kernel': EMPTY, 'bias': EMPTY[0, 0, 0]}}, {'conv1': KEPT}),
    ],
)
def test_files_of_other_trees(tmp_path, params, masks):
    save_sparse(tmp_path / 'w', params, masks, {'network': 'lenet5'})
    with pytest.raises(ValueError, match='w holds no network to run'):
        load_model(str(tmp_path / 'w'))
