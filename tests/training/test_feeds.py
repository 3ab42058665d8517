"""Tests of training.feeds and image_flags: what the flags of streamed images do to a run."""

import dataclasses
import json
import math
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import opened
import pytest
from run_flags import parse
from tiny import Tiny

from experiments import alexnet, vgg16
from experiments.config.command_line import identify
from experiments.data import resident, streams
from experiments.networks import models
from experiments.training import feeds, side_by_side, steps
from experiments.training.image_flags import ImageConfig
from experiments.training.phases import Stopped
from experiments.training.plan import read_pruning

SIZE = 8  # pixels
OWN_FLAGS = {field.name for field in dataclasses.fields(ImageConfig)} - {
    field.name for field in dataclasses.fields(feeds.Config)
}


@pytest.fixture(scope='module')
def make_config(data_dir, tmp_path_factory):
    """Makes the configuration of a tiny run on the digits, in a new folder."""

    def make(**fields):
        fields.setdefault('workdir', str(tmp_path_factory.mktemp('run') / 'run'))
        short = {'reference_steps': 30, 'surgery_steps': 40, 'finetuning_steps': 0}
        short |= {'record_every': 10, 'checkpoint_every': 10, 'batch_size': 16, 'dropout': 0.2}
        short |= {'image_size': SIZE, 'crop': 'whole', 'mesh': 'data:1', 'dataset': 'digits'}
        short |= {'refresh_every': 5, 'compression': 4.0}
        short |= {'reference_learning_rate': 'fixed:0.1', 'learning_rate': 'fixed:0.1'}
        return ImageConfig(**{'network': 'tiny', 'data_dir': str(data_dir), **short, **fields})

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.NETWORKS, 'tiny', Tiny)
        yield make


def outcome(config):
    """Runs it; returns the records and the pruned network's bytes."""
    opened.do(config)
    folder = Path(config.workdir)
    return (folder / 'metrics.jsonl').read_text(), (folder / 'pruned.safetensors').read_bytes()


@pytest.fixture(scope='module')
def plain(make_config):
    return outcome(make_config())


EFFECTIVE = {
    'image_size': 10,
    'crop': 'random_resized',
    'width': 1.5,
    'compute_dtype': 'bfloat16',
    'accumulate': 2,
}
ELSEWHERE = {'workers', 'mesh', 'distributed'}  # below, and in test_distributed


def test_every_flag_is_tried():
    assert {*EFFECTIVE, *ELSEWHERE} == OWN_FLAGS


@pytest.mark.parametrize(('name', 'value'), EFFECTIVE.items())
@pytest.mark.slow
def test_a_flag_has_an_effect(make_config, plain, name, value):
    assert outcome(make_config(**{name: value})) != plain


def test_a_run_learns_and_repeats_itself_with_workers_or_without(make_config, plain):
    assert json.loads(plain[0].splitlines()[-1])['validation_error'] < 50
    config = make_config(workers=1)
    assert outcome(config) == plain
    assert 'workers' not in identify(config)


@pytest.mark.parametrize('mesh', ['data:1', 'data:4,model:2'])
@pytest.mark.parametrize('phase', ['reference', 'surgery'])
@pytest.mark.slow
def test_a_stopped_run_goes_on_on_any_mesh(make_config, plain, mesh, phase):
    """It is stopped in the middle of an epoch of 78 batches."""
    config = make_config()
    opened_run = opened.open_run(config)
    stopping = [signal.SIGTERM]
    dense = [] if phase == 'reference' else side_by_side.train_references([opened_run], [])
    train = side_by_side.train_surgery if dense else side_by_side.train_references
    with pytest.raises(Stopped, match=f'saved {phase}'):
        train([opened_run], *([dense] if dense else []), stopping)
    records, network = outcome(dataclasses.replace(config, resume=True, mesh=mesh))
    if mesh == config.mesh:
        assert (records, network) == plain
    kept, expected = (json.loads(text.splitlines()[-1])['kept'] for text in (records, plain[0]))
    assert kept == expected


def test_batches_go_on_without_opening_the_stream_again(make_config, monkeypatch):
    opened = []
    whole = streams.StreamedSplit.train_batches

    def train_batches(self, seed, batch_size, start, rows):
        opened.append((seed, start))
        return whole(self, seed, batch_size, start, rows)

    monkeypatch.setattr(streams.StreamedSplit, 'train_batches', train_batches)
    feed = feeds.open_feed(make_config())
    parts = [list(feed.batches((0, 1), start, 3)) for start in (0, 3)]
    assert opened == [((0, 1), 0)]
    alone = list(feed.batches((0, 1), 4, 2))
    assert opened == [((0, 1), 0), ((0, 1), 4)]
    for one, other in zip(parts[1][1:], alone, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_errors_and_losses_count_every_image_once(make_config):
    """The last batch of 200 validation images is padded."""
    opened_run = opened.open_run(make_config(mesh='data:4,model:2', dropout=0.0))
    split = opened_run.task.dataset.validation
    assert len(split) == 200
    batches = [(np.asarray(images), np.asarray(labels)) for images, labels in split.batches()]
    images, labels = map(np.concatenate, zip(*batches, strict=True))
    assert (len(labels), np.sum(labels < 0)) == (208, 8)
    images, labels = images[:200].astype(np.float32), labels[:200]
    weights = jax.tree.map(np.asarray, opened_run.initial.params)
    scale = models.INPUTS['lenet5'].scale
    hidden = (images * scale).reshape(200, -1) @ weights['fc1']['kernel']
    logits = np.maximum(hidden + weights['fc1']['bias'], 0) @ weights['fc2']['kernel']
    logits += weights['fc2']['bias']
    error = opened_run.task.measure(opened_run.initial, split)
    assert error == pytest.approx(100 * np.mean(logits.argmax(1) != labels))
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    expected = -np.mean(np.log(shares[np.arange(200), labels]))
    loss = steps.make_measure(opened_run.task.network, opened_run.task.inputs, steps.NATS)
    assert loss(opened_run.initial.params, split) == pytest.approx(expected, rel=1e-5)


def test_colours_are_taken_less_their_mean(make_config, monkeypatch):
    """The network sees (pixels − mean) · scale."""
    inputs = models.Input((10.0, 20.0, 30.0), 0.5, SIZE)
    seen = []

    class Seeing:
        def apply(self, variables, images):
            seen.append(images)
            return jnp.zeros((images.shape[0], 10))

    images = np.full((2, SIZE, SIZE, 3), 40, np.uint8)
    split = resident.Split(images, np.zeros(2, np.int32))
    with jax.disable_jit():
        steps.make_measure(Seeing(), inputs)({}, split)
    np.testing.assert_array_equal(seen[0][1, 2, 3], [15.0, 10.0, 5.0])


@pytest.mark.parametrize('script', [alexnet, vgg16], ids=['alexnet', 'vgg16'])
def test_defaults_of_the_scripts(script):
    config = parse('--compression=10', defaults=script.DEFAULTS, config_type=ImageConfig)
    assert config.dataset == 'imagenet2012'
    assert config.image_size == models.INPUTS[config.network].size
    assert config.batch_size == 256


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'mesh': 'rows:2'}, '--mesh=rows:2 must be data:SIZE'),
        ({'distributed': 'here'}, '--distributed=here must be auto or HOST:PORT'),
        ({'width': math.inf}, '--width must be finite in float32, but is inf'),
        ({'width': 0.0}, '--width=0.0 must be above 0'),
        ({'mesh': 'data:8', 'batch_size': 12}, 'does not divide --batch_size=12'),
        ({'dataset': 'no_such_set'}, 'no_such_set'),
    ],
)
def test_a_refused_run_leaves_no_folder(make_config, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        opened.open_run(make_config(workdir=str(tmp_path / 'run'), **fields))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'ramp_end': 'fc1:10'}, '--ramp_end=fc1:10 must come after --ramp_start=0%'),
        ({'ramp_end': 'conv:10,*:20'}, "--ramp_end: pattern 'conv' is the first match of no layer"),
        (
            {'compression': 4.0, 'layer_density': '', 'ramp_end': 'fc1:10,fc2:20'},
            "--ramp_end: pattern 'fc1' is the first match of no layer",
        ),
    ],
)
def test_ramps_by_layer_are_refused(make_config, fields, message):
    given = {'compression': None, 'layer_density': 'fc1:0.1,fc2:0.5', **fields}
    with pytest.raises(ValueError, match=message):
        read_pruning(make_config(**given), ['fc1', 'fc2'])
