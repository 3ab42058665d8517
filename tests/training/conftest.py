"""A tiny run, for the tests of what flags do to one."""

import functools

import pytest
from run_flags import TARGETS
from tiny import Tiny
from tiny_runs import write_random_images

from experiments.networks import models
from experiments.training.flags import Config


@pytest.fixture(scope='module')
def random_images(tmp_path_factory):
    """A folder with two data sets of random images."""
    folder = tmp_path_factory.mktemp('data')
    write_random_images(folder, 'digits', 'fashion_mnist')
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
        patch.setitem(models.NETWORKS, 'tiny', functools.partial(Tiny, width=0.5))
        yield make
