"""Masks and states that people bring: of files, of peers, of other rules."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from situations import KEY, array, network, run, slow_but

import dns_jax
from dns_jax import Rule, count_kept, freeze, get_masks, layer_density, prune_to, surgery

COMPAT_TABLE = 'field'


class Params(NamedTuple):
    fc1: Any
    fc2: Any
    norm: Any


class Peer(NamedTuple):
    masks: Any
    other: int


def from_file(masks, tmp_path):
    sparse = pytest.importorskip('dns_jax.files.sparse')
    sparse.save_sparse(tmp_path / 'f', network(), masks)
    return sparse.load_sparse(tmp_path / 'f').masks


ORIGINS = {
    'a state': lambda masks, _: masks,
    'NumPy': lambda masks, _: jax.device_get(masks),
    'a file': from_file,
    'another tree': lambda masks, _: Params(**masks),
    "a peer's state": lambda masks, _: get_masks((optax.EmptyState(), Peer(masks, 0))),
}


@pytest.mark.parametrize(
    'takes_part',
    [pytest.param(dns_jax.is_kernel, marks=pytest.mark.slow), dns_jax.has_axes],
)
@pytest.mark.parametrize('origin', slow_but(ORIGINS, 'a file'))
def test_surgery_goes_on_from_masks(origin, takes_part, tmp_path):
    first = run(surgery(Rule(layer_density(0.5)), KEY, takes_part=takes_part))
    masks = ORIGINS[origin](first.masks, tmp_path)
    for make in (
        lambda: surgery(Rule(layer_density(0.25)), KEY, masks=masks),
        lambda: prune_to(density=0.25, steps=3, masks=masks),
    ):
        pruner = make()
        start = pruner.init(network())
        chex.assert_trees_all_equal(start.masks, first.masks)
        assert jax.tree.structure(start.masks) == jax.tree.structure(network())
        after = run(pruner)
        for before, mask in zip(*map(jax.tree.leaves, (first.masks, after.masks)), strict=True):
            assert before.shape == mask.shape  # what took no part still takes none
        kept, was = count_kept(after.masks), count_kept(first.masks)
        assert kept.keys() == was.keys()
        assert sum(kept.values()) == pytest.approx(sum(was.values()) / 2, abs=2)


def test_masks_and_a_rule_for_some_layers_only():
    first = run(surgery(Rule(layer_density(0.5)), KEY))
    after = run(surgery({'fc2': Rule(layer_density(0.1))}, KEY, masks=first.masks))
    chex.assert_trees_all_equal(after.masks['fc1'], first.masks['fc1'])
    assert count_kept(after.masks)['fc2'] == 19


@pytest.mark.parametrize('origin', slow_but(ORIGINS, 'a file'))
def test_frozen_masks_stay(origin, tmp_path):
    first = run(surgery(Rule(layer_density(0.3)), KEY))
    frozen = freeze(ORIGINS[origin](first.masks, tmp_path))
    optimizer = optax.chain(frozen, optax.sgd(0.1, 0.9))
    params, state = network(), optimizer.init(network())
    for _ in range(3):
        updates, state = jax.jit(optimizer.update)(params, state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(get_masks(state), first.masks)
    # The first state may be donated, and the masks are the user's own still.
    donated = jax.jit(optimizer.update, donate_argnums=1)(params, optimizer.init(params), params)
    chex.assert_trees_all_equal(get_masks(donated[1]), first.masks)
    chex.assert_trees_all_equal(frozen.init(params).masks, first.masks)


def test_masks_all_scalar_or_without_a_rule():
    masks = jax.tree.map(lambda leaf: jnp.ones((), bool), network())
    chex.assert_trees_all_equal(run(freeze(masks)).masks, masks)


WRONG_MASKS = [
    (lambda m: {**m, 'fc1': {'kernel': m['fc1']['kernel']}}, 'fc1/bias'),
    (lambda m: {**m, 'fc9': m['fc1']}, 'fc9'),
    (lambda m: {**m, 'fc1': {**m['fc1'], 'kernel': np.ones((16, 23), bool)}}, 'fc1/kernel'),
    (lambda m: {**m, 'fc1': {**m['fc1'], 'kernel': np.ones((16, 24))}}, 'fc1/kernel'),
    (lambda m: {**m, 'fc1': {**m['fc1'], 'kernel': optax.MaskedNode()}}, None),
]


@pytest.mark.parametrize(('damage', 'named'), WRONG_MASKS)
def test_masks_that_do_not_fit_are_named(damage, named):
    masks = damage(surgery(Rule(layer_density(0.3)), KEY).init(network()).masks)
    for make in (lambda: freeze(masks), lambda: prune_to(density=0.1, steps=2, masks=masks)):
        if named is None:
            make().init(network())  # a hole is a leaf that takes no part
            continue
        with pytest.raises((ValueError, TypeError), match=named):
            make().init(network())


RESUMED = {
    # how the state was made, how it goes on, what the error names
    'biases came in': ({}, {'takes_part': dns_jax.has_axes}, 'takes_part'),
    'biases went out': ({'takes_part': dns_jax.has_axes}, {}, 'takes_part'),
    'a leaf went out': (
        {'takes_part': lambda path, leaf: leaf.ndim > 0 and 'norm' not in path},
        {'takes_part': lambda path, leaf: path in ('fc1/kernel', 'fc2/kernel', 'fc2/bias')},
        'fc1/bias',
    ),
    'a layer went out': ({}, {'takes_part': lambda path, leaf: path == 'fc1/kernel'}, 'fc2'),
    'a layer came in': ({'takes_part': lambda path, leaf: path == 'fc1/kernel'}, {}, 'fc2'),
    'other layers': ({}, {'layer_of': lambda path: path}, 'layer_of'),
    'one layer': ({}, {'layer_of': lambda path: ''}, 'layer_of'),
    'other rules': ({}, {'rules': {'fc1': Rule(layer_density(0.3))}}, 'rules'),
    'more rules': ({'rules': {'fc1': Rule(layer_density(0.3))}}, {}, 'rules'),
    'stacked': ({}, {'stacked': {'fc1': 0}}, 'fc1/0'),
}


@pytest.mark.parametrize('name', RESUMED)
def test_a_state_under_other_words_is_refused_by_name(name):
    first, then, named = RESUMED[name]

    def make(options):
        return surgery(**{'rules': Rule(layer_density(0.3)), 'key': KEY, **options})

    state = make(first).init(network())
    with pytest.raises(ValueError, match=named):
        jax.eval_shape(make(then).update, network(), state, network())
    jax.eval_shape(make(first).update, network(), state, network())  # its own goes on


def test_a_state_of_another_network_is_refused_by_name():
    pruner = surgery(Rule(layer_density(0.3)), KEY)
    state = pruner.init(network())
    other = {**network(), 'fc2': {'kernel': array(24, 9), 'bias': array(9)}}
    with pytest.raises(ValueError, match=r'fc2/(bias|kernel)'):
        pruner.update(other, state, other)
