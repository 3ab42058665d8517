"""A tiny run, for the tests of what flags do to one."""

import flax.linen as nn
import numpy as np
import pytest
from run_flags import TARGETS

from experiments.data import resident
from experiments.networks import models
from experiments.training.flags import Config


class Tiny(nn.Module):
    """Two layers, small enough to compile in no time."""

    @nn.compact
    def __call__(self, images, dropout=None):
        hidden = nn.relu(nn.Dense(8, name='fc1')(images.reshape(images.shape[0], -1)))
        hidden = models.drop_out(self, hidden, dropout, 'fc1')
        return nn.Dense(10, name='fc2')(hidden)


@pytest.fixture(scope='module')
def random_images(tmp_path_factory):
    """A folder with the caches of two data sets, of random images, and so no need for TFDS."""
    folder = tmp_path_factory.mktemp('data')
    (folder / 'dns_jax_cache').mkdir()
    random = np.random.default_rng(0)
    for name in ('digits', 'fashion_mnist'):
        source, arrays = resident._SOURCES[name], {}
        for split, count in (('train', source.train), ('test', source.test)):
            arrays[f'{split}_labels'] = random.integers(0, 10, count, np.int32)
            arrays[f'{split}_images'] = random.integers(0, 256, (count, 28, 28, 1), np.uint8)
        np.savez(folder / 'dns_jax_cache' / f'{name}-{source.version}.npz', **arrays)
    return folder


@pytest.fixture(scope='module')
def make_config(random_images, tmp_path_factory):
    """Makes the configuration of a tiny run with some fields of its own, in a new folder."""

    def make(**fields):
        fields.setdefault('workdir', str(tmp_path_factory.mktemp('run') / 'run'))
        short = {'reference_steps': 3, 'surgery_steps': 4, 'record_every': 1, 'batch_size': 16}
        short |= {'checkpoint_every': 2, 'learning_rate': 'inv:0.1,1e-4,0.75', 'dataset': 'digits'}
        short |= {'finetuning_steps': 2}
        if not any(name in fields for name in TARGETS):
            short |= {'c_rate': '1'}
        return Config(**{'network': 'tiny', 'data_dir': str(random_images), **short, **fields})

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.NETWORKS, 'tiny', Tiny)
        yield make
