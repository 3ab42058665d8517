"""Tests of inference._layouts: entries that get another shape or order."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from shrinking import follow

from dns_jax.inference._layouts import _groups


@pytest.mark.parametrize(
    ('function', 'shape', 'constant', 'wanted', 'left'),
    [
        # Merged and parted axes; what is wanted of one that was parted is wanted of its parts.
        (lambda x: x.reshape(2, 12), (2, 3, 4), np.s_[:, 1], np.s_[:, 4:], ((2, 1, 4), (2, 4))),
        (lambda x: x.reshape(2, 12), (2, 3, 4), None, np.s_[:, [0, 5]], ((2, 2, 2), (2, 2))),
        (lambda x: x.reshape(2, 3, 4), (2, 12), np.s_[:, 8:], np.s_[..., 1:], ((2, 6), (2, 2, 3))),
        (lambda x: x.reshape(2, 3, 4), (2, 12), np.s_[:, ::4], np.s_[:, 1:], ((2, 6), (2, 2, 3))),
        (lambda x: x.reshape(3, 8), (4, 6), None, np.s_[1], ((2, 6), (1, 8))),
        (lambda x: x.reshape(1, 6, 1), (2, 3), None, np.s_[:, :3], ((1, 3), (1, 3, 1))),
        (lambda x: x.T, (3, 4), np.s_[1], np.s_[2:], ((2, 2), (2, 2))),
        (
            lambda x: jnp.transpose(x, (2, 0, 1)),
            (2, 3, 4),
            None,
            np.s_[0, :, 1:],
            ((2, 2, 1), (1, 2, 2)),
        ),
        (lambda x: lax.rev(x, (1,)), (2, 3), np.s_[:, 0], np.s_[:, 1:], ((2, 1), (2, 1))),
        (lambda x: lax.squeeze(x, (1,)), (2, 1, 3), None, np.s_[:, 1:], ((2, 1, 2), (2, 2))),
        (
            lambda x: lax.broadcast_in_dim(x, (2, 3, 4), (0, 2)),
            (1, 4),
            np.s_[:, 0],
            np.s_[1],
            ((1, 3), (1, 3, 3)),
        ),
    ],
)
def test_what_is_read_is_what_is_left(function, shape, constant, wanted, left):
    assert follow(function, shape, constant=constant, wanted=wanted) == left


@pytest.mark.parametrize(
    ('before', 'after', 'groups'),
    [
        ((2, 3, 4), (6, 4), [((2, 3), (6,)), ((4,), (4,))]),
        ((2, 1), (2,), [((2,), (2,)), ((1,), ())]),
        ((), (1, 1), [((), (1,)), ((), (1,))]),
        ((4, 6), (3, 8), [((4, 6), (3, 8))]),
        ((1, 6), (2, 3), [((1, 6), (2, 3))]),
    ],
)
def test_axes_that_belong_together(before, after, groups):
    assert [(before[own], after[theirs]) for own, theirs in _groups(before, after)] == groups
