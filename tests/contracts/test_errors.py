"""What errors name, and that they can be read for large networks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from situations import KEY, array, network

import dns_jax
from dns_jax import (
    Rule,
    apply_masks,
    freeze,
    global_density,
    layer_density,
    mean_std,
    measure_sizes,
    surgery,
)

COMPAT_TABLE = 'field'


@pytest.mark.parametrize('sigma', [0, 1, 0.5, np.float32(0.5), 1.0])
def test_a_number_is_a_chance(sigma):
    params, masks = network(), []
    for said in (sigma, lambda step: float(sigma)):
        pruner = surgery(Rule(mean_std(0.3), said), KEY)
        masks.append(jax.jit(pruner.update)(params, pruner.init(params), params)[1].masks)
    jax.tree.map(np.testing.assert_array_equal, *masks)
    if sigma in (0, 1):
        assert all(mask.all() == (not sigma) for mask in jax.tree.leaves(masks) if mask.ndim)


WRONG_RULES = [
    (lambda: surgery({'fc1': Rule(mean_std(0.3), 1.5)}, KEY), 'fc1'),
    (lambda: surgery({'fc1': Rule(mean_std(0.3), -0.1)}, KEY), 'fc1'),
    (lambda: surgery({'fc1': Rule(mean_std(0.3), float('nan'))}, KEY), 'fc1'),
    (lambda: surgery({'fc1': Rule(mean_std(0.3), 'often')}, KEY), 'fc1'),
    (lambda: surgery({'fc1': Rule(mean_std(0.3), None)}, KEY), 'fc1'),
    (lambda: surgery({'fc1': mean_std(0.3)}, KEY), 'fc1'),
    (lambda: surgery(mean_std(0.3), KEY), 'Rule'),
    (lambda: surgery(global_density(0.3), KEY), 'Rule'),
    (lambda: surgery(0.1, KEY), 'Rule'),
    (lambda: surgery({'fc1': 0.1}, KEY), 'fc1'),
    (lambda: surgery({'fc1': Rule(0.1)}, KEY), 'fc1'),
    (lambda: surgery({'fc1': Rule(mean_std(0.3), 1.0, -1)}, KEY), 'fc1'),
    (lambda: surgery({'fc1': Rule(mean_std(0.3), 1.0, 1.5)}, KEY), 'fc1'),
    (lambda: surgery(Rule(mean_std(0.3)), 0), 'key'),
    (lambda: surgery({'fc9': Rule(mean_std(0.3))}, KEY).init(network()), 'fc9'),
]


@pytest.mark.parametrize(('make', 'named'), WRONG_RULES)
def test_wrong_rules_are_named(make, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make()


def large():
    return {f'block{n:03}': {'kernel': np.ones((2, 3), np.float32)} for n in range(500)}


MISMATCHES = {
    'lacks one': lambda masks: {k: v for k, v in masks.items() if k != 'block250'},
    'has one more': lambda masks: {**masks, 'block999': masks['block000']},
    'other names': lambda masks: {f'x{k}': v for k, v in masks.items()},
    'another shape': lambda masks: {**masks, 'block250': {'kernel': np.ones((3, 2), bool)}},
    'another type': lambda masks: {**masks, 'block250': {'kernel': np.ones((2, 3), int)}},
    'deeper': lambda masks: {**masks, 'block250': {'kernel': {'more': np.ones((2, 3), bool)}}},
}


@pytest.mark.parametrize('name', MISMATCHES)
def test_mismatches_name_one_path_and_stay_short(name):
    params = large()
    masks = MISMATCHES[name](jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params))
    wanted = {'other names': 'block000', 'has one more': 'block999'}.get(name, 'block250')
    for function in (
        lambda: apply_masks(params, masks),
        lambda: measure_sizes(params, masks),
        lambda: freeze(masks).init(params),
        lambda: dns_jax.count_events(
            jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params), masks
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=wanted) as caught:
            function()
        assert len(str(caught.value)) < 400


LONG = {
    'a pattern': lambda: surgery({'blok*': Rule(layer_density(0.5))}, KEY).init(large()),
    'a hidden pattern': lambda: surgery(
        {'block*': Rule(layer_density(0.5)), 'block1*': Rule(layer_density(0.5))}, KEY
    ).init(large()),
    'nothing takes part': lambda: surgery(
        Rule(layer_density(0.5)), KEY, takes_part=lambda path, leaf: False
    ).init(large()),
    'a stack': lambda: dns_jax.unstack({'blocks': 0}, large()),
    'positions': lambda: measure_sizes(
        large(), jax.tree.map(lambda leaf: np.ones((), bool), large()), {'conv': 3}
    ),
    'a state of other layers': lambda: surgery(Rule(layer_density(0.5)), KEY).update(
        large(),
        dns_jax.SurgeryState(jnp.int32(0), KEY, jax.tree.map(lambda leaf: leaf > 0, large()), {}),
        large(),
    ),
    'thresholds': lambda: dns_jax.update_masks(
        KEY, large(), jax.tree.map(lambda leaf: leaf > 0, large()), {}, {}
    ),
}


@pytest.mark.parametrize('name', LONG)
def test_errors_of_large_networks_can_be_read(name):
    with pytest.raises(ValueError, match='block') as caught:
        LONG[name]()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize('updates', [{}, {'fc': {'kernel': None}}, {'fc': optax.MaskedNode()}])
def test_updates_without_an_array_pass(updates):
    params = {'fc': {'kernel': array(4, 4)}}
    pruner = surgery(Rule(mean_std(0.3), 1.0, 1), KEY)
    returned, state = pruner.update(updates, pruner.init(params), params)
    assert jax.tree.structure(returned) == jax.tree.structure(updates)
    assert not state.masks['fc']['kernel'].all()
