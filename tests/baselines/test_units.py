"""Tests of baselines.units: what is chosen at random, and what by weights."""

import numpy as np
import pytest

from experiments.baselines.units import choose_at_random, choose_by_importance


@pytest.mark.parametrize('k', [1, 3, 7, 8])
def test_units_at_random_are_all_alike(k):
    generator = np.random.default_rng(7)
    draws = np.stack([choose_at_random(8, k, generator) for _ in range(1000)])
    assert draws.shape == (1000, k)
    assert (np.diff(draws) > 0).all()
    shares = np.bincount(draws.ravel(), minlength=8) / 1000
    np.testing.assert_allclose(shares, k / 8, atol=4 * np.sqrt(k / 8 * (1 - k / 8) / 1000))


def test_importance_is_of_what_goes_out():
    outgoing = np.array([[1.0, 1.0], [-3.0, 0.5], [0.0, 0.1], [2.0, -2.0], [2.5, 0.0]])
    assert choose_by_importance(outgoing, 2).tolist() == [1, 3]
    assert choose_by_importance(outgoing, 3).tolist() == [1, 3, 4]
    assert choose_by_importance(outgoing, 5).tolist() == [0, 1, 2, 3, 4]
    ties = choose_by_importance(np.tile([[1.0], [2.0]], (100, 1)), 103)
    assert ties.tolist() == sorted([*range(1, 200, 2), 0, 2, 4])  # of equals the first


def test_a_seed_says_all():
    first, again = (choose_at_random(30, 10, np.random.default_rng(8)) for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize('k', [0, 9, -1, 2.5])
def test_how_many_units_is_checked(k):
    message = f'k must be a whole number from 1 to 8, but is {k}'
    with pytest.raises(ValueError, match=message):
        choose_at_random(8, k, np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        choose_by_importance(np.ones((8, 3)), k)
