"""Tests that training with surgery and pruners goes through JAX's transformations and modes."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import (
    STEPS,
    Run,
    Setting,
    check_equal,
    count_changes,
    cut,
    error,
    get_masks,
    jit,
    noise,
    start,
    step_of,
    train,
    train_by_hand,
)
from situations import slow_but

from dns_jax import (
    Rule,
    apply_masks,
    global_density,
    has_axes,
    importance,
    log_linear_density,
    mean_std,
    pruners,
    surgery,
    update_probability,
)

RATE = 0.1
SIGMA = update_probability(gamma=0.1)
DENSITY = Rule(global_density(log_linear_density(0.3, 0, 12)), SIGMA, refresh_every=3)
# What takes different ways through the code: coins, thresholds asked again, importances, regrowth.
MAKERS = {
    'surgery': lambda key: surgery(Rule(mean_std(0.0), SIGMA), key, has_axes),
    'surgery to a density': lambda key: surgery(DENSITY, key, has_axes),
    'gradual': lambda key: pruners.gradual(
        0.3, 0, 9, 1, key, importance=importance.taylor, takes_part=has_axes
    ),
    'RigL': lambda key: pruners.regrow(0.4, 1, 12, key, takes_part=has_axes),
}


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def unstack(weights, masks):
    """The history of a scan, as of single steps."""
    histories = [
        [jax.tree.map(lambda leaf, at=at: leaf[at], tree) for at in range(STEPS)]
        for tree in jax.device_get((weights, masks))
    ]
    return Run(*histories, None, None, 1)


def scan(transform, params):
    """Trains in one scan; returns the state at the end, and weights and masks after each step."""
    optimizer = optax.chain(transform, optax.sgd(RATE))
    step = step_of(optimizer, Setting())

    def one(carry, batch):
        params, state = step(*carry, batch)
        return (params, state), (params, get_masks(state))

    carry, history = jax.lax.scan(one, (params, optimizer.init(params)), stack(Setting().batches))
    return carry[1], *history


def scan_all(names=tuple(MAKERS)):
    """Trains with each of MAKERS, in one program that is traced anew."""

    def scans(params, key):
        return {name: scan(MAKERS[name](key), params) for name in names}

    return jit(scans)(start(), jax.random.key(0))


reference = functools.cache(scan_all)


def test_strict_types_and_ranks(compat):
    compat('transformations', 'numpy_dtype_promotion strict')
    compat('transformations', 'numpy_rank_promotion raise')
    assert jax.config.jax_numpy_dtype_promotion == 'strict'
    assert jax.config.jax_numpy_rank_promotion == 'raise'
    for name, (_, weights, masks) in reference().items():
        pruned, spliced = count_changes(unstack(weights, masks))
        assert pruned > 0
        assert (spliced > 0) == (name != 'gradual')


# Two in one program, as programs take long to compile. With enable_checks, debug_key_reuse takes
# any fold_in in a scan for a key used twice.
@pytest.mark.parametrize(
    ('modes', 'names'),
    [
        (('enable_checks', 'enable_x64'), tuple(MAKERS)),
        (('check_tracer_leaks', 'debug_key_reuse'), ('surgery to a density', 'RigL')),
    ],
)
def test_modes_of_jax(modes, names, compat):
    with contextlib.ExitStack() as stack:
        for mode in modes:
            compat('transformations', mode)
            stack.enter_context(getattr(jax, mode)(True))
        got = scan_all(names)
    wanted = {name: reference()[name] for name in names}
    chex.assert_trees_all_equal_dtypes(got, wanted)
    for name, (_, weights, masks) in got.items():
        check_equal(unstack(weights, masks), unstack(*wanted[name][1:]))


def test_key_used_twice_would_be_found():
    def twice(key, params, gradients):
        del gradients
        return jax.tree.map(lambda leaf: leaf * jax.random.normal(key, leaf.shape), params)

    transform = surgery(Rule(mean_std(0.0), SIGMA, 1), jax.random.key(0), importance=twice)
    state = transform.init(start())
    with jax.debug_key_reuse(True), pytest.raises(jax.errors.KeyReuseError):
        transform.update(start(), state, start())


@pytest.mark.parametrize('name', slow_but(MAKERS, 'surgery', 'surgery to a density'))
def test_no_number_is_nan_or_infinite(name, compat):
    compat(
        'transformations', f'debug_nans and debug_infs: {name}', 'a layer of zeros and one pruned'
    )
    weights = {'fc1': {'kernel': np.float32([0.1, -0.5, 2.0, 0.3])}}
    params = weights | {'fc2': {'kernel': np.zeros(4, np.float32)}}
    gradients = weights | {'fc2': weights['fc1']}
    with jax.debug_nans(True), jax.debug_infs(True), jax.disable_jit():
        transform = MAKERS[name](jax.random.key(0))
        state = transform.init(params)
        _, state = transform.update(gradients, state, params)
        state = state._replace(masks=jax.tree.map(jnp.zeros_like, state.masks))
        _, state = transform.update(gradients, state, params)
    assert int(state.count) == 2


def test_weights_of_float64(compat):
    compat('transformations', 'enable_x64, weights of float64', 'compared in float32')
    with jax.enable_x64(True):
        check_by_hand(Setting(params=start(np.float64), batches=noise(np.float64)))


def check_by_hand(setting, transform=None, by_hand=None, **options):
    """Trains as by hand, with the thresholds of by_hand.py."""
    transform = cut() if transform is None else transform
    run = train(optax.chain(transform, optax.sgd(RATE)), setting, **options)
    check_equal(run, train_by_hand(optax.sgd(RATE), by_hand or setting))
    assert run.traces == 1
    assert min(count_changes(run)) > 0
    return run


@pytest.mark.parametrize('dtype', [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_small_floats(dtype, compat):
    compat('transformations', f'weights of {dtype.__name__}')
    run = check_by_hand(Setting(params=start(dtype), batches=noise(dtype)))
    assert {leaf.dtype for leaf in jax.tree.leaves(run.params)} == {jnp.dtype(dtype)}


@pytest.mark.slow
def test_checkpoint_of_the_loss(compat):
    compat('transformations', 'checkpoint of the loss')
    check_by_hand(Setting(loss=jax.checkpoint(error)), by_hand=Setting())


@pytest.mark.slow  # test_states has a donation too
def test_donation_of_params_and_state(compat):
    compat('transformations', 'donation of params and state')
    first = []

    def remember(count, state):
        if count == 0:
            first.extend(jax.tree.leaves(state))
        return state

    setting = Setting(params=jax.tree.map(jnp.asarray, start()), between=remember)
    check_by_hand(setting, by_hand=Setting(), donate_argnums=(0, 1))
    # The buffers of later states are what the history looks at.
    assert all(leaf.is_deleted() for leaf in [*first, *jax.tree.leaves(setting.params)])


@pytest.mark.parametrize('without', [False, True], ids=['jit', 'disable_jit'])
def test_with_and_without_jit(without, compat):
    compat('transformations', 'disable_jit' if without else 'jit')
    setting = Setting(batches=noise()[:4])
    with jax.disable_jit(without):
        run = train(optax.chain(cut(), optax.sgd(RATE)), setting)
    check_equal(run, train_by_hand(optax.sgd(RATE), setting))
    assert run.traces == (4 if without else 1)


def coins(key, sigma):
    """What `update_masks` promises of its coins, as a question whether a layer is due."""
    numbers = [
        np.asarray(jax.random.uniform(jax.random.fold_in(key, count), (2,), jnp.float32))
        for count in range(STEPS)
    ]
    return lambda count, layer: bool(numbers[count][['fc1', 'fc2'].index(layer)] < sigma)


@pytest.mark.parametrize('implementation', slow_but(['threefry2x32', 'rbg', 'unsafe_rbg'], 'rbg'))
def test_keys(implementation, compat):
    compat('transformations', f'keys of {implementation}')
    key = jax.random.key(5, impl=implementation)
    run = check_by_hand(
        Setting(), cut(key=key, sigma=lambda step: 0.5), Setting(due=coins(key, 0.5))
    )
    assert optax.tree.get(run.state, 'key') == key


def test_vmap_over_seeds(compat):
    compat('transformations', 'scan of steps')
    compat('transformations', 'vmap over seeds', 'of scans: other weights and other coins')
    keys = jax.random.split(jax.random.key(7), 3)
    params = stack([jax.tree.map(lambda leaf, by=by: leaf * by, start()) for by in (1, -1, 0.9)])
    _, weights, masks = jit(
        jax.vmap(lambda params, key: scan(cut(key=key, sigma=lambda step: 0.5), params))
    )(params, keys)
    for at, key in enumerate(keys):
        own, *history = jax.tree.map(lambda leaf, at=at: leaf[at], (params, weights, masks))
        setting = Setting(params=jax.device_get(own), due=coins(key, 0.5))
        check_equal(unstack(*history), train_by_hand(optax.sgd(RATE), setting))


def loss_after_steps(make, masks=None):
    """Makes the loss after two steps, with the masks at each, a function of rate and weights.

    With masks given there is no surgery.
    """

    def loss(rate, params):
        transform, used = make(jax.random.key(0)), []
        state = transform.init(params)
        for count, batch in enumerate(noise(np.float64)[:3]):
            used.append(get_masks(state) if masks is None else masks[count])
            value, gradients = jax.value_and_grad(error)(apply_masks(params, used[-1]), batch)
            if masks is None:
                _, state = transform.update(gradients, state, params)
            params = jax.tree.map(lambda leaf, slope: leaf - rate * slope, params, gradients)
        return value, used

    return loss


@pytest.mark.parametrize('name', slow_but(MAKERS, 'gradual'))
def test_gradient_through_steps(name, compat):
    compat('transformations', f'grad through steps: {name}', 'masks are constants of it')
    with jax.enable_x64(True):
        loss = loss_after_steps(MAKERS[name])
        params, rate = start(np.float64), np.float64(RATE)
        (_, masks), slopes = jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(rate, params)
        assert not all(leaf.all() for leaf in jax.tree.leaves(masks))
        by_hand = loss_after_steps(MAKERS[name], masks)
        want, _ = jit(jax.grad(by_hand, (0, 1), has_aux=True))(rate, params)
        chex.assert_trees_all_close(slopes, want, rtol=1e-9)
        along = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size)).reshape(leaf.shape), params)
        jitted = jit(loss)
        ahead, behind = (
            jitted(rate + by, jax.tree.map(lambda leaf, to, by=by: leaf + by * to, params, along))
            for by in (1e-6, -1e-6)
        )
        chex.assert_trees_all_equal(ahead[1], masks, behind[1])
        slope = slopes[0] + optax.tree.vdot(slopes[1], along)
        np.testing.assert_allclose((ahead[0] - behind[0]) / 2e-6, slope, rtol=1e-6)
