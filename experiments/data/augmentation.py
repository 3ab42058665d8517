"""Images changed at random while a network trains on them, on the device within the step."""

import jax
import jax.numpy as jnp


def shift_and_mirror(key: jax.Array, images: jax.Array, pixels: int, mirror: bool) -> jax.Array:
    """Moves each image by some pixels, up or down and sideways, and mirrors half of them.

    Args:
      key: of the step.
      images: (batch, height, width, channels), of any dtype.
      pixels: at most, in each direction.
      mirror: whether any are mirrored, left to right.

    Returns:
      An array like `images`. What comes in from beyond the border is 0.

    Reference:
      He et al. 2016, Deep residual learning for image recognition, section 4.2.
    """
    shift_key, mirror_key = jax.random.split(key)
    border = (pixels, pixels)
    padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))
    corners = jax.random.randint(shift_key, (len(images), 2), 0, 2 * pixels + 1)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])

    cropped = jax.vmap(crop)(padded, corners)
    if not mirror:
        return cropped
    mirrored = jax.random.bernoulli(mirror_key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, cropped[:, :, ::-1], cropped)
