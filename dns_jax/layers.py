"""The leaves of a pytree by name, and which of them form one layer.

All is decided by the path of a leaf, so that any pytree will do: a Flax, Haiku or Equinox tree, a
tuple, a bare array. Everything here runs on structure alone, at trace time.
"""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import optax

from dns_jax.roles import has_axes
from dns_jax.typing import LayerOf, TakesPart

_MAX_PARTS = 100  # of a path: JAX cannot walk trees much deeper than a few times that
_Value = TypeVar('_Value')


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Names every leaf by its path: the keys that lead to it, joined by slashes.

    Args:
      tree: any pytree.

    Returns:
      Pairs of path and leaf, in the order of `jax.tree.leaves`. The path of a bare array is `''`; a
      variable of Flax NNX has the path of the array in it.

    Example:
      >>> named_leaves({'conv1': {'kernel': 1.0, 'bias': 0.0}})
      [('conv1/bias', 0.0), ('conv1/kernel', 1.0)]
    """
    return [(path, leaf) for path, leaf in _named_nodes(tree) if not _is_hole(leaf)]


def find_holes(tree: Any) -> list[str]:
    """Finds where `optax.masked`, `optax.partition` or `optax.multi_transform` left something out.

    Args:
      tree: any pytree.

    Returns:
      The path of each `optax.MaskedNode`.

    Example:
      >>> import optax
      >>> find_holes({'conv1': {'kernel': 1.0, 'bias': optax.MaskedNode()}})
      ['conv1/bias']
    """
    return [path for path, leaf in _named_nodes(tree) if _is_hole(leaf)]


def map_leaves(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Maps a function of path and leaf over a tree.

    Args:
      function: of the path of a leaf and the leaf.
      tree: any pytree.

    Returns:
      A tree of the same structure.

    Example:
      >>> map_leaves(lambda path, leaf: f'{path} is {leaf}', {'fc1': {'bias': 0.0}})
      {'fc1': {'bias': 'fc1/bias is 0.0'}}
    """
    mapped = [function(path, leaf) for path, leaf in named_leaves(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), mapped)


def nest_leaves(leaves: Iterable[tuple[str, Any]]) -> Any:
    """Makes the nested dict of leaves, by the parts of their paths: `named_leaves` the other way.

    Args:
      leaves: paths and leaves, none of them a dict.

    Returns:
      The dict, or the leaf itself where its path is `''`.

    Raises:
      ValueError: if there are no leaves, one has the place of another or lies within it, or a
        path has more than 100 parts.

    Example:
      >>> nest_leaves([('fc1/bias', 1), ('fc1/kernel', 2)])
      {'fc1': {'bias': 1, 'kernel': 2}}
    """
    top: dict[str, Any] = {}
    for path, leaf in leaves:
        node, key = top, ''  # the whole tree is the one entry of `top`
        parts = path.split('/') if path else []
        if len(parts) > _MAX_PARTS:
            raise ValueError(f'the path {path[:80]!r}... has {len(parts)} parts, over {_MAX_PARTS}')
        for part in parts:
            node, key = node.setdefault(key, {}), part
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or key in node:
            raise ValueError(f'the leaf {path!r} has the place of another, or lies within it')
        node[key] = leaf
    if not top:
        raise ValueError('a network must have at least one leaf')
    return top['']


def parent(path: str) -> str:
    """Names the layer of a leaf by all of its path but the last part.

    Args:
      path: the path of a leaf.

    Returns:
      The path of the tree node that holds the leaf, `''` for the root.

    Example:
      >>> parent('block/conv1/kernel'), parent('bias')
      ('block/conv1', '')
    """
    return path.rpartition('/')[0]


def layer_names(tree: Any, layer_of: LayerOf = parent) -> Any:
    """Names the layer of every leaf.

    Args:
      tree: any pytree.
      layer_of: maps the path of a leaf to the name of its layer.

    Returns:
      A tree of the same structure with a string at every leaf.

    Example:
      >>> layer_names({'fc1': {'kernel': 0.0, 'bias': 0.0}})
      {'fc1': {'bias': 'fc1', 'kernel': 'fc1'}}
    """
    return map_leaves(lambda path, _: layer_of(path), tree)


def group_by_layer(
    tree: Any, layer_of: LayerOf = parent, takes_part: TakesPart = has_axes
) -> dict[str, list[Any]]:
    """Collects the leaves that take part, layer by layer.

    Args:
      tree: any pytree of arrays.
      layer_of: maps the path of a leaf to the name of its layer.
      takes_part: which leaves are collected.

    Returns:
      ``{layer name: its leaves}``, layers sorted by name, leaves in the order of the tree.

    Example:
      >>> import jax.numpy as jnp
      >>> tree = {'fc1': {'kernel': jnp.zeros((4, 3)), 'bias': jnp.zeros(3)}}
      >>> {name: len(leaves) for name, leaves in group_by_layer(tree).items()}
      {'fc1': 2}
    """
    groups: dict[str, list[Any]] = {}
    for path, leaf in named_leaves(tree):
        if takes_part(path, leaf):
            groups.setdefault(layer_of(path), []).append(leaf)
    return dict(sorted(groups.items()))


def as_table(values: Mapping[str, _Value] | _Value) -> dict[str, _Value]:
    """Makes a table for `match_patterns` of a value for all layers.

    Args:
      values: the value, or a table, which stays as it is.

    Returns:
      ``{pattern: value}``.

    Example:
      >>> as_table(0.5), as_table({'fc*': 0.1, '*': 0.5})
      ({'*': 0.5}, {'fc*': 0.1, '*': 0.5})
    """
    return dict(values) if isinstance(values, Mapping) else {'*': values}


def match_patterns(
    table: Mapping[str, _Value], layers: Iterable[str]
) -> dict[str, tuple[str, _Value]]:
    """Finds for each layer the first pattern of a table that its name matches.

    Args:
      table: `{pattern: value}` in order of precedence. A pattern is a shell-style wildcard
        over the whole name, in which `*` also matches slashes.
      layers: the names of the layers.

    Returns:
      ``{layer name: (pattern, value)}``; a layer that no pattern matches is absent.

    Raises:
      ValueError: if a pattern is the first match of no layer: misspelt, or hidden by those
        before it.

    Example:
      >>> match_patterns({'conv*': 1, '*': 2}, ['conv1', 'fc1'])
      {'conv1': ('conv*', 1), 'fc1': ('*', 2)}
    """
    layers = list(layers)
    matches = {}
    for layer in layers:
        for pattern, value in table.items():
            if fnmatch.fnmatchcase(layer, pattern):
                matches[layer] = (pattern, value)
                break
    used = {pattern for pattern, _ in matches.values()}
    for pattern in table:
        if pattern not in used:
            raise ValueError(
                f'pattern {pattern!r} is the first match of no layer; the patterns are '
                f'{abridge(table)}, the layers {abridge(layers)}'
            )
    return matches


def abridge(names: Iterable[str]) -> str:
    """Lists some names for a message; a network may have hundreds.

    Args:
      names: what is listed.

    Returns:
      The list, or its first eight names and how many there are.

    Example:
      >>> abridge(['fc1', 'fc2'])
      "['fc1', 'fc2']"
    """
    names = list(names)
    if len(names) <= 8:
        return repr(names)
    return f'[{", ".join(map(repr, names[:8]))}, … {len(names)} in all]'


def _named_nodes(tree: Any, top: str = '') -> list[tuple[str, Any]]:
    """Names leaves, and the holes of optax, which have none."""
    named = []
    for key_path, node in jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is not tree and (_is_variable(node) or _is_hole(node))
    )[0]:
        if _is_variable(tree):  # the attribute `value` that holds the array is not its name
            key_path = key_path[1:]
        path = jax.tree_util.keystr(key_path, simple=True, separator='/')
        path = '/'.join(filter(None, (top, path)))
        named += _named_nodes(node, path) if _is_variable(node) else [(path, node)]
    return [(top, tree)] if _is_hole(tree) else named


def _is_variable(node: Any) -> bool:
    """Knows a variable of Flax NNX, without Flax."""
    return any(
        base.__name__ == 'Variable' and base.__module__.startswith('flax.nnx')
        for base in type(node).__mro__
    )


def _is_hole(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
