"""The plain training: it learns, keeps what is pruned at zero, and leaves what it was given."""

import jax
import numpy as np
import optax
import pytest

import dns_jax
from experiments.baselines.ternary import scaled_signs
from experiments.data import resident
from experiments.networks.models import MNIST_INPUT, LeNet300
from experiments.training.plain import train_network
from experiments.training.steps import make_error


@pytest.mark.parametrize('density', [None, 0.1])
def test_it_learns_and_gives_the_network_to_keep(density, data_dir):
    digits, network = resident.load('digits', data_dir), LeNet300()
    params = network.init(jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))['params']
    given = jax.tree.map(np.array, params)
    pruner = dns_jax.surgery({}, jax.random.key(0))
    if density:
        pruner = dns_jax.prune_to(density=density, steps=80)
    trained = train_network(
        network,
        params,
        optax.chain(pruner, dns_jax.caffe_sgd(0.05)),
        digits.train,
        steps=120,
        batch_size=16,
        seed=0,
        title='short',
    )
    assert make_error(network, MNIST_INPUT)(trained, digits.test) < 50  # chance is 90 %
    kernels = [leaves['kernel'] for leaves in trained.values()]
    kept = sum(np.count_nonzero(kernel) for kernel in kernels)
    assert kept == pytest.approx((density or 1) * sum(map(np.size, kernels)), rel=1e-3)
    for before, after in zip(jax.tree.leaves(given), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(before, after)


def test_it_computes_and_ends_with_what_a_quantiser_makes(data_dir):
    digits, network, quantiser = resident.load('digits', data_dir), LeNet300(), scaled_signs()
    params = network.init(jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))['params']
    rate = optax.constant_schedule(1.0)  # whose count of steps coins are thrown by
    solver = optax.chain(dns_jax.surgery({}, jax.random.key(0)), dns_jax.caffe_sgd(rate, 0.0, 0.0))

    def train(loss):
        return train_network(
            *(network, params, solver, digits.train),
            **{'steps': 1, 'batch_size': 16, 'seed': 0, 'title': 'short'},
            **{'quantiser': quantiser, 'loss': loss},
        )

    masks = jax.tree.map(lambda leaf: jax.numpy.array(True), params)
    signs = quantiser.finish(params, masks)
    still = train(lambda logits, labels: 0 * logits[:, 0])
    moved = train(lambda logits, labels: logits[:, 0] + 2 * logits[:, 1])
    for name in params:
        np.testing.assert_allclose(still[name]['kernel'], signs[name]['kernel'], rtol=1e-5)
    # A step of 1, twice that for biases, down the mean of the loss at the signs.
    np.testing.assert_allclose(moved['fc3']['bias'][:3], [-2, -4, 0], atol=1e-6)
    assert len(np.unique(np.abs(moved['fc1']['kernel']))) == 1
