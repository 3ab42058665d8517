"""Tests of training.solvers: what each optimizer does, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dns_jax
from experiments.training.solvers import Numbers, make_solver

RATES = (0.1, 0.1, 0.02, 0.02)


def rate(step):
    return jnp.where(step < 2, 0.1, 0.02)


def make_numbers(**fields):
    own = {'rate': rate, 'decay': 0.0, 'momentum': 0.9, 'bias_scale': 2.0, 'decay_biases': True}
    return Numbers(**{**own, **fields})


def tree(seed=0):
    random = np.random.default_rng(seed)
    shapes = {
        'tokens': {'embedding': (3, 2)},
        'norm': {'scale': (2,), 'bias': (2,)},
        'fc': {'kernel': (2, 4), 'bias': (4,)},
    }
    return {
        layer: {name: random.normal(size=shape).astype(np.float32) for name, shape in each.items()}
        for layer, each in shapes.items()
    }


def follow(solver, gradients):
    """The weights before and after each step."""
    params = tree()
    state, course = solver.init(params), [params]
    for gradient in gradients:
        updates, state = solver.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        course.append(params)
    return course


def assert_close(one, other, **tolerances):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), one, other)


@pytest.mark.parametrize('decay_biases', [True, False])
def test_sgd_has_a_momentum_that_knows_of_no_rate(decay_biases):
    gradients = [tree(seed) for seed in range(1, 5)]
    solver = make_solver('sgd', make_numbers(decay=0.01, decay_biases=decay_biases))
    *_, found = follow(solver, gradients)
    wanted, buffers = tree(), jax.tree.map(np.zeros_like, tree())
    for gradient, own_rate in zip(gradients, RATES, strict=True):
        for layer, leaves in wanted.items():
            for name in leaves:
                decays = decay_biases or name in ('kernel', 'embedding')
                whole = gradient[layer][name] + 0.01 * decays * leaves[name]
                buffers[layer][name] = 0.9 * buffers[layer][name] + whole
                leaves[name] = leaves[name] - own_rate * buffers[layer][name]
    assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    # Caffe's knows of it.
    *_, other = follow(make_solver('caffe', make_numbers(decay=0.01, bias_scale=1.0)), gradients)
    assert not np.allclose(other['fc']['kernel'], found['fc']['kernel'], rtol=1e-3)


def test_caffe_is_that_of_the_library():
    gradients = [tree(seed) for seed in range(1, 5)]
    numbers = make_numbers(decay=0.01, momentum=0.5, bias_scale=3.0, decay_biases=False)
    found = follow(make_solver('caffe', numbers), gradients)
    wanted = follow(dns_jax.caffe_sgd(rate, 0.5, 0.01, 3.0, False), gradients)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize('decay_biases', [True, False])
def test_adamw_decays_what_it_is_asked_to(promotion, decay_biases):
    nothing = [jax.tree.map(np.zeros_like, tree())] * 2
    solver = make_solver('adamw', make_numbers(decay=0.1, decay_biases=decay_biases))
    *_, found = follow(solver, nothing)
    for layer, leaves in tree().items():
        for name, leaf in leaves.items():
            decays = decay_biases or name in ('kernel', 'embedding')
            wanted = leaf * ((1 - 0.1 * 0.1) ** 2 if decays else 1.0)
            np.testing.assert_allclose(found[layer][name], wanted, rtol=1e-5)


def test_adamw_steps_by_the_signs_of_gradients_at_first(promotion):
    gradient = tree(1)
    _, found = follow(make_solver('adamw', make_numbers()), [gradient])
    wanted = jax.tree.map(lambda leaf, own: leaf - 0.1 * np.sign(own), tree(), gradient)
    assert_close(found, wanted, atol=1e-4)


def test_clip_bounds_the_norm_of_all_gradients_together():
    gradient = tree(1)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    plain = make_numbers(momentum=0.0)
    for clip, factor in ((norm / 4, 0.25), (2 * norm, 1.0), (0.0, 1.0)):
        _, found = follow(make_solver('sgd', plain, float(clip)), [gradient])
        wanted = jax.tree.map(lambda leaf, own, by=factor: leaf - 0.1 * by * own, tree(), gradient)
        assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', ['caffe', 'sgd'])
@pytest.mark.parametrize('momentum', [-0.1, 1.0])
def test_a_momentum_out_of_range_is_refused(name, momentum):
    with pytest.raises(ValueError, match=r'momentum must be in \[0, 1\)'):
        make_solver(name, make_numbers(momentum=momentum))
