"""Tests of _sharing: layers as h_k sees them, of weights or of groups."""

import jax.numpy as jnp
import numpy as np

from dns_jax import Thresholds
from dns_jax._core.counts import to_int
from dns_jax._sharing import Layer, single_weights

# A kernel in groups of 6 and a bias in single weights.
LAYER = Layer(
    weights=[jnp.array([[1.0, 0.0, 3.0]]), jnp.array([2.0, 0.5, 4.0])],
    masks=[jnp.array([[True, False, True]]), jnp.array([True, True, False])],
    limits=[None, jnp.array([True, True, False])],
    shapes=((6, 3), (3,)),
)


def test_groups_count_as_many_as_they_have_members():
    assert LAYER.size == 21
    assert LAYER.members() == [6, 1]
    assert to_int(LAYER.count(LAYER.masks)) == 2 * 6 + 2


def test_what_is_kept_and_can_be_stays_within_the_limits():
    kernel, bias = LAYER.keep(Thresholds(jnp.float32(0.6), jnp.float32(2.0)))
    np.testing.assert_array_equal(kernel, [[True, False, True]])
    np.testing.assert_array_equal(bias, [True, False, False])
    assert to_int(LAYER.reach()) == 2 * 6 + 2


def test_single_weights_are_groups_of_one():
    layer = single_weights({'fc': [np.ones((2, 3), np.float32)]}, {'fc': [np.ones((2, 3), bool)]})
    assert layer['fc'].members() == [1]
    assert to_int(layer['fc'].count(layer['fc'].masks)) == layer['fc'].size == 6
