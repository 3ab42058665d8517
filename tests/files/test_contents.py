"""Tests of files._contents: what float32 holds, and metadata of strings."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save

from dns_jax.files import _contents


@pytest.mark.parametrize('dtype', [np.float16, np.float32, jnp.bfloat16])
def test_numbers_that_float32_holds(dtype):
    _contents.check_float32('w', np.ones(2, dtype))
    with pytest.raises(ValueError, match=r"params\['w'\] has a weight that is not finite"):
        _contents.check_float32('w', np.array([1, np.nan], dtype))


@pytest.mark.parametrize('dtype', [np.float64, np.int32, bool, np.complex64])
def test_numbers_that_it_does_not(dtype):
    with pytest.raises(TypeError, match=r"params\['w'\] must be floats that fit float32"):
        _contents.check_float32('w', np.ones(2, dtype))


def test_sorted_metadata_leave_the_tensors_where_they_were():
    tensors = {'a': np.arange(3, dtype=np.float32)}
    one, other = (
        _contents.sort_metadata(save(tensors, dict(order)))
        for order in ([('x', '1'), ('y', 'σ')], [('y', 'σ'), ('x', '1')])
    )
    assert one == other
    assert one[-12:] == tensors['a'].tobytes()
    assert (len(one) - 12) % 8 == 0
