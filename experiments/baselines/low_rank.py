"""Low-rank factors of trained kernels, by singular values.

Owns numbers alone; `low_rank_layers` makes layers of them, and `ranks` says how many.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def factorise_kernel(kernel: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    r"""Splits a kernel into the two that come nearest to it, of all pairs of that rank.

    .. math::
      W_{(c,y),(x,n)} \approx \sum_{k=1}^{K} U_{(c,y),k} \sqrt{\sigma_k} \cdot
      \sqrt{\sigma_k} V_{(x,n),k}

    Args:
      kernel: (in, out), or (height, width, in, out) of a convolution without groups.
      rank: K, from 1 to the smaller side of the matrix (in · height) × (width · out).

    Returns:
      (in, K) and (K, out), or (height, 1, in, K) and (1, width, K, out), of the kernel's dtype.

    Raises:
      ValueError: if the kernel has other axes, or there is no such rank.

    Example:
      >>> first, second = factorise_kernel(jnp.ones((5, 3, 2, 4)), 1)
      >>> first.shape, second.shape
      ((5, 1, 2, 1), (1, 3, 1, 4))

    Reference:
      Tai et al. 2016, Convolutional neural networks with low-rank regularization, theorem 1.
    """
    count_parameters(kernel.shape, rank)  # which checks both
    left, values, right = decompose(kernel)
    roots = np.sqrt(values[:rank])
    first, second = left[:, :rank] * roots, roots[:, None] * right[:rank]
    if kernel.ndim == 4:
        height, width, channels, features = kernel.shape
        first = first.reshape(channels, height, 1, rank).transpose(1, 2, 0, 3)
        second = second.reshape(rank, 1, width, features).transpose(1, 2, 0, 3)
    return jnp.asarray(first, kernel.dtype), jnp.asarray(second, kernel.dtype)


def count_parameters(shape: Sequence[int], rank: int | None) -> int:
    """Counts the entries of a kernel's factors, or of the kernel where the rank is None.

    Args:
      shape: of the kernel, as of `factorise_kernel`.
      rank: K, or None.

    Returns:
      K · (in · height + width · out), or in · height · width · out.

    Raises:
      ValueError: as `factorise_kernel`.

    Example:
      >>> count_parameters((784, 300), 10), count_parameters((5, 5, 20, 50), None)
      (10840, 25000)
    """
    rows, columns = _sides(shape)
    most = min(rows, columns)
    if rank is None:
        return rows * columns
    if rank not in range(1, most + 1):
        raise ValueError(f'rank must be from 1 to {most} for shape {tuple(shape)}, but is {rank!r}')
    return rank * (rows + columns)


def decompose(kernel: jax.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds U, σ and Vᵀ of the matrix of a kernel, as of `factorise_kernel`.

    Args:
      kernel: of shape (in, out), or that of a convolution.

    Returns:
      The three, float64, σ falling.

    Raises:
      ValueError: if the kernel has other axes.

    Example:
      >>> decompose(jnp.array([[3.0, 0.0], [0.0, 4.0]]))[1]
      array([4., 3.])
    """
    matrix = np.asarray(kernel).astype(np.float64)
    matrix = matrix.transpose(2, 0, 1, 3) if matrix.ndim == 4 else matrix
    return np.linalg.svd(matrix.reshape(_sides(kernel.shape)), full_matrices=False)


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) not in (2, 4):
        raise ValueError(f'shape of a kernel must have 2 or 4 axes, but is {tuple(shape)}')
    height, width, channels, features = (1, 1, *shape)[-4:]
    return channels * height, width * features
