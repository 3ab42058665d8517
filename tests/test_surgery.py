"""Tests of dns_jax.surgery: what one transformation does, step by step."""

import collections
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dns_jax import (
    Rule,
    Thresholds,
    apply_masks,
    count_kept,
    init_masks,
    is_kernel,
    masked_value_and_grad,
    mean_std,
    surgery,
    update_masks,
    update_probability,
)

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
RULES = {
    'fc1': Rule(mean_std(0.2), update_probability(gamma=0.1)),
    'fc*': Rule(mean_std(-0.3, 0.3), update_probability(gamma=0.5, stop=15)),
}
STEPS = 20


def network(dtype=jnp.float32):
    random = np.random.default_rng(0)
    shapes = {'fc1': {'kernel': (16, 8), 'bias': (8,)}, 'fc2': {'kernel': (8, 8), 'bias': (8,)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def drift(params, count):
    """Moves the weights to and fro, the same for every order of evaluation."""
    factors = jnp.where(count % 2 == 0, jnp.float32(1.25), jnp.float32(0.75))
    return jax.tree.map(lambda leaf: leaf * factors.astype(leaf.dtype), params)


def masks_of_run(how, params, key=None, steps=STEPS):
    """Runs some updates and returns the masks after each, stacked."""
    transform = surgery(RULES, jax.random.key(4) if key is None else key)
    state = transform.init(params)

    def step(state, count):
        moved = drift(params, count)
        _, state = transform.update(moved, state, moved)
        return state, state.masks

    counts = jnp.arange(steps)
    if how == 'scan':
        return jax.lax.scan(step, state, counts)[1]
    if how == 'jit':
        step = jax.jit(step)
    seen = []
    for count in counts:
        state, masks = step(state, count)
        seen.append(masks)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)


@pytest.mark.parametrize('dtype', DTYPES)
def test_all_ways_of_running_give_the_same_masks(dtype):
    params = network(dtype)
    masks = masks_of_run('jit', params)
    kept = [int(jnp.sum(leaf)) for leaf in jax.tree.leaves(masks)]
    assert all(0 < k < leaf.size for k, leaf in zip(kept, jax.tree.leaves(masks), strict=True))
    for how in ('scan', 'plain'):
        chex.assert_trees_all_equal(masks, masks_of_run(how, params))


def test_without_any_jit():
    masks = masks_of_run('jit', network(), steps=4)
    with jax.disable_jit():
        chex.assert_trees_all_equal(masks, masks_of_run('plain', network(), steps=4))


def test_vmap_over_keys():
    params, keys = network(), jax.random.split(jax.random.key(9), 5)
    masks = jax.vmap(lambda key: masks_of_run('scan', params, key))(keys)
    for at, key in enumerate(keys):
        single = jax.tree.map(lambda leaf, at=at: leaf[at], masks)
        chex.assert_trees_all_equal(single, masks_of_run('plain', params, key))
    assert any(jnp.any(leaf[0] != leaf[1]) for leaf in jax.tree.leaves(masks))


def test_mesh_of_eight_devices(mesh):
    params = network()
    spec = jax.sharding.PartitionSpec
    placed = jax.tree.map(
        lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, spec('x'))), params
    )
    whole, parts = masks_of_run('jit', params), masks_of_run('jit', placed)
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(parts))
    transform = surgery(RULES, jax.random.key(4))
    state = transform.init(placed)
    for _ in range(3):
        _, state = jax.jit(transform.update)(placed, state, placed)
        for mask, weights in zip(
            jax.tree.leaves(state.masks), jax.tree.leaves(placed), strict=True
        ):
            assert mask.sharding.is_equivalent_to(weights.sharding, weights.ndim)


def test_state_at_the_start():
    params, key = network(), jax.random.key(4)
    state = surgery(RULES, key).init(params)
    assert (int(state.count), state.count.dtype, state.count.shape) == (0, jnp.int32, ())
    assert state.key == key
    chex.assert_trees_all_equal(state.masks, init_masks(params))
    for layer, c_rate, width in [('fc1', 0.2, 0.1), ('fc2', -0.3, 0.3)]:
        leaves = [np.ravel(leaf).astype(np.float64) for leaf in params[layer].values()]
        sizes = np.abs(np.concatenate(leaves))
        middle = sizes.mean() + c_rate * sizes.std()
        want = [(1 - width) * middle, (1 + width) * middle]
        np.testing.assert_allclose([*state.thresholds[layer]], want, rtol=1e-5)


def test_one_step_is_update_masks_with_the_key_and_probability_of_the_count():
    params, key = network(), jax.random.key(4)
    transform = surgery(RULES, key)
    state = transform.init(params)
    masks = state.masks
    for count in range(STEPS):
        moved = drift(params, jnp.int32(count))
        _, state = transform.update(moved, state, moved)
        sigma = {'fc1': 1 / (1 + 0.1 * count), 'fc2': 1 / (1 + 0.5 * count) if count < 15 else 0.0}
        folded = jax.random.fold_in(key, count)
        masks = update_masks(folded, moved, masks, state.thresholds, sigma)
        chex.assert_trees_all_equal(state.masks, masks)
        assert int(state.count) == count + 1
        assert state.key == key


def test_coins_of_all_steps_are_independent():
    # At one step the layers, in one layer neighbouring steps; the masks are all on before each.
    steps, sigma = 20_000, {'a': 0.3, 'b': 0.6}
    params = {layer: {'w': jnp.zeros((1, 1))} for layer in sigma}
    table = {
        layer: Rule(
            lambda layers, masks, step: dict.fromkeys(layers, Thresholds(1.0, 2.0)),
            lambda step, probability=probability: probability,
        )
        for layer, probability in sigma.items()
    }
    transform = surgery(table, jax.random.key(8))
    start = transform.init(params)

    def pruned(count):
        _, state = transform.update(params, start._replace(count=count), params)
        return jnp.stack([~state.masks[layer]['w'][0, 0] for layer in sigma])

    coins = np.asarray(jax.jit(jax.vmap(pruned))(jnp.arange(steps)))

    def check(frequency, probability):
        assert abs(frequency - probability) < 4 * math.sqrt(probability / steps)

    check(coins[:, 0].mean(), 0.3)
    check(coins[:, 1].mean(), 0.6)
    check((coins[:, 0] & coins[:, 1]).mean(), 0.18)
    check((coins[1:, 0] & coins[:-1, 0]).mean(), 0.09)
    check((coins[1:, 1] & coins[:-1, 1]).mean(), 0.36)


def test_thresholds_stay_those_of_the_reference():
    params = network()
    transform = surgery(RULES, jax.random.key(0))
    state = transform.init(params)
    _, after = transform.update(params, state, jax.tree.map(lambda leaf: 10 * leaf, params))
    chex.assert_trees_all_equal(after.thresholds, state.thresholds)


def test_masks_follow_the_weights_of_the_gradient_not_the_updated_ones():
    always = Rule(
        lambda layers, masks, step: dict.fromkeys(layers, Thresholds(1.0, 1.0)),
        update_probability(power=0),
    )
    params, gradients = jnp.array([0.5, 2.0]), jnp.array([-10.0, 10.0])
    for order in (lambda *parts: parts, lambda *parts: reversed(parts)):
        optimizer = optax.chain(*order(surgery(always, jax.random.key(0)), optax.sgd(1.0)))
        _, state = optimizer.update(gradients, optimizer.init(params), params)
        assert optax.tree.get(state, 'masks').tolist() == [False, True]


@pytest.mark.parametrize(
    ('rules', 'arguments', 'kept'),
    [
        ({'fc2': RULES['fc1']}, {}, ['fc2']),
        (RULES['fc1'], {}, ['fc1', 'fc2']),
        ({'fc?': RULES['fc1']}, {'takes_part': is_kernel}, ['fc1', 'fc2']),
        (RULES['fc1'], {'layer_of': lambda path: path.split('/')[-1]}, ['bias', 'kernel']),
        ({}, {}, []),
    ],
)
def test_layers_with_a_rule_have_masks(rules, arguments, kept):
    params = network()
    transform = surgery(rules, jax.random.key(0), **arguments)
    state = transform.init(params)
    assert sorted(state.thresholds) == kept
    layer_of = arguments.get('layer_of')
    assert list(count_kept(state.masks, *([layer_of] if layer_of else []))) == kept
    if 'takes_part' in arguments:
        assert state.masks['fc1']['bias'].shape == ()
    _, new = transform.update(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


def test_rule_sees_all_its_layers_and_the_step():
    seen = []

    def rule(layers, masks, step):
        assert jax.tree.map(jnp.shape, masks) == jax.tree.map(jnp.shape, layers)
        seen.append(({name: len(leaves) for name, leaves in layers.items()}, int(step)))
        return dict.fromkeys(layers, Thresholds(jnp.float32(0), jnp.float32(1)))

    sigma = update_probability()
    surgery({'fc*': Rule(rule, sigma)}, jax.random.key(0)).init(network())
    assert seen == [({'fc1': 2, 'fc2': 2}, 0)]


def test_empty_table_costs_nothing():
    params = network()
    transform = surgery({}, jax.random.key(0))
    state = transform.init(params)
    assert {leaf.shape for leaf in jax.tree.leaves(state.masks)} == {()}
    assert jax.make_jaxpr(apply_masks)(params, state.masks).jaxpr.eqns == []
    _, state = transform.update(params, state, params)
    assert all(bool(leaf) for leaf in jax.tree.leaves(state.masks))


def train_step():
    optimizer = optax.chain(surgery(RULES, jax.random.key(4)), optax.sgd(0.1, 0.9))

    def loss(params, images):
        for layer in ('fc1', 'fc2'):
            images = jnp.tanh(images @ params[layer]['kernel'] + params[layer]['bias'][None])
        return jnp.mean(images**2)

    value_and_grad = masked_value_and_grad(loss)

    def step(params, state, images):
        value, gradients = value_and_grad(params, optax.tree.get(state, 'masks'), images)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return optimizer.init, step


def test_step_is_traced_and_compiled_once_and_stays_on_the_device():
    init, step = train_step()
    params, images = network(), jnp.ones((4, 16))
    state = init(params)
    traces, compiled = [], collections.Counter()

    @jax.jit
    def counted(*arguments):
        traces.append(1)
        return step(*arguments)

    def listen(event, duration, **extra):
        del duration, extra
        compiled[event] += 1

    jax.block_until_ready((params, state, images))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with jax.transfer_guard('disallow'):
            for _ in range(30):
                params, state, _ = counted(params, state, images)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(traces) == 1
    # One program in all: nothing is run beside it, at the first step or at a later one.
    assert compiled['/jax/core/compile/backend_compile_duration'] == 1
    assert int(optax.tree.get(state, 'count')) == 30


def test_step_lowers_to_one_program_without_callbacks():
    init, step = train_step()
    params = network()
    lowered = jax.jit(step).lower(params, init(params), jnp.ones((4, 16)))
    text = lowered.as_text()
    assert text.count('module @') == 1
    for word in ('callback', 'infeed', 'outfeed', 'host'):
        assert word not in text.lower(), word
    assert lowered.compile().as_text().count('HloModule') == 1


def test_masked_value_and_grad():
    weights, mask = jnp.array([1.0, 5.0, -2.0]), jnp.array([True, False, True])
    images = jnp.array([2.0, 3.0, 1.0])

    def loss(weights, images, *, offset):
        value = jnp.sum(weights * images) ** 2 + offset
        return value, {'value': value}

    value, gradient = masked_value_and_grad(lambda *a, **k: loss(*a, **k)[0])(
        weights, mask, images, offset=7.0
    )
    # (2·1 − 1·2)² = 0 at W⊙T; shift it so that the gradient shows.
    assert float(value) == 7.0
    assert gradient.tolist() == [0.0, 0.0, 0.0]
    (value, aux), gradient = masked_value_and_grad(loss, has_aux=True)(
        weights + 1, mask, images, offset=7.0
    )
    # W⊙T = (2, 0, −1): the sum is 3, the derivative 2·3·x, also for the pruned weight.
    assert float(value) == float(aux['value']) == 16.0
    assert gradient.tolist() == [12.0, 18.0, 6.0]


def test_a_pruned_weight_learns_and_comes_back():
    always = Rule(
        lambda layers, masks, step: dict.fromkeys(layers, Thresholds(0.9, 1.1)),
        update_probability(power=0),
    )
    optimizer = optax.chain(surgery(always, jax.random.key(0)), optax.sgd(0.25))
    params = jnp.array([0.5])
    state = optimizer.init(params)
    value_and_grad = masked_value_and_grad(lambda weights: jnp.sum((weights - 2.0) ** 2) / 2)
    kept, values = [], []
    for _ in range(6):
        value, gradient = value_and_grad(params, optax.tree.get(state, 'masks'))
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        values.append(float(value))
        kept.append(bool(optax.tree.get(state, 'masks')[0]))
    # 0.5 is below the band: pruned. At zero its gradient is −2, so it grows to 0.875, 1.375, 1.875.
    assert kept == [False, False, True, True, True, True]
    assert values[:4] == [1.125, 2.0, 2.0, 0.0078125]


PARAMS = {'fc1': {'kernel': jnp.ones((2, 2))}}
ONE = RULES['fc1']


@pytest.mark.parametrize(
    'key',
    [
        jax.random.PRNGKey(0),
        jnp.zeros(2, jnp.uint32),
        0,
        1.5,
        None,
        'key',
        object(),
        jax.random.split(jax.random.key(0), 2),
    ],
    ids=['legacy', 'uint32', 'int', 'float', 'none', 'string', 'object', 'several'],
)
def test_bad_keys(key):
    with pytest.raises((TypeError, ValueError), match=r'^key must be'):
        surgery(ONE, key)


@pytest.mark.parametrize(
    ('rules', 'params', 'arguments', 'error', 'message'),
    [
        ({'fc9': ONE}, PARAMS, {}, ValueError, r"pattern 'fc9' .*\['fc1'\]"),
        ({'*': ONE, 'fc1': ONE}, PARAMS, {}, ValueError, "pattern 'fc1' "),
        (ONE, {}, {}, ValueError, 'params'),
        ({}, {}, {}, ValueError, r'params must have at least one leaf.*\{\}'),
        (ONE, {'a': {'w': jnp.ones(2, int)}}, {}, TypeError, r"params\['a/w'\].*int32"),
        (
            ONE,
            {'a': {'w': jnp.ones(())}},
            {'takes_part': lambda path, leaf: True},
            ValueError,
            r"params\['a/w'\] is a scalar",
        ),
    ],
)
def test_bad_rules_and_params(rules, params, arguments, error, message):
    with pytest.raises(error, match=message):
        surgery(rules, jax.random.key(0), **arguments).init(params)


@pytest.mark.parametrize(
    ('params', 'error', 'message'),
    [
        (None, ValueError, 'params'),
        ({'fc1': {'kernel': jnp.ones((2, 3))}}, ValueError, r"masks\['fc1/kernel'\].*\(2, 3\)"),
        ({'fc1': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}}, ValueError, 'structure'),
    ],
)
def test_bad_updates(params, error, message):
    transform = surgery(ONE, jax.random.key(0))
    state = transform.init(PARAMS)
    with pytest.raises(error, match=message):
        transform.update(PARAMS, state, params)


@pytest.mark.parametrize('names', [[], ['fc2'], ['fc1', 'fc2']])
def test_rule_that_gives_thresholds_of_other_layers(names):
    rule = Rule(
        lambda layers, masks, step: {name: Thresholds(0.0, 1.0) for name in names},
        update_probability(),
    )
    transform = surgery(rule, jax.random.key(0))
    with pytest.raises(ValueError, match=r"thresholds must name the layers \['fc1'\]"):
        transform.init(PARAMS)


def test_factory_may_be_used_again_after_its_state_was_donated():
    transform = surgery(ONE, jax.random.key(0))
    step = jax.jit(lambda state: transform.update(PARAMS, state, PARAMS)[1], donate_argnums=0)
    first = step(transform.init(PARAMS))
    second = step(transform.init(PARAMS))
    chex.assert_trees_all_equal(first.masks, second.masks)
