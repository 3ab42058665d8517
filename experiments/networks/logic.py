"""The network of the paper's XOR problem."""

import flax.linen as nn
import jax


class Xor(nn.Module):
    """The network of the paper's section 4.1, 2-5-1: 21 parameters."""

    @nn.compact
    def __call__(self, points: jax.Array) -> jax.Array:
        """Maps points (batch, 2) to logits (batch,); the sigmoid of the output is the loss's."""
        hidden = nn.sigmoid(nn.Dense(5, name='fc1')(points))
        return nn.Dense(1, name='fc2')(hidden)[:, 0]
