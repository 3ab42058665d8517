"""Samples of k items that are unlike each other: k-DPPs. Knows nothing of networks."""

import numpy as np


def sample(kernel: np.ndarray, k: int, generator: np.random.Generator) -> np.ndarray:
    r"""Draws k items from the k-DPP of a kernel.

    .. math::
      P(Y) = \frac{\det(L_Y)}{e_k(\lambda_1, …, \lambda_n)}, \quad |Y| = k

    e_k is the k-th elementary symmetric polynomial of the eigenvalues of L. First k eigenvectors
    are drawn, then k items from the subspace that these span.

    Args:
      kernel: L, symmetric and positive semidefinite, shape=(n, n); computed with as float64.
      k: how many items, from 1 to the rank of L.
      generator: the source of randomness.

    Returns:
      The items, sorted, shape=(k,), dtype=np.int64.

    Raises:
      ValueError: if `kernel` is no such matrix or has entries that are not finite, or `k` is out of
        range.

    Example:
      >>> import numpy as np
      >>> alike = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
      >>> int(sample(alike, 2, np.random.default_rng(0))[1])  # the last, and one of the others
      2

    Reference:
      Kulesza and Taskar 2011, k-DPPs: fixed-size determinantal point processes; in Kulesza and
      Taskar 2012, Determinantal point processes for machine learning, algorithms 7 and 8 for the
      eigenvectors and 1 for the items.
    """
    kernel = np.asarray(kernel, np.float64)
    _check_kernel(kernel)
    check_size(k, len(kernel))
    eigenvalues, eigenvectors = np.linalg.eigh(kernel)
    zero = len(kernel) * np.finfo(np.float64).eps * np.abs(eigenvalues).max()
    if eigenvalues[0] < -zero:
        raise ValueError(
            f'kernel must be positive semidefinite, but its least eigenvalue is {eigenvalues[0]}'
        )
    positive = eigenvalues > zero
    if k > (rank := np.count_nonzero(positive)):
        raise ValueError(f'k must be at most the rank of kernel, which is {rank}, but is {k}')
    chosen = _choose_eigenvectors(np.log(eigenvalues[positive]), k, generator)
    return _choose_items(eigenvectors[:, positive][:, chosen], generator)


def check_size(k: int, n: int) -> None:
    """Checks how many of n are to be chosen.

    Raises:
      ValueError: if `k` is not whole, or not from 1 to `n`.

    Example:
      >>> check_size(4, 3)
      Traceback (most recent call last):
        ...
      ValueError: k must be a whole number from 1 to 3, but is 4
    """
    if not (1 <= k <= n and k % 1 == 0):
        raise ValueError(f'k must be a whole number from 1 to {n}, but is {k!r}')


def _check_kernel(kernel: np.ndarray) -> None:
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f'kernel must be a square matrix, but its shape is {kernel.shape}')
    if lacking := np.count_nonzero(~np.isfinite(kernel)):
        raise ValueError(
            f'kernel must be finite, but {lacking} of its {kernel.size} entries are not'
        )
    largest = np.abs(kernel).max(initial=0)
    if (apart := np.abs(kernel - kernel.T).max(initial=0)) > 1e-9 * largest:
        raise ValueError(f'kernel must be symmetric, but differs from its transpose by {apart}')


def _choose_eigenvectors(logs: np.ndarray, k: int, generator: np.random.Generator) -> list[int]:
    """Draws k eigenvectors: a set of them as often as the product of its eigenvalues says."""
    polynomials = _log_polynomials(logs, k)
    chosen = []
    number = len(logs)
    while left := k - len(chosen):
        number -= 1
        # λ_N e_{k−1}(λ_1, …, λ_{N−1}) / e_k(λ_1, …, λ_N), exactly 1 where all are needed.
        chance = logs[number] + polynomials[number, left - 1] - polynomials[number + 1, left]
        if generator.random() < np.exp(chance):
            chosen.append(number)
    return chosen


def _log_polynomials(logs: np.ndarray, k: int) -> np.ndarray:
    """Finds log e_l(λ_1, …, λ_N) in row N and column l; e_l itself may leave a float64's range."""
    polynomials = np.full((len(logs) + 1, k + 1), -np.inf)
    polynomials[:, 0] = 0
    for number, log in enumerate(logs):
        before = polynomials[number]
        polynomials[number + 1, 1:] = np.logaddexp(before[1:], log + before[:-1])
    return polynomials


def _choose_items(basis: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draws as many items as an orthonormal basis, shape=(n, k), has columns."""
    items = []
    while basis.shape[1]:
        shares = np.square(basis).sum(1)
        item = generator.choice(len(shares), p=shares / shares.sum())
        items.append(item)
        # A reflection that makes the first column the only one to contain the item. The others
        # then span what is orthogonal to it.
        normal = basis[item].copy()
        normal[0] += np.copysign(np.linalg.norm(normal), normal[0])
        factors = basis @ normal * (2 / (normal @ normal))
        basis = basis[:, 1:] - np.outer(factors, normal[1:])
    return np.sort(items)
