"""Deep Compression, its second stage: the kept weights of a layer share a few values.

A network is then a codebook for each layer, and for each kept weight a place in it. Pure
functions on pytrees; files are the concern of `codec`.

Reference:
  Han, Mao and Dally 2016, Deep Compression (ICLR).
"""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dns_jax._core.checks import as_table, needs_extra
from dns_jax._trees import check_parallel
from dns_jax.files._contents import check_float32
from dns_jax.layers import map_leaves, match_patterns, named_leaves, parent_path
from dns_jax.masks import apply_masks
from dns_jax.typing import Masks, Params

MAX_CLUSTERS = 2**16
"""How many values a codebook has at most; bfloat16 has no more."""


class SharedNetwork(NamedTuple):
    """A pruned network whose weights share the values of a few codebooks."""

    codebooks: dict[str, np.ndarray]  #: values by layer, shape=(clusters,), dtype=np.float32
    assignments: Params  #: int32 arrays, shaped as the leaves, of places in the codebook
    masks: Masks  #: parallel to the assignments, boolean; one of shape () keeps the whole leaf
    metadata: dict[str, str]  #: free strings


def share_weights(
    params: Params,
    masks: Masks,
    clusters: int | Mapping[str, int],
    metadata: Mapping[str, str] | None = None,
) -> SharedNetwork:
    r"""Clusters the kept weights of each layer by k-means and rounds the centroids.

    .. math::
      C_k = \arg\min_C \sum_{w \text{ kept in } k} \min_{c \in C} (w - c)^2

    The centroids start evenly spaced between the smallest and the largest weight of the layer.
    They are rounded as `round_codebooks` does, and only then does each weight choose the
    nearest.

    Args:
      params: dense weights, concrete arrays of float32 or a narrower floating-point type,
        finite where they are kept.
      masks: the parallel masks. A leaf with a mask of shape `()` is kept whole.
      clusters: how many values a layer may have, for all layers or by patterns as in
        `dns_jax.layers.match_patterns`. A layer with fewer distinct weights gets fewer, one
        without kept weights none.
      metadata: free strings, such as the name of the network.

    Returns:
      The network, in the structure of `params`.

    Raises:
      ValueError: if the trees do not match, a kept weight is not finite, a layer has no number
        of clusters, or that is not in 1 to 65,536.
      TypeError: if a mask is not boolean or a leaf not of a type that float32 can hold.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {'fc1': {'kernel': jnp.array([[3.0, -2.0], [1.0, 5.0]])}}
      >>> masks = {'fc1': {'kernel': jnp.array([[True, True], [False, True]])}}
      >>> network = share_weights(params, masks, clusters=2)
      >>> network.codebooks['fc1'], network.assignments['fc1']['kernel']
      (array([-2.,  4.], dtype=float32), array([[1, 0],
             [0, 1]], dtype=int32))

    Reference:
      Han, Mao and Dally 2016, section 3.
    """
    masks = jax.tree.map(np.asarray, check_parallel(params, masks))
    leaves = [
        (path, np.asarray(leaf), mask)
        for (path, leaf), mask in zip(named_leaves(params), jax.tree.leaves(masks), strict=True)
    ]
    values: dict[str, list[np.ndarray]] = {}
    for path, leaf, mask in leaves:
        values.setdefault(parent_path(path), []).append(_kept_values(path, leaf, mask))
    codebooks = {
        layer: _codebook(np.concatenate(values[layer]), amount)
        for layer, amount in _clusters_by_layer(clusters, sorted(values)).items()
    }

    def assign(path, leaf, mask):
        assignment = np.zeros(leaf.shape, np.int32)
        full = np.broadcast_to(mask, leaf.shape) | (mask.ndim == 0)
        book = codebooks[parent_path(path)].astype(np.float64)
        borders = (book[1:] + book[:-1]) / 2
        assignment[full] = np.searchsorted(borders, leaf[full].astype(np.float64))
        return assignment

    assignments = jax.tree.unflatten(
        jax.tree.structure(params), [assign(*parts) for parts in leaves]
    )
    return SharedNetwork(codebooks, assignments, masks, dict(metadata or {}))


def round_codebooks(codebooks: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Rounds codebooks to values that a coded file holds: those of bfloat16.

    Args:
      codebooks: `{layer: its values}`, finite.

    Returns:
      The same in float32, each at the nearest value that bfloat16 has.

    Raises:
      ValueError: if a value is not finite.

    Example:
      >>> round_codebooks({'fc1': [0.1, 1.0]})
      {'fc1': array([0.10009766, 1.        ], dtype=float32)}

    Reference:
      Han, Mao and Dally 2016, section 3, where codebooks are float32.
    """
    rounded = {}
    largest = np.float32(jnp.finfo(jnp.bfloat16).max)
    for layer, values in codebooks.items():
        book = np.asarray(values, np.float32)
        if not np.isfinite(book).all():
            raise ValueError(f'codebooks[{layer!r}] has a value that is not finite')
        rounded[layer] = book.clip(-largest, largest).astype(jnp.bfloat16).astype(np.float32)
    return rounded


def expand(codebooks: Mapping[str, Any], assignments: Params, masks: Masks) -> Params:
    r"""Writes out the weights that a network with codebooks computes with.

    .. math::
      W_k = C_k[A_k] \odot T_k \quad \text{with the codebook } C_k \text{ and the places } A_k

    Differentiable in the codebooks: the gradient of a centroid is the sum of those of its
    weights, so that an optimizer may tune the centroids through it.

    Args:
      codebooks: `{layer: its values}`, arrays of one axis.
      assignments: the parallel places in the codebooks.
      masks: the parallel masks.

    Returns:
      A tree like `assignments` of arrays of the dtype of the codebooks, 0 where pruned.

    Raises:
      ValueError: if the trees do not match, or a layer has no codebook.
      TypeError: if a mask is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> expand({'': jnp.array([-2.0, 4.0])}, jnp.array([1, 0, 0]), jnp.array([True, True, False]))
      Array([ 4., -2.,  0.], dtype=float32)

    Reference:
      Han, Mao and Dally 2016, section 3.
    """

    def expand_leaf(path, assignment):
        layer = parent_path(path)
        if layer not in codebooks:
            raise ValueError(f'codebooks must have the layer {layer!r}; it has {list(codebooks)}')
        book = jnp.asarray(codebooks[layer])
        if not book.size:
            return jnp.zeros(assignment.shape, book.dtype)
        return book[jnp.asarray(assignment)]

    return apply_masks(map_leaves(expand_leaf, assignments), masks)


def _kept_values(path: str, weights: np.ndarray, mask: np.ndarray) -> np.ndarray:
    values = weights[mask] if mask.ndim else weights.ravel()
    check_float32(path, values)
    return values.astype(np.float64)


def _clusters_by_layer(clusters: int | Mapping[str, int], layers: list[str]) -> dict[str, int]:
    matches = match_patterns(as_table(clusters), layers)
    amounts = {layer: amount for layer, (_, amount) in matches.items()}
    wrong = [layer for layer in layers if not 1 <= amounts.get(layer, 0) <= MAX_CLUSTERS]
    if wrong:
        raise ValueError(
            f'clusters={clusters!r}: wanted 1 to {MAX_CLUSTERS} for the layers {wrong}'
        )
    return amounts


def _codebook(values: np.ndarray, clusters: int) -> np.ndarray:
    """The centroids of the values, rounded, ascending, each once."""
    with needs_extra('codec'):  # only here, so that a file can be read without scikit-learn
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

    centroids = np.unique(values)
    if len(centroids) > clusters:
        start = np.linspace(values.min(), values.max(), clusters)[:, None]
        means = KMeans(clusters, init=start, n_init=1, tol=0)  # pyright: ignore[reportArgumentType]
        # It warns of clusters that are one, for weights that float32 hardly tells apart.
        with warnings.catch_warnings(action='ignore', category=ConvergenceWarning):
            centroids = means.fit(values[:, None]).cluster_centers_[:, 0]
    return np.unique(round_codebooks({'': centroids})[''])
