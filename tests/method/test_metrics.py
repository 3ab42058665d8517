"""Tests of metrics against counting by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dns_jax import Size, init_masks, measure_sizes
from dns_jax.layers import has_axes

PARAMS = {
    'conv': {'kernel': jnp.ones((3, 3, 2, 4), jnp.bfloat16), 'bias': jnp.ones(4)},
    'fc': {'kernel': jnp.ones((5, 6)), 'bias': jnp.ones(6, jnp.float16)},
    'norm': {'scale': jnp.ones(4), 'steps': jnp.zeros((), jnp.int32)},
}
POSITIONS = {'conv': 49}


def random_masks(takes_part=None):
    random = np.random.default_rng(1)
    masks = init_masks(PARAMS, *([takes_part] if takes_part else []))
    return jax.tree.map(
        lambda mask: jnp.asarray(random.random(mask.shape) < 0.3) if mask.ndim else mask, masks
    )


def by_hand(params, masks, positions):
    """Looks at every weight by itself."""
    size = [0] * 6
    for name, leaf in params.items():
        item = leaf.dtype.itemsize
        for mask in np.broadcast_to(masks[name], leaf.shape).ravel():
            uses = positions if leaf.ndim > 1 else 0
            stored = item + 4 if masks[name].ndim else item
            size[0] += 1
            size[1] += mask
            size[2] += uses
            size[3] += uses * mask
            size[4] += item
            size[5] += stored * mask
    return Size(*map(int, size))


@pytest.mark.parametrize('positions', [POSITIONS, {'conv': 49, 'fc': 2}, {}, None])
@pytest.mark.parametrize('takes_part', [None, has_axes, lambda path, leaf: False])
def test_sizes_by_hand(takes_part, positions):
    masks = random_masks(takes_part)
    sizes = measure_sizes(PARAMS, masks, positions)
    want = {
        layer: by_hand(PARAMS[layer], masks[layer], (positions or {}).get(layer, 1))
        for layer in PARAMS
    }
    assert sizes.layers == want
    assert sizes.total == Size(*np.sum([*want.values()], 0).tolist())
    assert all(type(number) is int for number in sizes.total)


def test_density_and_compression():
    sizes = measure_sizes(PARAMS, random_masks(), POSITIONS)
    for size in (*sizes.layers.values(), sizes.total):
        assert size.density == size.kept / size.parameters
        assert size.compression == size.parameters / size.kept
    assert sizes.layers['norm'].density == sizes.layers['norm'].compression == 1.0


def test_compression_of_nothing_kept_is_infinite():
    size = measure_sizes(jnp.ones((2, 2)), jnp.zeros((2, 2), bool)).total
    assert (size.density, size.compression) == (0.0, math.inf)


def test_layers_by_another_function():
    sizes = measure_sizes(PARAMS, random_masks(), {'all': 3}, layer_of=lambda path: 'all')
    assert list(sizes.layers) == ['all']
    assert sizes.total.parameters == 76 + 36 + 5
    assert sizes.total.multiply_adds == 3 * (72 + 30)


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ((PARAMS, random_masks(), {'conv': 1, 'fc9': 2}), ValueError, r"positions .*\['fc9'\]"),
        ((PARAMS, random_masks()['fc']), ValueError, "masks .* lack 'conv/bias'"),
        ((jnp.ones(3), jnp.ones(2, bool)), ValueError, r'masks.*shape \(2,\)'),
        ((jnp.ones(3), jnp.ones(3)), TypeError, 'masks.*boolean.*float32'),
        (({}, {}), ValueError, 'params'),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        measure_sizes(*arguments)
