"""Tests of importance: by other numbers than magnitudes, and by chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruned_by_hand import expected, keep_largest, masks_of
from wandering import ALL, HISTORY, KEY, STEPS

import dns_jax
from dns_jax import importance, pruners
from dns_jax.calibration import gather_inputs


def test_surgery_may_go_by_another_importance():
    """With splicing the numbers of pruned connections count, and they return."""
    rule = dns_jax.Rule(dns_jax.layer_density(0.3, 0.0), dns_jax.update_probability(power=0), 1)
    found = masks_of(dns_jax.surgery(rule, KEY, importance=importance.taylor, **ALL))

    def prune(step, weights, gradients, masks):
        tree = jax.tree.map(lambda w, g: w * g, weights, gradients)
        everything = jax.tree.map(np.ones_like, masks)
        return keep_largest(tree, everything, {'fc1': 0.3, 'fc2': 0.3})

    for one, other in zip(found, expected(prune), strict=True):
        for mask, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(mask, right)


def test_chance_knows_nothing_of_the_weights():
    pruner = pruners.one_shot(0.3, 0, KEY, importance=importance.chance, **ALL)
    weights, gradients = HISTORY[0]
    update, start = jax.jit(pruner.update), pruner.init(weights)
    _, state = update(gradients, start, weights)
    _, other = update(gradients, start, jax.tree.map(lambda leaf: 10 * leaf + 1, weights))
    for one, two in zip(*map(jax.tree.leaves, (state.masks, other.masks)), strict=True):
        np.testing.assert_array_equal(one, two)
    assert dns_jax.count_kept(state.masks) == {'fc1': 21, 'fc2': 12}
    _, again = update(gradients, start._replace(key=jax.random.key(1)), weights)
    assert not (again.masks['fc1']['kernel'] == state.masks['fc1']['kernel']).all()


def test_chance_draws_anew_at_every_step_and_leaf():
    key = jax.random.key(3)
    numbers = importance.chance(key, {'a': jnp.zeros(9), 'b': jnp.zeros(9)}, {})
    assert not (numbers['a'] == numbers['b']).any()
    assert all(((leaf > 0) & (leaf <= 1)).all() for leaf in numbers.values())
    rule = dns_jax.Rule(dns_jax.layer_density(0.3, 0.0), dns_jax.update_probability(power=0), 1)
    masks = masks_of(dns_jax.surgery(rule, KEY, importance=importance.chance, **ALL))
    assert len({mask['fc1']['kernel'].tobytes() for mask in masks}) == STEPS


def calibrated():
    """Weights of two layers, what came into the first, and the inputs that were gathered."""
    random = np.random.default_rng(6)
    params = {
        'fc1': {'kernel': random.normal(size=(6, 8)).astype(np.float32)},
        'fc2': {'kernel': random.normal(size=(8, 3)).astype(np.float32)},
    }
    images = (random.normal(size=(40, 6)) * [0.1, 1, 3, 1, 0.3, 2]).astype(np.float32)
    images[:, 1] += images[:, 2]  # what one says the other says too
    hidden = np.sin(images @ params['fc1']['kernel'])

    def apply(params, x):
        return jnp.dot(jnp.sin(jnp.dot(x, params['fc1']['kernel'])), params['fc2']['kernel'])

    inputs = gather_inputs(apply, params, [images[:30], images[30:]])
    return params, {'fc1': images, 'fc2': hidden}, inputs


def wanda_by_hand(kernel, rows):
    return kernel * np.linalg.norm(rows, axis=0)[:, None]


def obs_by_hand(kernel, rows, damping=0.05):
    rows = rows.astype(np.float64)
    hessian = rows.T @ rows / len(rows)
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    return np.sqrt(kernel**2 / np.diag(np.linalg.inv(hessian))[:, None]) * np.sign(kernel)


CALIBRATED = {
    'wanda': (importance.wanda, wanda_by_hand),
    'obs': (lambda inputs: importance.obs(inputs, 0.05), obs_by_hand),
}


@pytest.mark.parametrize('name', CALIBRATED)
def test_importances_by_inputs(name):
    make, by_hand = CALIBRATED[name]
    params, rows, inputs = calibrated()
    bias = {'bias': jnp.ones(3)}
    found = jax.jit(make(inputs))(KEY, {**params, 'fc2': {**params['fc2'], **bias}}, {})
    np.testing.assert_array_equal(found['fc2']['bias'], 1)
    for layer, kernel in params.items():
        wanted = by_hand(kernel['kernel'], rows[layer])
        np.testing.assert_allclose(found[layer]['kernel'], wanted, rtol=1e-4, err_msg=layer)


PRUNERS = {
    'one_shot': lambda by: pruners.one_shot(0.25, 0, KEY, importance=by),
    'gradual': lambda by: pruners.gradual(0.25, 0, 1, 1, KEY, importance=by),
    'surgery': lambda by: dns_jax.surgery(
        dns_jax.Rule(dns_jax.layer_density(0.25)), KEY, importance=by
    ),
    'prune_to': lambda by: dns_jax.prune_to(density=0.25, steps=2, key=KEY, importance=by),
}


@pytest.mark.parametrize('pruner', PRUNERS)
def test_pruners_go_by_inputs(pruner):
    params, rows, inputs = calibrated()
    transform = PRUNERS[pruner](importance.wanda(inputs))
    state = transform.init(params)
    for _ in range(3):
        _, state = jax.jit(transform.update)(params, state, params)
    for layer, kernel in params.items():
        scores = np.abs(wanda_by_hand(kernel['kernel'], rows[layer]))
        kept = np.asarray(state.masks[layer]['kernel'])
        assert scores[kept].min() > scores[~kept].max()
        magnitudes = np.abs(kernel['kernel'])
        assert layer == 'fc2' or magnitudes[kept].min() < magnitudes[~kept].max()


def test_stacked_layers_have_inputs_of_their_own():
    params, images = {'blocks': {'kernel': jnp.ones((2, 3, 3))}}, np.diag([1.0, 2.0, 3.0])
    stacked = {'blocks': 0}

    def apply(params, x):
        layers = params['blocks']['kernel']
        return jax.lax.scan(lambda x, kernel: (jnp.dot(jnp.flip(x, 1), kernel), x), x, layers)

    inputs = gather_inputs(apply, params, [images.astype(np.float32)], stacked=stacked)
    by = importance.wanda({'blocks/0/kernel': inputs['blocks/0/kernel']})
    pruner = pruners.one_shot(1 / 3, 0, KEY, importance=by, stacked=stacked)
    _, state = pruner.update(params, pruner.init(params), params)
    # Flipped, the first has the largest input; the other goes by magnitude, where all tie.
    np.testing.assert_array_equal(
        state.masks['blocks']['kernel'], [[[True] * 3, [False] * 3, [False] * 3], [[True] * 3] * 3]
    )
    with pytest.raises(ValueError, match=r"inputs must be of leaves of params, but \['blocks/0/"):
        by(KEY, params, params)


def test_a_layer_that_sees_zeros_alone_matters_nothing():
    params = [jnp.ones((3, 2))]
    inputs = gather_inputs(lambda params, x: x @ params[0], params, [jnp.zeros((4, 3))])
    np.testing.assert_array_equal(importance.obs(inputs)(KEY, params, params)[0], 0)


@pytest.mark.parametrize('damping', [0, -0.1, np.nan, 1e39])
def test_obs_refuses_what_it_cannot_invert(damping):
    with pytest.raises(ValueError, match=r'^damping must be '):
        importance.obs({}, damping)
    params = [jnp.ones((2, 2))]
    inputs = gather_inputs(lambda params, x: x @ params[0], params, [jnp.ones((4, 2))])
    with pytest.raises(ValueError, match=r"^damping must be larger for inputs\['0'\]"):
        importance.obs(inputs, 1e-12)
    lean = {'0': inputs['0']._replace(grams=None)}
    with pytest.raises(ValueError, match=r"^inputs\['0'\] have no products"):
        importance.obs(lean)


@pytest.mark.parametrize('values', ['narrow', 'half', 'zeros'])
def test_a_density_of_untied_weights_keeps_its_number(values):
    weights = np.random.default_rng(0).normal(size=(300, 40))
    params = {
        'narrow': jnp.asarray(weights, jnp.bfloat16),
        'half': jnp.asarray(weights, jnp.float16),
        'zeros': jnp.zeros((300, 40)),
    }[values]
    tree = {'kernel': params}
    kept = {}
    for of_weights in (importance.magnitude, importance.untied):
        pruner = pruners.one_shot(0.3, 0, jax.random.key(0), importance=of_weights)
        masks = jax.jit(pruner.update)(tree, pruner.init(tree), tree)[1].masks['kernel']
        kept[of_weights] = int(masks.sum())
    assert kept[importance.untied] == 3_600 < kept[importance.magnitude]
    # The order of unequal weights stays.
    assert jnp.abs(params[masks]).min() >= jnp.abs(params[~masks]).max()


def test_equals_in_different_leaves_are_told_apart():
    tree = {name: jnp.ones((16, 4), jnp.bfloat16) for name in 'abc'}
    numbers = importance.untied(jax.random.key(0), tree, tree)
    together = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(numbers)])
    assert (np.diff(together) < 0).all()  # the first count most
    zeros = importance.untied(jax.random.key(0), jnp.zeros(1000), None)
    assert len(np.unique(zeros)) == 1000
    assert float(zeros.min()) > 1e-37
    assert float(zeros.max()) <= 2e-37


def test_untied_keeps_shardings_and_refuses_what_is_wider():
    mesh = jax.make_mesh((8,), ('x',), (jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spread = jax.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
        params = jax.device_put(jnp.arange(16.0).reshape(8, 2), spread)
        numbers = jax.jit(importance.untied)(jax.random.key(0), params, params)
    assert numbers.sharding.is_equivalent_to(spread, 2)
    with jax.enable_x64(True), pytest.raises(TypeError, match='float64'):
        importance.untied(jax.random.key(0), jnp.ones(3, jnp.float64), None)
