"""The names of leaves, in trees of every library."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from situations import slow_but

import dns_jax
from dns_jax import Rule, layer_density, surgery
from dns_jax.layers import group_by_layer, named_leaves

NAMES = ('query', 'key', 'value', 'out')


class Tuple(NamedTuple):
    query: Any
    key: Any
    value: Any
    out: Any


class Module(eqx.Module):
    query: Any
    key: Any
    value: Any
    out: Any


@flax.struct.dataclass
class Struct:
    query: Any
    key: Any
    value: Any
    out: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    query: Any
    key: Any
    value: Any
    out: Any


class AloneTuple(NamedTuple):
    value: Any


class AloneModule(eqx.Module):
    value: Any


@flax.struct.dataclass
class AloneStruct:
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class AloneRegistered:
    value: Any


class Own(nnx.Variable):
    """A kind of variable that Flax does not know."""


class Attention(nnx.Module):
    """Four arrays, one of them called value, in variables of some kind."""

    def __init__(self, kind):
        for number, name in enumerate(NAMES):
            setattr(self, name, kind(array(5, 5, seed=number)))


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def four():
    return [array(5, 5, seed=number) for number in range(4)]


def paths(tree):
    return [path for path, _ in named_leaves(tree)]


MANY = {
    'dict': lambda: dict(zip(NAMES, four(), strict=True)),
    'NamedTuple': lambda: Tuple(*four()),
    'Equinox': lambda: Module(*four()),
    'flax.struct': lambda: Struct(*four()),
    'registered dataclass': lambda: Registered(*four()),
    'nnx module': lambda: Attention(nnx.Param),
    'nnx.State': lambda: nnx.state(Attention(nnx.Param)),
    'nnx.State of BatchStat': lambda: nnx.state(Attention(nnx.BatchStat)),
    'nnx.State of a kind of its own': lambda: nnx.state(Attention(Own)),
    'nnx.State of LoRAParam': lambda: nnx.state(Attention(nnx.LoRAParam)),
    'nnx pure dict': lambda: nnx.to_pure_dict(nnx.state(Attention(nnx.Param))),
}
ALONE = {
    'dict': lambda leaf: {'value': leaf},
    'NamedTuple': AloneTuple,
    'Equinox': AloneModule,
    'flax.struct': AloneStruct,
    'registered dataclass': AloneRegistered,
}


@pytest.mark.parametrize('kind', MANY)
def test_a_leaf_called_value_keeps_its_name(kind):
    assert set(paths({'attn': MANY[kind]()})) == {f'attn/{name}' for name in NAMES}
    assert set(paths(MANY[kind]())) == set(NAMES)


@pytest.mark.parametrize('kind', slow_but(MANY, 'Equinox', 'nnx.State of a kind of its own'))
def test_a_leaf_called_value_is_pruned_by_its_name(kind):
    params = {'attn': MANY[kind]()}
    pruner = surgery({'attn': Rule(layer_density(0.4))}, jax.random.key(0))
    _, state = jax.jit(pruner.update)(params, pruner.init(params), params)
    assert set(state.thresholds) == {'attn'}
    assert dns_jax.count_kept(state.masks) == {'attn': 40}
    # By layers of one leaf each, all are found, and files get their names.
    by_leaf = surgery(
        {'attn/value': Rule(layer_density(0.2)), 'attn/*': Rule(layer_density(0.4))},
        jax.random.key(0),
        layer_of=lambda path: path,
    )
    _, state = jax.jit(by_leaf.update)(params, by_leaf.init(params), params)
    kept = dns_jax.count_kept(state.masks, lambda path: path)
    assert kept == {f'attn/{name}': 5 if name == 'value' else 10 for name in NAMES}
    sizes = dns_jax.measure_sizes(params, state.masks)
    assert set(sizes.layers) == {'attn'}


@pytest.mark.parametrize('kind', ALONE)
def test_alone_in_its_parent(kind):
    leaf = array(4, 4)
    assert paths(ALONE[kind](leaf)) == ['value']
    assert paths({'a': ALONE[kind](leaf), 'b': [ALONE[kind](leaf)]}) == ['a/value', 'b/0/value']
    assert paths(ALONE[kind](ALONE[kind](leaf))) == ['value/value']
    assert list(group_by_layer({'a': ALONE[kind](leaf)})) == ['a']


@pytest.mark.parametrize('kind', [kind for kind in ALONE if kind != 'dict'])
def test_within_nnx(kind):
    class Holder(nnx.Module):
        def __init__(self):
            self.value = nnx.Param(ALONE[kind](array(4, 4)))

    state = nnx.state(Holder())
    assert paths(state) == ['value/value']
    assert paths(Holder()) == ['value/value']


def test_a_variable_by_itself_has_the_name_of_a_bare_array():
    assert paths(nnx.Param(array(3, 3))) == ['']
    assert paths({'value': nnx.Param(array(3, 3))}) == ['value']
    assert paths([nnx.BatchStat(array(3, 3))]) == ['0']


@pytest.mark.parametrize('kind', MANY)
def test_a_file_has_the_names(kind, tmp_path):
    sparse = pytest.importorskip('dns_jax.files.sparse')
    params = {'attn': MANY[kind]()}
    masks = jax.tree.map(lambda leaf: leaf > 0, params)
    sparse.save_sparse(tmp_path / 'f', params, masks)
    back = sparse.load_sparse(tmp_path / 'f')
    assert set(paths(back.params)) == {f'attn/{name}' for name in NAMES}
    for (path, leaf), (_, loaded) in zip(
        sorted(named_leaves(dns_jax.apply_masks(params, masks)), key=lambda pair: pair[0]),
        sorted(named_leaves(back.params), key=lambda pair: pair[0]),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(leaf), loaded, err_msg=path)
