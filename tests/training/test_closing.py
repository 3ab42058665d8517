"""Tests of training.closing beside those of whole runs in test_run."""

import dataclasses
import json

import numpy as np
import opened
import pytest
from run_flags import BY_DENSITY
from situations import slow_but

from dns_jax.files.sparse import load_sparse
from dns_jax.layers import named_leaves
from experiments.data import resident
from experiments.training import run
from experiments.training.checkpoints import Checkpoints
from experiments.training.flags import Config


@pytest.mark.slow
def test_lenet5_runs_and_its_report_has_no_map_of_pixels(data_dir, tmp_path, capsys):
    short = {'reference_steps': 2, 'surgery_steps': 2, 'record_every': 1, 'checkpoint_every': 1}
    tables = {'c_rate': 'conv*:1,fc*:1', 'stop': 'fc1:1'}
    places = {'data_dir': str(data_dir), 'workdir': str(tmp_path / 'run')}
    fields = {'dataset': 'digits', 'batch_size': 16, 'finetuning_steps': 0, **short, **tables}
    summary = run.run(Config('lenet5', **places, **fields))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary
    assert (summary['parameters'], summary['network']) == (431_080, 'lenet5')
    positions = {'conv1': 576, 'conv2': 64, 'fc1': 1, 'fc2': 1}
    weights = {'conv1': 500, 'conv2': 25_000, 'fc1': 400_000, 'fc2': 5_000}
    for layer, size in summary['per_layer'].items():
        assert size['multiply_adds'] == positions[layer] * weights[layer]
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert page.count('<img ') == 3
    assert 'First layer' not in page


@pytest.mark.parametrize(
    'quantiser', slow_but(('binary', 'stochastic_binary', 'ternary', 'signs'), 'signs')
)
def test_a_file_holds_the_quantised_network_that_was_measured(quantiser, data_dir, tmp_path):
    steps = {'reference_steps': 40, 'surgery_steps': 40, 'finetuning_steps': 20}
    often = {'record_every': 20, 'checkpoint_every': 20}
    places = {'data_dir': str(data_dir), 'workdir': str(tmp_path / 'run')}
    config = Config(
        *('lenet300', 'digits'), **places, **steps, **often, compression=4, quantiser=quantiser
    )
    summary = run.run(config)
    network = load_sparse(tmp_path / 'run' / 'pruned.safetensors')
    digits = resident.load('digits', data_dir).test
    hidden = digits.images.reshape(len(digits.labels), -1) / np.float32(256)
    for leaves in network.params.values():
        hidden = np.maximum(hidden, 0) @ leaves['kernel'] + leaves['bias']
        kept = np.unique(np.abs(leaves['kernel']))
        assert quantiser == 'stochastic_binary' or len(kept) == 2  # with 0
    wrong = 100 * np.mean(hidden.argmax(1) != digits.labels)
    assert summary['test_error'] == pytest.approx(wrong, abs=0.6)
    assert summary['compression'] == pytest.approx(4, rel=0.01)


def test_the_network_that_is_kept_is_the_average_of_fine_tuning(make_config):
    own = {'average': 0.75, 'finetuning_learning_rate': 'fixed:0.3', 'checkpoint_every': 1}
    config = make_config(**BY_DENSITY, **own)
    (summary,) = opened.do(config)
    run = opened.open_run(dataclasses.replace(config, resume=True))
    phase = run.plan.finetuning
    like = run.start(phase.make_optimizer(run.task.shapes), run.initial)
    with Checkpoints(run.folder / 'checkpoints' / 'finetuning') as checkpoints:
        states = [checkpoints.restore(like, step)[1] for step in (1, 2)]
    with Checkpoints(run.folder / 'checkpoints' / 'surgery') as checkpoints:
        operated = run.plan.surgery.make_optimizer(run.task.shapes)
        _, before = checkpoints.restore(run.start(operated, run.initial))
    *_, record = (run.folder / 'metrics.jsonl').read_text().splitlines()
    assert json.loads(record)['validation_error'] == summary['validation_error']
    kept = load_sparse(run.folder / 'pruned.safetensors').params
    masks = dict(named_leaves(states[-1].masks))
    params = [dict(named_leaves(state.params)) for state in (before, *states)]
    for path, leaf in named_leaves(kept):
        want = np.asarray(params[0][path])
        for later in params[1:]:
            want = 0.75 * want + 0.25 * np.asarray(later[path])
        np.testing.assert_allclose(leaf, want * np.asarray(masks[path]), rtol=1e-5, atol=1e-7)
