"""Tests of _rules: which layers a rule is asked about, and what it must give."""

import chex
import jax
import jax.numpy as jnp
import pytest
from surgery_runs import RULES, network, states_of_run, surgery

from dns_jax import Rule, Thresholds, count_kept, is_kernel, update_probability


@pytest.mark.parametrize('how', ['scan', pytest.param('plain', marks=pytest.mark.slow)])
def test_own_rule_may_give_numbers_of_python(how):
    # Asked in a branch of a `cond`, it must agree with the state in the type of the thresholds.
    def rule(layers, masks, step):
        return {layer: Thresholds(step, 2 * len(leaves)) for layer, leaves in layers.items()}

    table = Rule(rule, update_probability(), refresh_every=2)
    states = states_of_run(how, network(), steps=5, rules=table)
    for low, high in states.thresholds.values():
        assert low.dtype == high.dtype == jnp.float32
        assert (low.tolist(), high.tolist()) == ([0, 0, 2, 2, 4], [4] * 5)


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
    _, new = jax.eval_shape(transform.update, params, state, params)
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


PARAMS = {'fc1': {'kernel': jnp.ones((2, 2))}}
ONE = RULES['fc1']


@pytest.mark.parametrize('names', [[], ['fc2'], ['fc1', 'fc2']])
def test_rule_that_gives_thresholds_of_other_layers(names):
    rule = Rule(
        lambda layers, masks, step: {name: Thresholds(0.0, 1.0) for name in names},
        update_probability(),
    )
    transform = surgery(rule, jax.random.key(0))
    with pytest.raises(ValueError, match=r"thresholds must name the layers \['fc1'\]"):
        transform.init(PARAMS)
