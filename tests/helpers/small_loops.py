"""What tests of own loops share: networks that compile in no time, a text, the rows of a file."""

import csv

import numpy as np
import pytest
from flax import nnx

from experiments.own_loops import networks as own_networks
from experiments.own_loops.runs import OwnLoopConfig

TEXT = ''.join(np.random.default_rng(0).choice(list('abcd \n'), 4_000))


class Tiny(nnx.Module):
    """In place of the CNN, whose programs take seconds to compile."""

    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(64, 6, rngs=rngs), nnx.Linear(6, 10, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, images):
        return self.out(nnx.relu(self.norm(self.hidden(images.reshape(len(images), -1)))))


@pytest.fixture
def small(monkeypatch):
    """Networks that compile in no time."""
    monkeypatch.setattr(own_networks, 'Cnn', Tiny)
    monkeypatch.setattr(own_networks, '_WIDTH', 8)
    monkeypatch.setattr(own_networks, '_CONTEXT', 8)
    monkeypatch.setattr(own_networks, '_BLOCKS', 1)


@pytest.fixture
def config(small, tmp_path):
    return OwnLoopConfig(
        compression='2', seeds=1, dense_steps=2, steps=10, output=str(tmp_path / 'deep/rows.csv')
    )


@pytest.fixture
def text(tmp_path):
    path = tmp_path / 'text.txt'
    path.write_text(TEXT)
    return path


def rows_in(config):
    with open(config.output, newline='') as file:
        return list(csv.DictReader(file))
