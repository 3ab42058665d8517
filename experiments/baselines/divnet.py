"""Diversity networks: units unlike each other stay, and take over what a layer's others did."""

import numpy as np
from numpy.typing import ArrayLike

from dns_jax.typing import Params
from experiments.baselines.determinantal import sample


def diversity_kernel(activations: ArrayLike) -> np.ndarray:
    r"""Says how alike the units of a layer are.

    .. math::
      L_{ij} = e^{-\beta \lVert v_i - v_j \rVert^2} + \varepsilon [i = j], \quad
      \beta = \frac{10}{T}, \quad \varepsilon = 0.01

    Args:
      activations: v, of n units at T points, after the nonlinearity, shape=(T, n).

    Returns:
      L, positive definite, shape=(n, n), dtype=np.float64.

    Raises:
      ValueError: if `activations` are not finite or have another shape.

    Example:
      >>> diversity_kernel([[0.0, 0.0, 1.0]]).round(5).tolist()
      [[1.01, 1.0, 5e-05], [1.0, 1.01, 5e-05], [5e-05, 5e-05, 1.01]]

    Reference:
      Mariet and Sra 2016, Diversity networks: the kernel of a layer, with β and ε as there.
    """
    vectors = _check_activations(activations)
    products = vectors.T @ vectors
    squares = np.diag(products)
    distances = np.maximum(squares[:, None] + squares - 2 * products, 0)
    return np.exp(-10 / len(vectors) * distances) + 0.01 * np.eye(len(products))


def choose_diverse(activations: ArrayLike, k: int, generator: np.random.Generator) -> np.ndarray:
    """Draws k of n units that are unlike each other, from the k-DPP of their kernel.

    Args:
      activations: as for `diversity_kernel`.
      k: how many units, from 1 to n.
      generator: the source of randomness.

    Returns:
      The units, sorted, shape=(k,), dtype=np.int64.

    Raises:
      ValueError: if `k` is out of range, or as of `diversity_kernel`.

    Example:
      >>> import numpy as np
      >>> int(choose_diverse([[9.0, 9.0, 0.0]], 2, np.random.default_rng(0))[1])
      2

    Reference:
      Mariet and Sra 2016, Diversity networks: the choice of neurons.
    """
    return sample(diversity_kernel(activations), k, generator)


def fuse(activations: ArrayLike, outgoing: ArrayLike, kept: ArrayLike) -> np.ndarray:
    r"""Adds to the outgoing weights of kept units what the pruned units did, as nearly as can be.

    .. math::
      \tilde w_j = w_j + \sum_{i \notin Y} \alpha_{ij} w_i, \quad
      \alpha_i = \arg\min \Big\lVert v_i - \sum_{j \in Y} \alpha_{ij} v_j \Big\rVert

    Args:
      activations: v, as for `diversity_kernel`.
      outgoing: w, the kernel of the next layer, shape=(n, next).
      kept: Y, distinct units, shape=(k,).

    Returns:
      The rows of the kept units, shape=(k, next), of the dtype of `outgoing`.

    Raises:
      ValueError: if `kept` are not distinct units, or `activations` are not finite or not of the
        units of `outgoing`.

    Example:
      >>> fuse([[2.0, 1.0], [4.0, 2.0]], [[1.0, 0.0], [3.0, 8.0]], [0]).round(5)
      array([[2.5, 4. ]])

    Reference:
      Mariet and Sra 2016, Diversity networks: fusing redundant neurons, by reweighting.
    """
    outgoing = np.asarray(outgoing)
    kept = _check_units(kept, len(outgoing))
    vectors = _check_activations(activations, len(outgoing))
    shares, *_ = np.linalg.lstsq(vectors[:, kept], np.delete(vectors, kept, 1), rcond=None)
    return (outgoing[kept] + shares @ np.delete(outgoing, kept, 0)).astype(outgoing.dtype)


def prune(
    params: Params, layer: str, reader: str, kept: ArrayLike, activations: ArrayLike | None = None
) -> Params:
    """Removes units of one layer, and their rows from the kernel of the next.

    Args:
      params: of a network, by layer: kernels of shape=(inputs, outputs), biases or none.
      layer: whose n units are removed.
      reader: the next layer, whose kernel has shape=(n, next).
      kept: distinct units, shape=(k,).
      activations: of `layer`, to fuse the units; None removes them without.

    Returns:
      Smaller params; other layers are as given.

    Raises:
      ValueError: if the kernel of `reader` has not n rows, or as of `fuse`.

    Example:
      >>> import numpy as np
      >>> params = {name: {'kernel': np.ones((3, 3)), 'bias': np.ones(3)} for name in ('in', 'out')}
      >>> smaller = prune(params, 'in', 'out', [0, 2])
      >>> smaller['in']['kernel'].shape, smaller['in']['bias'].shape, smaller['out']['kernel'].shape
      ((3, 2), (2,), (2, 3))
    """
    outgoing = np.asarray(params[reader]['kernel'])
    if len(outgoing) != (n := np.shape(params[layer]['kernel'])[-1]):
        raise ValueError(f'reader must read {n} units, but {reader!r} reads {len(outgoing)}')
    kept = _check_units(kept, n)
    rows = outgoing[kept] if activations is None else fuse(activations, outgoing, kept)
    return {
        **params,
        layer: {name: np.asarray(leaf)[..., kept] for name, leaf in params[layer].items()},
        reader: {**params[reader], 'kernel': rows},
    }


def _check_activations(activations: ArrayLike, n: int | None = None) -> np.ndarray:
    activations = np.asarray(activations, np.float64)
    shape = activations.shape
    if len(shape) != 2 or not shape[0] or n not in (None, shape[1]):
        wanted = f'(points, {n or "units"}), with at least one point'
        raise ValueError(f'activations must have shape {wanted}, but have {shape}')
    if lacking := np.count_nonzero(~np.isfinite(activations)):
        raise ValueError(f'activations must be finite, but {lacking} of their entries are not')
    return activations


def _check_units(kept: ArrayLike, n: int) -> np.ndarray:
    kept = np.asarray(kept)
    if not 0 < kept.size == len(np.intersect1d(kept, np.arange(n))):
        raise ValueError(f'kept must be distinct units from 0 to {n - 1}, but is {kept.tolist()}')
    return kept
