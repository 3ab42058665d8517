"""What a quantiser does in a run: to the steps, the bounds, the records and the coins."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import opened
import optax
import pytest

import dns_jax
from experiments.baselines.binary_connect import binary_connect, glorot_limit
from experiments.networks.models import MNIST_INPUT, LeNet300
from experiments.training import side_by_side
from experiments.training.flags import Config
from experiments.training.steps import Rounding, TrainState, Weights, make_step


@pytest.fixture(scope='module')
def run(data_dir, tmp_path_factory):
    """Operates on a network for a few steps; gives the opened run, its state and records."""

    def run(quantiser):
        steps = {'reference_steps': 30, 'surgery_steps': 4, 'finetuning_steps': 0}
        config = Config(
            'lenet300',
            'digits',
            data_dir=str(data_dir),
            workdir=str(tmp_path_factory.mktemp(quantiser) / 'run'),
            **steps,
            batch_size=16,
            record_every=4,
            checkpoint_every=4,
            reference_learning_rate='fixed:0.05',
            learning_rate='fixed:0.02',
            density=1,
            quantiser=quantiser,
        )
        begun = opened.open_run(config)
        references = side_by_side.train_references([begun], [])
        (final,) = side_by_side.train_surgery([begun], references, [])
        lines = (Path(config.workdir) / 'metrics.jsonl').read_text().splitlines()
        return begun, final, [json.loads(line) for line in lines]

    return run


@pytest.mark.slow
def test_a_network_learns_by_what_it_computes_with(run):
    _, rounded, _ = run('signs')
    _, real, _ = run('none')
    assert (rounded.params['fc1']['kernel'] != real.params['fc1']['kernel']).any()


def test_real_weights_stay_within_bounds_and_records_are_of_the_binary_network(run):
    begun, final, records = run('binary')
    for leaves in final.params.values():
        limit = glorot_limit(leaves['kernel'].shape)
        assert jnp.abs(leaves['kernel']).max() == pytest.approx(limit, rel=1e-6)
    kept = binary_connect().finish(final.params, final.masks)
    split = begun.task.dataset.validation
    measured, before = (
        begun.task.measure(Weights(params), split) for params in (kept, final.params)
    )
    assert records[-1]['validation_error'] == measured != before


def test_every_step_and_every_phase_throws_other_coins():
    network = LeNet300()
    params = network.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))['params']
    random = np.random.default_rng(0)
    batch = (
        jnp.asarray(random.integers(0, 256, (8, 28, 28, 1), np.uint8)),
        jnp.asarray(random.integers(0, 10, 8, np.int32)),
    )
    still = optax.chain(
        dns_jax.surgery({}, jax.random.key(0)), dns_jax.caffe_sgd(lambda step: jnp.float32(0))
    )
    losses = []
    for number in (1, 2):
        rounding = Rounding(binary_connect(stochastic=True), number)
        step = jax.jit(make_step(network, still, MNIST_INPUT, rounding=rounding))
        state = TrainState(params, still.init(params))
        for _ in range(2):
            state, loss = step(state, *batch)
            losses.append(float(loss))
    assert len(set(losses)) == 4
