"""What all tests run under: eight CPU devices, no implicit promotion, examples that repeat."""

import gc
import itertools
import os
from pathlib import Path

import hypothesis
import jax
import pytest
from compat_report import compat, pytest_addoption, pytest_configure, row_of_module

from experiments.data import resident

__all__ = [
    'compat',
    'pytest_addoption',
    'pytest_configure',
    'row_of_module',
]  # pytest finds them here by name

TESTS = itertools.count()

# What JAX keeps of its traces lives as long as the process: to look through it for garbage after
# every 700 objects, as Python does, takes a tenth of the time.
gc.set_threshold(50_000)

if jax.config.values['jax_disable_most_optimizations']:
    # Programs run for few steps here, and take longer to compile. Together these take a third of
    # the time; from 0.11 on jaxlib fuses in one way alone, and ends where the other is asked for.
    flags = ['--xla_cpu_parallel_codegen_split_count=1']
    if jax.__version_info__ < (0, 11):
        flags.append('--xla_cpu_use_fusion_emitters=false')
    os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *flags])

jax.config.update('jax_num_cpu_devices', 8)  # for the meshes of the sharding tests
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')

hypothesis.settings.register_profile(
    'repeatable', derandomize=True, deadline=None, database=None, max_examples=60
)
hypothesis.settings.load_profile('repeatable')


@pytest.fixture(scope='session')
def mesh():
    """Eight CPU devices along one axis named x."""
    automatic = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((8,), ('x',), automatic, devices=jax.devices('cpu')[:8])


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A TFDS folder with the digits in it, prepared once."""
    folder = tmp_path_factory.mktemp('tfds')
    resident.load('digits', folder)
    return folder


@pytest.fixture(scope='module')
def promotion():
    """What Adam needs: it mixes int32 and float32 inside optax."""
    with jax.numpy_dtype_promotion('standard'):
        yield


@pytest.fixture(autouse=True)
def forget_compiled_programs():
    """Linux lets a process map 65,530 areas of memory; a compiled program takes up to hundreds."""
    yield
    maps = Path('/proc/self/maps')
    if not next(TESTS) % 4 and maps.exists() and maps.read_bytes().count(b'\n') > 30_000:
        jax.clear_caches()
