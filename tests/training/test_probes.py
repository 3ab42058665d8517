"""Tests of training.probes: a random cut, and what is remembered of connections that return."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dns_jax
from experiments.training import probes

RULE = dns_jax.Rule(dns_jax.layer_density(0.5, 0.1), dns_jax.update_probability(power=0), 1)
FROZEN = dns_jax.Rule(dns_jax.mean_std(-9.0), dns_jax.update_probability(stop=0))


def weights_at(step):
    random = np.random.default_rng(step // 2)
    return {
        'fc1': {'kernel': jnp.asarray(random.normal(size=(40, 50)), jnp.float32)},
        'scale': jnp.ones(()),
    }


def course_of(transform, steps=8):
    state, seen = transform.init(weights_at(0)), []
    update = jax.jit(transform.update)
    for step in range(steps):
        params = weights_at(step)
        updates, state = update(params, state, params)
        for one, other in zip(*map(jax.tree.leaves, (updates, params)), strict=True):
            np.testing.assert_array_equal(one, other)
        seen.append(np.array(dns_jax.get_masks(state)['fc1']['kernel']))
    return seen, state


def test_a_cut_takes_its_share_once():
    seen, state = course_of(probes.cut(dns_jax.surgery(FROZEN, jax.random.key(0)), 0.3, 3))
    kept = [mask.mean() for mask in seen]
    assert kept[:3] == [1.0] * 3
    assert kept[3] == pytest.approx(0.7, abs=0.05)
    assert kept[3:] == [kept[3]] * 5
    assert state.masks['scale'].shape == ()
    other, _ = course_of(probes.cut(dns_jax.surgery(FROZEN, jax.random.key(1)), 0.3, 3))
    assert (seen[3] != other[3]).any()


def test_a_cut_takes_of_what_is_kept():
    plain, _ = course_of(dns_jax.surgery(RULE, jax.random.key(0)))
    seen, _ = course_of(probes.cut(dns_jax.surgery(RULE, jax.random.key(0)), 0.3, 3))
    for step in range(3):
        np.testing.assert_array_equal(seen[step], plain[step])
    assert not (seen[3] & ~plain[3]).any()
    assert seen[3].sum() / plain[3].sum() == pytest.approx(0.7, abs=0.05)
    # The next update of surgery splices as many as it wants.
    assert seen[4].sum() == plain[4].sum()


def test_returns_are_those_of_the_course():
    plain, _ = course_of(dns_jax.surgery(RULE, jax.random.key(0)))
    transform = probes.count_returns(dns_jax.surgery(RULE, jax.random.key(0)))
    seen, state = course_of(optax.chain(transform, optax.identity()))
    np.testing.assert_array_equal(seen, plain)
    pruned, returned = np.zeros_like(plain[0]), np.zeros_like(plain[0])
    before = np.ones_like(plain[0])
    for mask in plain:
        returned |= mask & ~before
        pruned |= ~mask
        before = mask
    found = probes.find_returns(state)
    np.testing.assert_array_equal(found.pruned['fc1']['kernel'], pruned)
    np.testing.assert_array_equal(found.returned['fc1']['kernel'], returned)
    assert not found.returned['scale']
    assert 0 < returned.sum() < pruned.sum()


def test_nothing_is_found_where_nothing_was_counted():
    state = dns_jax.surgery(RULE, jax.random.key(0)).init(weights_at(0))
    assert probes.find_returns((state, ())) is None


def test_as_many_others_are_removed():
    masks = {'a': np.array([True] * 8 + [False] * 4), 'b': np.ones((), bool)}
    returned = {'a': np.array([True] * 3 + [False] * 7 + [True] * 2), 'b': np.zeros((), bool)}
    seen = set()
    for seed in range(5):
        left = probes.remove_others(masks, returned, seed)
        assert left['b']
        assert left['a'][:3].all()
        assert left['a'].sum() == 5
        assert not left['a'][8:].any()
        seen.add(left['a'].tobytes())
    assert len(seen) > 1
    assert masks['a'].sum() == 8
    # Of two others no more can go.
    returned = {'a': np.array([True] * 6 + [False] * 6), 'b': np.zeros((), bool)}
    assert probes.remove_others(masks, returned, 0)['a'].sum() == 6
