"""Tests of _following: densities that are followed, step after step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from density_layers import searches_and_passes, wanted_of

import dns_jax
from dns_jax import Rule, _following, surgery, update_probability


def distinct(random, shape, dtype):
    """Weights whose magnitudes do not tie, in a dtype however narrow."""
    size = int(np.prod(shape))
    if dtype == jnp.bfloat16:
        bits = 0x3C00 + random.permutation(size).astype(np.uint16)  # of numbers above 0, ascending
        values = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16)
    else:
        values = jnp.asarray(np.abs(random.normal(size=size)) + 1e-3, dtype)
    signs = jnp.asarray(random.choice([-1.0, 1.0], size), dtype)
    return (values * signs).reshape(shape)


FOLLOWED = {
    # rule of a density schedule, steps of updates, all steps, dtype, options of surgery
    'cubic': (dns_jax.polynomial_density(0.1, 0, 20), 24, jnp.float32, {}, {}),
    'awkward': (dns_jax.log_linear_density(0.0371, 2, 17), 19, jnp.float32, {}, {}),
    'bfloat16': (dns_jax.polynomial_density(0.13, 0, 15), 16, jnp.bfloat16, {}, {}),
    'no band': (dns_jax.polynomial_density(0.1, 0, 20), 23, jnp.float32, {'hysteresis': 0.0}, {}),
    'wide band': (dns_jax.polynomial_density(0.1, 0, 9), 11, jnp.float32, {'hysteresis': 0.7}, {}),
    'up and down': (lambda step: 0.3 + 0.25 * jnp.sin(jnp.float32(step)), 17, jnp.float32, {}, {}),
    'a number': (0.2, 13, jnp.float32, {}, {}),
    'every 4': (dns_jax.polynomial_density(0.1, 0, 10), 15, jnp.float32, {}, {'refresh_every': 4}),
    'every 100': (
        dns_jax.polynomial_density(0.1, 0, 9),
        11,
        jnp.float32,
        {},
        {'refresh_every': 100},
    ),
    'coins': (dns_jax.polynomial_density(0.1, 0, 9), 12, jnp.float32, {}, {'gamma': 0.3}),
    'late': (dns_jax.polynomial_density(0.1, 5, 9), 13, jnp.float32, {}, {'start': 4}),
}


@pytest.mark.parametrize(
    ('name', 'score'),
    [
        ('awkward', 'norm'),
        ('every 4', 'layer'),
        *(
            pytest.param(name, 'norm', marks=pytest.mark.slow)
            for name in FOLLOWED
            if name != 'awkward'
        ),
        *(
            pytest.param(name, 'layer', marks=pytest.mark.slow)
            for name in ('cubic', 'coins', 'bfloat16')
        ),
    ],
)
def test_followed_numbers_while_weights_jump(name, score):
    schedule, stop, dtype, options, other = FOLLOWED[name]
    refresh, gamma, start = (
        other.get(key, default)
        for key, default in (('refresh_every', None), ('gamma', 0.0), ('start', 0))
    )
    rule = (dns_jax.layer_density if score == 'layer' else dns_jax.global_density)(
        schedule, **options
    )
    pruner = surgery(
        Rule(rule, update_probability(gamma, stop=stop, start=start), refresh), jax.random.key(0)
    )
    random, steps = np.random.default_rng(0), stop + 4
    shapes = {'a': (13, 7), 'b': (31, 9), 'c': (5, 4), 'd': (60, 40)}
    trees = []
    for _ in range(steps):
        jump = random.choice([1e-3, 1.0, 1e3], 4)
        trees.append(
            {
                layer: {'kernel': distinct(random, shape, dtype) * jnp.asarray(by, dtype)}
                if dtype != jnp.bfloat16
                else {'kernel': distinct(random, shape, dtype)}
                for (layer, shape), by in zip(shapes.items(), jump, strict=True)
            }
        )
    weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    @jax.jit
    def run(weights):
        def step(state, params):
            state = pruner.update(params, state, params)[1]
            return state, state.masks

        return jax.lax.scan(step, pruner.init(trees[0]), weights)[1]

    masks = jax.device_get(run(weights))
    sizes = {layer: int(np.prod(shape)) for layer, shape in shapes.items()}
    groups = [[layer] for layer in sizes] if score == 'layer' else [list(sizes)]
    for step in range(steps):
        for group in groups:
            whole = sum(sizes[layer] for layer in group)
            density = schedule(jnp.int32(step)) if callable(schedule) else schedule
            wanted = wanted_of(density, whole)
            kept = sum(int(masks[layer]['kernel'][step].sum()) for layer in group)
            if step < start:
                assert kept == whole
            elif step == stop - 1:
                assert kept == wanted
            elif step < stop and refresh is None and not gamma:
                assert abs(kept - wanted) <= _following.TOLERANCE * wanted
        if start <= step < stop and not gamma and refresh is None:
            assert all(masks[layer]['kernel'][step].any() for layer in sizes)
        if step >= stop:
            for layer in sizes:
                np.testing.assert_array_equal(
                    masks[layer]['kernel'][step], masks[layer]['kernel'][stop - 1]
                )


def by_lamp(layers, wanted):
    """Layers' shares by LAMP's score, w² / Σ v² over |v| ≥ |w|, of the `wanted` largest."""
    scores = {}
    for layer, (leaf,) in layers.items():
        squares = np.sort(np.asarray(leaf, np.float64).ravel() ** 2)[::-1]
        scores[layer] = squares / np.cumsum(squares)
    last = np.sort(np.concatenate([*scores.values()]))[-wanted]
    return {layer: int((own >= last).sum()) for layer, own in scores.items()}


@pytest.mark.parametrize('density', [0.02, pytest.param(0.1, marks=pytest.mark.slow)])
def test_shares_settle_where_every_unit_is_that_of_what_is_kept(density):
    """Without damping one layer takes what the other had, and they take turns."""
    random = np.random.default_rng(0)
    layers = {
        'normal': [random.normal(size=(300, 100)).astype(np.float32)],
        'uniform': [random.uniform(-1, 1, (100, 100)).astype(np.float32)],
        'heavy': [random.laplace(size=(100, 50)).astype(np.float32)],
    }
    params = {layer: {'kernel': jnp.asarray(leaf)} for layer, (leaf,) in layers.items()}
    pruner = surgery(Rule(dns_jax.global_density(density, hysteresis=0.0)), jax.random.key(0))

    @jax.jit
    def run(state):
        def step(state, _):
            state = pruner.update(params, state, params)[1]
            return state, dns_jax.count_kept(state.masks)

        return jax.lax.scan(step, state, length=400)[1]

    kept = jax.device_get(run(pruner.init(params)))
    wanted = by_lamp(layers, round(density * 45_000))
    for layer, number in wanted.items():
        assert abs(kept[layer][-1] - number) <= 0.1 * number + 1
        assert np.ptp(kept[layer][-100:]) <= 0.1 * number + 1


def test_thresholds_follow_weights_that_drift_without_a_search(monkeypatch):
    passes = searches_and_passes(monkeypatch)
    params = {'fc': {'kernel': jax.random.normal(jax.random.key(0), (200, 50))}}
    density = lambda step: 0.2 * jnp.exp(-0.005 * jnp.float32(step))  # noqa: E731
    pruner = surgery(Rule(dns_jax.layer_density(density)), jax.random.key(0))

    @jax.jit
    def run(state):
        def step(carry, key):
            state, params = carry
            state = pruner.update(params, state, params)[1]
            noise = 0.01 * jax.random.normal(key, (200, 50))
            params = jax.tree.map(lambda leaf: leaf + noise, params)
            return (state, params), state.masks['fc']['kernel'].sum()

        return jax.lax.scan(step, (state, params), jax.random.split(jax.random.key(1), 100))[1]

    kept = np.asarray(run(pruner.init(params)))
    jax.effects_barrier()
    wanted = 10_000 * np.asarray(density(np.arange(100)))
    assert (abs(kept - wanted) <= _following.TOLERANCE * wanted + 1).all()
    assert 1 <= len(passes) <= 10


def run_scaled(scales, small=(200, 100)):
    """How many three layers keep at every step, of which the first is scaled by the step."""
    return np.stack(scaled_run(small)(np.float32(scales)), 1)


@functools.cache
def scaled_run(small):
    random = np.random.default_rng(0)
    shapes = {'a': small, 'b': (200, 100), 'c': (200, 100)}
    layers = {name: np.float32(random.normal(size=shape)) for name, shape in shapes.items()}
    pruner = surgery(Rule(dns_jax.global_density(0.1)), jax.random.key(0))

    @jax.jit
    def run(scales):
        def step(state, scale):
            scaled = {**layers, 'a': layers['a'] * scale}
            params = {name: {'kernel': leaf} for name, leaf in scaled.items()}
            state = pruner.update(params, state, params)[1]
            return state, [state.masks[name]['kernel'].sum() for name in 'abc']

        params = {name: {'kernel': leaf} for name, leaf in layers.items()}
        return jax.lax.scan(step, pruner.init(params), scales)[1]

    return run


@pytest.mark.parametrize(
    ('scales', 'farthest'),
    [([1.0] * 20 + [10.0] * 80, 0.3), (1.003 ** np.arange(100), 0.15)],
    ids=['jump', 'drift'],
)
def test_a_layer_keeps_its_share_whatever_its_scale(scales, farthest):
    kept = run_scaled(scales)
    assert (abs(kept.sum(1) - 6000) <= _following.TOLERANCE * 6000).all()
    assert (abs(kept[-1] - 2000) <= farthest * 2000).all()


def test_a_dead_layer_costs_no_search_at_every_step(monkeypatch):
    passes = searches_and_passes(monkeypatch)
    scaled_run.__wrapped__((200, 100))(np.zeros(33, np.float32))
    jax.effects_barrier()
    assert 1 <= len(passes) <= 8


def test_nothing_of_a_dead_layer_is_kept():
    kept = run_scaled(np.zeros(150), small=(1, 5))  # few, so no count tells
    assert (kept[1:, 0] == 0).all()
    assert (abs(kept[1:].sum(1) - 4000) <= _following.TOLERANCE * 4000 + 1).all()


def test_one_rule_that_is_wrong_leaves_the_number_of_another():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        n: {'kernel': jax.random.normal(key, (80, 50))} for n, key in zip('ab', keys, strict=True)
    }
    falling = lambda step: 0.3 * (1 - 0.002 * jnp.float32(step))  # noqa: E731
    rules = {'a': Rule(dns_jax.layer_density(0.1)), 'b': Rule(dns_jax.layer_density(falling))}
    pruner = surgery(rules, jax.random.key(0))

    @jax.jit
    def step(state, scale):
        weights = {'a': {'kernel': params['a']['kernel'] * scale}, 'b': params['b']}
        return pruner.update(params, state, weights)[1]

    state, lows = pruner.init(params), []
    for scale in (1.0, 3.0, 0.2, 5.0):
        state = step(state, jnp.float32(scale))
        kept = {name: int(state.masks[name]['kernel'].sum()) for name in 'ab'}
        assert abs(kept['a'] - 400) <= _following.TOLERANCE * 400
        assert abs(kept['b'] - 1200) <= _following.TOLERANCE * 1200
        lows.append(float(state.thresholds['b'].low))
    assert lows[0] < lows[1]  # fewer are wanted, though the rule of a alone was wrong
