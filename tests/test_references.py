"""Tests of experiments.references; references of other runs are tested with the runs."""

import jax
import numpy as np
import pytest
from wire import blob, layer

from experiments import models, references, run
from experiments.flags import Config
from experiments.train import TrainState

SHAPES = ((784, 300), (300, 100), (100, 10))


@pytest.fixture(scope='module')
def like():
    network = models.NETWORKS['lenet300']()
    images = jax.ShapeDtypeStruct((1, 28, 28, 1), np.float32)
    return TrainState(jax.eval_shape(network.init, jax.random.key(0), images)['params'], ())


def lenet300(last_outputs=10, masks=False):
    """The layers of LeNet-300-100 as Caffe would store them, and their weights."""
    random, content, weights = np.random.default_rng(0), b'', []
    for number, (inputs, outputs) in enumerate(SHAPES, start=1):
        outputs = last_outputs if number == 3 else outputs
        kernel = random.normal(size=(outputs, inputs)).astype(np.float32)
        bias = random.normal(size=outputs).astype(np.float32)
        marks = [kernel > 0, bias > 0] if masks else []
        content += layer(f'ip{number}', 'InnerProduct', *map(blob, [kernel, bias, *marks]))
        weights.append((kernel * (kernel > 0), bias * (bias > 0)) if masks else (kernel, bias))
    return content, weights


def make_config(path, **fields):
    fields = {'c_rate': '1', 'train_on_all': True, **fields}
    return Config('lenet300', reference=str(path), **fields)


@pytest.mark.parametrize('masks', [False, True])
def test_a_caffemodel_is_a_reference(tmp_path, like, masks):
    content, weights = lenet300(masks=masks)
    path = tmp_path / 'net.caffemodel'
    path.write_bytes(content)
    params = references.read(make_config(path), like)
    assert jax.tree.structure(params) == jax.tree.structure(like.params)
    for number, (kernel, bias) in enumerate(weights, start=1):
        np.testing.assert_array_equal(params[f'fc{number}']['kernel'], kernel.T)
        np.testing.assert_array_equal(params[f'fc{number}']['bias'], bias)
    # Else the loop would be compiled a second time for the state that it gives back.
    assert not any(leaf.committed for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize('kind', ['missing', 'damaged', 'other network'])
def test_a_caffemodel_that_will_not_do(tmp_path, like, kind):
    path = tmp_path / 'net.caffemodel'
    error, message = ValueError, 'cannot read'
    if kind == 'missing':
        error, message = FileNotFoundError, 'net.caffemodel'
    elif kind == 'damaged':
        path.write_bytes(lenet300()[0][:-1])
    else:
        path.write_bytes(lenet300(last_outputs=11)[0])
        message = r"--reference=.* holds the shapes .*'kernel': \(100, 11\).*; wanted .*\(100, 10\)"
    with pytest.raises(error, match=message):
        references.read(make_config(path), like)


def test_a_caffemodel_may_have_seen_the_validation_images(like):
    with pytest.raises(ValueError, match=r'--reference=some\.caffemodel .* with --train_on_all'):
        references.read(make_config('some.caffemodel', train_on_all=False), like)


def test_a_run_starts_from_it(tmp_path, capsys):
    path = tmp_path / 'net.caffemodel'
    path.write_bytes(lenet300()[0])
    short = {'surgery_steps': 2, 'finetuning_steps': 0, 'record_every': 2, 'checkpoint_every': 2}
    folders = {'data_dir': str(tmp_path / 'data'), 'workdir': str(tmp_path / 'run')}
    config = make_config(path, dataset='digits', **short, **folders)
    summary = run.run(config)
    capsys.readouterr()
    # Random weights know nothing of digits.
    assert summary['reference_error'] > 70
    assert not (tmp_path / 'run' / 'checkpoints' / 'reference').exists()
