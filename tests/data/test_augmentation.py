"""Tests of data.augmentation: every image is a shifted crop of itself, mirrored or not."""

import functools
from collections import Counter

import jax
import numpy as np
import pytest

from experiments.data.augmentation import shift_and_mirror

HEIGHT, WIDTH = 5, 6
change = functools.partial(
    jax.jit(shift_and_mirror, static_argnames=('pixels', 'mirror')), jax.random.key(3)
)


def random_images(count, dtype=np.uint8):
    random = np.random.default_rng(0)
    # From 1 on: what is 0 comes from beyond the border.
    return random.integers(1, 256, (count, HEIGHT, WIDTH, 3)).astype(dtype)


def ways(image, pixels, mirror):
    """All that may become of an image, by the shift down and to the right and the mirroring."""
    padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)))
    for down in range(2 * pixels + 1):
        for right in range(2 * pixels + 1):
            crop = padded[down : down + HEIGHT, right : right + WIDTH]
            yield (down, right, False), crop
            if mirror:
                yield (down, right, True), crop[:, ::-1]


def find_ways(images, changed, pixels, mirror):
    found = []
    for image, new in zip(images, np.asarray(changed), strict=True):
        (way,) = [way for way, crop in ways(image, pixels, mirror) if np.array_equal(crop, new)]
        found.append(way)
    return found


@pytest.mark.parametrize('pixels', [0, 1, 2])
@pytest.mark.parametrize('mirror', [False, True])
def test_every_image_is_a_shifted_crop_and_all_shifts_occur(pixels, mirror):
    images = random_images(600)
    changed = change(images, pixels=pixels, mirror=mirror)
    assert (changed.shape, changed.dtype) == (images.shape, images.dtype)
    counts = Counter(find_ways(images, changed, pixels, mirror))
    # Each way alike; six standard deviations.
    number = (2 * pixels + 1) ** 2 * (1 + mirror)
    assert len(counts) == number
    share = 600 / number
    assert all(abs(count - share) <= 6 * share**0.5 for count in counts.values())


def test_another_key_changes_other_images():
    images = random_images(40)
    first, second = (
        find_ways(images, shift_and_mirror(jax.random.key(seed), images, 2, True), 2, True)
        for seed in (0, 1)
    )
    assert first != second
    # Neither coin follows from the other: all four pairs of whether it moved down and is mirrored.
    assert len({(down > 2, is_mirrored) for down, _, is_mirrored in first}) == 4


def test_images_may_be_floats():
    images = random_images(4, np.float32)
    changed = change(images, pixels=1, mirror=True)
    assert changed.dtype == np.float32
    assert len(find_ways(images, changed, 1, True)) == 4
