"""Tests of files.compressed: N of M as values and positions."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dns_jax import NofM, Rule, get_masks, surgery
from dns_jax.files.compressed import compress, expand


@pytest.mark.parametrize('structure', [NofM(2, 4), NofM(1, 8, axis=-1), NofM(3, 4, axis=0)])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_what_surgery_keeps_comes_back(structure, dtype):
    weights = np.random.default_rng(0).normal(size=(4, 8, 16)).astype(dtype)
    params = {'kernel': jnp.asarray(weights)}
    pruner = surgery(Rule(structure=structure), jax.random.key(0))
    _, state = pruner.update(params, pruner.init(params), params)
    mask = np.asarray(get_masks(state)['kernel'])
    packed = compress(weights, mask, structure)
    assert packed.values.dtype == dtype
    assert packed.values.size == mask.sum() == weights.size * structure.n // structure.m
    np.testing.assert_array_equal(expand(packed, structure), np.where(mask, weights, dtype(0)))


def test_values_and_positions_stand_in_the_order_of_the_weights():
    weights = np.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])
    mask = np.array([[0, 1, 0, 1, 0, 0, 1, 0]], bool)
    packed = compress(weights, mask, NofM(2, 4, axis=-1))
    # Of the second four one is kept: a zero stands for the other.
    np.testing.assert_array_equal(packed.values, [[2, 4, 0, 7]])
    np.testing.assert_array_equal(packed.positions, [[1, 3, 0, 2]])


def test_what_is_no_n_of_m_is_refused():
    ones = np.ones((4, 2))
    with pytest.raises(ValueError, match='at most 2 of every 4, not 4'):
        compress(ones, ones > 0, NofM(2, 4))
    with pytest.raises(ValueError, match='must divide axis -1'):
        compress(ones, ones > 0, NofM(2, 4, axis=-1))
    with pytest.raises(ValueError, match='at most 256'):
        compress(np.ones((512, 1)), np.ones((512, 1), bool), NofM(2, 512))
