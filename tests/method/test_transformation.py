"""Tests of surgery: what one transformation does, step by step."""

import collections
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dns_jax
from dns_jax import (
    Rule,
    SurgeryState,
    Thresholds,
    apply_masks,
    count_kept,
    get_masks,
    global_density,
    group_by_layer,
    has_axes,
    is_kernel,
    layer_density,
    log_linear_density,
    masked_value_and_grad,
    mean_std,
    polynomial_density,
    update_masks,
    update_probability,
)

# As in the paper, biases take part.
surgery = functools.partial(dns_jax.surgery, takes_part=has_axes)
init_masks = functools.partial(dns_jax.init_masks, takes_part=has_axes)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
RULES = {
    'fc1': Rule(mean_std(0.2), update_probability(gamma=0.1)),
    'fc*': Rule(mean_std(-0.3, 0.3), update_probability(gamma=0.5, stop=15)),
}
STEPS = 20
# Rules that are asked again: the first at steps 4, 6, 8 …, the second at 0, 3, 6 and at the last.
REFRESHED = {
    'fc1': Rule(
        layer_density(polynomial_density(0.1, 1, 9, initial=0.8)),
        update_probability(gamma=0, start=3),
        refresh_every=2,
    ),
    'fc*': Rule(
        global_density(log_linear_density(0.2, 0, 8, initial=0.9), hysteresis=0.2),
        update_probability(gamma=0.1, stop=8),
        refresh_every=3,
    ),
}


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


def wander(params, count):
    """Moves every weight on a wave of its own, so that other weights are the largest."""

    def move(leaf):
        phases = jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape) ** 2
        return (leaf.astype(jnp.float32) + jnp.sin(phases + jnp.float32(count))).astype(leaf.dtype)

    return jax.tree.map(move, params)


def masks_of_run(how, params, key=None, steps=STEPS, rules=RULES, move=drift):
    """Runs some updates and returns the masks after each, stacked."""
    return states_of_run(how, params, key, steps, rules, move).masks


def states_of_run(how, params, key=None, steps=STEPS, rules=RULES, move=drift):
    """Runs some updates and returns the states after each, stacked."""
    transform = surgery(rules, jax.random.key(4) if key is None else key)
    state = transform.init(params)

    def step(state, count):
        moved = move(params, count)
        # The updates are not the weights, nor of their size.
        _, state = transform.update(jax.tree.map(jnp.ones_like, moved), state, moved)
        return state, state

    counts = jnp.arange(steps)
    if how == 'scan':
        return jax.lax.scan(step, state, counts)[1]
    if how == 'jit':
        step = jax.jit(step)
    seen = []
    for count in counts:
        state, _ = step(state, count)
        seen.append(state)
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


@pytest.mark.parametrize(('rules', 'move'), [(RULES, drift), (REFRESHED, wander)])
def test_mesh_of_eight_devices(mesh, rules, move):
    params = network()
    spec = jax.sharding.PartitionSpec
    placed = jax.tree.map(
        lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, spec('x'))), params
    )
    whole, parts = (
        jax.device_get(masks_of_run('jit', tree, steps=8, rules=rules, move=move))
        for tree in (params, placed)
    )
    chex.assert_trees_all_equal(whole, parts)
    transform = surgery(rules, jax.random.key(4))
    state = transform.init(placed)
    update = jax.jit(transform.update)
    for _ in range(3):
        _, state = update(placed, state, placed)
        for mask, weights in zip(
            jax.tree.leaves(state.masks), jax.tree.leaves(placed), strict=True
        ):
            assert mask.sharding.is_equivalent_to(weights.sharding, weights.ndim)


@pytest.mark.parametrize('axes', [('x',), (None, 'x')])
@pytest.mark.parametrize('axis_type', list(jax.sharding.AxisType)[:2])
def test_density_on_meshes_of_both_kinds(axis_type, axes):
    mesh = jax.make_mesh((8,), ('x',), (axis_type,), devices=jax.devices('cpu')[:8])
    rule = Rule(global_density(0.1), update_probability(power=0), 2)
    transform = surgery(rule, jax.random.key(0))
    weights = jax.random.normal(jax.random.key(1), (16, 24))
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, jax.NamedSharding(mesh, jax.P(*axes)))
        _, state = jax.jit(transform.update)(placed, transform.init(placed), placed)
        assert state.masks.sharding.is_equivalent_to(placed.sharding, 2)
    _, whole = transform.update(weights, transform.init(weights), weights)
    assert int(jnp.sum(whole.masks)) == 38
    chex.assert_trees_all_equal(jax.device_get(state.masks), jax.device_get(whole.masks))


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


def test_importance_has_another_key_at_every_step_and_none_of_a_coin():
    params, key, keys = network(), jax.random.key(4), []

    def importance(key, params, updates):
        keys.append(key)
        return params

    rule = Rule(layer_density(0.5), update_probability(power=0), refresh_every=1)
    transform = surgery(rule, key, importance=importance)
    state = transform.init(params)
    for _ in range(2):
        _, state = transform.update(params, state, params)
    keys += [jax.random.fold_in(key, count) for count in range(6)]  # those of the coins
    assert len({tuple(jax.random.key_data(each).tolist()) for each in keys}) == 2 + 6


def test_thresholds_stay_those_of_the_reference():
    params = network()
    transform = surgery(RULES, jax.random.key(0))
    state = transform.init(params)
    _, after = transform.update(params, state, jax.tree.map(lambda leaf: 10 * leaf, params))
    chex.assert_trees_all_equal(after.thresholds, state.thresholds)


@pytest.mark.parametrize('how', ['jit', 'vmap of scan', 'plain'])
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


def three_layers(dtype=jnp.float32):
    params = network(dtype)
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(8, 16)), dtype)
    return params | {'fc3': {'kernel': 5 * kernel}}


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


@pytest.mark.parametrize('rule', [layer_density(0.3), global_density(0.2, hysteresis=0.2)])
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


@pytest.mark.parametrize('how', ['scan', 'plain'])
def test_own_rule_may_give_numbers_of_python(how):
    # Asked in a branch of a `cond`, it must agree with the state in the type of the thresholds.
    def rule(layers, masks, step):
        return {layer: Thresholds(step, 2 * len(leaves)) for layer, leaves in layers.items()}

    table = Rule(rule, update_probability(), refresh_every=2)
    states = states_of_run(how, network(), steps=5, rules=table)
    for low, high in states.thresholds.values():
        assert low.dtype == high.dtype == jnp.float32
        assert (low.tolist(), high.tolist()) == ([0, 0, 2, 2, 4], [4] * 5)


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


def test_masks_follow_the_weights_of_the_gradient_not_the_updated_ones():
    always = Rule(
        lambda layers, masks, step: dict.fromkeys(layers, Thresholds(1.0, 1.0)),
        update_probability(power=0),
    )
    params, gradients = jnp.array([0.5, 2.0]), jnp.array([-10.0, 10.0])
    for order in (lambda *parts: parts, lambda *parts: reversed(parts)):
        optimizer = optax.chain(*order(surgery(always, jax.random.key(0)), optax.sgd(1.0)))
        _, state = optimizer.update(gradients, optimizer.init(params), params)
        assert get_masks(state).tolist() == [False, True]


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
        seen.append({name: len(leaves) for name, leaves in layers.items()})
        return dict.fromkeys(layers, Thresholds(jnp.float32(step), jnp.float32(step + 1)))

    state = surgery({'fc*': Rule(rule)}, jax.random.key(0)).init(network())
    assert seen == [{'fc1': 2, 'fc2': 2}]
    assert state.thresholds == dict.fromkeys(('fc1', 'fc2'), Thresholds(0, 1))


def test_empty_table_costs_nothing():
    params = network()
    transform = surgery({}, jax.random.key(0))
    state = transform.init(params)
    assert {leaf.shape for leaf in jax.tree.leaves(state.masks)} == {()}
    assert jax.make_jaxpr(apply_masks)(params, state.masks).jaxpr.eqns == []
    _, state = transform.update(params, state, params)
    assert all(bool(leaf) for leaf in jax.tree.leaves(state.masks))


def train_step(rules):
    optimizer = optax.chain(surgery(rules, jax.random.key(4)), optax.sgd(0.1, 0.9))

    def loss(params, images):
        for layer in ('fc1', 'fc2'):
            images = jnp.tanh(images @ params[layer]['kernel'] + params[layer]['bias'][None])
        return jnp.mean(images**2)

    value_and_grad = masked_value_and_grad(loss)

    def step(params, state, images):
        value, gradients = value_and_grad(params, get_masks(state), images)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return optimizer.init, step


@pytest.mark.parametrize('rules', [RULES, REFRESHED], ids=['asked once', 'refreshed'])
def test_step_is_traced_and_compiled_once_and_stays_on_the_device(rules):
    init, step = train_step(rules)
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


@pytest.mark.parametrize('rules', [RULES, REFRESHED], ids=['asked once', 'refreshed'])
def test_step_lowers_to_one_program_without_callbacks(rules):
    init, step = train_step(rules)
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
        value, gradient = value_and_grad(params, get_masks(state))
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        values.append(float(value))
        kept.append(bool(get_masks(state)[0]))
    # 0.5 is below the band: pruned. At zero its gradient is −2, so it grows to 0.875, 1.375, 1.875.
    assert kept == [False, False, True, True, True, True]
    assert values[:4] == [1.125, 2.0, 2.0, 0.0078125]


PARAMS = {'fc1': {'kernel': jnp.ones((2, 2))}}
ONE = RULES['fc1']


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
        ({'fc1': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}}, ValueError, "lack 'fc1/bias'"),
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
