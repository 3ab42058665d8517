"""Tests of export: coded files of networks that are no chain, on data made up here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruned_files import save_network

from dns_jax.files.sharing import round_codebooks
from dns_jax.layers import named_leaves
from experiments.artefacts.loading import load_model
from experiments.data import resident, texts
from experiments.export import ExportConfig, export
from experiments.networks import models

pytestmark = pytest.mark.usefixtures('promotion')  # which optax's Adam takes for granted

DATASETS = {'resnet': 'cifar10', 'gpt': 'tiny_shakespeare'}
TUNING = {'finetuning_steps': 3, 'learning_rate': 1e-2, 'batch_size': 4, 'tuned': 'weights'}


@pytest.fixture(autouse=True)
def data(monkeypatch):
    """A few noisy images, and seven letters in turns, in place of those that are downloaded."""
    rng = np.random.default_rng(0)

    def images(count):
        labels = rng.integers(0, 10, count).astype(np.int32)
        return resident.Split(rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8), labels)

    def text(count):
        return texts.TextSplit((np.arange(count) % 7).astype(np.uint8), 6)

    pictures = resident.Dataset('cifar10', images(8), images(8), images(20))
    letters = texts.Texts('tiny_shakespeare', text(50), text(50), text(90), b'abcdefg')
    monkeypatch.setattr(resident, 'load', lambda *arguments: pictures)
    monkeypatch.setattr(texts, 'load', lambda *arguments: letters)
    return {'resnet': pictures.test, 'gpt': letters.test}


def run_export(tmp_path, kind, **flags):
    path, *_ = save_network(tmp_path, kind)
    flags = {'dataset': DATASETS[kind], 'clusters': '4', 'finetuning_steps': 0} | flags
    output = str(tmp_path / 'file.dns')
    result = export(ExportConfig(model=path, format='coded', output=output, **flags))
    return load_model(path), load_model(output), result


def error_of(model, split):
    """By hand: wrong images in percent, or bits of the characters that follow."""
    if model.metadata['network'] == 'resnet':
        scaled = models.INPUTS['resnet'].prepare(jnp.asarray(split.images))
        chosen = np.asarray(model.apply(model.params, scaled)).argmax(-1)
        return 100 * np.mean(chosen != split.labels)
    count = len(split.tokens) - 1
    windows = np.zeros((-(-count // 6), 6), np.int32)
    windows.flat[:count] = split.tokens[:-1]
    logits = np.asarray(model.apply(model.params, windows)).reshape(-1, 7)[:count]
    chances = np.asarray(jax.nn.log_softmax(logits)) / np.log(2)
    return -chances[np.arange(count), split.tokens[1:]].mean()


@pytest.mark.parametrize('kind', ['resnet', 'gpt'])
def test_a_coded_network_is_measured_as_it_is_written(tmp_path, data, kind):
    before, coded, result = run_export(tmp_path, kind)
    assert coded.network == before.network
    assert result['error_before'] == pytest.approx(error_of(before, data[kind]), rel=1e-4)
    assert result['error'] == pytest.approx(error_of(coded, data[kind]), rel=1e-4)
    params = coded.params['params'] if kind == 'resnet' else coded.params
    assert result['kept'] == sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(params))
    kernel = params['block1_1']['conv1'] if kind == 'resnet' else params['blocks']['up']
    assert len(np.unique(kernel['kernel'])) == 5  # with 0
    # Images have 32 pixels a side in the first stage and before it, then 16, then 8.
    positions = {'conv1': 32**2, 'block1_1': 32**2, 'block2_1': 16**2, 'block3_1': 8**2}
    assert result['multiply_adds'] == sum(
        positions.get(path.split('/')[0], 1) * np.count_nonzero(leaf)
        for path, leaf in named_leaves(params)
        if path.endswith('kernel')
    )


def test_statistics_are_rounded_but_neither_shared_nor_tuned(tmp_path):
    before, untuned, _ = run_export(tmp_path, 'resnet')
    *_, tuned, _ = run_export(tmp_path, 'resnet', **TUNING)
    for own in (untuned, tuned):
        rounded = jax.tree.map(
            lambda leaf: round_codebooks({'': leaf})[''], before.params['batch_stats']
        )
        jax.tree.map(np.testing.assert_array_equal, own.params['batch_stats'], rounded)
    for layer in ('conv1', 'norm1', 'head'):
        pairs = jax.tree.map(
            np.array_equal, untuned.params['params'][layer], tuned.params['params'][layer]
        )
        assert not all(jax.tree.leaves(pairs)), layer


def test_a_language_model_is_tuned(tmp_path):
    flags = TUNING | {'finetuning_steps': 60}
    *_, result = run_export(tmp_path, 'gpt', **flags)
    *_, untuned = run_export(tmp_path, 'gpt')
    assert result['error'] < untuned['error'] - 0.1


@pytest.mark.parametrize(
    ('kind', 'dataset', 'message'),
    [
        ('gpt', 'mnist', '--dataset=mnist is not for the network gpt'),
        ('resnet', 'tiny_shakespeare', '--dataset=tiny_shakespeare is not for the network resnet'),
        ('resnet', 'mnist', 'its images are 28x28x1'),
    ],
)
def test_a_data_set_for_others_is_refused(tmp_path, kind, dataset, message):
    with pytest.raises(ValueError, match=message):
        run_export(tmp_path, kind, dataset=dataset)


def test_a_text_of_another_alphabet_is_refused(tmp_path, monkeypatch):
    other = dataclasses.replace(texts.load('x', 6), alphabet=b'ab')
    monkeypatch.setattr(texts, 'load', lambda *arguments: other)
    with pytest.raises(ValueError, match='has 2 different characters, but the network has 7'):
        run_export(tmp_path, 'gpt')


def test_a_file_whose_options_do_not_fit_is_refused(tmp_path):
    path, *_ = save_network(tmp_path, 'gpt', json.dumps({'depth': 3}))
    with pytest.raises(ValueError, match='w holds no network to code: gpt with the options'):
        export(ExportConfig(model=path, format='coded', output=str(tmp_path / 'file.dns')))
