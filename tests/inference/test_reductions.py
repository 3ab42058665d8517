"""Tests of inference._reductions: entries that come together."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from shrinking import check, follow, shapes


def pool(function, first, padding='VALID'):
    return lambda x: lax.reduce_window(x, first, function, (1, 2, 1), (1, 2, 1), padding)


def stride(x):
    """Windows of one entry, but not of every entry."""
    return lax.reduce_window(x, -np.inf, lax.max, (1, 1, 1), (1, 2, 1), 'VALID')


@pytest.mark.parametrize(
    ('function', 'shape', 'constant', 'wanted', 'left'),
    [
        # What is known need not be summed: it is in a constant.
        (lambda x: x.sum(1), (2, 3, 4), np.s_[:, 1], np.s_[:, 1:], ((2, 2, 3), (2, 3))),
        (lambda x: x.sum((0, 2)), (2, 3, 4), np.s_[..., 1:3], np.s_[1:], ((2, 2, 2), (2,))),
        (lambda x: x.sum(1), (2, 3), np.s_[:1], ..., ((1, 3), (1,))),
        (lambda x: x.sum(1), (2, 3), np.s_[0, 1], ..., ((2, 3), (2,))),
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
            lambda x: jnp.cumsum(x, axis=1) + lax.cummax(x, 1),
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
        (stride, (2, 4, 3), None, np.s_[:, 1:, 1:], ((2, 4, 2), (2, 1, 2))),
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


def test_sums_of_weights_stay_sums():
    params = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    masks = np.ones((3, 4), bool)
    masks[1] = False

    def apply(params, x):
        return jnp.sin(x * params.sum(0)[None])

    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    assert shapes(check(apply, params, masks, x)) == {'': (2, 4)}
