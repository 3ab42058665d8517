"""Tests of what inference.shrink refuses, and what its small network does."""

import jax
import numpy as np
import pytest
from shrinking import ones_like, shapes

from dns_jax.inference.shrink import shrink


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ('changes', 'error', 'said'),
    [
        ({'masks': {'a': np.ones((3, 2), bool)}}, ValueError, 'lack'),
        ({'masks': {'a': np.ones((3, 2))}, 'params': {'a': np.ones((3, 2))}}, TypeError, 'boolean'),
        (
            {'params': {'a': np.full((3, 2), np.inf), 'b': np.ones((2, 1))}},
            ValueError,
            'not finite',
        ),
        ({'apply': lambda params, x: jax.debug.print('{}', x)}, ValueError, 'side effects'),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, said):
    params = {'a': np.ones((3, 2), np.float32), 'b': np.ones((2, 1), np.float32)}
    settings = {
        'apply': lambda params, x: x @ params['a'] @ params['b'],
        'params': params,
        'masks': ones_like(params),
        **changes,
    }
    with pytest.raises(error, match=said):
        shrink(*settings.values(), np.ones((1, 3), np.float32))


def test_what_the_small_network_refuses():
    params = {'a': normal(4, 3)}
    masks = ones_like(params)
    masks['a'][:2] = False

    def apply(params, x):
        rows = params['a'] if x.shape[0] > 3 else params['a'][:, :2]
        return x @ rows

    small = shrink(apply, params, masks, normal(2, 4))
    assert shapes(small) == {'a': (2, 2)}
    with pytest.raises(ValueError, match=r"params\['a'\] that went"):
        small.apply(small.params, normal(5, 4))
    with pytest.raises(ValueError, match=r"params\['a'\] must have the shape \(2, 2\)"):
        small.apply(params, normal(2, 4))
    with pytest.raises(ValueError, match='tree'):
        small.apply({'b': small.params['a']}, normal(2, 4))
