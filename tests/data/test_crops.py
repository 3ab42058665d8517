"""Tests of data.crops: which part of an image is cut out, and its pixels."""

import io
import itertools

import archives
import numpy as np
import pytest
from PIL import Image

from experiments.data import crops

BILINEAR = Image.Resampling.BILINEAR


def gradient(width, height):
    """Returns an image that is redder to the right and greener to the bottom, without steps."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width) * 255 // (width - 1)
    pixels[..., 1] = (np.arange(height) * 255 // (height - 1))[:, None]
    return Image.fromarray(pixels)


def as_png(image):
    """A file that changes no pixel."""
    return archives.encode(image, 'PNG', compress_level=1)


def crop(image, size, kind, generator=None):
    return crops.crop_image(as_png(image), size, kind, generator)


def difference(left, right):
    """Returns absolute differences of pixels."""
    return np.abs(np.asarray(left).astype(int) - np.asarray(right))


def caffe_square(image, size):
    """The words of Caffe's recipe for 227 pixels: warp to 256x256, then cut squares out."""
    side = round(size * 256 / 227)
    return np.asarray(image.resize((side, side), BILINEAR))


@pytest.mark.parametrize('shape', [(500, 375), (375, 500), (120, 90), (256, 256), (90, 300)])
def test_caffe_evaluation(shape):
    image = archives.photograph(*shape)
    square = caffe_square(image, 227)
    assert square.shape == (256, 256, 3)
    expected = square[14 : 14 + 227, 14 : 14 + 227]
    assert difference(crop(image, 227, 'caffe'), expected).max() <= 1


def test_caffe_training():
    image, size, found = archives.photograph(90, 60), 45, []
    content, square = as_png(image), caffe_square(image, size)
    margin = len(square) - size
    assert margin == 6
    places = list(itertools.product((False, True), range(margin + 1), range(margin + 1)))
    for seed in range(150):
        pixels = crops.crop_image(content, size, 'caffe', np.random.default_rng(seed))
        candidates = [square[y : y + size, x : x + size] for _, y, x in places]
        candidates = [c[:, ::-1] if p[0] else c for p, c in zip(places, candidates, strict=True)]
        matching = [
            place
            for place, candidate in zip(places, candidates, strict=True)
            if difference(pixels, candidate).max() <= 1
        ]
        assert len(matching) == 1
        found += matching
    assert {y for _, y, _ in found} == {x for _, _, x in found} == set(range(margin + 1))
    assert 50 < sum(mirrored for mirrored, _, _ in found) < 100


def extent(pixels, length, channel):
    """Returns where a crop of a gradient begins and ends, in pixels of the image, and its turn."""
    places = pixels.mean(axis=channel)[:, channel] / 255 * (length - 1)
    step = (places[-4] - places[3]) / (len(places) - 7)  # Edges are averaged over fewer pixels.
    middle = places[len(places) // 2 - 1 : len(places) // 2 + 1].mean() + 0.5
    half = abs(step) * len(places) / 2
    return middle - half, middle + half, step < 0


def test_random_resized_training():
    width, height, shares, ratios, turns = 640, 480, [], [], []
    content = as_png(gradient(width, height))
    for seed in range(300):
        pixels = crops.crop_image(content, 32, 'random_resized', np.random.default_rng(seed))
        left, right, mirrored = extent(pixels, width, 0)
        top, bottom, upside_down = extent(pixels, height, 1)
        assert not upside_down
        assert min(left, top) > -4
        assert right < width + 4
        assert bottom < height + 4
        turns.append(mirrored)
        shares.append((right - left) * (bottom - top) / (width * height))
        ratios.append((right - left) / (bottom - top))
    assert 0.07 < min(shares) < 0.11
    assert 0.9 < max(shares) < 1.03
    assert 0.38 < np.mean(shares) < 0.5  # Drawn from 0.08 to 1 evenly, but large ones fit less.
    assert 0.73 < min(ratios) < 0.8
    assert 1.27 < max(ratios) < 1.36
    assert abs(np.mean(np.log(ratios))) < 0.06
    assert 110 < sum(turns) < 190


def test_random_resized_of_a_thin_image_is_its_centre():
    image = archives.photograph(200, 12)  # No 8 % of its area has a ratio of at most 4/3.
    expected = image.crop((92, 0, 108, 12)).resize((24, 24), BILINEAR)
    upright, mirrored = np.asarray(expected), np.asarray(expected)[:, ::-1]
    for seed in range(6):
        pixels = crop(image, 24, 'random_resized', np.random.default_rng(seed))
        assert min(difference(pixels, each)[:, 1:-1].max() for each in (upright, mirrored)) <= 1


@pytest.mark.parametrize('shape', [(500, 376), (376, 500), (256, 256), (768, 512), (128, 128)])
def test_random_resized_evaluation(shape):
    image = archives.photograph(*shape)
    shorter = min(shape)
    scaled = image.resize([round(side * 256 / shorter) for side in shape], BILINEAR)
    left, top = ((side - 224) // 2 for side in scaled.size)
    expected = scaled.crop((left, top, left + 224, top + 224))
    # The longer side is rounded to whole pixels here, but not there.
    assert difference(crop(image, 224, 'random_resized'), expected).mean() < 1.5


@pytest.mark.parametrize('generator', [None, np.random.default_rng(0)])
def test_whole(generator):
    image = archives.photograph(50, 30)
    expected = image.resize((28, 28), BILINEAR)
    for _ in range(8):
        np.testing.assert_array_equal(crop(image, 28, 'whole', generator), expected)


@pytest.mark.parametrize('kind', crops.CROPS)
def test_large_jpegs_lose_nothing_by_a_quick_decoding(kind, monkeypatch):
    image = archives.photograph(1601, 1203)
    content = archives.encode(image)
    quick = crops.crop_image(content, 128, kind, np.random.default_rng(1))
    reductions = []
    draft = Image.Image.draft
    with Image.open(io.BytesIO(content)) as opened:
        plain = type(opened)
    original = plain.draft

    def record(self, mode, size):
        drafted = original(self, mode, size)
        reductions.append(self.decoderconfig[0])
        return drafted

    monkeypatch.setattr(plain, 'draft', record)
    again = crops.crop_image(content, 128, kind, np.random.default_rng(1))
    np.testing.assert_array_equal(quick, again)
    assert max(reductions) > 1
    monkeypatch.setattr(plain, 'draft', draft)
    full = crops.crop_image(content, 128, kind, np.random.default_rng(1))
    assert difference(quick, full).mean() < 0.5
    assert difference(quick, full).max() <= 4


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGBA', 'LA'])
@pytest.mark.parametrize('kind', crops.CROPS)
def test_other_modes_become_rgb(mode, kind):
    image = archives.photograph(30, 20).convert(mode)
    expected = crop(image.convert('RGB'), 16, kind)
    assert expected.shape == (16, 16, 3)
    np.testing.assert_array_equal(crop(image, 16, kind), expected)


def test_cmyk_jpegs_become_rgb():
    image = archives.photograph(40, 40)
    content = archives.encode(image.convert('CMYK'))
    pixels = crops.crop_image(content, 40, 'whole', None)
    assert difference(pixels, image).mean() < 8
