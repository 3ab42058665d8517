"""Tests of layers."""

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dns_jax import layers


class Pair(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


KERNEL, BIAS = jnp.ones((4, 3)), jnp.ones(3)


def nnx_state():
    return nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param)


@pytest.mark.parametrize(
    ('tree', 'paths'),
    [
        ({'params': {'fc1': {'kernel': KERNEL}}}, ['params/fc1/kernel']),
        ({'fc1': Pair(KERNEL, BIAS)}, ['fc1/kernel', 'fc1/bias']),
        (((KERNEL, BIAS), (KERNEL,)), ['0/0', '0/1', '1/0']),
        ([KERNEL, None, {'b': BIAS}], ['0', '2/b']),
        (KERNEL, ['']),
        ({'a': None}, []),
        ({'a/b': {'kernel': KERNEL}}, ['a/b/kernel']),
        ({'value': KERNEL}, ['value']),
        ({'value': {'kernel': KERNEL}}, ['value/kernel']),
    ],
)
def test_named_leaves(tree, paths):
    named = layers.named_leaves(tree)
    assert [path for path, _ in named] == paths
    assert all(map(operator.is_, [leaf for _, leaf in named], jax.tree.leaves(tree)))


def test_named_leaves_of_nnx_state_and_its_pure_dict():
    state = nnx_state()
    for tree in (state, nnx.to_pure_dict(state)):
        assert sorted(path for path, _ in layers.named_leaves(tree)) == ['bias', 'kernel']


@pytest.mark.parametrize(
    ('path', 'name'), [('a/b/kernel', 'a/b'), ('a/kernel', 'a'), ('kernel', ''), ('', '')]
)
def test_parent(path, name):
    assert layers.parent_path(path) == name


@pytest.mark.parametrize(
    ('shape', 'axes', 'kernel'),
    [((), False, False), ((3,), True, False), ((4, 3), True, True), ((3, 3, 1, 2), True, True)],
)
def test_predicates_where_names_say_nothing(shape, axes, kernel):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert layers.has_axes('any/path', leaf) is axes
    assert layers.is_kernel('any/path', leaf) is kernel


def test_layer_names():
    tree = {'b': Pair(KERNEL, BIAS), 'a': (KERNEL, None)}
    assert layers.layer_names(tree) == {'b': Pair('b', 'b'), 'a': ('a', None)}
    assert layers.layer_names(tree, lambda path: path.upper()) == {
        'b': Pair('B/KERNEL', 'B/BIAS'),
        'a': ('A/0', None),
    }


def test_group_by_layer_sorts_layers_and_keeps_the_order_of_leaves():
    # A list is not sorted by jax as a dict is: its tenth layer sorts before its second.
    tree = [Pair(KERNEL * i, BIAS * i) for i in range(11)]
    groups = layers.group_by_layer(tree)
    assert list(groups) == sorted(map(str, range(11)))
    assert [leaf.shape for leaf in groups['10']] == [(4, 3), (3,)]
    assert float(groups['10'][0][0, 0]) == 10.0


def test_group_by_layer_takes_what_the_predicate_takes():
    tree = {'fc1': Pair(KERNEL, BIAS), 'norm': {'scale': BIAS}, 'temperature': jnp.ones(())}
    assert {k: len(v) for k, v in layers.group_by_layer(tree).items()} == {'fc1': 2, 'norm': 1}
    kernels = layers.group_by_layer(tree, takes_part=layers.is_kernel)
    assert {k: len(v) for k, v in kernels.items()} == {'fc1': 1}
    one = layers.group_by_layer(tree, layer_of=lambda path: 'all')
    assert {k: len(v) for k, v in one.items()} == {'all': 3}
    by_path = layers.group_by_layer(tree, takes_part=lambda path, leaf: path == 'norm/scale')
    assert list(by_path) == ['norm']


NAMES = ['conv1', 'conv2', 'block/conv1', 'fc1']


@pytest.mark.parametrize(
    ('table', 'matches'),
    [
        ({'*': 0}, dict.fromkeys(NAMES, ('*', 0))),
        ({'conv*': 1}, {'conv1': ('conv*', 1), 'conv2': ('conv*', 1)}),
        ({'*conv1': 1}, {'conv1': ('*conv1', 1), 'block/conv1': ('*conv1', 1)}),
        (
            {'conv2': 1, 'conv?': 2, '*': 3},
            {
                'conv2': ('conv2', 1),
                'conv1': ('conv?', 2),
                'block/conv1': ('*', 3),
                'fc1': ('*', 3),
            },
        ),
        ({'fc[12]': 1}, {'fc1': ('fc[12]', 1)}),
        ({}, {}),
    ],
)
def test_match_patterns(table, matches):
    assert layers.match_patterns(table, iter(NAMES)) == matches


@pytest.mark.parametrize(
    ('table', 'pattern'),
    [
        ({'fc2': 1}, 'fc2'),
        ({'FC1': 1}, 'FC1'),  # upper case is another name, on any system
        ({'*': 1, 'fc1': 2}, 'fc1'),  # shadowed
        ({'conv1': 1, 'conv2': 1, 'conv?': 2}, 'conv?'),
        ({'': 1}, ''),
    ],
)
def test_match_patterns_refuses_a_pattern_without_effect(table, pattern):
    with pytest.raises(ValueError, match='first match of no layer') as caught:
        layers.match_patterns(table, NAMES)
    assert f'pattern {pattern!r}' in str(caught.value)
    assert str(NAMES) in str(caught.value)
