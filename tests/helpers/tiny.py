"""A network that compiles in no time, and its entry script: python tests/helpers/tiny.py FLAGS."""

import flax.linen as nn
import jax.numpy as jnp

from experiments.config import command_line
from experiments.devices import hosts
from experiments.networks import models
from experiments.training.flags import Config
from experiments.training.image_flags import ImageConfig
from experiments.training.run import run


class Tiny(nn.Module):
    """Two layers with the fields of AlexNet."""

    classes: int = 10
    width: float = 1.0
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, images, dropout=None):
        hidden = images.reshape(images.shape[0], -1)
        units = int(16 * self.width)
        hidden = nn.relu(nn.Dense(units, dtype=self.dtype, name='fc1')(hidden))
        hidden = models.drop_out(self, hidden, dropout, 'fc1')
        return nn.Dense(self.classes, dtype=self.dtype, name='fc2')(hidden).astype(jnp.float32)


def run_tiny(fields, errors):
    """Does a run of the network in a process that a test starts and ends."""
    models.NETWORKS['tiny'] = Tiny
    try:
        run(Config(network='tiny', **fields))
    except Exception as error:
        errors.write_text(f'{type(error).__name__}: {error}')
        raise SystemExit(1) from error


if __name__ == '__main__':
    models.NETWORKS['tiny'] = Tiny
    command_line.launch({'network': 'tiny'}, hosts.with_processes(run), ImageConfig)
