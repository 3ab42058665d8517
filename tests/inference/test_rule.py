"""Tests of inference._rule: parts of arrays, and what known numbers give."""

import jax
import numpy as np
import pytest

from dns_jax.inference._program import trace
from dns_jax.inference._rule import Call, arrange, compute, take, take_regions

X = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize('places', [[0, 1, 2, 3], [1, 3], [2], [0, 3], [3, 1], [1, 1], [0, 1, 3]])
def test_entries_along_an_axis(places):
    taken = take(X, np.array(places), 1)
    np.testing.assert_array_equal(taken, X[:, places])


def test_evenly_spaced_entries_need_no_gather():
    text = str(jax.make_jaxpr(lambda x: take(x, np.array([1, 3]), 1))(X))
    assert 'gather' not in text
    text = str(jax.make_jaxpr(lambda x: take(x, np.array([0, 1, 3]), 1))(X))
    assert 'gather' in text


def test_a_region_of_a_region():
    given = np.array([True, True, False]), np.array([True, False, True, True])
    wanted = np.array([False, True, False]), np.array([True, False, False, True])
    part = X[np.ix_(*given)]
    np.testing.assert_array_equal(take_regions(part, given, wanted), X[np.ix_(*wanted)])


@pytest.mark.parametrize('filler', [np.float32(7), np.arange(4, dtype=np.float32)[None]])
@pytest.mark.parametrize('places', [[0, 1, -1, -1], [-1, 2, -1, 0], [-1, -1, 0, 3], [-1] * 4])
def test_entries_that_are_not_there_are_filled(places, filler):
    rows = np.array([0, 2])
    wanted = np.where(np.array(places) < 0, filler, X[rows][:, places])
    np.testing.assert_array_equal(arrange(X, [rows, np.array(places)], filler), wanted)


def test_nothing_but_fillers():
    assert arrange(None, [np.array([-1, -1])], np.float32(3)).tolist() == [3, 3]


@pytest.mark.parametrize('dtype', [np.float32, np.int32, jax.numpy.bfloat16])
def test_numpy_computes_what_jax_does(dtype):
    x = jax.numpy.asarray(X, dtype)
    factor = np.asarray(3, dtype)
    program = trace(lambda x: jax.lax.div(-x, factor + abs(x)), x, [])
    equation = program.equations[-1]
    assert equation.primitive.name == 'div'
    operands = [np.asarray(-x), np.asarray(factor + abs(x))]
    avals = [program.avals[number] for number in equation.operands]
    call = Call(equation, avals, [program.avals[equation.results[0]]], [], [], False)
    (result,) = compute(call, operands)
    np.testing.assert_array_equal(result, jax.lax.div(*operands))
    assert result.dtype == x.dtype
