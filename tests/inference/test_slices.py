"""Tests of inference._slices: entries that are picked, and arrays that are put together."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from shrinking import check, follow, ones_like, shapes


def place(x):
    """A slice that begins where an input says, along one axis."""
    return lax.dynamic_slice(x, (0, (x[0, 0] > 0).astype(np.int32)), (2, 3))


@pytest.mark.parametrize(
    ('function', 'shape', 'constant', 'wanted', 'left'),
    [
        (lambda x: x[1:, ::2], (3, 6), np.s_[:, 2], np.s_[1], ((1, 2), (1, 2))),
        (lambda x: lax.dynamic_slice(x, (1, 9), (2, 2)), (3, 6), None, np.s_[:1], ((1, 2), (1, 2))),
        (place, (2, 6), None, np.s_[1:], ((2, 6), (1, 3))),
        (
            lambda x: lax.pad(x, np.float32(2), [(1, -1, 0), (2, 0, 1)]),
            (3, 4),
            np.s_[:, 0],
            np.s_[1:, :6],
            ((2, 1), (2, 1)),
        ),
        (
            lambda x: lax.pad(x, np.float32(2), [(0, 0, 0), (2, 1, 0)]),
            (3, 4),
            None,
            np.s_[1:],
            ((2, 4), (2, 4)),
        ),
        (
            lambda x: jnp.concatenate([x, x + 1], 0),
            (2, 3),
            np.s_[:, 1],
            np.s_[1:3],
            ((2, 2), (2, 2)),
        ),
        (
            lambda x: jnp.concatenate([x, jnp.zeros_like(x)], 1),
            (2, 3),
            None,
            np.s_[:, 2:],
            ((2, 1), (2, 1)),
        ),
        (lambda x: jnp.split(x, [1, 4], 1)[1], (2, 6), np.s_[:, 2], np.s_[:1], ((1, 2), (1, 2))),
        (lambda x: x[:, np.array([4, 1, 1])], (2, 6), np.s_[:, 4], np.s_[:1], ((1, 1), (1, 2))),
        (lambda x: x[:, np.array([[4], [0]])], (2, 6), None, np.s_[:, 1:], ((2, 1), (2, 1, 1))),
        (
            lambda x: x[jnp.array([0, 1]), (x[0, :2] > 0).astype(np.int32)],
            (2, 3),
            None,
            ...,
            ((2, 3), (2,)),
        ),
    ],
)
def test_what_is_read_is_what_is_left(function, shape, constant, wanted, left):
    assert follow(function, shape, constant=constant, wanted=wanted) == left


def test_fixed_indices_out_of_bounds_are_left_to_jax():
    def apply(x):
        return x.at[:, np.array([1, 9])].get(mode='fill', fill_value=2.0)

    assert follow(apply, (2, 3), wanted=np.s_[:1]) == ((1, 3), (1, 2))


def test_features_of_a_table_of_embeddings():
    random = np.random.default_rng(0)
    params = {
        'table': random.normal(size=(7, 6)).astype(np.float32),
        'out': random.normal(size=(6, 2)).astype(np.float32),
    }
    masks = ones_like(params)
    masks['table'][:, 1] = False
    masks['out'][[2, 5]] = False
    tokens = random.integers(0, 7, (2, 3))

    def apply(params, tokens):
        return jnp.take(params['table'], tokens, axis=0) @ params['out']

    assert shapes(check(apply, params, masks, tokens)) == {'out': (3, 2), 'table': (7, 3)}
    # A column of one number is a constant; what is read at fixed places is known to be read.
    params['table'][:, 3] = 2
    assert shapes(check(apply, params, masks, tokens)) == {'out': (2, 2), 'table': (7, 2)}
    pair = np.eye(2, dtype=np.float32)
    fixed = lambda params, x: x @ apply(params, np.array([4, 2]))  # noqa: E731
    small = check(fixed, params, masks, pair, other_batch=False)
    assert shapes(small) == {'out': (3, 2), 'table': (2, 3)}
