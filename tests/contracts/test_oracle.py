"""The library against the NumPy oracle: Algorithm 1 with Caffe's SGD, and the Caffe order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import dns_jax

STEPS = 200
KEY = 11
# The rate changes twice within the run; σ decays and stops before its end.
SOLVER = oracle.Solver(0.1, 0.3, 80, 0.9, 5e-4, 2.0)
RULES = {
    'fc1': oracle.LayerRule(c_rate=0.3, gamma=0.01, power=1.0, stop=150),
    'fc2': oracle.LayerRule(c_rate=-0.2, gamma=0.03, power=0.5, stop=170),
}


@functools.cache
def problem():
    """A 12-8-5 network and one batch of 16 for every step, labelled by a fixed teacher."""
    random = np.random.default_rng(3)
    weights = {
        'fc1': {'kernel': random.normal(0, 0.5, (12, 8)), 'bias': np.zeros(8)},
        'fc2': {'kernel': random.normal(0, 0.6, (8, 5)), 'bias': np.zeros(5)},
    }
    # Zeros are not counted by μ and s: some in the kernels, besides all biases.
    weights['fc1']['kernel'][:2, :3] = 0.0
    weights = jax.tree.map(lambda leaf: leaf.astype(np.float32), weights)
    teacher = random.normal(size=(12, 5))
    images = random.normal(size=(STEPS, 16, 12)).astype(np.float32)
    return weights, images, (images @ teacher).argmax(-1)


@functools.cache
def coins():
    """The numbers that the documented scheme draws: one for each step and layer."""
    key = jax.random.key(KEY)
    draw = jax.vmap(lambda step: jax.random.uniform(jax.random.fold_in(key, step), (2,)))
    return np.asarray(draw(jnp.arange(STEPS)))


@functools.cache
def expected(order):
    weights, images, labels = problem()
    batches = zip(images.astype(np.float64), labels, strict=True)
    return oracle.train(weights, RULES, SOLVER, batches, coins(), order)


def loss(params, images, labels):
    hidden = jax.nn.relu(jnp.dot(images, params['fc1']['kernel']) + params['fc1']['bias'][None])
    logits = jnp.dot(hidden, params['fc2']['kernel']) + params['fc2']['bias'][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def parts():
    rules = {
        layer: dns_jax.Rule(
            dns_jax.mean_std(rule.c_rate),
            dns_jax.update_probability(rule.gamma, rule.power, rule.stop),
        )
        for layer, rule in RULES.items()
    }
    rate = dns_jax.caffe_step(SOLVER.base, SOLVER.factor, SOLVER.step_size)
    sgd = dns_jax.caffe_sgd(rate, SOLVER.momentum, SOLVER.decay, SOLVER.bias_scale)
    return dns_jax.surgery(rules, jax.random.key(KEY), dns_jax.has_axes), sgd


def paper_step():
    optimizer = optax.chain(*parts())
    value_and_grad = dns_jax.masked_value_and_grad(loss)

    def step(carry, batch):
        params, state = carry
        _, gradients = value_and_grad(params, dns_jax.get_masks(state), *batch)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (dns_jax.get_masks(state), params)

    return optimizer.init, step


def caffe_step():
    """The masks first: the transformation is asked before there is a gradient."""
    surgery, sgd = parts()
    value_and_grad = dns_jax.masked_value_and_grad(loss)

    def step(carry, batch):
        params, (state, sgd_state) = carry
        _, state = surgery.update(params, state, params)
        _, gradients = value_and_grad(params, state.masks, *batch)
        updates, sgd_state = sgd.update(gradients, sgd_state, params)
        params = optax.apply_updates(params, updates)
        return (params, (state, sgd_state)), (state.masks, params)

    return lambda params: (surgery.init(params), sgd.init(params)), step


ORDERS = {'paper': paper_step, 'caffe': caffe_step}


def trained(order):
    weights, images, labels = problem()
    init, step = ORDERS[order]()
    params = jax.tree.map(jnp.asarray, weights)
    batches = (jnp.asarray(images), jnp.asarray(labels))
    history = jax.device_get(jax.lax.scan(step, (params, init(params)), batches)[1])
    return [jax.tree.map(lambda leaf, at=at: leaf[at], history) for at in range(STEPS)]


@pytest.mark.parametrize('order', ORDERS)
def test_library_follows_the_oracle(order):
    steps = zip(trained(order), expected(order), strict=True)
    for at, ((masks, params), (oracle_masks, oracle_weights)) in enumerate(steps):
        for layer in RULES:
            for name in ('kernel', 'bias'):
                where = f'{layer}/{name} at step {at}'
                np.testing.assert_array_equal(
                    masks[layer][name], oracle_masks[layer][name], err_msg=where
                )
                np.testing.assert_allclose(
                    params[layer][name],
                    oracle_weights[layer][name],
                    rtol=0,
                    atol=1e-5,
                    err_msg=where,
                )


@pytest.mark.parametrize('layer', RULES)
@pytest.mark.parametrize('order', ORDERS)
def test_oracle_run_prunes_splices_and_skips(order, layer):
    # Were one of these missing, the comparison above would say little.
    masks = [history[0][layer]['kernel'] for history in expected(order)]
    late = masks[1:]
    pruned = [np.sum(old & ~new) for old, new in zip(masks, late, strict=False)]
    spliced = [np.sum(~old & new) for old, new in zip(masks, late, strict=False)]
    assert sum(pruned) >= 5
    assert sum(spliced) >= 5
    both = [p > 0 and s > 0 for p, s in zip(pruned, spliced, strict=True)]
    assert any(both)
    assert masks[-1].any()
    assert not masks[-1].all()
    heads = [
        draw < oracle.sigma(RULES[layer], step)
        for step, draw in enumerate(coins()[:, sorted(RULES).index(layer)])
    ]
    assert 20 < sum(heads) < STEPS - 20
    # The rate still matters after its change, and the last weights are still moving.
    assert SOLVER.step_size < RULES[layer].stop


def test_gradient_of_the_oracle_is_the_derivative():
    weights, images, labels = problem()
    weights = jax.tree.map(lambda leaf: leaf.astype(np.float64), weights)

    def cost(weights):
        hidden = np.maximum(images[0] @ weights['fc1']['kernel'] + weights['fc1']['bias'], 0)
        logits = hidden @ weights['fc2']['kernel'] + weights['fc2']['bias']
        normalizer = np.log(np.exp(logits).sum(1))
        return np.mean(normalizer - logits[np.arange(16), labels[0]])

    gradients = oracle.gradient(weights, images[0].astype(np.float64), labels[0])
    for layer, name, at in [
        ('fc1', 'kernel', (4, 5)),
        ('fc1', 'bias', (2,)),
        ('fc2', 'kernel', (3, 1)),
        ('fc2', 'bias', (4,)),
    ]:
        values = []
        for shift in (1e-6, -1e-6):
            moved = jax.tree.map(np.copy, weights)
            moved[layer][name][at] += shift
            values.append(cost(moved))
        difference = (values[0] - values[1]) / 2e-6
        np.testing.assert_allclose(gradients[layer][name][at], difference, atol=1e-8)


def test_orders_line_up():
    """On one path of the weights the masks are the same; the paper's gradient sees them late."""
    weights, _, _ = problem()
    surgery, _ = parts()
    # The weights that the gradients of steps 0, 1, 2, ... are taken at.
    path = [weights, *(history[1] for history in expected('caffe'))]
    path = [jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree) for tree in path]
    update = jax.jit(surgery.update)
    paper_state = caffe_state = surgery.init(path[0])
    seen = {'paper': [], 'caffe': []}
    for params in path[:STEPS]:
        _, caffe_state = update(params, caffe_state, params)  # masks, then gradient
        seen['caffe'].append(caffe_state.masks)
        seen['paper'].append(paper_state.masks)  # gradient, then masks
        _, paper_state = update(params, paper_state, params)
    flat = {
        order: [
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(masks)])
            for masks in all_masks
        ]
        for order, all_masks in seen.items()
    }
    np.testing.assert_array_equal(flat['paper'][1:], flat['caffe'][:-1])
    assert flat['paper'][0].all()
    assert np.any(np.array(flat['paper']) != np.array(flat['caffe']))
    # And what the Caffe gradients saw is what the whole run had.
    for masks, (oracle_masks, _) in zip(seen['caffe'], expected('caffe'), strict=True):
        jax.tree.map(np.testing.assert_array_equal, masks, oracle_masks)
