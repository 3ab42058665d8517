"""Checkpoints that are saved for a test, and what must come back of them."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.training.checkpoints import Checkpoints


def to_bytes(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for one, other in pairs:
        assert isinstance(one, jax.Array)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.sharding == other.sharding
        assert to_bytes(one) == to_bytes(other)


def save_steps(directory, steps, keep=2):
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, {'w': jnp.full((50, 40), step, jnp.float32)})


def like():
    return {'w': jax.ShapeDtypeStruct((50, 40), jnp.float32)}
