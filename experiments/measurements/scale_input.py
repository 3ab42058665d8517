"""How fast images are decoded and cropped: photographs made up here, read as a prepared set is."""

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from experiments.data import streams
from experiments.measurements import timing

_SIZE = (500, 375)  # width and height in pixels, the most common of ImageNet's
_CLASSES = 10
_QUALITY = 92  # files have some 80 KB with it, as ImageNet's have
_BATCH = 32
_WARM_UP_BATCHES = 6  # batches until all that decodes is under way
_TIMED_BATCHES = 20  # batches that are timed


class MadeUpPhotographs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Smooth colour images with grain, as JPEGs."""

    VERSION = tfds.core.Version('1.0.0')

    def __init__(self, images: int, **options: Any):
        self._images = images
        super().__init__(**options)

    def _info(self):
        features = {
            'image': tfds.features.Image(encoding_format='jpeg'),
            'label': tfds.features.ClassLabel(num_classes=_CLASSES),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager  # Nothing to download.
        return {'train': self._generate_examples(self._images), 'test': self._generate_examples(1)}

    def _generate_examples(self, count):
        random = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as folder:
            for key in range(count):
                path = os.path.join(folder, f'{key}.jpeg')
                make_photograph(random, _SIZE).save(path, quality=_QUALITY)
                yield key, {'image': path, 'label': key % _CLASSES}


def measure_input(images: int, size: int, workers: Sequence[int]) -> dict[str, Any]:
    """Times training batches: by threads on one core, then by processes on all cores.

    Args:
      images: how many to make, at least two batches.
      size: height and width that they are cropped to as Caffe does, pixels.
      workers: numbers of processes that decode; 0 is for threads of this one, on one core.

    Returns:
      `{images, bytes_per_image, size, rows: [{workers, cores, images_per_s, images_per_core_s}]}`.

    Raises:
      OSError: if the set cannot be written.
      ValueError: if there are too few images to split.
    """
    with tempfile.TemporaryDirectory() as folder:
        tfds.disable_progress_bar()
        builder = MadeUpPhotographs(images, data_dir=folder)
        builder.download_and_prepare(file_format='array_record')
        bytes_per_image = builder.info.splits['train'].num_bytes / images
        rows = [_measure_row(builder.name, folder, size, number) for number in workers]
    return {'images': images, 'bytes_per_image': bytes_per_image, 'size': size, 'rows': rows}


def _measure_row(name: str, folder: str, size: int, workers: int) -> dict[str, Any]:
    train = streams.open_streams(name, size, 'caffe', folder, workers=workers).train
    count = max(_TIMED_BATCHES, len(train) // _BATCH)
    own = contextlib.nullcontext(os.cpu_count() or 1) if workers else timing.on_one_core()
    # Batches never end, so as many lie ready after the last as after the first.
    with own as cores, contextlib.closing(_endless(train)) as batches:
        for _ in itertools.islice(batches, _WARM_UP_BATCHES):
            pass
        started = time.perf_counter()
        for _ in itertools.islice(batches, count):
            pass
        images_per_s = count * _BATCH / (time.perf_counter() - started)
    return {
        'workers': workers,
        'cores': cores,
        'images_per_s': images_per_s,
        'images_per_core_s': images_per_s / cores,
    }


def _endless(train: streams.StreamedSplit) -> Generator[Any]:
    yield from train.train_batches([0], _BATCH, 0)


def make_photograph(random: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Makes a smooth colour image with grain as of a photograph."""
    width, height = size
    coarse = random.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    pixels = smooth + random.normal(0, 8, (height, width, 1))
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
