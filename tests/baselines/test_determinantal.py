"""Tests of baselines.determinantal: samples against the determinants of all subsets."""

import itertools

import numpy as np
import pytest

from experiments.baselines.determinantal import sample

DRAWS = 2000
UNITS = 6


def gram(units, columns):
    """A kernel of rank `columns`, of vectors that have a direction in common."""
    vectors = np.random.default_rng(0).normal(0.8, 1.0, (units, columns))
    return vectors @ vectors.T


def probabilities(kernel, k):
    """det(L_Y) of every subset Y, over their sum."""
    subsets = list(itertools.combinations(range(len(kernel)), k))
    volumes = np.array([np.linalg.det(kernel[np.ix_(subset, subset)]) for subset in subsets])
    return dict(zip(subsets, volumes / volumes.sum(), strict=True))


def draws(kernel, k, seed=2):
    generator = np.random.default_rng(seed)
    return [tuple(sample(kernel, k, generator).tolist()) for _ in range(DRAWS)]


def distance(found, expected):
    """The chi-square statistic, in standard deviations above its mean."""
    counts = {subset: found.count(subset) for subset in expected}
    assert sum(counts.values()) == len(found), 'drew what is no subset of k'
    means = {subset: chance * len(found) for subset, chance in expected.items()}
    assert min(means.values()) > 5, 'too few draws for a chi-square'
    statistic = sum((counts[subset] - mean) ** 2 / mean for subset, mean in means.items())
    freedom = len(expected) - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize('k', range(1, UNITS))
def test_subsets_come_as_often_as_their_determinants_say(k):
    kernel = gram(UNITS, UNITS)
    found, expected = draws(kernel, k), probabilities(kernel, k)
    assert distance(found, expected) < 4
    for unit in range(UNITS):
        chance = sum(share for subset, share in expected.items() if unit in subset)
        included = np.mean([unit in subset for subset in found])
        assert abs(included - chance) < 4 * np.sqrt(chance * (1 - chance) / DRAWS)


@pytest.mark.parametrize('k', [2, 3])
def test_the_bound_tells_other_distributions_apart(k):
    """Units at random, as often as their diagonal says, or by powers of the determinants."""
    kernel = gram(UNITS, UNITS)
    expected = probabilities(kernel, k)
    wrong = [
        dict.fromkeys(expected, 1.0),
        {subset: np.diag(kernel)[list(subset)].prod() for subset in expected},
        {subset: chance**1.5 for subset, chance in expected.items()},
    ]
    for weights in wrong:
        chances = np.array(list(weights.values())) / sum(weights.values())
        chosen = np.random.default_rng(3).choice(len(expected), DRAWS, p=chances)
        assert distance([list(expected)[place] for place in chosen], expected) > 10


def test_equals_are_never_drawn_together():
    kernel = gram(4, 4)[np.ix_([0, 1, 2, 3, 1], [0, 1, 2, 3, 1])]
    generator = np.random.default_rng(4)
    found = {tuple(sample(kernel, 4, generator).tolist()) for _ in range(100)}
    assert found == {(0, 1, 2, 3), (0, 2, 3, 4)}


@pytest.mark.parametrize(('units', 'k'), [(500, 1), (500, 250), (500, 499), (500, 500)])
def test_hundreds_of_units(units, k):
    chosen = sample(gram(units, units), k, np.random.default_rng(5))
    assert chosen.shape == (k,)
    assert np.issubdtype(chosen.dtype, np.integer)
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < units


@pytest.mark.parametrize('scale', [2.0**-400, 2.0**400])
def test_the_scale_of_a_kernel_is_nothing(scale):
    """Though the product of 100 eigenvalues leaves the range of a float64 both ways."""
    kernel = gram(200, 200)
    chosen = sample(kernel, 100, np.random.default_rng(6))
    np.testing.assert_array_equal(sample(scale * kernel, 100, np.random.default_rng(6)), chosen)


def test_which_of_many_is_left_out():
    """With a diagonal kernel, one of n is left out as often as one over its entry says."""
    entries = np.full(80, 1e4)
    entries[[7, 50]] = 1e-3, 3e-3
    generator = np.random.default_rng(7)
    left_out = [set(range(80)) - set(sample(np.diag(entries), 79, generator)) for _ in range(80)]
    assert set.union(*left_out) == {7, 50}
    assert 45 <= left_out.count({7}) <= 75  # three of four


def test_a_seed_says_all():
    kernel = gram(40, 40)
    first, again, other = (sample(kernel, 10, np.random.default_rng(seed)) for seed in (8, 8, 9))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ('kernel', 'k', 'message'),
    [
        (np.eye(3), 0, 'k must be a whole number from 1 to 3, but is 0'),
        (np.eye(3), 4, 'k must be a whole number from 1 to 3, but is 4'),
        (np.eye(3), 1.5, 'k must be a whole number from 1 to 3, but is 1.5'),
        (np.ones((3, 3)), 2, r'k must be at most the rank of kernel, which is 1, but is 2'),
        (np.eye(3)[:2], 1, r'kernel must be a square matrix, but its shape is \(2, 3\)'),
        (np.ones(3), 1, r'kernel must be a square matrix, but its shape is \(3,\)'),
        (np.diag([1, np.nan]), 1, 'kernel must be finite, but 1 of its 4 entries are not'),
        (np.triu(np.ones((2, 2))), 1, 'kernel must be symmetric, but differs from its transpose'),
        (np.diag([1.0, -2.0]), 1, r'kernel must be positive semidefinite, but .* is -2\.0'),
    ],
)
def test_what_is_refused(kernel, k, message):
    with pytest.raises(ValueError, match=message):
        sample(kernel, k, np.random.default_rng(0))
