"""Tests of surgery: thresholds are asked for again when they are due, and then alone."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from situations import slow_but
from surgery_runs import (
    REFRESHED,
    init_masks,
    network,
    states_of_run,
    surgery,
    three_layers,
    wander,
)

from dns_jax import (
    Rule,
    SurgeryState,
    count_kept,
    global_density,
    group_by_layer,
    layer_density,
    polynomial_density,
    update_masks,
    update_probability,
)


@pytest.mark.parametrize('how', slow_but(['jit', 'vmap of scan', 'plain'], 'jit'))
def test_thresholds_are_asked_for_again_when_they_should_be(how):
    params, key = three_layers(), jax.random.key(4)
    steps = 4 if how == 'plain' else 12  # without jit every refresh is compiled anew
    if how == 'vmap of scan':
        keys = jnp.stack([jax.random.key(3), key])
        run = jax.vmap(lambda key: states_of_run('scan', params, key, steps, REFRESHED, wander))
        states = jax.tree.map(lambda leaf: leaf[1], run(keys))
    else:
        states = states_of_run(how, params, key, steps, REFRESHED, wander)

    masks, bands = init_masks(params), {}
    for pattern, rule in ASK.items():
        bands |= rule(*groups(params, masks)[pattern], jnp.int32(0))
    for count in range(steps):
        moved, before = wander(params, jnp.int32(count)), bands
        weights_and_masks = groups(moved, masks)
        due = {'fc1': count >= 3 and count % 2 == 0, 'fc*': count in (0, 3, 6, 7)}
        for pattern, again in due.items():
            if again:
                bands = bands | ASK[pattern](*weights_and_masks[pattern], jnp.int32(count))
        state = jax.tree.map(lambda leaf, count=count: leaf[count], states)
        # A norm may be summed up in another order; else it is to the last bit.
        chex.assert_trees_all_close(state.thresholds, bands, rtol=1e-6)
        for layer in bands:
            pattern = 'fc1' if layer == 'fc1' else 'fc*'
            assert (bands[layer] == before[layer]) == (not due[pattern])
        # By density the last update is made for certain.
        chance = 1 / (1 + 0.1 * count) if count < 7 else float(count == 7)
        sigma = dict.fromkeys(('fc2', 'fc3'), chance)
        sigma['fc1'] = float(count >= 3)
        after = update_masks(jax.random.fold_in(key, count), moved, masks, bands, sigma)
        chex.assert_trees_all_equal(state.masks, after)
        masks = after
    kept = count_kept(masks)
    assert all(0 < kept[layer] < sum(map(jnp.size, params[layer].values())) for layer in kept)


ASK = {pattern: jax.jit(rule.thresholds) for pattern, rule in REFRESHED.items()}


def groups(params, masks):
    """What each rule of REFRESHED is asked about."""
    names = {'fc1': ['fc1'], 'fc*': ['fc2', 'fc3']}
    both = group_by_layer(params), group_by_layer(masks)
    return {
        pattern: [{layer: tree[layer] for layer in layers} for tree in both]
        for pattern, layers in names.items()
    }


@pytest.mark.parametrize(('factory', 'hysteresis'), [(layer_density, 0.3), (global_density, 0.1)])
def test_every_refresh_reaches_the_density(factory, hysteresis):
    # However far the weights went; the band is counted in, by the masks that were.
    random = np.random.default_rng(0)
    params = {
        'a': {'kernel': random.normal(size=(40, 25)), 'bias': random.normal(size=25)},
        'b': {'kernel': 3 * random.normal(size=(3, 3, 10, 20))},
    }
    params = jax.tree.map(jnp.float32, params)
    density = polynomial_density(0.06, 5, 20)
    rule = factory(density, hysteresis=hysteresis)
    table = Rule(rule, update_probability(power=0), refresh_every=4)
    states = states_of_run('scan', params, steps=26, rules=table, move=wander)
    kept = jax.vmap(count_kept)(states.masks)
    kept, sizes = np.stack([kept['a'], kept['b']], axis=1), np.array([40 * 25 + 25, 3 * 3 * 200])
    if factory is global_density:
        kept, sizes = kept.sum(axis=1, keepdims=True), sizes.sum(keepdims=True)
    for count in range(0, 26, 4):
        wanted = (0.06 + 0.94 * (1 - np.clip((count - 5) / 15, 0, 1)) ** 3) * sizes
        assert np.all(np.abs(kept[count] - wanted) < 0.501)
        assert np.all(np.abs(kept[count] / wanted - 1) < 0.01)
    # Between, the masks follow the weights over the thresholds that there are.
    assert np.all(kept[21:24] != kept[20])


@pytest.mark.parametrize(
    'rule',
    [
        pytest.param(layer_density(0.3), marks=pytest.mark.slow),
        global_density(0.2, hysteresis=0.2),
    ],
)
def test_without_refresh_thresholds_stay_those_of_the_start(rule):
    params = three_layers()
    once = Rule(rule, update_probability(gamma=0.1), refresh_every=0)
    states = states_of_run('scan', params, steps=8, rules=once, move=wander)
    start = surgery(once, jax.random.key(0)).init(params).thresholds
    for layer, band in start.items():
        for got, want in zip(states.thresholds[layer], band, strict=True):
            np.testing.assert_allclose(got, [want] * 8, rtol=1e-6)


def test_nothing_is_refreshed_or_updated_once_sigma_is_0():
    rule = Rule(layer_density(0.5), update_probability(power=0, stop=5), refresh_every=1)
    states = states_of_run('scan', network(), steps=9, rules=rule, move=wander)
    for leaf in map(np.asarray, jax.tree.leaves((states.masks, states.thresholds))):
        assert np.all(leaf[4:] == leaf[4])
        assert np.all([np.any(leaf[at] != leaf[at + 1]) for at in range(4)])


def primitives(jaxpr):
    """Counts the primitives of a jaxpr that always run, and those in the branches of a `cond`."""
    always, sometimes = collections.Counter(), collections.Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        always[name] += 1
        for value in jax.tree.leaves([*equation.params.values()]):
            inner = getattr(value, 'jaxpr', value)
            if hasattr(inner, 'eqns'):
                inner_always, inner_sometimes = primitives(inner)
                sometimes += inner_sometimes
                (sometimes if name == 'cond' else always).update(inner_always)
    return always, sometimes


@pytest.mark.parametrize('runs', [1, 3])
def test_step_without_refresh_does_not_look_for_thresholds(runs):
    params = network()
    transform = surgery(REFRESHED, jax.random.key(0))
    state = transform.init(params)

    def update(state, params):
        return transform.update(params, state, params)[1]

    if runs > 1:
        # One count for all runs: of one for each, vmap would make a `select` of both branches.
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * runs), state)
        state = stacked._replace(count=state.count)
        update = jax.vmap(update, (SurgeryState(None, 0, 0, 0), None))
    always, sometimes = primitives(jax.make_jaxpr(update)(state, params).jaxpr)
    assert always['cond'] >= 2
    # The one loop is of as many turns as there are updates, one or none; searches are within.
    assert always['while'] + always['scan'] == 1
    assert sometimes['while'] + sometimes['scan'] >= 2
    assert not {'sort', 'top_k', 'approx_top_k', 'cumsum'} & {*always, *sometimes}
