"""Tests of experiments.search: what is chosen, given up, refused, and survives.

Most searches here are of a tiny network on random images, in this process; what concerns several
processes is asked of real ones, on the digits.
"""

import dataclasses
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
from experiments.flags import Config, SearchConfig, define, to_config

ROOT = Path(__file__).resolve().parents[1]
SPACES = ('compression', 'layer_density', 'c_rate')


class Tiny(nn.Module):
    """Two layers, small enough to train without compiling."""

    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Dense(8, name='fc1')(images.reshape(images.shape[0], -1)))
        return nn.Dense(10, name='fc2')(hidden)


def parse(*arguments, defaults=None, config_type=SearchConfig):
    flag_values = absl_flags.FlagValues()
    define(config_type, defaults or {}, flag_values)
    return to_config(config_type, defaults or {}, flag_values, flag_values(['program', *arguments]))


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """A folder with the cache of a data set of random images, and so no need for TFDS."""
    folder = tmp_path_factory.mktemp('data')
    (folder / 'dns_jax_cache').mkdir()
    random = np.random.default_rng(0)
    source, arrays = data._SOURCES['digits'], {}
    for split, count in (('train', source.train), ('test', source.test)):
        arrays[f'{split}_labels'] = random.integers(0, 10, count, np.int32)
        arrays[f'{split}_images'] = random.integers(0, 256, (count, 28, 28, 1), np.uint8)
    np.savez(folder / 'dns_jax_cache' / f'digits-{source.version}.npz', **arrays)
    return folder


@pytest.fixture(scope='module')
def make_config(data_dir, tmp_path_factory):
    def make(**fields):
        fields.setdefault('workdir', str(tmp_path_factory.mktemp('search') / 'search'))
        short = {'reference_steps': 2, 'surgery_steps': 4, 'finetuning_steps': 1}
        short |= {'record_every': 1, 'checkpoint_every': 2, 'batch_size': 16, 'dataset': 'digits'}
        short |= {'network': 'tiny', 'space': 'c_rate', 'trials': 2, 'tolerance': 100.0}
        return SearchConfig(**{'data_dir': str(data_dir), **short, **fields})

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.NETWORKS, 'tiny', Tiny)
        yield make


def do(config):
    # To compile takes longer than such searches: here their operations go one by one.
    with jax.disable_jit():
        return search.search(config)


def open_trials(config):
    return study.open_study(config.storage or f'sqlite:///{config.workdir}/study.db', config).trials


def last_record(folder):
    return json.loads((Path(folder) / 'metrics.jsonl').read_text().splitlines()[-1])


@pytest.fixture(scope='module')
def searched(make_config):
    """A search that allows some of its trials and not others, and what it returned."""
    config = make_config(trials=6, tolerance=0.0)
    return config, do(config)


def test_the_smallest_network_of_allowed_error_wins(searched):
    """By the records of all trials, as they lie in their folders."""
    config, result = searched
    reference = last_record(f'{config.workdir}/reference')['validation_error']
    found = {}
    for number in range(6):
        record = last_record(f'{config.workdir}/trials/search-{number}')
        assert (record['phase'], record['step']) == ('finetuning', 1)
        found[number] = (sum(record['kept'].values()), record['validation_error'])
    allowed = {number: pair for number, pair in found.items() if pair[1] <= reference}
    # The rule decides something here: the smallest of all is not allowed.
    assert 0 < len(allowed) < 6
    assert min(found.values()) not in allowed.values()
    best = min(allowed, key=lambda number: allowed[number])
    assert (result['trial'], (result['kept'], result['validation_error'])) == (best, found[best])
    assert result['reference_validation_error'] == reference
    assert result['compression'] == (785 * 8 + 9 * 10) / result['kept']
    assert (result['completed'], result['given_up']) == (6, 0)
