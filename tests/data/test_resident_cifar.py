"""Tests of data.resident on CIFAR-10: the full set, and the part that is only read."""

import dataclasses
import os
import pathlib

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from published import list_all

from experiments.data import builders, resident

TRAIN, TEST, VALIDATION = 11, 6, 4
PART = resident._SOURCES['cifar10_part']
FRONT = 300  # images of each real split that are decoded where not all need be


class Cifar10Part(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A part of CIFAR-10 as one would prepare it elsewhere, of made-up images."""

    VERSION = tfds.core.Version('1.0.0')
    size, mode, classes, last = (32, 32), 'RGB', 10, 9

    def _info(self):
        channels = len(self.mode) if self.mode == 'RGB' else 1
        image = tfds.features.Image(shape=(None, None, channels))
        label = tfds.features.ClassLabel(num_classes=self.classes)
        features = tfds.features.FeaturesDict({'image': image, 'label': label})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples(TRAIN), 'test': self._generate_examples(TEST)}

    def _generate_examples(self, count):
        for key, (image, label) in enumerate(zip(*make_part(count), strict=True)):
            image = Image.fromarray(image).resize(self.size).convert(self.mode)
            yield key, {'image': image, 'label': self.last if key == 2 else int(label)}


def make_part(count):
    """Returns the images and labels of a made-up split; the third label is 9."""
    random = np.random.default_rng(count)
    images = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = random.integers(0, 10, (count,), np.int32)
    labels[2] = 9
    return images, labels


@pytest.fixture
def small_part(monkeypatch):
    """Lets cifar10_part be as small as what is made up here."""
    small = dataclasses.replace(PART, train=TRAIN, test=TEST, validation=VALIDATION)
    monkeypatch.setitem(resident._SOURCES, 'cifar10_part', small)


def prepare_part(folder, **changes):
    """Prepares cifar10_part in a folder, and returns the one that it lies in."""
    part = type('Cifar10Part', (Cifar10Part,), changes, skip_registration=True)
    builder = part(data_dir=folder)
    builder.download_and_prepare(file_format='array_record')
    return pathlib.Path(builder.data_path)


def test_cifar10(cifar10, tmp_path, monkeypatch, no_network):
    source = dataclasses.replace(resident._SOURCES['cifar10'], train=15, test=4, validation=5)
    monkeypatch.setitem(resident._SOURCES, 'cifar10', source)
    loaded = resident.load('cifar10', tmp_path, tmp_path / 'manual')
    monkeypatch.setattr(resident, '_prepare', lambda *args: pytest.fail('the cache was not found'))
    whole = resident.load('cifar10', tmp_path, train_on_all=True)
    for split, part in (('train', whole.train), ('test', whole.test)):
        assert (part.images.dtype, part.labels.dtype) == (np.uint8, np.int32)
        found = {image.tobytes(): label for image, label in zip(*part.arrays, strict=True)}
        images, labels = cifar10[1][split]  # TFDS shuffles what it prepares.
        assert part.images.shape == images.shape == (len(found), 32, 32, 3)
        assert found == {
            image.tobytes(): label for image, label in zip(images, labels, strict=True)
        }
    np.testing.assert_array_equal(loaded.train.images, whole.train.images[:-5])
    np.testing.assert_array_equal(loaded.validation.images, whole.train.images[-5:])
    assert [path.name for path in (tmp_path / 'dns_jax_cache').iterdir()] == ['cifar10-3.0.2.npz']


def test_a_part_is_read_in_its_order_and_nothing_is_written(small_part, tmp_path, monkeypatch):
    prepare_part(tmp_path / 'data')
    before = list_all(tmp_path)
    monkeypatch.setattr(os, 'access', lambda *args: False)  # as if all were read-only
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
    loaded = resident.load('cifar10_part', tmp_path / 'data')
    whole = resident.load('cifar10_part', tmp_path / 'data', train_on_all=True)
    assert list_all(tmp_path) == before
    images, labels = make_part(TRAIN)
    start = TRAIN - VALIDATION
    for split, part in (
        (loaded.train, slice(0, start)),
        (loaded.validation, slice(start, None)),
        (whole.train, slice(None)),
        (whole.validation, slice(start, None)),
    ):
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(split.images, images[part])
        np.testing.assert_array_equal(split.labels, labels[part])
    np.testing.assert_array_equal(loaded.test.images, make_part(TEST)[0])
    np.testing.assert_array_equal(loaded.test.labels, make_part(TEST)[1])


BAD_PARTS = {
    r'image 0 of train is \(31, 32, 3\), wanted \(32, 32, 3\)': {'size': (32, 31)},
    r'image 0 of train is \(32, 32, 1\), wanted \(32, 32, 3\)': {'mode': 'L'},
    'its labels reach outside 0 to 9': {'classes': 11, 'last': 10},
    r'its version is 1\.0\.1, wanted 1\.0\.0': {'VERSION': tfds.core.Version('1.0.1')},
}


@pytest.mark.parametrize('message', BAD_PARTS)
def test_another_part(message, small_part, tmp_path):
    prepare_part(tmp_path, **BAD_PARTS[message])
    with pytest.raises(ValueError, match=rf'cifar10_part.1\.0\.\d cannot be read: {message}'):
        resident.load('cifar10_part', tmp_path)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


DAMAGES = {
    'train.array_record.* is missing': lambda path: path.unlink(),
    'holds 0 records, wanted 11': lambda path: os.truncate(path, path.stat().st_size // 2),
    '': flip,
}


@pytest.mark.parametrize('cause', DAMAGES)
def test_damaged_part(cause, small_part, tmp_path):
    DAMAGES[cause](next(prepare_part(tmp_path).glob('*train*')))
    with pytest.raises(ValueError, match=rf'cifar10_part.1\.0\.0 cannot be read: .*{cause}'):
        resident.load('cifar10_part', tmp_path)


def test_missing_part(tmp_path, no_network):
    with pytest.raises(ValueError, match=r"name='cifar10_part'.*one prepared in \S*none"):
        resident.load('cifar10_part', tmp_path / 'none')
    assert not list(tmp_path.iterdir())


def test_too_few_images(tmp_path):
    prepare_part(tmp_path)
    with pytest.raises(ValueError, match='train split holds 11 examples, wanted 45000'):
        resident.load('cifar10_part', tmp_path)


def test_a_part_that_was_cut_off_while_it_was_prepared(tmp_path):
    os.truncate(prepare_part(tmp_path) / 'dataset_info.json', 20)
    with pytest.raises(RuntimeError, match=r'cifar10_part can neither be read.*JSON'):
        resident.load('cifar10_part', tmp_path)


class Front:
    """The first images of each split of a prepared set."""

    def __init__(self, builder):
        self.name, self.version, self.data_path = builder.name, builder.version, builder.data_path
        self._builder = builder

    def as_data_source(self, split):
        return self._builder.as_data_source(f'{split}[:{FRONT}]')


def test_front_of_the_real_part(prepared_sets, monkeypatch):
    source = dataclasses.replace(PART, train=FRONT, test=FRONT, validation=50)
    monkeypatch.setitem(resident._SOURCES, 'cifar10_part', source)
    prepare = builders.prepare
    monkeypatch.setattr(builders, 'prepare', lambda *arguments: Front(prepare(*arguments)))
    loaded = resident.load('cifar10_part', prepared_sets)
    # The first images of CIFAR-10 show a frog and two lorries.
    assert loaded.train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert loaded.train.images[0, 0, :2].tolist() == [[59, 62, 63], [43, 46, 45]]
    assert len(loaded.train) == FRONT - 50


@pytest.mark.slow
def test_all_of_the_real_part(prepared_sets):
    loaded = resident.load('cifar10_part', prepared_sets)
    counts = len(loaded.train), len(loaded.validation), len(loaded.test)
    assert counts == (40_000, 5_000, 6_000)
    # The last 1,000 are the first test images: a cat, two ships and a plane.
    assert loaded.test.labels[5_000:5_004].tolist() == [3, 8, 8, 0]
    labels = np.concatenate([loaded.train.labels, loaded.validation.labels, loaded.test.labels])
    assert np.bincount(labels[:50_000]).tolist() == [5_000] * 10


def test_images_are_held_to_those_of_a_network():
    grey = dict.fromkeys(('digits', 'mnist', 'fashion_mnist'), (28, 28, 1))
    coloured = dict.fromkeys(('cifar10', 'cifar10_part'), (32, 32, 3))
    assert {**grey, **coloured} == resident.IMAGE_SHAPES
    for name, shape in resident.IMAGE_SHAPES.items():
        resident.check_image_shape(name, shape)
    message = "name='cifar10': its images are 32x32x3, wanted 28x28x1, as those of digits, mnist,"
    with pytest.raises(ValueError, match=message):
        resident.check_image_shape('cifar10', (28, 28, 1))
    with pytest.raises(ValueError, match='wanted 1x2x3, as those of no set here are'):
        resident.check_image_shape('digits', (1, 2, 3))
    with pytest.raises(ValueError, match="name='cifar100': wanted one of digits, "):
        resident.check_image_shape('cifar100', (32, 32, 3))


def test_examples_are_gathered_by_number():
    split = resident.Split(*make_part(20))
    numbers = np.random.default_rng(0).integers(0, 20, (8,), np.int32)
    arrays = jax.device_put(split.arrays)
    for gather, place in ((split.gather, split.arrays), (jax.jit(split.gather), arrays)):
        images, labels = gather(place, numbers)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        for row, number in enumerate(numbers):
            np.testing.assert_array_equal(images[row], split.images[number])
            assert labels[row] == split.labels[number]
