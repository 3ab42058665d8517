"""Tests of optimizers: Caffe's SGD, and averages of the weights, against the same in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dns_jax import average_weights, caffe_inv, caffe_sgd, caffe_step

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


def follow_average(decay, dtype, steps=12):
    """The average after some steps of SGD, the weights after each, and those before the first."""
    params, gradients = start(dtype)
    optimizer = optax.chain(optax.sgd(0.1), average_weights(decay))
    first = params = jax.tree.map(jnp.asarray, params)
    state, path = optimizer.init(params), []
    for gradient in gradients[:steps]:
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return optax.tree.get(state, 'average'), path, first


@pytest.mark.parametrize('decay', [0, 0.5, 0.9])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_average_is_that_of_the_weights_after_each_step(decay, dtype):
    average, path, first = follow_average(decay, dtype)
    for name in SHAPES:
        want = np.asarray(first[name], np.float64)
        for params in path:
            want = decay * want + (1 - decay) * np.asarray(params[name], np.float64)
        assert average[name].dtype == jnp.float32
        # XLA need not round the weights that it averages to their dtype.
        near = 8.0 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(average[name], want, rtol=near, atol=near)


def test_an_average_changes_no_step_and_shares_no_memory_with_the_weights():
    params, gradients = start()
    plain = descend(optax.sgd(0.1), params, gradients)[-1]
    _, path, _ = follow_average(0.9, np.float32)
    for name in SHAPES:
        np.testing.assert_allclose(path[-1][name], plain[name], rtol=1e-5)
    params = jax.tree.map(jnp.asarray, params)
    average = average_weights(0.9).init(params).average
    kept = jax.tree.map(np.array, params)
    jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)(params)
    jax.tree.map(np.testing.assert_array_equal, average, kept)


def test_an_average_needs_the_weights():
    optimizer, params = average_weights(0.9), jnp.ones(2)
    with pytest.raises(ValueError, match=r'^average_weights needs the weights: call update\('):
        optimizer.update(params, optimizer.init(params))
