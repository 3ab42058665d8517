"""Stacked layers: arrays that hold those of many layers, as scans and vmapped ensembles have them.

Owns how a tree is taken apart into the network that it would be unstacked, and put together again.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from dns_jax._core.checks import abridge
from dns_jax._trees import nest_leaves
from dns_jax.layers import map_leaves, named_leaves


def unstack(stacked: Mapping[str, int], tree: Any, *others: Any) -> tuple[Any, ...]:
    """Takes stacked layers apart: the network as if each had been written down by itself.

    A scan over layers and a vmapped ensemble hold the arrays of many layers in one. Under a node
    `blocks` that is stacked along axis 0, the leaf `blocks/fc/kernel` of shape (6, 16, 16) becomes
    six leaves `blocks/0/fc/kernel` to `blocks/5/fc/kernel` of shape (16, 16).

    Args:
      stacked: `{path of a node: axis}`; all leaves under the node are stacked along it. A part of
        the path may be a shell-style wildcard, `''` is the whole tree. Within a stacked node the
        axes of another are counted in one slice.
      tree: any pytree of arrays.
      *others: trees with leaves of the same paths, such as masks; a scalar stands for all slices.

    Returns:
      For each tree the nested dict of its slices, with the index of a slice behind its node.

    Raises:
      ValueError: if a node has no leaves, a leaf lacks the axis, or another tree a leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {'blocks': {'kernel': jnp.array([[1.0, 2.0], [3.0, 4.0]])}}
      >>> (apart,) = unstack({'blocks': 0}, params)
      >>> apart['blocks']['1']['kernel']
      Array([3., 4.], dtype=float32)
    """
    named, others_of = named_leaves(tree), [dict(named_leaves(other)) for other in others]
    _check_nodes(stacked, [path for path, _ in named])
    slices: list[list[tuple[str, Any]]] = [[] for _ in (tree, *others)]
    for path, leaf in named:
        axes, names = _stacked_axes(stacked, path, leaf), slice_paths(stacked, path, leaf)
        for into, leaves in zip(slices, ({path: leaf}, *others_of), strict=True):
            if path not in leaves:
                raise ValueError(f'others must have the leaves of tree, but one lacks {path!r}')
            into += zip(names, _take_apart(leaves[path], axes), strict=True)
    return tuple(map(nest_leaves, slices))


def restack(stacked: Mapping[str, int], like: Any, apart: Any) -> Any:
    """Puts slices together again: `unstack` the other way.

    Args:
      stacked: as for `unstack`.
      like: the tree that was taken apart.
      apart: a tree of slices; scalars are spread where other slices of their leaf are not.

    Returns:
      A tree with the structure of `like`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {'blocks': {'kernel': jnp.array([[1.0, 2.0], [3.0, 4.0]])}}
      >>> restack({'blocks': 0}, params, *unstack({'blocks': 0}, params))
      {'blocks': {'kernel': Array([[1., 2.],
             [3., 4.]], dtype=float32)}}
    """
    slices = dict(named_leaves(apart))

    def together(path, leaf):
        axes = _stacked_axes(stacked, path, leaf)
        own = [slices[name] for name in slice_paths(stacked, path, leaf)]
        if all(jnp.ndim(each) == 0 for each in own):
            return own[0]
        shape = max((jnp.shape(each) for each in own), key=len)
        own = [jnp.broadcast_to(each, shape) for each in own]
        for _, axis, length in reversed(axes):
            groups = range(0, len(own), length)
            own = [jnp.stack(own[start : start + length], axis) for start in groups]
        return own[0]

    return map_leaves(together, like)


def slice_paths(stacked: Mapping[str, int], path: str, leaf: Any) -> list[str]:
    """Names the slices of a leaf.

    Args:
      stacked: as for `unstack`.
      path: the path of the leaf.
      leaf: an array.

    Returns:
      The path of each slice, or that of the leaf where it is not stacked.

    Raises:
      ValueError: if the leaf lacks an axis.

    Example:
      >>> import jax.numpy as jnp
      >>> slice_paths({'blocks': 0}, 'blocks/fc/kernel', jnp.zeros((2, 16, 16)))
      ['blocks/0/fc/kernel', 'blocks/1/fc/kernel']
    """
    names = [path.split('/') if path else []]
    for inserted, (at, _, length) in enumerate(_stacked_axes(stacked, path, leaf)):
        at += inserted
        names = [[*n[:at], str(index), *n[at:]] for n in names for index in range(length)]
    return ['/'.join(name) for name in names]


def _check_nodes(stacked: Mapping[str, int], paths: Iterable[str]) -> None:
    """Refuses a node without leaves, as one that is misspelt."""
    paths = list(paths)
    nodes = {node for path in paths for node in _nodes(path)}
    for pattern in stacked:
        if not any(_is_node(node, pattern) for node in nodes):
            raise ValueError(
                f'stacked names the node {pattern!r}, which has no leaves among {abridge(paths)}'
            )


def _stacked_axes(stacked: Mapping[str, int], path: str, leaf: Any) -> list[tuple[int, int, int]]:
    """Finds the stacked axes of a leaf, those of outer nodes first.

    For each it gives how many parts of the path name its node, the axis within a slice of the nodes
    around, and its length.
    """
    found, shape = [], list(jnp.shape(leaf))
    for parts, node in enumerate(_nodes(path)):
        for pattern, axis in stacked.items():
            if _is_node(node, pattern):
                if not 0 <= axis < len(shape):
                    raise ValueError(
                        f'{path!r} is under {pattern!r}, which is stacked along axis {axis}, but '
                        f'its shape is {jnp.shape(leaf)}'
                    )
                found.append((parts, axis, shape.pop(axis)))
    return found


def _nodes(path: str) -> list[str]:
    """Lists the nodes a leaf lies in, from the whole tree to the leaf itself."""
    parts = path.split('/') if path else []
    return ['/'.join(parts[:count]) for count in range(len(parts) + 1)]


def _is_node(node: str, pattern: str) -> bool:
    parts, patterns = node.split('/'), pattern.split('/')
    # No wildcard means the whole tree, whose path has no part.
    return (node == '') == (pattern == '') and (
        len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))
    )


def _take_apart(array: Any, axes: list[tuple[int, int, int]]) -> list[Any]:
    slices = [array]
    for _, axis, length in axes:
        slices = [
            each[(slice(None),) * axis + (index,)] if jnp.ndim(each) else each
            for each in slices
            for index in range(length)
        ]
    return slices
