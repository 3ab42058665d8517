"""Networks of which wrappers of optax show surgery a part."""

import itertools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from situations import KEY, array, network

import dns_jax
from dns_jax import (
    Rule,
    apply_masks,
    count_kept,
    freeze,
    get_masks,
    layer_density,
    measure_sizes,
    prune_to,
    surgery,
    update_probability,
)

COMPAT_TABLE = 'field'
LABELS = {
    'by leaf': lambda params: (
        jax.tree.map(lambda _: 'a', params) | {'fc2': jax.tree.map(lambda _: 'b', params['fc2'])}
    ),
    'by subtree': lambda params: {'fc1': 'a', 'fc2': 'b', 'norm': 'a'},
    'by function': None,
}


@pytest.mark.parametrize(
    ('how', 'labels', 'both'),
    [
        ('multi_transform', 'by subtree', True),
        *(
            pytest.param('partition', labels, both, marks=pytest.mark.slow)
            for labels, both in itertools.product(LABELS, (True, False))
        ),
    ],
)
def test_networks_dealt_out(how, labels, both):
    params = network()

    def label(tree):
        return {
            layer: jax.tree.map(lambda _, to=layer: 'b' if to == 'fc2' else 'a', leaves)
            for layer, leaves in tree.items()
        }

    chosen = label if labels == 'by function' else LABELS[labels](params)
    sigma = update_probability(power=0, stop=3)
    second = surgery(Rule(layer_density(0.25), sigma), KEY) if both else optax.identity()
    optimizer = getattr(optax, how)(
        {
            'a': optax.chain(surgery(Rule(layer_density(0.5), sigma), KEY), optax.sgd(0.1)),
            'b': optax.chain(second, optax.sgd(0.1)),
        },
        chosen,
    )
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        masks = get_masks(state)
        _, grads = dns_jax.masked_value_and_grad(
            lambda params: jnp.sum(jnp.square(params['fc1']['kernel'] @ params['fc2']['kernel']))
        )(params, masks)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    masks = get_masks(state)
    assert count_kept(masks) == {'fc1': 192, **({'fc2': 48} if both else {})}
    small = apply_masks(params, masks)
    assert int((small['fc1']['kernel'] != 0).sum()) <= 192
    assert int((small['fc2']['kernel'] != 0).sum()) <= (48 if both else 192)
    sizes = measure_sizes(params, masks)
    assert sizes.layers['fc1'].kept == 192 + 24
    assert sizes.total.parameters == 16 * 24 + 24 + 24 * 8 + 8 + 8


def test_masked_surgery_as_with_frozen_subtrees():
    params = network()
    mask = lambda tree: {k: jax.tree.map(lambda _, k=k: k == 'fc1', v) for k, v in tree.items()}  # noqa: E731
    optimizer = optax.chain(
        optax.masked(prune_to(density=0.25, steps=2), mask), optax.sgd(0.1, 0.9)
    )
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = jax.jit(optimizer.update)(params, state, params)
        params = optax.apply_updates(params, updates)
    assert count_kept(get_masks(state)) == {'fc1': 96}
    chex.assert_trees_all_equal(apply_masks(params, get_masks(state))['fc2'], params['fc2'])


def test_a_subtree_called_masks():
    params = {'masks': {'kernel': array(8, 8)}, 'other': {'masks': array(8, 4)}}
    optimizer = optax.chain(prune_to(density=0.25, steps=2), optax.sgd(0.1, 0.9))
    state = optimizer.init(params)
    for _ in range(3):
        _, state = jax.jit(optimizer.update)(params, state, params)
    assert count_kept(get_masks(state), lambda path: '') == {'': 24}


def test_no_masks_is_said():
    with pytest.raises(ValueError, match='masks'):
        get_masks(optax.adam(1e-3).init(network()))
    with pytest.raises(ValueError, match='two masks of'):
        get_masks(optax.chain(freeze_of(0.5), freeze_of(0.3)).init(network()))


def freeze_of(share):
    return freeze(jax.tree.map(lambda leaf: leaf > share, network()))
