"""Tests of inference._reductions: entries that come together."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from shrinking import follow


def pool(function, first, padding='VALID'):
    return lambda x: lax.reduce_window(x, first, function, (1, 2, 1), (1, 2, 1), padding)


@pytest.mark.parametrize(
    ('function', 'shape', 'constant', 'wanted', 'left'),
    [
        # What is known need not be summed: it is in a constant.
        (lambda x: x.sum(1), (2, 3, 4), np.s_[:, 1], np.s_[:, 1:], ((2, 2, 3), (2, 3))),
        (lambda x: x.sum((0, 2)), (2, 3, 4), np.s_[..., 1:3], np.s_[1:], ((2, 2, 2), (2,))),
        (lambda x: x.sum(1), (2, 3), np.s_[:1], ..., ((1, 3), (1,))),
        (lambda x: x.max(1), (2, 3, 4), np.s_[:, 1], np.s_[:, 1:], ((2, 2, 3), (2, 3))),
        (lambda x: x.max(1), (2, 3, 4), np.s_[..., 1], np.s_[:, 1:], ((2, 3, 2), (2, 2))),
        (lambda x: x.min(0), (2, 3), None, np.s_[:1], ((2, 1), (1,))),
        (lambda x: x.prod(0), (2, 3), None, np.s_[:1], ((2, 1), (1,))),
        (lambda x: (x > 0.5).any(0) | (x > 0.1).all(0), (2, 3), None, np.s_[:1], ((2, 1), (1,))),
        (
            lambda x: lax.reduce_xor(x.astype(np.int32), (0,)),
            (2, 3),
            None,
            np.s_[:1],
            ((2, 1), (1,)),
        ),
        (lambda x: x.argmax(1) - x.argmin(1), (2, 3, 4), None, np.s_[:, 1:], ((2, 3, 3), (2, 3))),
        (
            lambda x: jnp.cumsum(x, 1) + lax.cummax(x, 1),
            (2, 3, 4),
            np.s_[..., 1],
            np.s_[:, 1:],
            ((2, 3, 3), (2, 2, 3)),
        ),
        (
            lambda x: lax.cumprod(x, 0) + lax.cummin(x, 0),
            (2, 3),
            None,
            np.s_[:, 1:],
            ((2, 2), (2, 2)),
        ),
        (lambda x: lax.cumlogsumexp(x, 0), (2, 3), None, np.s_[:, 1:], ((2, 2), (2, 2))),
        (pool(lax.max, -np.inf), (2, 4, 3), np.s_[..., 1], np.s_[:, 1:], ((2, 4, 2), (2, 1, 2))),
        (
            pool(lax.add, 0.0, 'SAME'),
            (2, 5, 3),
            np.s_[..., 1],
            np.s_[..., 1:],
            ((2, 5, 1), (2, 3, 1)),
        ),
        (pool(lax.min, np.inf), (2, 4, 3), None, np.s_[1:, :, 1:], ((1, 4, 2), (1, 2, 2))),
    ],
)
def test_what_is_read_is_what_is_left(function, shape, constant, wanted, left):
    assert follow(function, shape, constant=constant, wanted=wanted) == left
