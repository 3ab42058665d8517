"""N of M as hardware holds it: the kept values of each M, and where in it they stand."""

from typing import NamedTuple

import numpy as np

from dns_jax.structures import NofM


class Compressed(NamedTuple):
    """The kept weights of a leaf; along the axis of its structure, N of every M are left."""

    values: np.ndarray  #: of the dtype of the weights
    positions: np.ndarray  #: dtype=np.uint8, from 0 to M − 1, ascending within each M


def compress(weights: np.ndarray, mask: np.ndarray, structure: NofM) -> Compressed:
    """Packs a leaf that keeps at most N of every M.

    For 2:4 these are the two arrays of NVIDIA's sparse tensor cores (Ampere and later), which hold
    a position in two bits. PyTorch's `torch.sparse.to_sparse_semi_structured` makes them itself,
    of the masked weights with outputs first.

    Args:
      weights: dense weights of a leaf.
      mask: their mask, bool of the same shape.
      structure: under which it was pruned; M is at most 256.

    Returns:
      Values and positions. Where fewer than N of an M are kept, zeros stand for the others.

    Raises:
      ValueError: if the structure does not divide the leaf, or an M keeps more than N.

    Example:
      >>> import numpy as np
      >>> from dns_jax import NofM
      >>> weights = np.array([[5.0], [6.0], [7.0], [8.0]])
      >>> packed = compress(weights, weights > 6, NofM(2, 4))
      >>> packed.values.ravel(), packed.positions.ravel()
      (array([7., 8.]), array([2, 3], dtype=uint8))

    Reference:
      Mishra et al. 2021, Accelerating sparse deep neural networks, figure 1.
    """
    weights, mask = np.asarray(weights), np.asarray(mask)
    structure.check('weights', weights.shape)
    if structure.m > 256:
        raise ValueError(f'M must be at most 256, as a position is one byte, but is {structure.m}')
    groups, kept = _split(weights, structure), _split(mask, structure)
    if (most := kept.sum(-1).max()) > structure.n:
        raise ValueError(f'mask must keep at most {structure.n} of every {structure.m}, not {most}')
    first = np.argsort(~kept, -1, kind='stable')[..., : structure.n]
    positions = np.sort(first, -1)
    values = np.take_along_axis(np.where(kept, groups, groups.dtype.type(0)), positions, -1)
    return Compressed(*(_join(each, structure) for each in (values, positions.astype(np.uint8))))


def expand(compressed: Compressed, structure: NofM) -> np.ndarray:
    """Unpacks what `compress` made.

    Args:
      compressed: values and positions.
      structure: that of `compress`.

    Returns:
      The masked weights W⊙T.

    Example:
      >>> import numpy as np
      >>> from dns_jax import NofM
      >>> weights = np.array([[5.0], [6.0], [7.0], [8.0]])
      >>> expand(compress(weights, weights > 6, NofM(2, 4)), NofM(2, 4)).ravel()
      array([0., 0., 7., 8.])
    """
    values, positions = (
        _split(each, NofM(structure.n, structure.n, structure.axis)) for each in compressed
    )
    groups = np.zeros((*values.shape[:-1], structure.m), values.dtype)
    np.put_along_axis(groups, positions.astype(np.int64), values, -1)
    return _join(groups, structure)


def _split(leaf: np.ndarray, structure: NofM) -> np.ndarray:
    """Moves the axis to the end and splits it into groups."""
    moved = np.moveaxis(leaf, structure.axis, -1)
    return moved.reshape(*moved.shape[:-1], -1, structure.m)


def _join(groups: np.ndarray, structure: NofM) -> np.ndarray:
    return np.moveaxis(groups.reshape(*groups.shape[:-2], -1), -1, structure.axis)
