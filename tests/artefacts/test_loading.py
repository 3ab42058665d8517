"""Tests of artefacts.loading: files of networks, and layers made up."""

import jax.numpy as jnp
import numpy as np
import pytest
from networks import LENET5, LENET300
from pruned_files import inputs_of, save_network

from dns_jax import apply_masks
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
    save_sparse(tmp_path / 'w', np.ones(2, np.float32), np.array(True), {'network': 'alexnet'})
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


def test_a_residual_network_runs_as_it_was_trained(tmp_path):
    """Also from what the training left beside its weights."""
    path, network, variables, masks = save_network(tmp_path, 'resnet')
    model = load_model(path)
    assert (model.input_shape, model.dtype, model.chain) == ((32, 32, 3), jnp.float32, ())
    images = inputs_of('resnet', 2)
    expected = network.apply(apply_masks(variables, masks), images)
    np.testing.assert_allclose(model.apply(model.params, images), expected, rtol=1e-5)
    assert model.apart() is model


def test_a_language_model_runs_as_it_was_trained(tmp_path):
    path, network, variables, masks = save_network(tmp_path, 'gpt')
    model = load_model(path)
    assert (model.input_shape, model.dtype, model.chain) == ((6,), jnp.int32, ())
    tokens = inputs_of('gpt', 2)
    expected = network.apply({'params': apply_masks(variables['params'], masks)}, tokens)
    np.testing.assert_allclose(model.apply(model.params, tokens), expected, rtol=1e-5)
    apart = model.apart()
    np.testing.assert_array_equal(
        apart.params['blocks']['1']['up']['kernel'][:, :3],
        model.params['blocks']['up']['kernel'][1, :, :3],
    )
    np.testing.assert_array_equal(
        apart.masks['blocks']['1']['up']['kernel'], model.masks['blocks']['up']['kernel'][1]
    )
    np.testing.assert_allclose(apart.apply(apart.params, tokens), expected, rtol=1e-4, atol=1e-6)
    assert apart.apart() is apart


@pytest.mark.parametrize(
    ('kind', 'options', 'message'),
    [
        ('gpt', '{"characters": 7', 'cannot be read'),
        ('gpt', '[' * 100_000, 'cannot be read'),
        ('gpt', '[7]', 'must be some of .*characters'),
        ('gpt', '{"parent": 7}', 'must be some of .*characters'),
        ('gpt', '{"dtype": "float32"}', 'must be some of .*characters'),
        ('gpt', '{"depth": 2.0}', 'depth must be of type int'),
        ('gpt', '{"depth": true}', 'depth must be of type int'),
        ('gpt', '{"tied": 1}', 'tied must be of type bool'),
        ('gpt', '{"depth": 1001}', 'no more than 1000'),
        ('gpt', '{"width": 1048577}', 'no more than 1048576'),
        ('gpt', '{"depth": 0}', 'depth=0 must be at least 1'),
        ('gpt', '{}', "has 'blocks/attend/bias' of shape .2, 384., but the file has .2, 24."),
        ('resnet', '{"depth": 9}', r'depth=9 must be 6n \+ 2'),
        ('resnet', '{"width": NaN}', 'width must be of type float'),
        ('resnet', '{"depth": 14, "width": 0.25}', 'block1_2.* but the file has None'),
    ],
)  # fmt: skip
def test_options_that_make_no_network_of_the_file(tmp_path, kind, options, message):
    path, *_ = save_network(tmp_path, kind, options)
    with pytest.raises(ValueError, match=f'w holds no network to run: .*{message}'):
        load_model(path)


def test_variables_of_other_collections_are_refused(tmp_path):
    _, _, variables, masks = save_network(tmp_path, 'resnet')
    metadata = {'network': 'resnet', 'options': '{"depth": 8, "width": 0.25}'}
    save_sparse(tmp_path / 'w', variables['params'], masks['params'], metadata)
    with pytest.raises(ValueError, match=r"'batch_stats/.* but the file has None"):
        load_model(str(tmp_path / 'w'))
