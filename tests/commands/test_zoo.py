"""Tests of zoo, and of the networks in the zoo."""

import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from pruned_files import save_network

from dns_jax.files._entropy import Encoder, encode_mask
from dns_jax.files.codec import load_coded
from dns_jax.files.sharing import expand
from dns_jax.files.sparse import load_sparse, save_sparse
from experiments import zoo
from experiments.data import resident
from experiments.networks import models, names
from experiments.reports import run_report as report
from experiments.training import steps as train
from experiments.zoo import ZooConfig

ZOO = sorted((Path(__file__).parents[2] / 'zoo').glob('*.safetensors'))


@pytest.fixture(scope='module')
def mnist(tmp_path_factory):
    """The published images, where they are at hand."""
    folder = os.environ.get('DNS_JAX_MNIST')
    if not folder:
        pytest.skip('needs the published MNIST files in the folder DNS_JAX_MNIST')
    return resident.load('mnist', tmp_path_factory.mktemp('mnist'), folder)


@pytest.mark.parametrize('path', ZOO, ids=lambda path: path.stem)
def test_a_card_is_that_of_its_network(path):
    network = load_sparse(path)
    summary = json.loads(path.with_suffix('.json').read_text())
    assert path.with_suffix('.md').read_text() == report.card(summary)
    kept = {
        layer: sum(int(mask.sum()) for mask in masks.values())
        for layer, masks in network.masks.items()
    }
    assert kept == {layer: size['kept'] for layer, size in summary['per_layer'].items()}
    assert network.metadata['network'] == summary['network']
    assert float(network.metadata['input_scale']) == models.MNIST_INPUT.scale
    shapes = jax.eval_shape(
        lambda: models.NETWORKS[summary['network']]().init(
            jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32)
        )
    )['params']
    assert jax.tree.map(np.shape, network.params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    # A few kilobytes: a value and a position for each kept weight, and a header.
    assert path.stat().st_size < 8 * summary['kept'] + 2_000


@pytest.mark.parametrize('path', ZOO, ids=lambda path: path.stem)
@pytest.mark.slow
def test_a_network_makes_the_errors_of_its_card(path, mnist):
    """The network runs as a user would run it: scaled images, masked weights, linen."""
    summary = json.loads(path.with_suffix('.json').read_text())
    network = load_sparse(path)
    error = train.make_measure(models.NETWORKS[network.metadata['network']](), models.MNIST_INPUT)
    assert error(network.params, mnist.test) == pytest.approx(summary['test_error'], abs=0.011)
    # A coded one errs little more.
    coded = load_coded(path.with_suffix('.dns'))
    assert error(expand(*coded[:3]), mnist.test) <= summary['test_error'] + 0.05 + 0.001


@pytest.mark.parametrize('path', ZOO, ids=lambda path: path.stem)
def test_a_coded_network_is_that_of_the_zoo(path):
    """The same connections, and the size that the page of sizes says."""
    network, coded = load_sparse(path), load_coded(path.with_suffix('.dns'))
    assert coded.metadata == network.metadata
    jax.tree.map(np.testing.assert_array_equal, coded.masks, network.masks)
    page = (path.parents[1] / 'results' / 'size.md').read_text()
    size = path.with_suffix('.dns').stat().st_size
    dense = 4 * sum(leaf.size for leaf in jax.tree.leaves(network.params))
    encoder, fed = Encoder(), np.zeros(0, bool)
    for _, mask in sorted(jax.tree.leaves_with_path(network.masks), key=lambda leaf: str(leaf[0])):
        fed = encode_mask(encoder, mask, fed)
    said = 'bytes for' if path.stem == 'lenet300' else 'for'
    assert f'{len(encoder.getvalue()):,} {said} {names.NETWORK_NAMES[path.stem]}' in page
    assert re.search(rf'coded *\| *{size:,} \| *{dense / size:.1f}× \|', page)


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A finished run, and an empty zoo."""
    monkeypatch.setattr(zoo, 'FOLDER', tmp_path / 'zoo')
    run = tmp_path / 'run'
    run.mkdir()
    results = Path(__file__).parents[2] / 'results'
    summary = json.loads((results / 'lenet300_mnist-0.json').read_text())
    weights = {'fc1': {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3)}}
    masks = {'fc1': {'kernel': np.arange(6).reshape(2, 3) > 2}}
    save_sparse(run / 'pruned.safetensors', weights, masks, {'network': 'lenet300'})
    (run / 'summary.json').write_text(json.dumps({**summary, 'kept': 3}))
    return run


def test_publish_copies_the_network_and_writes_its_card(finished):
    paths = zoo.publish(ZooConfig(workdir=str(finished), name='small'))
    assert [path.name for path in paths] == ['small.safetensors', 'small.json', 'small.md']
    assert paths[0].read_bytes() == (finished / 'pruned.safetensors').read_bytes()
    summary = json.loads((finished / 'summary.json').read_text())
    del summary['flags']['reference']  # a folder of the machine it was made on
    assert json.loads(paths[1].read_text()) == summary
    assert paths[2].read_text() == report.card(summary)
    # A file that a network began with is named.
    summary['flags']['reference'] = '/some/where/net.caffemodel'
    (finished / 'summary.json').write_text(json.dumps(summary))
    paths = zoo.publish(ZooConfig(workdir=str(finished), name='other'))
    assert json.loads(paths[1].read_text())['flags']['reference'] == 'net.caffemodel'
    assert '--reference=net.caffemodel' in paths[2].read_text()


@pytest.mark.parametrize('kind', ['resnet', 'gpt'])
def test_what_was_left_dense_counts_and_statistics_do_not(finished, kind):
    path, _, variables, masks = save_network(finished, kind)
    Path(path).rename(finished / 'pruned.safetensors')
    masks = masks['params'] if kind == 'resnet' else masks
    kept = jax.tree.map(
        lambda mask, leaf: int(np.broadcast_to(mask, leaf.shape).sum()), masks, variables['params']
    )
    summary = json.loads((finished / 'summary.json').read_text())
    own = {'network': kind, 'kept': sum(jax.tree.leaves(kept))}
    (finished / 'summary.json').write_text(json.dumps(summary | own))
    assert zoo.publish(ZooConfig(workdir=str(finished), name=kind))[0].exists()


@pytest.mark.parametrize(
    ('file', 'content', 'error', 'message'),
    [
        ('summary.json', None, FileNotFoundError, 'summary.json'),
        ('pruned.safetensors', None, FileNotFoundError, 'pruned.safetensors'),
        ('summary.json', '{', ValueError, 'summary.json is damaged'),
        ('summary.json', '{"kept": 3}', ValueError, "the summary lacks the key 'network'"),
    ],
)
def test_a_run_that_is_not_whole_is_refused(finished, file, content, error, message):
    if content is None:
        (finished / file).unlink()
    else:
        (finished / file).write_text(content)
    with pytest.raises(error, match=message):
        zoo.publish(ZooConfig(workdir=str(finished), name='small'))
    assert not zoo.FOLDER.exists()


def test_what_is_of_another_run_is_refused(finished):
    summary = json.loads((finished / 'summary.json').read_text())
    (finished / 'summary.json').write_text(json.dumps({**summary, 'kept': 4}))
    with pytest.raises(ValueError, match=r'safetensors keeps 3 parameters, summary.json says 4'):
        zoo.publish(ZooConfig(workdir=str(finished), name='small'))
    assert not zoo.FOLDER.exists()


@pytest.mark.parametrize('name', ['', '../else', 'a b'])
def test_bad_names(name):
    with pytest.raises(ValueError, match='must be letters, digits and underscores'):
        ZooConfig(name=name)
