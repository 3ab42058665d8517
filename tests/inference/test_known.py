"""Tests of inference._known: which entries of a value are always one number."""

import jax
import numpy as np
import pytest

from dns_jax.inference._known import (
    Known,
    exact,
    is_empty,
    known_slices,
    nothing,
    restrict,
    spread,
    tidy,
    union,
    whole,
    widen,
)

AVAL = jax.ShapeDtypeStruct((2, 3), np.float32)


def test_an_axis_along_which_all_is_alike_is_of_length_one():
    rows = np.array([[1.0, 2, 2]] * 2)
    assert exact(rows, AVAL).numbers.tolist() == [[1, 2, 2]]
    assert exact(rows, AVAL).numbers.dtype == np.float32
    assert exact(np.full((2, 3), 4.0), AVAL).numbers.tolist() == [[4]]
    # The numbers are alike, but not what is known.
    known = tidy(AVAL, rows < 2, np.zeros((2, 3)))
    assert known.mask.tolist() == [[True, False, False]]
    assert known.zero.tolist() == [[True, False, False]]
    assert exact(np.full((2, 3), np.nan), AVAL).numbers.shape == (2, 3)


def test_numbers_that_are_not_known_are_zero():
    known = tidy(AVAL, np.eye(2, 3, dtype=bool), np.full((2, 3), 7))
    assert known.numbers.tolist() == [[7, 0, 0], [0, 7, 0]]
    assert not nothing(AVAL).mask.any()
    assert tidy(AVAL, np.zeros((2, 3), bool), np.ones((2, 3))).mask.shape == (1, 1)


def test_slices_that_are_known_within_a_region():
    mask = np.array([[True, True, False], [True, False, False]])
    known = Known(mask, np.zeros((2, 3)))
    rows, columns = known_slices(known, whole((2, 3)))
    assert (rows.tolist(), columns.tolist()) == ([False, False], [True, False, False])
    rows, columns = known_slices(known, (np.array([True, False]), np.array([True, True, False])))
    assert (rows.tolist(), columns.tolist()) == ([True, False], [True, True, False])


def test_regions_leave_axes_of_length_one_as_they_are():
    region = np.array([True, False]), np.array([False, True, True])
    assert restrict(np.arange(3)[None], region).tolist() == [[1, 2]]
    assert spread(np.ones((1, 1)), (2, 3), (1,)).shape == (1, 3)
    assert not is_empty(region)
    assert is_empty((region[0], np.zeros(3, bool)))
    both = union(region, (np.array([False, True]), np.zeros(3, bool)))
    assert [each.tolist() for each in both] == [[True, True], [False, True, True]]


@pytest.mark.parametrize(
    ('dtype', 'wide'),
    [(np.float16, np.float64), (np.int8, np.int64), (np.complex64, np.complex128)],
)
def test_sums_are_taken_in_the_widest_dtype(dtype, wide):
    assert widen(np.ones(2, dtype)).dtype == wide
