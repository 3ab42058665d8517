"""Tests of _trees: masks that do not belong to the weights."""

import jax
import jax.numpy as jnp
import pytest

from dns_jax import Thresholds, apply_masks, init_masks, update_masks
from dns_jax._trees import check_parallel
from dns_jax.layers import has_axes

TREE = {'a': jnp.ones((2, 3)), 'b': jnp.ones(3)}
GOOD = init_masks(TREE, has_axes)
BAD_MASKS = [
    ({'a': GOOD['a']}, ValueError, "lack 'b'; they have "),
    ((GOOD['a'], GOOD['b']), ValueError, "lack 'a'; they have .'0', '1'"),
    ({**GOOD, 'c': GOOD['b']}, ValueError, "have .'c'. too, which params lack"),
    ({**GOOD, 'b': None}, ValueError, "lack 'b'; they have "),
    ({**GOOD, 'a': jnp.ones((3, 2), bool)}, ValueError, r"masks\['a'\] has shape \(3, 2\)"),
    ({**GOOD, 'a': jnp.ones(3, bool)}, ValueError, r"masks\['a'\] has shape \(3,\)"),
    ({**GOOD, 'b': jnp.ones(3)}, TypeError, r"masks\['b'\] must be boolean.*float32"),
    ({**GOOD, 'b': jnp.ones(3, jnp.int8)}, TypeError, r"masks\['b'\] must be boolean.*int8"),
]


@pytest.mark.parametrize(('masks', 'error', 'message'), BAD_MASKS)
def test_masks_that_do_not_belong_to_the_weights(masks, error, message):
    layer = {'all': Thresholds(0.0, 1.0)}

    def update(params, masks):
        update_masks(jax.random.key(0), params, masks, layer, {'all': 1.0}, lambda path: 'all')

    for use in (check_parallel, apply_masks, update):
        with pytest.raises(error, match=message):
            use(TREE, masks)
