"""What networks take: images with their colours scaled, or the numbers of characters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Input(NamedTuple):
    """What a network takes: (pixels from 0 to 255 − mean) · scale."""

    mean: tuple[float, ...]  # one for each channel; colours are red, green, blue
    scale: float
    size: int  # of a side of the image as a rule, in pixels

    dtype = jnp.float32  # of what `prepare` gives

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        return self.size, self.size, len(self.mean)

    def prepare(self, images: jax.Array) -> jax.Array:
        """Makes of images (batch, height, width, channels), uint8, what the network takes."""
        scaled = images.astype(jnp.float32) * self.scale
        if any(self.mean):
            scaled -= (jnp.array(self.mean) * self.scale)[None, None, None]
        return scaled

    def describe(self) -> dict[str, str]:
        """Says it in the words of a file of weights."""
        said = {'input_scale': repr(self.scale)}
        if any(self.mean):
            said['input_mean'] = ','.join(map(repr, self.mean))
        return said


class Tokens(NamedTuple):
    """What a language model takes: the numbers of characters, as they are."""

    dtype = jnp.int32

    def prepare(self, tokens: jax.Array) -> jax.Array:
        """Gives the tokens (batch, characters), integers."""
        return tokens

    def describe(self) -> dict[str, str]:
        """Says nothing, for tokens are taken as they are."""
        return {}
