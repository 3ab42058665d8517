"""What runs are made with that meet a fault."""

import pytest
from absl import logging
from tiny import Tiny
from tiny_runs import FIELDS

from experiments.networks import models
from experiments.training.flags import Config


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(models.NETWORKS, 'tiny', Tiny)


@pytest.fixture(scope='module')
def make_config(data_dir):
    def make(workdir, **fields):
        fields = {**FIELDS, 'data_dir': str(data_dir), **fields}
        return Config(network='tiny', workdir=str(workdir), **fields)

    return make


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(logging, 'warning', lambda message, *values: found.append(message % values))
    return found
