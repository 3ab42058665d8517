"""The leaves of a pytree by name: what each is to its layer, and which form one layer.

All is decided by the path of a leaf, so that any pytree will do: a Flax, Haiku or Equinox tree, a
tuple, a bare array. What a leaf is, the names say that Flax, Haiku, Equinox and others give, and
its shape only where names say nothing; another choice is a predicate of one's own (`TakesPart`).
Everything here runs on structure alone, at trace time.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from dns_jax._core.checks import abridge
from dns_jax.typing import LayerOf, Role, TakesPart

_Value = TypeVar('_Value')

# What the last word of a leaf's name says, in all libraries that are known.
_ROLES: dict[str, Role] = {
    **dict.fromkeys(('kernel', 'kernels', 'matrix'), 'kernel'),
    **dict.fromkeys(('bias', 'biases', 'beta', 'offset'), 'bias'),
    **dict.fromkeys(('scale', 'scales', 'gamma', 'slope'), 'scale'),
    **dict.fromkeys(('embedding', 'embeddings', 'embed', 'emb', 'embs', 'encoding'), 'embedding'),
    **dict.fromkeys(('pos', 'posemb', 'position', 'positions', 'table'), 'embedding'),
    **dict.fromkeys(('token', 'tokens', 'cls', 'vocab', 'lookup', 'wte', 'wpe'), 'embedding'),
    **dict.fromkeys(('prompt', 'prompts', 'latents', 'codebook', 'memory'), 'embedding'),
    **dict.fromkeys(('mean', 'var', 'variance', 'average', 'count', 'counter'), 'statistic'),
}
_FIRST_WORDS = ('kernel', 'bias', 'embedding')  # say it too, as in bias_ih
_NORM = re.compile(r'norms?$|^(ln|bn|gn|rms)$')
_NO_NORM = {'ada', 'modulation', 'spectral', 'weight'}  # beside `norm`, of what has kernels
_EMBEDDING = re.compile(r'\b(pos)?emb|\b(wte|wpe)\b|\b(vocab|lookup|tokens?|pos|positions?|table)$')


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
    return _named_leaves(tree, '')


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


def role(path: str, leaf: Any) -> Role:
    """Says what a leaf is, by its name where that says it, else by its shape.

    The last word of the name decides: `kernel`, `bias`, `scale`, `embedding` and their like in
    other libraries. Names such as `weight` and `w`, or none that are known, are a scale in a layer
    called a norm, an embedding in one called so, and else a kernel from two axes on.

    Args:
      path: the path of a leaf; of a stacked one, that of a slice.
      leaf: an array, or anything with a shape.

    Returns:
      `kernel`, `bias`, `scale`, `embedding` or `statistic`.

    Example:
      >>> import jax.numpy as jnp
      >>> role('attention/out/bias', jnp.zeros((4, 8))), role('norm1/weight', jnp.zeros(8))
      ('bias', 'scale')
    """
    *parents, name = path.split('/')
    words, axes = _words(name), jnp.ndim(leaf)
    if words == ['b'] and name[0] == 'b':  # Haiku's; B of a low-rank pair is a matrix
        return 'bias'
    shared = words[:1] in (['w'], ['weight'], ['weights'])  # a name of all kinds of layers
    around = _words(parents[-1]) if parents else []
    # The name of a box or a node around says it too, where the leaf's own says nothing.
    for said in (words, [] if shared else around):
        found = _ROLES.get(said[-1]) if said else None
        if found and (found != 'statistic' or axes < 2 or len(said) == 1):  # w_mean may be a kernel
            return found
        if said and said[0] in _FIRST_WORDS:
            return _ROLES[said[0]]
    if {'rel', 'pos'} <= set(words) or words == ['weight', 'g']:
        return 'embedding' if 'pos' in words else 'scale'
    if shared and around[-1:] == ['bias']:
        return 'bias'
    if any(map(_NORM.search, around)) and not (axes > 1 and _NO_NORM & set(around)):
        return 'scale'
    if axes == 2 and 'patch' not in around and _EMBEDDING.search(' '.join(around)):
        return 'embedding'
    if axes < 2:
        return 'scale' if axes == 0 or words[:1] in (['w'], ['weight']) else 'bias'
    return 'kernel'


def is_kernel(path: str, leaf: Any) -> bool:
    """Selects the kernels (`role`): biases, norms, embeddings and statistics stay dense.

    Args:
      path: the path of a leaf.
      leaf: an array, or anything with a shape.

    Returns:
      True for a kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> is_kernel('fc1/kernel', jnp.zeros((4, 3))), is_kernel('fc1/bias', jnp.zeros(3))
      (True, False)
    """
    return role(path, leaf) == 'kernel'


def has_axes(path: str, leaf: Any) -> bool:
    """Selects every leaf but scalars: the paper's choice, which prunes biases too.

    Args:
      path: the path of a leaf.
      leaf: an array, or anything with a shape.

    Returns:
      True where the leaf has at least one axis and one element.

    Example:
      >>> import jax.numpy as jnp
      >>> has_axes('fc1/bias', jnp.zeros(3)), has_axes('temperature', jnp.zeros(()))
      (True, False)
    """
    del path
    return jnp.ndim(leaf) > 0 and 0 not in jnp.shape(leaf)


def parent_path(path: str) -> str:
    """Names the layer of a leaf by all of its path but the last part.

    Args:
      path: the path of a leaf.

    Returns:
      The path of the tree node that holds the leaf, `''` for the root.

    Example:
      >>> parent_path('block/conv1/kernel'), parent_path('bias')
      ('block/conv1', '')
    """
    return path.rpartition('/')[0]


def layer_names(tree: Any, layer_of: LayerOf = parent_path) -> Any:
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
    tree: Any, layer_of: LayerOf = parent_path, takes_part: TakesPart = has_axes
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
                f'pattern {pattern!r} is the first match of no layer: it matches none, or patterns '
                f'above it match first; the patterns are {abridge(table)}, the layers '
                f'{abridge(layers)}'
            )
    return matches


def _named_leaves(tree: Any, top: str) -> list[tuple[str, Any]]:
    named = []
    for key_path, node in jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is not tree and _is_variable(node)
    )[0]:
        if _is_variable(tree):  # the attribute `value` that holds the array is not its name
            key_path = key_path[1:]
        path = jax.tree_util.keystr(key_path, simple=True, separator='/')
        path = '/'.join(filter(None, (top, path)))
        named += _named_leaves(node, path) if _is_variable(node) else [(path, node)]
    return named


def _is_variable(node: Any) -> bool:
    """Knows a variable of Flax NNX, without Flax."""
    return any(
        base.__name__ == 'Variable' and base.__module__.startswith('flax.nnx')
        for base in type(node).__mro__
    )


def _words(name: str) -> list[str]:
    """Parts a name in snake case or camel case; digits are no words."""
    return [word.lower() for word in re.findall(r'[A-Z]+(?![a-z])|[A-Z]?[a-z]+', name)]
