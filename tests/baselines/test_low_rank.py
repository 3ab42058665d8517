"""Tests of baselines.low_rank and ranks, against NumPy and against all other choices."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.baselines.low_rank import count_parameters, factorise_kernel
from experiments.baselines.ranks import choose_ranks

SHAPES = {'dense': (7, 5), 'wide dense': (4, 9), 'square': (3, 3, 4, 6), 'oblong': (2, 5, 3, 4)}
LAYERS = {'conv': (3, 3, 2, 4), 'fc1': (9, 7), 'fc2': (8, 4), 'thin': (6, 1)}
OTHERS = 4 + 7 + 4 + 1 + 1  # biases and the scalar of `network`
NO_NUMBER: Any = float('nan')


def random(shape, seed=0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network(seed=0):
    """Layers of unlike sizes, the first with large weights, and a scalar that is no layer's."""
    params = {
        layer: {'kernel': random(shape, seed + place), 'bias': random(shape[-1:], seed + place)}
        for place, (layer, shape) in enumerate(LAYERS.items())
    }
    params['conv']['kernel'] *= 2
    return params | {'temperature': np.float32(1)}


def matrix_of(kernel) -> Any:
    """Row (channel, vertical place), column (horizontal place, feature), entry by entry."""
    if kernel.ndim == 2:
        return kernel.astype(np.float64)
    height, width, channels, features = kernel.shape
    matrix = np.zeros((channels * height, width * features))
    for row, column, channel, feature in np.ndindex(kernel.shape):
        place = channel * height + row, column * features + feature
        matrix[place] = kernel[row, column, channel, feature]
    return matrix


def product_of(first, second):
    """The kernel that two factors stand for."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim == 2:
        return first @ second
    return np.einsum('hck,wkn->hwcn', first[:, 0], second[0])


def ranks_of(shape):
    return range(1, min(matrix_of(np.zeros(shape)).shape) + 1)


def options_of(shape):
    """The ranks that make a kernel smaller, and None."""
    rows, columns = matrix_of(np.zeros(shape)).shape
    whole = rows * columns
    return [*(rank for rank in ranks_of(shape) if rank * (rows + columns) < whole), None]


def size_of(ranks):
    """Parameters of the network with those ranks."""
    sizes = [OTHERS]
    for layer, shape in LAYERS.items():
        rank = ranks.get(layer)
        rows, columns = matrix_of(np.zeros(shape)).shape
        sizes.append(rows * columns if rank is None else rank * (rows + columns))
    return sum(sizes)


def kept_squares(params, ranks):
    """The squared singular values that are kept, over the layers of `ranks`."""
    values = {
        layer: np.linalg.svd(matrix_of(params[layer]['kernel']), compute_uv=False)
        for layer in ranks
    }
    return sum((values[layer][:rank] ** 2).sum() for layer, rank in ranks.items())


@pytest.mark.parametrize(
    ('name', 'rank'), [(name, rank) for name, shape in SHAPES.items() for rank in ranks_of(shape)]
)
def test_the_error_is_that_of_the_dropped_singular_values(name, rank):
    kernel = random(SHAPES[name])
    values = np.linalg.svd(matrix_of(kernel), compute_uv=False)
    first, second = factorise_kernel(kernel, rank)
    error = np.sum((product_of(first, second) - kernel) ** 2)
    np.testing.assert_allclose(error, np.sum(values[rank:] ** 2), rtol=1e-5, atol=1e-9)
    # Each side has the root of σ: a column of the first is as long as its row of the second.
    columns = np.moveaxis(np.asarray(first), -1, 0).reshape(rank, -1)
    rows = np.moveaxis(np.asarray(second), -2, 0).reshape(rank, -1)
    for vectors in (columns, rows):
        np.testing.assert_allclose(np.sum(vectors**2, 1), values[:rank], rtol=1e-5)


@pytest.mark.parametrize('name', SHAPES)
def test_alternating_least_squares_finds_nothing_better(name):
    kernel = random(SHAPES[name])
    matrix, rank = matrix_of(kernel), 2
    least = np.sum((product_of(*factorise_kernel(kernel, rank)) - kernel) ** 2)
    errors = []
    for start in range(5):
        second = np.random.default_rng(start).normal(size=(rank, matrix.shape[1]))
        for _ in range(40):
            first = np.linalg.lstsq(second.T, matrix.T)[0].T
            second = np.linalg.lstsq(first, matrix)[0]
        errors.append(np.sum((first @ second - matrix) ** 2))
    assert min(errors) >= least * (1 - 1e-6)
    assert min(errors) < 1.05 * least  # so it was no weak rival


@pytest.mark.parametrize('name', SHAPES)
def test_parameters_are_counted(name):
    shape = SHAPES[name]
    assert count_parameters(shape, None) == np.prod(shape)
    for rank in ranks_of(shape):
        first, second = factorise_kernel(random(shape), rank)
        assert count_parameters(shape, rank) == first.size + second.size


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', ['dense', 'square'])
def test_factors_are_of_the_type_of_the_kernel(name, dtype):
    kernel = jnp.asarray(random(SHAPES[name]), dtype)
    assert {factor.dtype for factor in factorise_kernel(kernel, 2)} == {jnp.dtype(dtype)}


def test_ranks_keep_the_most_that_a_budget_can():
    """Against all choices that there are, at every other budget from the least to the whole."""
    params = network()
    every = [
        dict(zip(LAYERS, ranks, strict=True))
        for ranks in itertools.product(*map(options_of, LAYERS.values()))
    ]
    sizes = np.array(list(map(size_of, every)))
    kept = np.array([kept_squares(params, ranks) for ranks in every])
    before = 0
    for budget in range(sizes.min(), size_of({}) + 3, 2):
        ranks = choose_ranks(params, budget, LAYERS)
        assert size_of(ranks) <= budget
        found = kept_squares(params, ranks)
        np.testing.assert_allclose(found, kept[sizes <= budget].max(), rtol=1e-9)
        assert found >= before * (1 - 1e-12)
        before = found
    assert ranks == dict.fromkeys(LAYERS)  # none need be factorised


def test_a_layer_that_cannot_shrink_stays():
    assert options_of(LAYERS['thin']) == [None]
    assert choose_ranks(network(), 120, LAYERS)['thin'] is None
    # Rank 1 would keep all, but has as many parameters.
    assert choose_ranks({'fc': {'kernel': np.ones((2, 2))}}, 9, ['fc']) == {'fc': None}


def test_other_layers_count_whole():
    least = size_of({'fc1': 1, 'fc2': 1})
    ranks = choose_ranks(network(), least + 20, ['fc1', 'fc2'])
    assert list(ranks) == ['fc1', 'fc2']
    assert least + 12 <= size_of(ranks) <= least + 20  # one more rank of either


def test_layers_as_large_as_those_of_lenet5_use_their_budget_up():
    shapes = {'conv1': (5, 5, 1, 20), 'conv2': (5, 5, 20, 50), 'fc1': (800, 500), 'fc2': (500, 10)}
    params = {name: {'kernel': random(shape)} for name, shape in shapes.items()}
    ranks = choose_ranks(params, 43_000, list(shapes))
    spent = sum(count_parameters(shape, ranks[name]) for name, shape in shapes.items())
    assert 42_000 < spent <= 43_000


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: factorise_kernel(random((4, 3)), 0), 'rank must be from 1 to 3 .*but is 0'),
        (lambda: factorise_kernel(random((4, 3)), 4), r'rank .*\(4, 3\).*but is 4'),
        (lambda: count_parameters((4, 3), NO_NUMBER), 'rank .*but is nan'),
        (lambda: factorise_kernel(random((4,)), 1), r'shape .*2 or 4 axes.*but is \(4,\)'),
        (lambda: count_parameters((2, 2, 2), 1), r'shape .*2 or 4 axes.*but is \(2, 2, 2\)'),
        (lambda: count_parameters((3, 3, 2, 4), 7), 'rank must be from 1 to 6 .*but is 7'),
        (lambda: choose_ranks(network(), 500, ['fc3']), r"layers must have a kernel .*\['fc3'\]"),
        (lambda: choose_ranks(network(), 50, LAYERS), 'budget must be at least 69 .*but is 50'),
        (lambda: choose_ranks(network(), NO_NUMBER, LAYERS), 'budget .*but is nan'),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
