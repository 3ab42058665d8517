"""Tests of baselines.divnet: kernels by loops, fusing by least squares of its own, networks run."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.baselines import determinantal
from experiments.baselines.divnet import choose_diverse, diversity_kernel, fuse, prune
from experiments.baselines.units import choose_at_random

KEPT = np.array([0, 2, 5, 6])


def network(seed=0, sizes=(5, 8, 7, 3)):
    """Dense layers fc1, fc2 and fc3, as float32."""
    random = np.random.default_rng(seed)
    return {
        f'fc{number}': {
            'kernel': random.normal(size=(inputs, outputs)).astype(np.float32),
            'bias': random.normal(size=outputs).astype(np.float32),
        }
        for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes), 1)
    }


def points(count=60, seed=1):
    return np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)


def run(params, x):
    """The activations of each layer, of which the last is linear, in float64."""
    found = {}
    for name, layer in params.items():
        x = x @ np.float64(layer['kernel']) + np.float64(layer['bias'])
        x = x if name == 'fc3' else np.maximum(x, 0)
        found[name] = x
    return found


def test_a_kernel_by_its_formula():
    activations = np.random.default_rng(2).normal(size=(40, 6)).astype(np.float32)
    activations[:, 4] = activations[:, 1]
    kernel = diversity_kernel(activations)
    assert kernel.dtype == np.float64
    for i in range(6):
        for j in range(6):
            squared = sum((float(row[i]) - float(row[j])) ** 2 for row in activations)
            expected = np.exp(-10 / 40 * squared) + (0.01 if i == j else 0)
            assert kernel[i, j] == pytest.approx(expected, abs=1e-12)
    assert kernel[1, 4] == pytest.approx(1)
    assert np.linalg.eigvalsh(kernel)[0] > 0.0099


def test_a_kernel_does_not_depend_on_how_many_points_there_are():
    activations = np.random.default_rng(3).normal(size=(20, 6))
    twice = diversity_kernel(np.concatenate([activations, activations]))
    np.testing.assert_allclose(diversity_kernel(activations), twice, atol=1e-12)


def test_diverse_units_are_drawn_from_the_kernel():
    activations = run(network(), points())['fc1']
    expected = determinantal.sample(diversity_kernel(activations), 4, np.random.default_rng(4))
    chosen = choose_diverse(activations, 4, np.random.default_rng(4))
    np.testing.assert_array_equal(chosen, expected)


def test_diverse_units_are_seldom_equals():
    """Twelve units are four, three times each: four chosen are one of each, nearly always."""
    activations = np.tile(10 * np.random.default_rng(5).normal(size=(30, 4)), 3)
    draws = {'diverse': 0, 'at random': 0}
    generator = np.random.default_rng(6)
    for _ in range(100):
        draws['diverse'] += len(set(choose_diverse(activations, 4, generator) % 4)) == 4
        draws['at random'] += len(set(choose_at_random(12, 4, generator) % 4)) == 4
    # 3⁴ sets of one each have a determinant near 1, the 414 others of 0.03 or less.
    assert draws['diverse'] > 85
    assert draws['at random'] < 35  # 81 of 495 sets


def test_fusing_is_what_least_squares_finds():
    activations, outgoing = run(network(), points())['fc1'], network()['fc2']['kernel']
    expected = np.zeros((len(KEPT), 7))
    for place, unit in enumerate(KEPT):
        expected[place] = outgoing[unit]
    for unit in sorted(set(range(8)) - set(KEPT)):
        shares = np.linalg.lstsq(activations[:, KEPT], activations[:, unit], rcond=None)[0]
        for place in range(len(KEPT)):
            expected[place] += shares[place] * outgoing[unit]
    fused = fuse(activations, outgoing, KEPT)
    assert fused.dtype == np.float32
    np.testing.assert_allclose(fused, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('seed', range(6))
def test_fusing_never_raises_the_error_of_the_next_layer(seed):
    random = np.random.default_rng(seed)
    activations = np.maximum(random.normal(size=(30, 10)), 0)
    activations[:, 3] = 0  # a dead unit
    activations[:, 4] = activations[:, 5]
    outgoing = random.normal(size=(10, 4))
    kept = np.sort(random.choice(10, 5, replace=False))
    wanted = activations @ outgoing

    def error(weights):
        return np.square(activations[:, kept] @ weights - wanted).sum(0)

    fused = fuse(activations, outgoing, kept)
    assert (error(fused) <= error(outgoing[kept]) + 1e-12).all()
    least = np.linalg.lstsq(activations[:, kept], wanted, rcond=None)[0]
    np.testing.assert_allclose(error(fused), error(least), atol=1e-10)


def test_all_kept_change_nothing():
    activations, outgoing = run(network(), points())['fc1'], network()['fc2']['kernel']
    np.testing.assert_array_equal(fuse(activations, outgoing, np.arange(8)), outgoing)


def test_a_unit_like_a_kept_one_goes_without_a_trace():
    params = network()
    for leaf in params['fc1'].values():
        leaf[..., 3] = leaf[..., 6]
    kept = np.array([0, 1, 2, 4, 5, 6, 7])
    smaller = prune(params, 'fc1', 'fc2', kept, run(params, points())['fc1'])
    others = points(seed=8)
    np.testing.assert_allclose(run(smaller, others)['fc3'], run(params, others)['fc3'], atol=1e-4)
    # The weights of the twin are those of both, and no others change.
    both = params['fc2']['kernel'][[3, 6]].sum(0)
    np.testing.assert_allclose(smaller['fc2']['kernel'][5], both, rtol=1e-5)
    without = prune(params, 'fc1', 'fc2', kept)
    assert np.abs(run(without, others)['fc3'] - run(params, others)['fc3']).max() > 0.1


def test_without_fusing_rows_and_columns_go():
    params = network()
    smaller = prune(params, 'fc1', 'fc2', KEPT)
    assert list(smaller) == ['fc1', 'fc2', 'fc3']
    np.testing.assert_array_equal(smaller['fc1']['kernel'], params['fc1']['kernel'][:, KEPT])
    np.testing.assert_array_equal(smaller['fc1']['bias'], params['fc1']['bias'][KEPT])
    np.testing.assert_array_equal(smaller['fc2']['kernel'], params['fc2']['kernel'][KEPT])
    assert smaller['fc2']['bias'] is params['fc2']['bias']
    assert smaller['fc3'] is params['fc3']


def test_layers_one_by_one():
    params, x = network(), points()
    generator = np.random.default_rng(9)
    smaller = params
    for layer, reader in [('fc1', 'fc2'), ('fc2', 'fc3')]:
        activations = run(smaller, x)[layer]
        kept = choose_diverse(activations, 5, generator)
        smaller = prune(smaller, layer, reader, kept, activations)
    shapes = {name: layer['kernel'].shape for name, layer in smaller.items()}
    assert shapes == {'fc1': (5, 5), 'fc2': (5, 5), 'fc3': (5, 3)}
    dtypes = {leaf.dtype for layer in smaller.values() for leaf in layer.values()}
    assert dtypes == {np.dtype(np.float32)}
    # What was given is as it was.
    for layer, leaves in network().items():
        for name, leaf in leaves.items():
            np.testing.assert_array_equal(params[layer][name], leaf)


def test_arrays_of_jax_and_layers_without_a_bias():
    params = {name: {'kernel': layer['kernel']} for name, layer in network().items()}
    activations = np.maximum(points() @ params['fc1']['kernel'], 0)
    expected = prune(params, 'fc1', 'fc2', KEPT, activations)
    given = {name: {'kernel': jnp.asarray(layer['kernel'])} for name, layer in params.items()}
    smaller = prune(given, 'fc1', 'fc2', KEPT, jnp.asarray(activations))
    for name in ('fc1', 'fc2'):
        np.testing.assert_allclose(smaller[name]['kernel'], expected[name]['kernel'], rtol=1e-6)


def test_a_seed_says_all():
    activations = run(network(), points())['fc1']
    first, again = (choose_diverse(activations, 4, np.random.default_rng(10)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    generator = np.random.default_rng(10)
    assert len({tuple(choose_diverse(activations, 4, generator)) for _ in range(20)}) > 5


@pytest.mark.parametrize('k', [0, 9])
def test_how_many_units_is_checked(k):
    with pytest.raises(ValueError, match=f'k must be a whole number from 1 to 8, but is {k}'):
        choose_diverse(np.ones((4, 8)), k, np.random.default_rng(0))


FIT = r'activations must have shape \(points, 8\), with at least one point, but have \('


@pytest.mark.parametrize('broken', [np.nan, np.inf])
def test_activations_must_be_finite(broken):
    activations = np.ones((4, 8))
    activations[2, 3:5] = broken
    message = 'activations must be finite, but 2 of their entries are not'
    with pytest.raises(ValueError, match=message):
        diversity_kernel(activations)
    with pytest.raises(ValueError, match=message):
        fuse(activations, np.ones((8, 3)), KEPT)


@pytest.mark.parametrize(
    ('activations', 'kept', 'message'),
    [
        (np.ones((4, 7)), KEPT, FIT + r'4, 7\)'),
        (np.ones(8), KEPT, FIT + r'8,\)'),
        (np.ones((0, 8)), KEPT, FIT + r'0, 8\)'),
        (np.ones((4, 8)), [], r'kept must be distinct units from 0 to 7, but is \[\]'),
        (np.ones((4, 8)), [1, 1], r'kept must be distinct units from 0 to 7, but is \[1, 1\]'),
        (np.ones((4, 8)), [1, 8], r'kept must be distinct units from 0 to 7, but is \[1, 8\]'),
        (np.ones((4, 8)), [-1, 2], r'kept must be distinct units from 0 to 7, but is \[-1, 2\]'),
    ],
)
def test_what_does_not_fit_is_refused(activations, kept, message):
    with pytest.raises(ValueError, match=message):
        fuse(activations, np.ones((8, 3)), np.array(kept))
    with pytest.raises(ValueError, match=message):
        prune(network(), 'fc1', 'fc2', np.array(kept), activations)


@pytest.mark.parametrize('activations', [np.ones(8), np.ones((0, 8))])
def test_a_kernel_needs_points_of_units(activations):
    with pytest.raises(ValueError, match=r'activations must have shape \(points, units\)'):
        diversity_kernel(activations)


@pytest.mark.parametrize('kept', [[], [-1, 2], [3, 3]])
def test_units_are_checked_without_fusing(kept):
    with pytest.raises(ValueError, match='kept must be distinct units from 0 to 7'):
        prune(network(), 'fc1', 'fc2', np.array(kept))


def test_a_reader_reads_all_units():
    with pytest.raises(ValueError, match="reader must read 8 units, but 'fc3' reads 7"):
        prune(network(), 'fc1', 'fc3', KEPT)
