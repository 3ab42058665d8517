"""Tests of data.streams: which images come when, how they are cut, and what is refused."""

import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import time

import archives
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments.data import builders, resident, streams

SYNSETS = ['n01440764', 'n01443537', 'n01484850']  # the first classes of ImageNet


def split_of(count, classes=10, workers=0, **changes):
    """Returns a split of images that differ, each showing its number as its red."""
    examples = [
        {
            'image': archives.encode(Image.new('RGB', (9, 7), (index, 0, 0)), 'PNG'),
            'label': index % classes,
        }
        for index in range(count)
    ]
    source = changes.pop('source', examples)
    fields = {'image_size': 4, 'crop': 'whole', **changes}
    return streams.StreamedSplit(source, 'a set', classes, workers=workers, **fields)


def numbers(images):
    return images[:, 0, 0, 0].tolist()


def assert_same(found, expected):
    """Compares lists of (images, labels), which must have the same number of batches."""
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(left[0], right[0])
        np.testing.assert_array_equal(left[1], right[1])


@pytest.fixture(scope='module')
def imagenet_dir(tmp_path_factory):
    """A data_dir with 60 training and 8 validation images as of ImageNet."""
    folder = tmp_path_factory.mktemp('imagenet')
    with pytest.MonkeyPatch.context() as patch:
        validation = [SYNSETS[number % 3] for number in range(8)]
        files = {'labels.txt': SYNSETS, 'validation_labels.txt': validation}
        patch.setattr(builders, '_read_synsets', files.__getitem__)
        patch.setattr(builders, '_IMAGENET_COUNTS', {'train': 60, 'validation': 8})
        archives.make_imagenet_archives(folder / 'manual', SYNSETS, 20, 8, size=(60, 45))
        builders.prepare('imagenet2012', folder, folder / 'manual')
    return folder


@pytest.fixture
def open_imagenet(imagenet_dir, monkeypatch):
    """Opens the small ImageNet, of whose training images 6 are kept to validate."""
    monkeypatch.setitem(resident.VALIDATION_IMAGES, 'imagenet2012', 6)

    def open_it(crop='caffe', folder=imagenet_dir, **options):
        return streams.open_streams('imagenet2012', 32, crop, folder, **options)

    return open_it


def test_digits_are_those_of_data(digits_dir):
    arrays = resident.load('digits', digits_dir)
    streamed = streams.open_streams('digits', 28, 'whole', digits_dir)
    assert (streamed.name, streamed.classes, streamed.image_shape) == ('digits', 10, (28, 28, 3))
    for split in ('train', 'validation', 'test'):
        expected, found = getattr(arrays, split), getattr(streamed, split)
        assert len(found) == len(expected.labels)
        images, labels = next(found.batches(len(found)))
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(images, np.repeat(expected.images, 3, axis=3))
        np.testing.assert_array_equal(labels, expected.labels)


def test_imagenet_splits(open_imagenet):
    part, whole = open_imagenet(), open_imagenet(train_on_all=True)
    assert (part.classes, part.image_shape) == (1000, (32, 32, 3))
    assert [len(part.train), len(part.validation), len(part.test)] == [54, 6, 8]
    assert [len(whole.train), len(whole.validation), len(whole.test)] == [60, 6, 8]
    last = next(whole.train.batches(60))
    assert_same([next(part.train.batches(54))], [(last[0][:54], last[1][:54])])
    assert_same([next(part.validation.batches(6))], [(last[0][54:], last[1][54:])])


class Spots(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A set with a second image in every example."""

    VERSION = tfds.core.Version('1.0.0')
    splits = {}

    def _info(self):
        features = {
            'image': tfds.features.Image(shape=(None, None, 1)),
            'mask': tfds.features.Image(shape=(None, None, 1)),
            'label': tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(count) for name, count in self.splits.items()}

    def _generate_examples(self, count):
        for key in range(count):
            image = Image.new('L', (6, 5), key)
            yield key, {'image': image, 'mask': image, 'label': key % 3}


@pytest.fixture
def open_spots(tmp_path, monkeypatch):
    """Prepares and opens a set of the splits given, as {name: number of images}."""

    def open_it(**splits):
        monkeypatch.setattr(Spots, 'splits', splits)
        Spots(data_dir=tmp_path).download_and_prepare(file_format='array_record')
        return streams.open_streams('spots', 8, 'random_resized', tmp_path)

    return open_it


@pytest.mark.parametrize(
    'others', [{'test': 5, 'validation': 4}, {'validation': 4}], ids=lambda others: len(others)
)
def test_splits_of_another_set(others, open_spots):
    spots = open_spots(train=30, **others)
    assert [len(spots.train), len(spots.validation)] == [28, 2]  # 5 % of 30, rounded
    assert len(spots.test) == next(iter(others.values()))
    images, labels = next(spots.test.batches(len(spots.test)))
    assert sorted(numbers(images)) == list(range(len(spots.test)))
    assert labels.tolist() == [number % 3 for number in numbers(images)]


def test_set_without_a_test_split(open_spots):
    message = r"name='spots': wanted the splits train and test or validation, it has train$"
    with pytest.raises(ValueError, match=message):
        open_spots(train=30)


def test_set_too_small_to_split(open_spots):
    with pytest.raises(ValueError, match=r"name='spots': 9 training images are too few"):
        open_spots(train=9, test=1)


def test_sets_of_many_files_may_be_opened(digits_dir):
    """ImageNet has over a thousand, and each reader keeps all of them open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] - 1, before[1]))
    try:
        streams.open_streams('digits', 8, 'whole', digits_dir)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize('error', [ValueError, OSError])
def test_a_system_that_grants_no_more_open_files_is_let_be(monkeypatch, error):
    asked = []

    def refuse(kind, limits):
        asked.append(limits)
        raise error('not permitted')

    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, 'setrlimit', refuse)
    streams._raise_limit_of_open_files()
    assert asked == [(10_240, resource.RLIM_INFINITY)]


def test_evaluation_batches_are_padded():
    found = list(split_of(7).batches(3))
    assert [numbers(images) for images, _ in found] == [[0, 1, 2], [3, 4, 5], [6, 0, 0]]
    assert [labels.tolist() for _, labels in found] == [[0, 1, 2], [3, 4, 5], [6, -1, -1]]
    assert not found[-1][0][1:].any()


def test_evaluation_rows_beyond_the_end():
    found = list(split_of(4).batches(3, rows=slice(1, 3)))
    assert [labels.tolist() for _, labels in found] == [[1, 2], [-1, -1]]
    assert [images.shape for images, _ in found] == [(2, 4, 4, 3)] * 2


def test_every_epoch_holds_every_image_once():
    found = list(itertools.islice(split_of(10).train_batches([1], 4, 0), 10))
    order = [number for images, _ in found for number in numbers(images)]
    epochs = [tuple(order[start : start + 10]) for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 4
    labels = [label for _, labels in found for label in labels]
    assert labels == order
    assert {labels.dtype for _, labels in found} == {np.dtype(np.int32)}


def test_seeds_differ():
    def order(*seed):
        return numbers(next(split_of(20).train_batches(seed, 20, 0))[0])

    assert order(1, 2) == order(1, 2)
    orders = [order(1), order(2), order(1, 2), order(2, 1), order(2**40)]
    assert len({tuple(each) for each in orders}) == 5


def test_crops_differ_between_epochs_and_images():
    example = {'image': archives.encode(archives.photograph(80, 60)), 'label': 0}
    split = split_of(0, source=[example] * 4, image_size=24, crop='random_resized')
    found = itertools.islice(split.train_batches([5], 4, 0), 3)
    assert len({image.tobytes() for images, _ in found for image in images}) == 12


def test_start_goes_on_where_it_stopped(open_imagenet):
    split = open_imagenet().train
    unbroken = list(itertools.islice(split.train_batches([3, 1], 8, 0), 20))  # 54 images an epoch
    for start in (1, 5, 13):
        again = itertools.islice(split.train_batches([3, 1], 8, start), 20 - start)
        assert_same(again, unbroken[start:])


def test_far_starts_read_nothing_before_them():
    class Source(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    read = []
    split = split_of(0, source=Source(split_of(10).source))
    begun = split.train_batches([3], 2, 10**9)
    next(begun)
    begun.close()
    assert len(read) <= 2 * (2 * streams._THREADS + 1)  # what was being read ahead


def test_rows_are_parts_of_the_same_batches():
    split = split_of(10, image_size=8, crop='random_resized')
    whole = list(itertools.islice(split.train_batches([2], 6, 1), 4))
    for rows in (slice(0, 2), slice(2, 6), slice(None, 3), slice(3, None)):
        part = itertools.islice(split.train_batches([2], 6, 1, rows), 4)
        assert_same(part, [(images[rows], labels[rows]) for images, labels in whole])


def children():
    return {child.pid for child in multiprocessing.active_children()}


def test_workers_change_nothing_and_end(open_imagenet):
    split = open_imagenet('random_resized').train
    expected = list(itertools.islice(split.train_batches([3], 8, 5), 5))
    before = children()
    split = open_imagenet('random_resized', workers=1).train
    begun = split.train_batches([3], 8, 5)
    assert_same([next(begun) for _ in range(5)], expected)
    assert len(children() - before) == 1
    del begun
    assert children() == before


def test_worker_names_a_damaged_image():
    examples = split_of(10).source
    examples[7] = {**examples[7], 'image': examples[7]['image'][:50], 'file_name': b'seven.JPEG'}
    before = children()
    begun = split_of(0, source=examples, workers=2).batches(2)
    assert [numbers(next(begun)[0]) for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert len(children() - before) == 2
    with pytest.raises(ValueError, match=r"a set, image 7 'seven\.JPEG': ") as kept:
        next(begun)
    assert children() == before, 'the other worker still waits'
    del kept


@pytest.mark.slow
def test_killed_worker_is_missed():
    before = children()
    begun = split_of(10, workers=1).train_batches([1], 2, 0)
    next(begun)
    (worker,) = children() - before
    os.kill(worker, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match='Worker process was terminated'):
        list(itertools.islice(begun, 20))  # Some batches were ready.
    assert time.monotonic() - started < 20
    assert children() == before


BAD_EXAMPLES = {
    'cannot identify': {'image': b'no image'},
    'truncated': {'image': archives.encode(archives.photograph(40, 30))[:-300]},
    'label 10, wanted 0 to 9': {'label': 10},
    'label -1, wanted 0 to 9': {'label': -1},
}


@pytest.mark.parametrize('cause', BAD_EXAMPLES)
def test_bad_example_is_named(cause):
    examples = split_of(4).source
    examples[2].update(BAD_EXAMPLES[cause])
    with pytest.raises(ValueError, match=f'a set, image 2: .*{cause}'):
        list(split_of(0, source=examples).batches(4))
    with pytest.raises(ValueError, match=f'a set, image 2: .*{cause}'):
        list(itertools.islice(split_of(0, source=examples).train_batches([1], 4, 0), 1))


def test_damaged_image_of_imagenet_is_named(open_imagenet, imagenet_dir, tmp_path):
    shutil.copytree(imagenet_dir / 'imagenet2012', tmp_path / 'imagenet2012')
    shard = next((tmp_path / 'imagenet2012' / '5.1.0').glob('*validation.array*'))
    content = bytearray(shard.read_bytes())
    place = content.index(b'\xff\xd8\xff')
    content[place + 200 : place + 220] = bytes(20)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r'5\.1\.0 validation, image \d'):
        list(open_imagenet(folder=tmp_path).test.batches(8))


BAD_CALLS = {
    'batch_size=0': {'batch_size': 0},
    'start=-1': {'start': -1},
    r'seed=\(1, -1\)': {'seed': (1, -1)},
    r'rows=slice\(0, 9, None\)': {'rows': slice(0, 9)},
    r'rows=slice\(2, 2, None\)': {'rows': slice(2, 2)},
    r'rows=slice\(0, 4, 2\)': {'rows': slice(0, 4, 2)},
}


@pytest.mark.parametrize('message', BAD_CALLS)
def test_bad_arguments_of_a_split(message):
    arguments = {'seed': (1,), 'batch_size': 8, 'start': 0, **BAD_CALLS[message]}
    with pytest.raises(ValueError, match=f'{message}: wanted'):
        split_of(10).train_batches(**arguments)
    if not {'seed', 'start'} & set(BAD_CALLS[message]):
        del arguments['seed'], arguments['start']
        with pytest.raises(ValueError, match=f'{message}: wanted'):
            split_of(10).batches(**arguments)


BAD_OPENINGS = {
    'image_size=0': {'image_size': 0},
    "crop='centre': wanted one of caffe, random_resized, whole": {'crop': 'centre'},
    'workers=-1': {'workers': -1},
    "manual_dir='nowhere'": {'manual_dir': 'nowhere'},
    "data_dir='gs://bucket'": {'data_dir': 'gs://bucket'},
}


@pytest.mark.parametrize('message', BAD_OPENINGS)
def test_bad_arguments_of_open_streams(message, digits_dir):
    arguments = {'image_size': 28, 'crop': 'whole', 'data_dir': digits_dir}
    with pytest.raises(ValueError, match=message):
        streams.open_streams('digits', **{**arguments, **BAD_OPENINGS[message]})
