"""What comes into kernels, against sums that NumPy makes by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dns_jax import has_axes
from dns_jax.calibration import gather_inputs

RANDOM = np.random.default_rng(8)


def draw(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def check(inputs, rows, feature):
    """Compares with a matrix of samples and features, and the feature of each weight."""
    rows = rows.astype(np.float64)
    np.testing.assert_allclose(inputs.squares, (rows**2).sum(0)[None], rtol=1e-5)
    np.testing.assert_allclose(inputs.grams, (rows.T @ rows)[None], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(inputs.counts, [len(rows)])
    np.testing.assert_array_equal(np.broadcast_to(inputs.feature, feature.shape), feature)


def features_along(shape, axes):
    """Numbers the features of a kernel that has them along some axes, the last one fastest."""
    sizes = [shape[axis] for axis in axes]
    numbers = np.arange(np.prod(sizes)).reshape(sizes)
    numbers = np.expand_dims(numbers, tuple(set(range(len(shape))) - {*axes}))
    return np.broadcast_to(numbers, shape)


@jax.custom_vjp
def own_derivative(images, kernel):
    return jnp.dot(images, kernel)


own_derivative.defvjp(lambda *both: (own_derivative(*both), both), lambda both, back: both)

# Ways to write one dense layer of 6 features and 4 outputs: the shape of its kernel and the axis of
# the features, and the network.
WAYS = {
    'in, out': ((6, 4), 0, jnp.dot),
    'out, in': ((4, 6), 1, lambda x, w: jax.vmap(lambda row: jnp.dot(w, row))(x)),
    'transposed': ((4, 6), 1, lambda x, w: x @ w.T),
    'jit': ((6, 4), 0, jax.jit(jnp.dot)),
    'remat': ((6, 4), 0, jax.checkpoint(lambda x, w: jnp.sin(jnp.dot(x, w)))),
    'a derivative of its own': ((6, 4), 0, own_derivative),
    'half as wide': ((6, 4), 0, lambda x, w: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)),
    'broadcast': (
        *((6, 4), 0),
        lambda x, w: jnp.einsum('ni,nio->no', x, jnp.broadcast_to(w[None], (len(x), 6, 4))),
    ),
    'split': ((6, 4), 0, lambda x, w: [x @ part for part in jnp.split(w, 2, 1)][1]),
    'stopped': ((6, 4), 0, lambda x, w: x @ lax.stop_gradient(w)),
}


@pytest.mark.parametrize('way', WAYS)
def test_dense(way):
    shape, axis, apply = WAYS[way]
    batches = [draw(5, 6), draw(5, 6), draw(2, 6)]
    if way == 'half as wide':
        batches = [np.round(batch * 4) for batch in batches]
    kernel = jnp.asarray(draw(*shape))
    found = gather_inputs(
        lambda params, x: apply(x, params['fc']['kernel']), {'fc': {'kernel': kernel}}, batches
    )
    if way == 'split':
        groups = found['fc/kernel'].squares
        np.testing.assert_allclose(groups, [(np.concatenate(batches) ** 2).sum(0)] * 2, rtol=1e-5)
        return
    check(found['fc/kernel'], np.concatenate(batches), features_along(shape, [axis]))
    assert found['fc/kernel'].feature.size == 6


def patches_by_hand(images, size, stride):
    """All windows, each with its rows, columns and channels in turn."""
    starts = range(0, images.shape[1] - size + 1, stride)
    return np.stack(
        [
            image[row : row + size, column : column + size].ravel()
            for image in images
            for row in starts
            for column in starts
        ]
    )


def convolve(x, kernel, stride=1, groups=1, padding='VALID'):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, None, None, numbers, groups
    )


@pytest.mark.parametrize('stride', [1, 2])
def test_conv(stride):
    images, kernel = draw(3, 6, 6, 2), jnp.asarray(draw(3, 3, 2, 4))
    found = gather_inputs(lambda params, x: convolve(x, *params, stride), [kernel], [images])
    (inputs,) = found.values()
    rows = patches_by_hand(images, 3, stride)
    # The library has the channels first.
    order = np.arange(18).reshape(9, 2).T.ravel()
    wanted = np.argsort(order)[features_along((3, 3, 2, 4), [0, 1, 2])]
    check(inputs, rows[:, order], wanted)


def test_grouped_convolutions_have_inputs_in_groups():
    images, kernel = draw(2, 4, 4, 4), jnp.asarray(draw(2, 2, 2, 6))
    found = gather_inputs(lambda params, x: convolve(x, *params, groups=2), [kernel], [images])
    (inputs,) = found.values()
    assert inputs.feature.shape == (2, 2, 2, 6)
    for group in range(2):
        rows = patches_by_hand(images[..., 2 * group : 2 * group + 2], 2, 1).astype(np.float64)
        of_weights = inputs.spread(inputs.squares)[..., 3 * group]
        np.testing.assert_allclose(of_weights.ravel(), (rows**2).sum(0), rtol=1e-5)
        order = np.arange(8).reshape(4, 2).T.ravel()
        wanted = rows[:, order].T @ rows[:, order]
        np.testing.assert_allclose(inputs.grams[group], wanted, rtol=1e-4, atol=1e-4)


def test_attention():
    """Kernels (model, heads, width) that make queries, and (heads, width, model) behind them."""
    params = {'query': {'kernel': draw(6, 2, 3)}, 'out': {'kernel': draw(2, 3, 6)}}
    tokens = draw(2, 5, 6)

    def apply(params, x):
        heads = jnp.einsum('btd,dhk->bthk', x, params['query']['kernel'])
        scores = jax.nn.softmax(jnp.einsum('bthk,bshk->bhts', heads, heads))
        mixed = jnp.einsum('bhts,bshk->bthk', scores, heads)
        return jnp.einsum('bthk,hkd->btd', mixed, params['out']['kernel']), mixed

    found = gather_inputs(apply, params, [tokens])
    check(found['query/kernel'], tokens.reshape(10, 6), features_along((6, 2, 3), [0]))
    mixed = np.asarray(apply(params, tokens)[1]).reshape(10, 6)
    check(found['out/kernel'], mixed, features_along((2, 3, 6), [0, 1]))


def test_a_kernel_that_is_used_twice_has_the_sum():
    kernel, images = jnp.asarray(draw(4, 4)), draw(5, 4)
    found = gather_inputs(lambda params, x: jnp.sin(x @ params[0]) @ params[0], [kernel], [images])
    both = np.concatenate([images, np.sin(images @ kernel)])
    check(found['0'], both, features_along((4, 4), [0]))


@pytest.mark.parametrize('reverse', [False, True])
def test_layers_of_a_scan_have_inputs_of_their_own(reverse):
    kernels, images = draw(3, 4, 4), draw(5, 4)

    def apply(params, x):
        step = lambda x, kernel: (jnp.sin(x @ kernel), None)  # noqa: E731
        return lax.scan(step, x, params['blocks'], reverse=reverse)[0]

    found = gather_inputs(apply, {'blocks': kernels}, [images], has_axes, {'blocks': 0})
    assert sorted(found) == ['blocks/0', 'blocks/1', 'blocks/2']
    for layer in (2, 1, 0) if reverse else (0, 1, 2):
        check(found[f'blocks/{layer}'], images, features_along((4, 4), [0]))
        images = np.sin(images @ kernels[layer])


def test_what_is_no_kernel_is_left_alone():
    params = {
        'embed': {'embedding': draw(7, 4)},
        'norm': {'scale': draw(4)},
        'fc': {'kernel': draw(4, 3), 'bias': draw(3)},
    }

    def apply(params, x):
        x = params['embed']['embedding'][x] * params['norm']['scale'][None]
        return x @ params['fc']['kernel'] + params['fc']['bias'][None]

    words = np.array([3, 0, 3, 6, 2])
    found = gather_inputs(apply, jax.tree.map(jnp.asarray, params), [words])
    assert [*found] == ['fc/kernel']
    rows = params['embed']['embedding'][words] * params['norm']['scale']
    check(found['fc/kernel'], rows, features_along((4, 3), [0]))


def test_products_can_be_left_out():
    (inputs,) = gather_inputs(
        lambda params, x: x @ params[0], [jnp.ones((2, 3))], [draw(4, 2)], grams=False
    ).values()
    assert inputs.grams is None
    assert inputs.squares.shape == (1, 2)


KERNEL = jnp.ones((4, 4))
ERRORS = {
    'no batches': (lambda p, x: x @ p['a'], [], r'batches must hold at least one batch'),
    'no product': (lambda p, x: x, None, r"\['a'\] are in no matrix product"),
    'another use': (lambda p, x: x @ (2 * p['a']), None, r"'a' is an operand of mul"),
    'two kernels': (lambda p, x: p['a'] @ p['a'], None, r"'a' is an operand of dot_general"),
    'other axes': (lambda p, x: x @ p['a'] @ p['a'].T, None, r"'a' is used in several products"),
    'a part': (lambda p, x: x @ p['a'][:, :2], None, r"'a' has weights that are in no product"),
    'a loop': (
        lambda p, x: lax.fori_loop(0, x.shape[0] + jnp.int32(x[0, 0]), lambda i, x: x @ p['a'], x),
        *(None, r"'a' is an operand of while"),
    ),
}


@pytest.mark.parametrize('name', ERRORS)
def test_what_is_not_known_is_refused(name):
    apply, batches, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        gather_inputs(apply, {'a': KERNEL}, [jnp.ones((2, 4))] if batches is None else batches)
