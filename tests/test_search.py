"""Tests of experiments.search: what is chosen, given up, refused, and survives.

What concerns processes is asked of real ones, on the digits. Elsewhere training is played: its
errors and sizes follow from the flags of the run, so that it is known what must come out.
"""

import contextlib
import dataclasses
import fcntl
import json
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optuna
import pytest
from absl import flags as absl_flags
from optuna.trial import TrialState
from PIL import Image

from experiments import data, lenet300, models, run, search, space, study
from experiments.flags import Config, SearchConfig, define, parse_table, to_config

ROOT = Path(__file__).resolve().parents[1]
SPACES = ('compression', 'layer_density', 'c_rate')


class Tiny(nn.Module):
    """Two layers, small enough to train without compiling."""

    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Dense(8, name='fc1')(images.reshape(images.shape[0], -1)))
        return nn.Dense(10, name='fc2')(hidden)


SIZES = {'fc1': 785 * 8, 'fc2': 9 * 10}


def parse(*arguments, defaults=None, config_type=SearchConfig):
    flag_values = absl_flags.FlagValues()
    define(config_type, defaults or {}, flag_values)
    return to_config(config_type, defaults or {}, flag_values, flag_values(['program', *arguments]))


@pytest.fixture(scope='module')
def make_config(tmp_path_factory):
    """Makes the configuration of a search for a tiny network, on random images."""
    folder = tmp_path_factory.mktemp('data')
    (folder / 'dns_jax_cache').mkdir()
    random = np.random.default_rng(0)
    source, arrays = data._SOURCES['digits'], {}
    for split, count in (('train', source.train), ('test', source.test)):
        arrays[f'{split}_labels'] = random.integers(0, 10, count, np.int32)
        arrays[f'{split}_images'] = random.integers(0, 256, (count, 28, 28, 1), np.uint8)
    np.savez(folder / 'dns_jax_cache' / f'digits-{source.version}.npz', **arrays)

    def make(**fields):
        fields.setdefault('workdir', str(tmp_path_factory.mktemp('search') / 'search'))
        short = {'reference_steps': 2, 'surgery_steps': 4, 'finetuning_steps': 1}
        short |= {'record_every': 1, 'checkpoint_every': 2, 'batch_size': 16, 'dataset': 'digits'}
        short |= {'network': 'tiny', 'trials': 3, 'tolerance': 100.0, 'data_dir': str(folder)}
        return SearchConfig(**{**short, **fields})

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.NETWORKS, 'tiny', Tiny)
        yield make


def do(config):
    # To compile takes longer than such searches: here their operations go one by one.
    with jax.disable_jit():
        return search.search(config)


def trials_of(config):
    url = config.storage or f'sqlite:///{config.workdir}/study.db'
    return optuna.load_study(study_name=config.study, storage=url).trials


@pytest.fixture(scope='module')
def searched(make_config):
    """A search in which nothing is played, and what it returned."""
    config = make_config(space='c_rate', trials=2)
    with pytest.MonkeyPatch.context() as patch:
        load = data.load
        # Whoever measures on the test images fails.
        patch.setattr(data, 'load', lambda *args: dataclasses.replace(load(*args), test=None))
        return config, do(config)
