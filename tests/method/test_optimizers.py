"""Tests of optimizers: Caffe's SGD against the same in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dns_jax import caffe_inv, caffe_sgd, caffe_step

SHAPES = {'kernel': (2, 2, 1, 3), 'bias': (3,), 'scale': ()}
# The rate changes at the fourth and at the eighth of twelve steps.
STEP = caffe_step(0.1, 0.25, 4)


def start(dtype=np.float32):
    random = np.random.default_rng(0)
    params, *gradients = [
        {name: np.asarray(random.normal(size=shape), dtype) for name, shape in SHAPES.items()}
        for _ in range(13)
    ]
    return params, gradients


def descend(optimizer, params, gradients):
    """Returns the params after each step."""

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    state, path = optimizer.init(params), []
    for gradient in gradients:
        params, state = step(params, state, gradient)
        path.append(params)
    return path


def caffe(params, gradients, rates, momentum, decay, bias_scale, decay_biases=True):
    """SGDSolver::Regularize and ComputeUpdateValue, leaf by leaf, in float64."""
    params = {name: leaf.astype(np.float64) for name, leaf in params.items()}
    history = dict.fromkeys(params, 0.0)
    path = []
    for rate, gradient in zip(rates, gradients, strict=True):
        for name in params:
            local_rate = rate * bias_scale if name == 'bias' else rate
            decay_mult = 1 if name != 'bias' or decay_biases else 0
            diff = gradient[name] + decay * decay_mult * params[name]
            history[name] = local_rate * diff + momentum * history[name]
            params[name] = params[name] - history[name]
        path.append(dict(params))
    return path


@pytest.mark.parametrize(
    ('schedule', 'rates'),
    [
        (STEP, [0.1] * 4 + [0.025] * 4 + [0.00625] * 4),
        (caffe_inv(0.1, 0.5, 0.75), [0.1 * (1 + 0.5 * i) ** -0.75 for i in range(12)]),
        (0.05, [0.05] * 12),
    ],
    ids=['step', 'inv', 'fixed'],
)
@pytest.mark.parametrize(
    'arguments',
    [*((0.9, 5e-4, 2.0), (0.0, 0.0, 1.0), (0.5, 0.1, 0.0), (0.9, 0.1, 3)), (0.9, 0.1, 2.0, False)],
)
def test_caffe_sgd_across_rate_changes(schedule, rates, arguments):
    params, gradients = start()
    path = descend(caffe_sgd(schedule, *arguments), params, gradients)
    for got, want in zip(path, caffe(params, gradients, rates, *arguments), strict=True):
        for name in params:
            np.testing.assert_allclose(got[name], want[name], atol=2e-6, err_msg=name)


def test_defaults_are_those_of_the_authors():
    params, gradients = start()
    want = caffe(params, gradients, [0.1] * 12, 0.9, 5e-4, 2.0)[-1]
    got = descend(caffe_sgd(0.1), params, gradients)[-1]
    for name in params:
        np.testing.assert_allclose(got[name], want[name], atol=2e-6, err_msg=name)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes_are_kept(dtype):
    params, gradients = start(dtype)
    optimizer = caffe_sgd(STEP)
    state = optimizer.init(params)
    updates, _ = jax.jit(optimizer.update)(gradients[0], state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}


def test_params_are_needed():
    params, gradients = start()
    optimizer = caffe_sgd(0.1)
    with pytest.raises(ValueError, match='params'):
        optimizer.update(gradients[0], optimizer.init(params))
