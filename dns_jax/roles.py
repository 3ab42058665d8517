"""What a leaf is to its layer: a kernel, a bias, a scale, an embedding or a statistic.

Decided here for the whole library: by the names that Flax, Haiku, Equinox and others give, and by
shape only where names say nothing. Another choice is a predicate of one's own (`TakesPart`).
"""

import re
from typing import Any

import jax.numpy as jnp

from dns_jax.typing import Role

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


def _words(name: str) -> list[str]:
    """Parts a name in snake case or camel case; digits are no words."""
    return [word.lower() for word in re.findall(r'[A-Z]+(?![a-z])|[A-Z]?[a-z]+', name)]
