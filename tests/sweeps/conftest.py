"""The configuration of a search for a tiny network."""

import numpy as np
import pytest
from searches import Tiny

from experiments.config.command_line import make
from experiments.data import resident
from experiments.networks import models
from experiments.sweeps.flags import SearchConfig


@pytest.fixture(scope='module')
def make_config(tmp_path_factory):
    """Makes the configuration of a search for a tiny network, on random images."""
    folder = tmp_path_factory.mktemp('data')
    (folder / 'dns_jax_cache').mkdir()
    random = np.random.default_rng(0)
    source, arrays = resident._SOURCES['digits'], {}
    for split, count in (('train', source.train), ('test', source.test)):
        arrays[f'{split}_labels'] = random.integers(0, 10, count, np.int32)
        arrays[f'{split}_images'] = random.integers(0, 256, (count, 28, 28, 1), np.uint8)
    np.savez(folder / 'dns_jax_cache' / f'digits-{source.version}.npz', **arrays)

    def make_one(**fields):
        fields.setdefault('workdir', str(tmp_path_factory.mktemp('search') / 'search'))
        short = {'reference_steps': 2, 'surgery_steps': 10, 'finetuning_steps': 1}
        short |= {'record_every': 1, 'checkpoint_every': 2, 'refresh_every': 1, 'batch_size': 16}
        short |= {'network': 'tiny', 'trials': 3, 'tolerance': 100.0, 'dataset': 'digits'}
        return make(SearchConfig, **{'data_dir': str(folder), **short, **fields})

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.NETWORKS, 'tiny', Tiny)
        yield make_one
