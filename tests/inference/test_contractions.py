"""Tests of inference._contractions: terms that need not be computed, and those in constants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrinking import check, convolve, follow, ones_like, shapes

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ('spec', 'lengths', 'constant', 'wanted', 'left'),
    [
        # What is known of one side alone does not help, if it is not 0.
        ('bi,io->bo', [(2, 3), (3, 4)], np.s_[:, 1], np.s_[:1, 2:], ((1, 2), (3, 2), (1, 2))),
        (
            'bhi,bhj->bhij',
            [(2, 3, 4), (2, 3, 5)],
            None,
            np.s_[:, 1:, 0],
            ((2, 2, 1), (2, 2, 5), (2, 2, 1, 5)),
        ),
        (
            'nhd,hdo->no',
            [(2, 3, 4), (3, 4, 5)],
            None,
            np.s_[..., 3:],
            ((2, 3, 4), (3, 4, 2), (2, 2)),
        ),
        ('i,i->', [(4,), (4,)], np.s_[:2], ..., ((2,), (4,), ())),
    ],
)
def test_axes_of_a_product(spec, lengths, constant, wanted, left):
    def product(x, y):
        return jnp.einsum(spec, x, y)

    assert follow(product, *lengths, constant=constant, wanted=wanted) == left


def test_a_factor_of_zero_takes_its_term_with_it():
    def product(x, y):
        return jnp.einsum('nhd,hdo->no', jnp.minimum(x, 0), y)  # x is above 0 where it is constant

    lengths = (2, 3, 4), (3, 4, 5)
    assert follow(product, *lengths, constant=np.s_[:, 1]) == ((2, 2, 4), (2, 4, 5), (2, 5))
    assert follow(product, *lengths, constant=np.s_[..., 2]) == ((2, 3, 3), (3, 3, 5), (2, 5))


def test_known_terms_are_in_a_constant_and_units_of_them_alone_are_known():
    params = {'scale': normal(6), 'shift': normal(6), 'in': normal(6, 5), 'out': normal(5, 2)}
    masks = ones_like(params)
    masks['scale'][:2] = False
    masks['in'][2:, 1] = False  # unit 1 reads constants alone

    def apply(params, x):
        x = x * params['scale'][None] + params['shift'][None]
        return jnp.sin(x @ params['in']) @ params['out']

    assert shapes(check(apply, params, masks, normal(3, 6))) == {
        'scale': (4,),
        'shift': (4,),
        'in': (4, 4),
        'out': (4, 2),
    }


def test_products_of_weights_stay_products():
    params = {'left': normal(5, 3), 'right': normal(3, 4)}
    masks = ones_like(params)
    masks['left'][:, 1] = False
    masks['right'][:, 2] = False

    def apply(params, x):
        return jnp.tanh(x @ (params['left'] @ params['right'])) + 1

    assert shapes(check(apply, params, masks, normal(3, 5))) == {'left': (5, 2), 'right': (2, 3)}


def test_convolutions_of_weights_stay_convolutions():
    params = {'left': normal(2, 3, 3, 4), 'right': normal(2, 2, 4, 5)}
    masks = ones_like(params)
    masks['right'][:, :, 1] = False

    def apply(params, x):
        return jnp.tanh(convolve(x, convolve(params['left'], params['right'])))

    small = check(apply, params, masks, normal(2, 3, 4, 2))
    assert shapes(small) == {'left': (2, 3, 3, 3), 'right': (2, 2, 3, 5)}


def test_weights_that_sum_to_one_leave_a_constant_as_it_is():
    params = {'score': normal(4, 4), 'value': normal(4, 6), 'bias': normal(6), 'out': normal(6, 2)}
    masks = ones_like(params)
    masks['value'][...] = False

    def apply(params, x, axis=-1):
        weights = jax.nn.softmax(x @ params['score'], axis)
        values = x @ params['value'] + params['bias'][None]
        return x + (weights.T @ values @ params['out']).sum(-1, keepdims=True)

    # Here they sum to 1 along the other axis, so nothing may go but what makes the values.
    small = check(apply, params, masks, normal(4, 4), other_batch=False)
    assert shapes(small)['score'] == (4, 4)

    small = check(lambda *both: apply(*both, 0), params, masks, normal(4, 4), other_batch=False)
    assert shapes(small)['score'] == (1, 1)

    # What is divided by the sums of other rows does not.
    def crossed(params, x):
        weights = jnp.exp(x @ params['score'])
        values = x @ params['value'] + params['bias'][None]
        return (weights / weights.sum(1)[None]) @ values @ params['out']

    small = check(crossed, params, masks, normal(4, 4), other_batch=False)
    assert shapes(small)['score'] == (4, 4)

    # Nor do they when they are rounded.
    def rounded(params, x):
        weights = jnp.round(5 * jax.nn.softmax(x @ params['score'])).astype(np.int32)
        values = x @ params['value'] + params['bias'][None]
        whole = jax.nn.softmax(x @ params['score']).astype(np.int32)
        return (weights + whole).astype(np.float32) @ values @ params['out']

    small = check(rounded, params, masks, normal(4, 4), other_batch=False)
    assert shapes(small)['score'] == (4, 4)


def test_an_infinite_constant_is_no_known_factor():
    params = {'scale': normal(3), 'out': normal(3, 2)}
    masks = ones_like(params)
    masks['scale'][0] = False  # its logarithm is -∞

    def apply(params, x):
        return jnp.log(jnp.abs(x * params['scale'][None])) @ jnp.abs(params['out'])

    small = check(apply, params, masks, normal(4, 3))
    assert shapes(small) == {'scale': (2,), 'out': (3, 2)}


@pytest.mark.parametrize(
    ('kernel', 'groups', 'constant', 'wanted', 'left'),
    [
        ((2, 2, 4, 6), 1, np.s_[..., :1], np.s_[..., 4:], ((1, 4, 5, 3), (2, 2, 4, 2))),
        ((2, 2, 2, 6), 2, None, np.s_[..., 4:], ((1, 4, 5, 2), (2, 2, 2, 2))),
        ((2, 2, 2, 6), 2, None, np.s_[..., 2:4], ((1, 4, 5, 4), (2, 2, 2, 4))),
        ((2, 1, 1, 8), 4, None, np.s_[..., [1, 6]], ((1, 4, 5, 2), (2, 1, 1, 4))),
    ],
)
def test_channels_and_groups_of_a_convolution(kernel, groups, constant, wanted, left):
    def apply(x, y):
        return convolve(x, y, feature_group_count=groups, padding='SAME', window_strides=(2, 1))

    found = follow(apply, (1, 4, 5, 4), kernel, constant=constant, wanted=wanted)
    assert found[:2] == left


@pytest.mark.parametrize(
    'settings',
    [
        {'padding': ((2, 0), (1, -1))},
        {'rhs_dilation': (1, 2)},
        {'lhs_dilation': (2, 1), 'padding': ((0, 1), (0, 0))},
        {'window_strides': (2, 2), 'padding': 'SAME'},
    ],
)
def test_known_channels_of_a_convolution_are_in_a_constant(settings):
    params = {'scale': normal(3), 'shift': normal(3), 'kernel': normal(2, 2, 3, 4)}
    masks = ones_like(params)
    masks['scale'][1] = False
    masks['kernel'][:, :, [0, 2], 3] = False  # filter 3 reads constants alone

    def apply(params, x):
        x = x * params['scale'].reshape(1, 1, 1, 3) + params['shift'].reshape(1, 1, 1, 3)
        return convolve(x, params['kernel'], **settings)

    small = check(apply, params, masks, normal(2, 5, 6, 3))
    assert shapes(small)['scale'] == (2,)
    assert shapes(small)['kernel'][2:] in ((2, 3), (2, 4))


def test_groups_of_batches_are_taken_whole():
    params = {'kernel': normal(2, 2, 3, 4), 'scale': normal(3)}
    masks = ones_like(params)
    masks['scale'][0] = False

    def apply(params, x):
        x = x * params['scale'].reshape(1, 1, 1, 3)
        return convolve(x, params['kernel'], batch_group_count=2)[..., :3]

    small = check(apply, params, masks, normal(2, 4, 4, 3))
    assert shapes(small)['kernel'] == (2, 2, 3, 4)
