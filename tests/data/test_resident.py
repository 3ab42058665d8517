"""Tests of data.resident: what it prepares, reads and refuses."""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from archives import write_idx
from tensorflow_datasets.core.download import checksums

from experiments.data import builders, resident

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRAIN, TEST, VALIDATION = 30, 12, 5


def pairs(images, labels):
    """Returns the (pixels, label) pairs, sorted, for TFDS shuffles what it prepares."""
    return sorted(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


@pytest.fixture
def copied_dir(digits_dir, tmp_path):
    """A copy of digits_dir without its cache."""
    folder = tmp_path / 'copy'
    shutil.copytree(digits_dir, folder)
    shutil.rmtree(folder / 'dns_jax_cache')
    return folder


@pytest.fixture
def small_files(tmp_path, monkeypatch):
    """Small IDX files whose sizes and checksums stand in for those of both downloaded sets."""
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (('train', TRAIN), ('test', TEST)):
        arrays[f'{split}_images'] = random.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f'{split}_labels'] = random.integers(0, 10, (count,), np.uint8)
    folder = tmp_path / 'manual'
    folder.mkdir()
    known = {}
    for key, array in arrays.items():
        path = folder / builders._IDX_FILES[key]
        write_idx(path, array)
        content = path.read_bytes()
        for name in ('mnist', 'fashion_mnist'):
            known[tfds.builder_cls(name).URL + path.name] = checksums.UrlInfo(
                len(content), hashlib.sha256(content).hexdigest(), path.name
            )
    monkeypatch.setattr(checksums, 'get_all_url_infos', lambda: dict(known))
    source = resident._Source('3.0.1', TRAIN, TEST, VALIDATION)
    monkeypatch.setattr(
        resident, '_SOURCES', {**resident._SOURCES, 'mnist': source, 'fashion_mnist': source}
    )
    return folder, arrays


def test_sizes_of_the_published_sets():
    for name in ('mnist', 'fashion_mnist'):
        source = resident._SOURCES[name]
        assert (source.train, source.test, source.validation) == (60_000, 10_000, 5_000)
        assert source.version == str(tfds.builder_cls(name).VERSION)
    for name in ('cifar10', 'cifar10_part'):
        source = resident._SOURCES[name]
        train, test = (50_000, 10_000) if name == 'cifar10' else (45_000, 6_000)
        assert (source.train, source.test, source.validation) == (train, test, 5_000)
    assert resident._SOURCES['cifar10'].version == str(tfds.builder_cls('cifar10').VERSION)


def test_digits_shapes_types_and_order(digits_dir):
    digits = resident.load('digits', digits_dir)
    assert digits.name == 'digits'
    for split, count in ((digits.train, 1237), (digits.validation, 200), (digits.test, 360)):
        assert (split.images.shape, split.images.dtype) == ((count, 28, 28, 1), np.uint8)
        assert (split.labels.shape, split.labels.dtype) == ((count,), np.int32)
    labels = [digits.train.labels, digits.validation.labels, digits.test.labels]
    np.testing.assert_array_equal(np.concatenate(labels), sklearn.datasets.load_digits().target)


def test_digits_are_enlarged_bilinearly(digits_dir):
    digits = resident.load('digits', digits_dir)
    found = np.concatenate([digits.train.images, digits.validation.images, digits.test.images])
    places = np.clip((np.arange(28) + 0.5) / 3.5 - 0.5, 0, 7)
    lower = np.minimum(places.astype(int), 6)
    weights = np.zeros((28, 8))
    weights[np.arange(28), lower] = 1 - (places - lower)
    weights[np.arange(28), lower + 1] = places - lower
    expected = weights @ (sklearn.datasets.load_digits().images * 255 / 16) @ weights.T
    np.testing.assert_allclose(found[..., 0], expected, rtol=0, atol=2)


def test_train_on_all_keeps_the_validation_images(digits_dir):
    part = resident.load('digits', digits_dir)
    whole = resident.load('digits', digits_dir, train_on_all=True)
    assert len(whole.train.images) == 1437
    np.testing.assert_array_equal(whole.train.images[:-200], part.train.images)
    np.testing.assert_array_equal(whole.train.labels[-200:], part.validation.labels)
    np.testing.assert_array_equal(whole.train.images[-200:], part.validation.images)
    np.testing.assert_array_equal(whole.validation.images, part.validation.images)
    np.testing.assert_array_equal(whole.test.labels, part.test.labels)


def test_cached_load_does_not_import_tfds(digits_dir):
    code = (
        'import sys; from experiments.data import resident; resident.load("digits", sys.argv[1]); '
        'sys.exit("tensorflow_datasets" in sys.modules or "tensorflow" in sys.modules)'
    )
    command = [sys.executable, '-W', 'error', '-c', code, str(digits_dir)]
    subprocess.run(command, cwd=ROOT, check=True)


def test_default_data_dir_is_that_of_tfds(digits_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(resident, '_prepare', lambda *args: pytest.fail('the cache was not found'))
    monkeypatch.setenv('TFDS_DATA_DIR', str(digits_dir))
    assert resident.load('digits').name == 'digits'
    monkeypatch.delenv('TFDS_DATA_DIR')
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'tensorflow_datasets').symlink_to(digits_dir)
    assert resident.load('digits').name == 'digits'
    assert resident.load('digits', '~/tensorflow_datasets').name == 'digits'


@pytest.mark.parametrize('name', ['mnist', 'fashion_mnist'])
def test_idx_files_become_the_standard_folder(name, small_files, tmp_path, no_network):
    manual_dir, arrays = small_files
    loaded = resident.load(name, tmp_path, manual_dir)
    assert len(loaded.train.images) == TRAIN - VALIDATION
    assert len(loaded.validation.images) == VALIDATION
    whole = resident.load(name, tmp_path, train_on_all=True)
    for split, part in (('train', whole.train), ('test', whole.test)):
        assert pairs(part.images, part.labels) == pairs(
            arrays[f'{split}_images'], arrays[f'{split}_labels']
        )
    stock = tfds.builder_from_directory(tmp_path / name / '3.0.1')
    assert stock.info.file_format is tfds.core.FileFormat.ARRAY_RECORD
    assert stock.info.features['label'].names == tfds.builder(name).info.features['label'].names
    last = stock.as_data_source(f'train[-{VALIDATION}:]')
    np.testing.assert_array_equal([e['image'] for e in last], loaded.validation.images)
    np.testing.assert_array_equal([e['label'] for e in last], loaded.validation.labels)


def test_published_mnist_passes_the_checksums_of_tfds(
    mnist_files, tmp_path, monkeypatch, no_network
):
    read = builders.read_idx
    whole = {key: read(mnist_files / file) for key, file in builders._IDX_FILES.items()}
    assert whole['train_images'].shape == (60_000, 28, 28)
    assert whole['test_images'].shape == (10_000, 28, 28)
    assert np.bincount(whole['train_labels'])[:3].tolist() == [5923, 6742, 5958]
    # A slice of it goes the whole way, for decoding all takes most of a minute on some machines.
    source = resident._Source('3.0.1', train=300, test=300, validation=50)
    monkeypatch.setitem(resident._SOURCES, 'mnist', source)
    monkeypatch.setattr(builders, 'read_idx', lambda path: read(path)[:300])
    loaded = resident.load('mnist', tmp_path, mnist_files, train_on_all=True)
    assert pairs(loaded.train.images, loaded.train.labels) == pairs(
        whole['train_images'][:300], whole['train_labels'][:300]
    )


def test_no_data_and_no_network_names_both_ways_out(tmp_path, no_network):
    with pytest.raises(RuntimeError, match='network') as caught:
        resident.load('mnist', tmp_path)
    assert isinstance(caught.value.__cause__, OSError)
    assert '--manual_dir' in str(caught.value)
    for file in builders._IDX_FILES.values():
        assert file in str(caught.value)
    assert len(no_network) <= 4 * len(builders._IDX_FILES)  # Else the user waits for minutes.
    assert not (tmp_path / 'mnist' / '3.0.1').exists()
    assert not list((tmp_path / 'dns_jax_cache').iterdir())


def test_unknown_checksum_is_refused(small_files, tmp_path, monkeypatch, no_network):
    monkeypatch.setattr(checksums, 'get_all_url_infos', dict)
    with pytest.raises(ValueError, match='checksums'):
        resident.load('mnist', tmp_path, small_files[0])


def test_wrong_checksum_is_refused(small_files, tmp_path, no_network):
    path = small_files[0] / builders._IDX_FILES['test_labels']
    write_idx(path, np.zeros((TEST,), np.uint8))
    with pytest.raises(RuntimeError, match='wrong checksum') as caught:
        resident.load('mnist', tmp_path, small_files[0])
    assert str(path) in str(caught.value)
    assert not (tmp_path / 'mnist' / '3.0.1').exists()


BAD_CALLS = {
    "name='cifar100'.*digits, mnist, fashion_mnist, cifar10, cifar10_part": {'name': 'cifar100'},
    "name=''.*digits, mnist, fashion_mnist": {'name': ''},
    "manual_dir='.*nowhere'.*folder that exists": {'manual_dir': '/nowhere'},
    "data_dir=''.*local folder": {'data_dir': ''},
    "data_dir='gs://bucket/sets'.*local folder": {'data_dir': 'gs://bucket/sets'},
}


@pytest.mark.parametrize('message', BAD_CALLS)
def test_bad_arguments(message, tmp_path):
    with pytest.raises(ValueError, match=message):
        resident.load(**{'name': 'digits', 'data_dir': tmp_path, **BAD_CALLS[message]})


def test_data_dir_must_be_writable(tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    with pytest.raises(OSError, match=r"data_dir='.*below'.*written to"):
        resident.load('digits', str(tmp_path / 'file' / 'below'))


def test_data_dir_must_not_be_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda *args: False)
    with pytest.raises(OSError, match=r'data_dir=.*written to.*read-only'):
        resident.load('digits', str(tmp_path))


def damage_truncated(path, arrays):
    np.savez(path, **arrays)
    os.truncate(path, path.stat().st_size // 2)


def damage_flipped(path, arrays):
    np.savez(path, **arrays)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def with_arrays(change):
    def damage(path, arrays):
        change(arrays)
        np.savez(path, **arrays)

    return damage


DAMAGES = {
    'truncated': damage_truncated,
    'one byte': damage_flipped,
    'missing key': with_arrays(lambda arrays: arrays.pop('test_labels')),
    'extra key': with_arrays(lambda arrays: arrays.update(more=np.zeros(1))),
    'count': with_arrays(lambda arrays: arrays.update(train_labels=arrays['train_labels'][1:])),
    'type': with_arrays(lambda arrays: arrays.update(test_images=arrays['test_images'] * 1.0)),
    'object': with_arrays(
        lambda arrays: arrays.update(test_labels=arrays['test_labels'].astype(object))
    ),
    'label': with_arrays(lambda arrays: arrays.update(test_labels=arrays['test_labels'] + 1)),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_cache(damage, digits_dir, tmp_path):
    cache = tmp_path / 'dns_jax_cache' / 'digits-1.0.0.npz'
    cache.parent.mkdir()
    with np.load(digits_dir / 'dns_jax_cache' / cache.name, allow_pickle=False) as stored:
        DAMAGES[damage](cache, dict(stored))
    with pytest.raises(ValueError, match=r'digits-1\.0\.0\.npz is damaged.*Delete it'):
        resident.load('digits', tmp_path)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_cache_is_never_unpickled(tmp_path):
    cache = tmp_path / 'dns_jax_cache' / 'digits-1.0.0.npz'
    cache.parent.mkdir()
    np.savez(cache, train_images=np.array([Payload(tmp_path / 'made')], object))
    with pytest.raises(ValueError, match='is damaged'):
        resident.load('digits', tmp_path)
    assert not (tmp_path / 'made').exists()


def test_cache_is_written_whole_or_not_at_all(copied_dir, monkeypatch):
    def fail(file, **arrays):
        file.write(b'a part')
        raise OSError('no space left')

    monkeypatch.setattr(np, 'savez', fail)
    with pytest.raises(OSError, match='no space left'):
        resident.load('digits', copied_dir)
    assert not list((copied_dir / 'dns_jax_cache').iterdir())
    monkeypatch.undo()
    resident.load('digits', copied_dir)
    assert [path.name for path in (copied_dir / 'dns_jax_cache').iterdir()] == ['digits-1.0.0.npz']


@pytest.mark.parametrize(('length', 'cause'), [(131_072, '0'), (65_536, '0 records, wanted 1437')])
def test_half_prepared_folder(length, cause, copied_dir):
    """Cut at the second length, the reader finds no records, yet gives empty ones."""
    os.truncate(next((copied_dir / 'digits' / '1.0.0').glob('*train*')), length)
    with pytest.raises(ValueError, match=rf'digits/1\.0\.0 cannot be read: .*{cause}.*Delete it'):
        resident.load('digits', copied_dir)
    assert not list((copied_dir / 'dns_jax_cache').iterdir())


def test_too_few_examples(copied_dir, monkeypatch):
    source = resident._Source('1.0.0', train=1_437, test=361, validation=200)
    monkeypatch.setitem(resident._SOURCES, 'digits', source)
    with pytest.raises(ValueError, match='test split holds 360 examples, wanted 361'):
        resident.load('digits', copied_dir)


def test_two_may_prepare_at_once(tmp_path, monkeypatch):
    """Beside what a third left unfinished."""
    left = tmp_path / 'digits' / 'incomplete.AAAAAA_1.0.0'
    left.mkdir(parents=True)
    (left / 'digits-train.array_record-00000-of-00001').write_bytes(b'a part')
    original = sklearn.datasets.load_digits

    def overtaken(**kwargs):
        monkeypatch.setattr(sklearn.datasets, 'load_digits', original)
        resident.load('digits', tmp_path)
        return original(**kwargs)

    monkeypatch.setattr(sklearn.datasets, 'load_digits', overtaken)
    assert len(resident.load('digits', tmp_path).test.images) == 360


def test_builders_stay_out_of_the_registry(digits_dir):
    del digits_dir
    assert 'digits' not in tfds.list_builders(with_community_datasets=False)
    assert tfds.builder_cls('mnist').__module__.startswith('tensorflow_datasets.')
