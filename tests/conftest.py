"""What all tests run under: eight CPU devices, no implicit promotion, examples that repeat."""

import os
import sys
from pathlib import Path

# XLA reads its flags once, when jax starts; the meshes of the sharding tests need the devices.
os.environ['XLA_FLAGS'] = ' '.join(
    [os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count=8']
).strip()

import hypothesis
import jax
import pytest

# Under importlib mode the tests are no package; this lets them import `oracle`.
sys.path.append(str(Path(__file__).parent))

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
