"""Which part of an image a network sees, and its decoding."""

import io
import math

import numpy as np
from PIL import Image

CROPS = ('caffe', 'random_resized', 'whole')
# What TFDS encodes and decodes. Pillow would also hand a file to other programs, as PostScript is.
_FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG')
_MOST_PIXELS = 89_478_485  # a third of a GiB once decoded; above, Pillow warns of bombs


def open_image(content: bytes) -> Image.Image:
    """Opens an image; its pixels are decoded once they are asked for.

    Args:
      content: a BMP, GIF, JPEG or PNG file.

    Raises:
      ValueError: it has more than 89,478,485 pixels.
      OSError: the file is damaged or another; Pillow raises other types besides.
    """
    image = Image.open(io.BytesIO(content), formats=_FORMATS)
    if image.width * image.height > _MOST_PIXELS:
        raise ValueError(f'it has {image.width}x{image.height} pixels, over {_MOST_PIXELS}')
    return image


def crop_image(
    content: bytes, image_size: int, crop: str, generator: np.random.Generator | None
) -> np.ndarray:
    """Decodes an image, cuts a part out of it and resizes that to a square.

    Args:
      content: as for `open_image`.
      image_size: height and width wanted, pixels.
      crop: one of `CROPS`.
      generator: what place and mirroring are drawn from; None gives the crop for evaluation.

    Returns:
      The pixels, (image_size, image_size, 3) uint8.

    Raises:
      Exception: as `open_image` does.
    """
    with open_image(content) as image:
        width, height = image.size
        box, mirror = _choose_box(width, height, image_size, crop, generator)
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, which is much faster. As long as
        # what remains is twice the size wanted, the resizing hides that: pixels differ by 1 or 2.
        surplus = min(box[2] - box[0], box[3] - box[1]) / (2 * image_size)
        wanted = math.ceil(width / surplus), math.ceil(height / surplus)
        drafted = image.draft(None, wanted)  # None for other formats.
        if drafted is not None:
            left, top, right, bottom = (place * drafted[1][2] / width for place in box)
            box = left, top, right, bottom
        colours = image if image.mode == 'RGB' else image.convert('RGB')
        part = colours.resize((image_size, image_size), Image.Resampling.BILINEAR, box)
    return np.asarray(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else part)


def _choose_box(
    width: int, height: int, image_size: int, crop: str, generator: np.random.Generator | None
) -> tuple[tuple[float, float, float, float], bool]:
    """Returns left, top, right and bottom of the part to resize, and whether to mirror it."""
    if crop == 'whole':
        return (0, 0, width, height), False
    mirror = generator is not None and generator.random() < 0.5
    if crop == 'caffe':
        # To cut a square out of the stretched image is to stretch a part of the image.
        side = round(image_size * 256 / 227)
        left = top = (side - image_size) // 2
        if generator is not None:
            left, top = generator.integers(side - image_size, size=2, endpoint=True)
        right, bottom = left + image_size, top + image_size
        return (
            left * width / side,
            top * height / side,
            right * width / side,
            bottom * height / side,
        ), mirror
    if generator is not None:
        return _draw_box(width, height, generator), mirror
    side = min(width, height) * image_size / round(image_size * 256 / 224)
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side), mirror


def _draw_box(
    width: int, height: int, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draws a part of 8 to 100 % of the area, its ratio of width to height from 3/4 to 4/3."""
    for _ in range(10):
        area = width * height * generator.uniform(0.08, 1)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left = int(generator.integers(width - across, endpoint=True))
            top = int(generator.integers(height - down, endpoint=True))
            return left, top, left + across, top + down
    # No part fits a long thin image: then the largest one of an allowed ratio, in the centre.
    across, down = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down
