"""Tests of typing: what a rule does by default, and the order of a band."""

from dns_jax import Rule, Thresholds, mean_std
from dns_jax.structures import Structure


def test_a_rule_updates_at_every_step_and_is_asked_as_its_kind_is():
    thresholds = mean_std(1.0)
    assert Rule(thresholds) == (thresholds, 1.0, None, Structure())


def test_a_band_begins_with_its_lower_end():
    assert Thresholds(0.9, 1.1)._asdict() == {'low': 0.9, 'high': 1.1}
