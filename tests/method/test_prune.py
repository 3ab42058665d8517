"""The short form: what is asked for is met, whatever the numbers are, and stays."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dns_jax
from dns_jax import _following, get_masks, has_axes, importance, measure_sizes, prune_to

COMPAT_TABLE = 'field'

SHAPES = {
    'fc1': {'kernel': (13, 17), 'bias': (17,)},
    'fc2': {'kernel': (17, 11), 'bias': (11,)},
    'norm': {'scale': (11,)},
}
TOTAL, KERNELS = 13 * 17 + 17 + 17 * 11 + 11 + 11, 13 * 17 + 17 * 11


def network(seed=0, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    return {
        layer: {
            name: (random.normal(size=shape) * random.choice([0.1, 1, 5])).astype(dtype)
            for name, shape in leaves.items()
        }
        for layer, leaves in SHAPES.items()
    }


def over_steps(steps, dtype=jnp.float32):
    """Weights that are others at every step."""
    trees = [network(seed, dtype) for seed in range(steps)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def run(pruner, weights, start=None):
    """All masks, after every step."""

    def step(state, params):
        state = pruner.update(params, state, params)[1]
        return state, state.masks

    first = pruner.init(jax.tree.map(lambda leaf: leaf[0], weights)) if start is None else start
    return jax.jit(functools.partial(jax.lax.scan, step))(first, weights)


def kept_of(masks):
    """Of kernels, after every step."""
    return sum(np.asarray(masks[layer]['kernel']).sum((1, 2)) for layer in ('fc1', 'fc2'))


CASES = [
    # steps, start, what is asked for, dtype
    (1, 0, {'density': 0.1}, jnp.float32),
    (2, 3, {'density': 1 / 3}, jnp.float32),
    (7, 0, {'compression': 3.7}, jnp.float32),
    (10, 5, {'compression': 7}, jnp.float32),
    (13, 1, {'density': 0.0371}, jnp.float32),
    (29, 0, {'density': 0.5}, jnp.float32),
    (5, 0, {'density': 1.0}, jnp.float32),
    (3, 0, {'compression': 1}, jnp.float32),
    (6, 2, {'compression': math.pi}, jnp.float32),
    (11, 0, {'compression': 1.1}, jnp.bfloat16),
]


@pytest.mark.parametrize(
    ('steps', 'start', 'asked', 'dtype'),
    [
        case if number in (1, 3, 9) else pytest.param(*case, marks=pytest.mark.slow)
        for number, case in enumerate(CASES)
    ],
)
def test_met_exactly_at_the_end_and_frozen_after(steps, start, asked, dtype):
    weights = over_steps(start + steps + 3, dtype)
    if dtype == jnp.bfloat16:  # no ties: every magnitude once

        def once(leaf):
            size = leaf[0].size
            bits = 0x3C00 + np.random.default_rng(0).permutation(len(leaf) * size) % 2**14
            bits = bits.reshape(len(leaf), size).astype(np.uint16)
            return jax.lax.bitcast_convert_type(jnp.asarray(bits), dtype).reshape(leaf.shape)

        weights = jax.tree.map(once, weights)
    pruner = prune_to(steps=steps, start=start, **asked)
    state, masks = run(pruner, weights)
    kept = kept_of(masks)
    if 'density' in asked:
        final = round(asked['density'] * KERNELS)
    else:
        final = math.floor(TOTAL / asked['compression']) - (TOTAL - KERNELS)
        params = jax.tree.map(lambda leaf: leaf[-1], weights)
        size = measure_sizes(params, state.masks).total
        assert size.kept == math.floor(TOTAL / asked['compression'])
        assert size.compression >= asked['compression']
    assert (kept[:start] == KERNELS).all()
    assert (kept[start + steps - 1 :] == final).all()
    for mask in jax.tree.leaves(masks):
        after = np.asarray(mask)[start + steps - 1 :]
        np.testing.assert_array_equal(after, np.broadcast_to(after[:1], after.shape))
    # On the way it is the ramp of the docstring, within what is stated.
    ramp = int(0.5 * (steps - 1))
    for step in range(steps):
        done = 1.0 if step >= ramp else step / ramp
        wanted = final + (KERNELS - final) * (1 - done) ** 3
        assert abs(kept[start + step] - wanted) <= _following.TOLERANCE * wanted + 1, step


def test_every_layer_keeps_something_at_the_least():
    _, masks = run(prune_to(density=2 / KERNELS, steps=3), over_steps(4))
    assert kept_of(masks)[-1] == 2
    assert all(np.asarray(masks[layer]['kernel'])[-1].any() for layer in ('fc1', 'fc2'))


SOFT = {'steps': 3, 'density': 0.1, 'soft': True}
ERRORS = [  # the others are in the table of test_arguments
    ({'steps': 3}, ValueError, 'compression'),
    ({'steps': 3, 'density': 0.1, 'compression': 10}, ValueError, 'compression'),
    ({'steps': 2**31 - 1, 'density': 0.1, 'start': 9}, ValueError, 'start'),
    ({'steps': 3, 'density': 0.1, 'key': 0}, TypeError, 'key'),
    (SOFT | {'importance': importance.taylor}, ValueError, 'importance .*soft=True.*taylor'),
    (SOFT | {'structure': dns_jax.NofM(2, 4)}, ValueError, 'structure .*soft=True.* NofM'),
    (SOFT | {'structure': {'fc1': dns_jax.Units()}}, ValueError, 'structure .*soft=True.*Units'),
]


@pytest.mark.parametrize(('arguments', 'kind', 'named'), ERRORS)
def test_what_is_wrong_is_named(arguments, kind, named):
    with pytest.raises(kind, match=named):
        prune_to(**arguments).init(network())


@pytest.mark.parametrize('asked', [{'compression': 100}, {'compression': 11.4}, {'density': 0.001}])
def test_what_cannot_be_is_refused_with_the_numbers(asked):
    with pytest.raises(ValueError, match='39 other parameters stay dense'):
        prune_to(steps=3, **asked).init(network())


def test_no_kernel_at_all():
    with pytest.raises(ValueError, match='takes part'):
        prune_to(density=0.1, steps=3).init({'norm': {'scale': jnp.ones(4)}})


def test_biases_too():
    pruner = prune_to(density=0.25, steps=3, takes_part=has_axes)
    state, _ = run(pruner, over_steps(4))
    assert sum(dns_jax.count_kept(state.masks).values()) == round(0.25 * TOTAL)


def test_going_on_from_masks_to_another_density():
    first, weights = prune_to(density=0.3, steps=4), over_steps(5)
    state, _ = run(first, weights)
    second = prune_to(density=0.1, steps=8, masks=jax.device_get(state.masks))
    after, masks = run(second, over_steps(9))
    chex.assert_trees_all_equal(second.init(network()).masks, state.masks)
    kept = kept_of(masks)
    assert kept[-1] == round(0.1 * KERNELS)
    # And on the way it does not bring back all that was pruned.
    assert kept.max() <= round(0.3 * KERNELS) * (1 + _following.TOLERANCE)
    assert dns_jax.count_kept(after.masks).keys() == {'fc1', 'fc2'}


@pytest.mark.parametrize(('soft', 'share', 'hysteresis'), [(False, 0.6, 0.5), (True, 0.8, 0.1)])
def test_soft_thresholds_have_a_narrower_band_for_longer(soft, share, hysteresis):
    state, masks = run(prune_to(density=0.3, steps=31, soft=soft), over_steps(40))
    changed = sum(
        (np.diff(mask, axis=0) != 0).any((1, 2))
        for mask in (np.asarray(masks[layer]['kernel']) for layer in ('fc1', 'fc2'))
    )
    assert np.flatnonzero(changed)[-1] + 1 == share * 30
    for low, high in state.thresholds.values():
        np.testing.assert_allclose(low / high, (1 - hysteresis) / (1 + hysteresis), rtol=1e-5)


def prune_softly(params, target, density, masks=None):
    """Pulls stacked weights to a target; gives what is kept, its masks and numbers by step."""
    stacked, numbers = {'blocks': 0}, []
    pruner = prune_to(steps=30, density=density, soft=True, masks=masks, stacked=stacked)
    optimizer = dns_jax.slow_pruned(pruner, optax.sgd(0.1, momentum=0.9))

    def soften(params, state):
        thresholds = optax.tree.get(state, 'thresholds')
        return dns_jax.soft_threshold(params, get_masks(state), thresholds, stacked=stacked)

    @jax.jit
    def step(params, state):
        gradients = jax.tree.map(lambda leaf: leaf - target, soften(params, state))
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(40):
        params, state = step(params, state)
        numbers.append(int(get_masks(state)['blocks']['kernel'].sum()))
    small, masks = soften(params, state), get_masks(state)
    for layer, weights in enumerate(np.asarray(params['blocks']['kernel'])):
        cut = np.abs(weights) - float(state[0].thresholds[f'blocks/{layer}'].low)
        wanted = np.where(
            masks['blocks']['kernel'][layer], np.sign(weights) * np.maximum(cut, 0), 0
        )
        np.testing.assert_allclose(small['blocks']['kernel'][layer], wanted, atol=1e-6)
    return small, jax.tree.map(lambda mask, leaf: mask & (leaf != 0), masks, small), numbers


def test_a_soft_network_is_pruned_further():
    start, target = np.random.default_rng(0).normal(size=(2, 2, 16, 16)).astype(np.float32)
    small, masks, numbers = prune_softly({'blocks': {'kernel': start}}, target, 0.3)
    assert numbers[-1] == round(0.3 * 512)
    _, _, further = prune_softly(small, target, 0.2, masks)
    assert max(further) <= numbers[-1] * (1 + _following.TOLERANCE)
    assert further[-1] == round(0.2 * 512)


@pytest.mark.parametrize(
    'wrap',
    [
        'MultiSteps',
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ('chain', 'apply_if_finite', 'inject', 'nested')
        ),
    ],
)
def test_in_a_loop_of_ones_own(wrap):
    def chain(rate):
        return optax.chain(prune_to(compression=4, steps=6), optax.adam(rate))

    optimizer = {
        'chain': lambda: chain(1e-3),
        'MultiSteps': lambda: optax.MultiSteps(chain(1e-3), 2),
        'apply_if_finite': lambda: optax.apply_if_finite(chain(1e-3), 3),
        'inject': lambda: optax.inject_hyperparams(chain)(rate=1e-3),
        'nested': lambda: optax.chain(optax.chain(optax.clip(1.0), chain(1e-3)), optax.identity()),
    }[wrap]()
    params = network()
    state = optimizer.init(params)
    x = np.float32(np.random.default_rng(0).normal(size=(8, 13)))

    def loss_fn(params, x):
        hidden = jnp.tanh(x @ params['fc1']['kernel'] + params['fc1']['bias'][None])
        out = hidden @ params['fc2']['kernel'] + params['fc2']['bias'][None]
        return jnp.mean(jnp.square(out * params['norm']['scale'][None] - 1.0))

    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x):
        traces.append(1)
        masks = get_masks(state)
        loss, grads = dns_jax.masked_value_and_grad(loss_fn)(params, masks, x)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    with jax.numpy_dtype_promotion('standard'):
        for _ in range(14):
            params, state, _ = step(params, state, x)
    assert len(traces) == 1
    sizes = measure_sizes(params, get_masks(state)).total
    assert sizes.kept == TOTAL // 4
    small = dns_jax.apply_masks(params, get_masks(state))
    nonzero = sum(int(jnp.sum(small[layer]['kernel'] != 0)) for layer in ('fc1', 'fc2'))
    assert nonzero == TOTAL // 4 - (TOTAL - KERNELS)
