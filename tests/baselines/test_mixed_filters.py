"""Tests of baselines.mixed_filters: what the filters compute and how they start, against NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dns_jax
from experiments.baselines.mixed_filters import MixedFilters

# Height, width and number of each group's filters, under windows of 3 × 5.
GROUPS = {'horizontal': (1, 5, 24), 'vertical': (3, 1, 40), 'full': (3, 5, 16)}
OUTGOING = 1 * 5 * 24 + 3 * 1 * 40 + 3 * 5 * 16  # from each input: Σ w h d
CHANNELS = 32


def random(shape, seed=0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def many(features=None):
    return MixedFilters(24, 40, 16, (3, 5), features)


def start(layer, shape, seed=0) -> Any:
    return layer.init(jax.random.key(seed), jnp.zeros(shape))['params']


def output_of(layer, params, images) -> Any:
    return layer.apply({'params': params}, images)


def correlate(images, leaves, window, padding):
    """One output after the other: a filter sees the middle of the window that all share."""
    images, kernel = np.asarray(images, np.float64), leaves['kernel']
    if padding == 'SAME':
        edges = [((size - 1) // 2, size // 2) for size in window]
        images = np.pad(images, [(0, 0), *edges, (0, 0)])
    height, width, _, features = kernel.shape
    top, left = (window[0] - height) // 2, (window[1] - width) // 2
    rows, columns = images.shape[1] - window[0] + 1, images.shape[2] - window[1] + 1
    found = np.zeros((len(images), rows, columns, features))
    for row, column in np.ndindex(rows, columns):
        seen = images[:, row + top : row + top + height, column + left : column + left + width]
        found[:, row, column] = np.einsum('bhwc,hwcn->bn', seen, kernel)
    return found + leaves.get('bias', 0)


@pytest.mark.parametrize('padding', ['SAME', 'VALID'])
@pytest.mark.parametrize('features', [None, 3])
@pytest.mark.parametrize('numbers', [(2, 3, 1), (2, 0, 0), (0, 1, 2)])
def test_filters_lie_side_by_side(numbers, features, padding):
    horizontal, vertical, full = numbers
    layer = MixedFilters(horizontal, vertical, full, (3, 5), features, padding)
    images = random((2, 6, 7, 4))
    shapes = jax.tree.map(jnp.shape, start(layer, images.shape))
    params = {
        name: {part: random(shape, 1) for part, shape in leaves.items()}
        for name, leaves in shapes.items()
    }
    names = [name for name, number in zip(GROUPS, numbers, strict=True) if number]
    assert params.keys() == {*names, *(['mixing'] if features else [])}
    groups = [correlate(images, params[name], (3, 5), padding) for name in names]
    expected = np.concatenate(groups, axis=-1)
    if features:
        expected = correlate(expected, params['mixing'], (1, 1), 'VALID')
    np.testing.assert_allclose(output_of(layer, params, images), expected, rtol=1e-4, atol=1e-4)


def test_a_whole_window_alone_is_a_convolution():
    layer = MixedFilters(0, 0, 6, (5, 5), padding='VALID')
    images = random((2, 9, 8, 3))
    params = start(layer, images.shape)
    expected = jax.lax.conv_general_dilated(
        images,
        params['full']['kernel'],
        (1, 1),
        'VALID',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    np.testing.assert_allclose(output_of(layer, params, images), expected, rtol=1e-4, atol=1e-5)


def test_parameters_are_as_many_as_filters_have():
    sizes = jax.tree.map(np.size, start(many(), (1, 8, 8, CHANNELS)))
    assert sum(jax.tree.leaves(sizes)) == CHANNELS * OUTGOING + 24 + 40 + 16
    sizes = jax.tree.map(np.size, start(many(10), (1, 8, 8, CHANNELS)))
    # Biases below a linear layer would add nothing.
    assert sum(jax.tree.leaves(sizes)) == CHANNELS * OUTGOING + (24 + 40 + 16) * 10 + 10


def gradient_variance(layer, params):
    """Of an input pixel, for gradients of variance 1 behind a ReLU; away from the border."""
    images = random((8, 16, 16, CHANNELS))
    function = lambda images: jax.nn.relu(output_of(layer, params, images))  # noqa: E731
    outputs, backward = jax.vjp(function, images)
    (gradients,) = backward(jnp.asarray(random(outputs.shape, 1)))
    return float(jnp.var(gradients[:, 4:-4, 4:-4]))


def start_by_groups(params, axis):
    """As He et al. have it for each group by itself, with incoming or outgoing connections."""
    return {
        name: {
            'kernel': random(leaves['kernel'].shape, 3)
            * np.float32(np.sqrt(2 / np.delete(leaves['kernel'].shape, axis).prod())),
            'bias': leaves['bias'],
        }
        for name, leaves in params.items()
    }


@pytest.mark.parametrize('features', [None, 30])
def test_gradients_keep_their_size(features):
    layer = many(features)
    params = start(layer, (1, 16, 16, CHANNELS))
    assert 0.85 < gradient_variance(layer, params) < 1.15


def test_each_group_by_itself_would_change_the_size_of_gradients():
    layer = many()
    params = start(layer, (1, 16, 16, CHANNELS))
    assert gradient_variance(layer, start_by_groups(params, axis=2)) > 2.5  # three groups
    assert gradient_variance(layer, start_by_groups(params, axis=3)) > 2


def test_outputs_have_the_variance_of_their_filters():
    """What follows for random normal images: more, the larger the filter."""
    images = random((8, 16, 16, CHANNELS))
    outputs = output_of(many(), start(many(), images.shape), images)
    groups = jnp.split(outputs[:, 4:-4, 4:-4], [24, 24 + 40], axis=-1)
    for (height, width, _), group in zip(GROUPS.values(), groups, strict=True):
        expected = 2 * height * width * CHANNELS / OUTGOING
        np.testing.assert_allclose(jnp.var(group), expected, rtol=0.15)


def test_weights_start_normal_with_one_spread():
    params = start(many(), (1, 16, 16, 4 * CHANNELS))
    for leaves in params.values():
        weights = np.asarray(leaves['kernel']).ravel() * np.sqrt(OUTGOING / 2)
        np.testing.assert_allclose(np.std(weights), 1, rtol=0.03)
        assert 2.5 < np.mean(weights**4) < 3.5  # 3 for a normal distribution, 2.3 where truncated
        assert abs(np.mean(weights)) < 0.05
        assert not leaves['bias'].any()


def test_surgery_prunes_all_groups():
    layer, images = MixedFilters(3, 3, 2, (3, 3), 4), random((4, 6, 6, 2))
    params = start(layer, images.shape)
    optimizer = optax.chain(dns_jax.prune_to(density=0.5, steps=3), optax.sgd(0.01))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        loss = lambda params: jnp.mean(output_of(layer, params, images) ** 2)  # noqa: E731
        _, gradients = dns_jax.masked_value_and_grad(loss)(params, dns_jax.get_masks(state))
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        params, state = step(params, state)
    masks = {name: leaves['kernel'] for name, leaves in dns_jax.get_masks(state).items()}
    assert masks.keys() == {*GROUPS, 'mixing'}
    assert sum(map(np.sum, masks.values())) == sum(map(np.size, masks.values())) // 2


@pytest.mark.parametrize(
    ('layer', 'message'),
    [
        (MixedFilters(-1, 2, 0, (3, 3)), 'horizontal must be .*0 or more, but is -1'),
        (MixedFilters(1, 2, -3, (3, 3)), 'full must be .*0 or more, but is -3'),
        (MixedFilters(0, 0, 0, (3, 3)), 'filters .*at least one'),
        (MixedFilters(1, 1, 0, (0, 3)), r'kernel_size .*but is \(0, 3\)'),
        (MixedFilters(1, 1, 0, (3, 3), 0), 'features .*but is 0'),
        (MixedFilters(1, 1, 0, (3, 3), None, 'CIRCULAR'), "padding .*but is 'CIRCULAR'"),
        (MixedFilters(1, 1, 0, (7, 3), None, 'VALID'), r'images .*7 × 3 .*\(1, 6, 6, 2\)'),
    ],
)
def test_errors(layer, message):
    with pytest.raises(ValueError, match=message):
        start(layer, (1, 6, 6, 2))
