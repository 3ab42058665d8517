"""Tests of networks.names: every network has one."""

from experiments.networks import models, names


def test_every_network_has_a_name_of_its_own():
    assert names.NETWORK_NAMES.keys() == models.NETWORKS.keys()
    assert len({*names.NETWORK_NAMES.values()}) == len(models.NETWORKS)
