"""Tests of data.builders: what is prepared, what is refused, and what is named then."""

import io
import os
import shutil
import sys

import archives
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from shapes_builder import Shapes

from experiments.data import builders

SYNSETS = ['n01440764', 'n01443537', 'n01484850']  # the first classes of ImageNet
TRAIN, VALIDATION = 4, 5
TRAIN_TAR, VALIDATION_TAR = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'
ENCODED = {'image': tfds.decode.SkipDecoding()}


@pytest.fixture(autouse=True)
def few_classes(monkeypatch):
    """Lets ImageNet have three classes of four images."""
    labels = [SYNSETS[number % 3] for number in range(VALIDATION)]
    counts = {'train': TRAIN * len(SYNSETS), 'validation': VALIDATION}
    files = {'labels.txt': SYNSETS, 'validation_labels.txt': labels}
    monkeypatch.setattr(builders, '_read_synsets', files.__getitem__)
    monkeypatch.setattr(builders, '_IMAGENET_COUNTS', counts)


@pytest.fixture
def images():
    """Training images by synset and name, and validation images by name."""
    random = np.random.default_rng(0)

    def make():
        return archives.encode(archives.make_photograph(random, (40, 30)))

    train = {each: {f'{each}_{n}.JPEG': make() for n in range(TRAIN)} for each in SYNSETS}
    # Not in the order of their names, as in the published archive.
    names = [f'ILSVRC2012_val_{number:08d}.JPEG' for number in (3, 1, 5, 2, 4)]
    return train, {name: make() for name in names}


def prepare(tmp_path, train, validation):
    """Prepares ImageNet in tmp_path/data from archives in tmp_path/manual."""
    archives.write_imagenet(tmp_path / 'manual', train, validation)
    return builders.prepare('imagenet2012', tmp_path / 'data', tmp_path / 'manual')


def is_clean(tmp_path):
    """Whether the folder holds nothing that could be taken for a prepared set."""
    return not list((tmp_path / 'data' / 'imagenet2012').glob('*'))


def read(builder, split):
    """Returns {file name: (bytes, label)}."""
    examples = builder.as_data_source(split, decoders=ENCODED)
    return {e['file_name'].decode(): (e['image'], e['label']) for e in examples}


def test_imagenet_is_stored_byte_for_byte(images, tmp_path):
    train, validation = images
    builder = prepare(tmp_path, train, validation)
    assert read(builder, 'train') == {
        name: (content, label)
        for label, synset in enumerate(SYNSETS)
        for name, content in train[synset].items()
    }
    expected = {n: (validation[n], place % 3) for place, n in enumerate(sorted(validation))}
    assert read(builder, 'validation') == expected
    assert 'tensorflow' not in sys.modules


def test_imagenet_is_a_stock_folder(images, tmp_path):
    builder = prepare(tmp_path, *images)
    stock = tfds.builder('imagenet2012')
    assert builder.info.full_name == stock.info.full_name == 'imagenet2012/5.1.0'
    assert builder.info.features['label'].names == stock.info.features['label'].names
    assert sorted(builder.info.features) == sorted(stock.info.features)
    assert builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD
    again = tfds.builder('imagenet2012', data_dir=tmp_path / 'data')
    assert len(again.as_data_source('train')) == TRAIN * len(SYNSETS)
    assert tfds.builder_cls('imagenet2012').__module__.startswith('tensorflow_datasets.')


def test_prepared_folder_needs_no_archives(images, tmp_path):
    first = read(prepare(tmp_path, *images), 'train')
    shutil.rmtree(tmp_path / 'manual')
    again = builders.prepare('imagenet2012', tmp_path / 'data')
    assert read(again, 'train') == first


def test_published_numbers_and_labels(monkeypatch):
    monkeypatch.undo()
    assert builders._IMAGENET_COUNTS == {'train': 1_281_167, 'validation': 50_000}
    names = tfds.builder('imagenet2012').info.features['label'].names
    assert builders._read_synsets('labels.txt') == names
    labels = builders._read_synsets('validation_labels.txt')
    assert len(labels) == 50_000
    assert set(labels) == set(names)
    assert labels[0] == 'n01751748'  # ILSVRC2012_val_00000001 is a sea snake.


def test_cmyk_and_png_become_rgb_and_all_else_stays(images, tmp_path):
    train, validation = images
    picture = archives.make_photograph(np.random.default_rng(1), (40, 30))
    whole = archives.encode(picture)
    strange = {
        'cmyk': archives.encode(picture.convert('CMYK')),
        'png': archives.encode(picture, 'PNG'),
        'grey': archives.encode(picture.convert('L')),
        'more': whole + b'bytes after the end',
    }
    named = {f'{kind}.JPEG': content for kind, content in strange.items()}
    stored = read(prepare(tmp_path, {**train, SYNSETS[0]: named}, validation), 'train')
    for kind in ('cmyk', 'png'):
        with Image.open(io.BytesIO(stored[f'{kind}.JPEG'][0])) as image:
            assert (image.format, image.mode) == ('JPEG', 'RGB')
            difference = np.asarray(image).astype(int) - np.asarray(picture)
        assert np.abs(difference).mean() < 8
    for kind in ('grey', 'more'):
        assert stored[f'{kind}.JPEG'][0] == strange[kind]


DAMAGES = {
    'text': lambda content: b'<html>no image</html>',
    'cut': lambda content: content[: len(content) // 2],
    'end cut': lambda content: content[:-40],
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('file', [TRAIN_TAR, VALIDATION_TAR])
def test_damaged_image_is_named(file, damage, images, tmp_path):
    """And leaves nothing, not even a split that was whole."""
    own = images[0][SYNSETS[1]] if file == TRAIN_TAR else images[1]
    name = sorted(own)[-1]
    own[name] = DAMAGES[damage](own[name])
    with pytest.raises(ValueError, match=rf'{file}: {name} is no whole image'):
        prepare(tmp_path, *images)
    assert is_clean(tmp_path)


@pytest.mark.parametrize('file', [TRAIN_TAR, VALIDATION_TAR])
def test_missing_archive(file, images, tmp_path):
    archives.write_imagenet(tmp_path / 'manual', *images)
    (tmp_path / 'manual' / file).unlink()
    with pytest.raises(ValueError, match=rf'--manual_dir=\S*manual lacks {file}\. Get the'):
        builders.prepare('imagenet2012', tmp_path / 'data', tmp_path / 'manual')
    assert is_clean(tmp_path)


def test_no_manual_dir(tmp_path):
    with pytest.raises(ValueError, match=rf'manual lacks {TRAIN_TAR}, {VALIDATION_TAR}\.'):
        builders.prepare('imagenet2012', tmp_path / 'data')


@pytest.mark.parametrize('file', [TRAIN_TAR, VALIDATION_TAR])
@pytest.mark.parametrize('keep', [0.0, 0.3, 0.99])
def test_archive_cut_short(file, keep, images, tmp_path):
    archives.write_imagenet(tmp_path / 'manual', *images)
    path = tmp_path / 'manual' / file
    content = path.read_bytes().rstrip(b'\0')  # Zeros pad every tar.
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=file):
        builders.prepare('imagenet2012', tmp_path / 'data', tmp_path / 'manual')
    assert is_clean(tmp_path)


def test_class_archive_cut_short(images, tmp_path, monkeypatch):
    train, validation = images
    pack = archives.pack
    monkeypatch.setattr(archives, 'pack', lambda members: pack(members)[:1_500])
    with pytest.raises(ValueError, match=rf'{TRAIN_TAR}: {SYNSETS[0]}.tar is damaged'):
        prepare(tmp_path, train, validation)
    assert is_clean(tmp_path)


def test_missing_and_unknown_classes(images, tmp_path):
    train, validation = images
    del train[SYNSETS[1]]
    for number in range(5):
        train[f'n9999999{number}'] = {'a.JPEG': b''}
    message = rf"{TRAIN_TAR} holds 2 of 3 class archives; 1 are missing, as \['{SYNSETS[1]}.tar'\]"
    message += r".*5 are unknown, as \['n99999990.tar', .*, 'n99999992.tar'\]"
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, train, validation)
    assert is_clean(tmp_path)


@pytest.mark.parametrize('split', ['train', 'validation'])
@pytest.mark.parametrize('more', [-1, 1])
def test_wrong_number_of_images(split, more, images, tmp_path):
    changed = images[0][SYNSETS[0]] if split == 'train' else images[1]
    if more > 0:
        changed['one_more.JPEG'] = next(iter(changed.values()))
    else:
        changed.popitem()
    wanted = TRAIN * len(SYNSETS) if split == 'train' else VALIDATION
    file = TRAIN_TAR if split == 'train' else VALIDATION_TAR
    with pytest.raises(ValueError, match=f'{file} holds {wanted + more} images, wanted {wanted}'):
        prepare(tmp_path, *images)
    assert is_clean(tmp_path)


def cut_shard(folder, split, keep):
    path = next(folder.glob(f'*{split}.array_record*'))
    os.truncate(path, int(path.stat().st_size * keep))


HALVES = {
    'has no dataset_info.json': lambda folder: (folder / 'dataset_info.json').unlink(),
    'JSON': lambda folder: os.truncate(folder / 'dataset_info.json', 20),
    'train.array_record.* is missing': lambda folder: next(folder.glob('*train*')).unlink(),
    'validation.array_record.* holds 0 records, wanted 5': lambda folder: cut_shard(
        folder, 'validation', 0.99
    ),
    'train.array_record.* holds 0 records, wanted 3': lambda folder: cut_shard(folder, 'train', 0),
}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """A data_dir with ImageNet prepared; to be copied before it is changed."""
    folder = tmp_path_factory.mktemp('prepared')
    with pytest.MonkeyPatch.context() as patch:
        files = {'labels.txt': SYNSETS, 'validation_labels.txt': SYNSETS + SYNSETS[:2]}
        patch.setattr(builders, '_read_synsets', files.__getitem__)
        patch.setattr(builders, '_IMAGENET_COUNTS', {'train': 3, 'validation': 5})
        archives.make_imagenet_archives(folder / 'manual', SYNSETS, 1, 5, size=(40, 30))
        builders.prepare('imagenet2012', folder / 'data', folder / 'manual')
    return folder / 'data'


@pytest.mark.parametrize('cause', HALVES)
def test_half_a_folder(cause, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / 'data')
    HALVES[cause](tmp_path / 'data' / 'imagenet2012' / '5.1.0')
    message = rf'(?s)imagenet2012.5\.1\.0 cannot be read: .*{cause}.*Delete it'
    with pytest.raises(ValueError, match=message):
        builders.prepare('imagenet2012', tmp_path / 'data')


def test_tfrecord_needs_tensorflow(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / 'data')
    info = tmp_path / 'data' / 'imagenet2012' / '5.1.0' / 'dataset_info.json'
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    with pytest.raises(ValueError, match=r'tfrecord.*TensorFlow; wanted array_record'):
        builders.prepare('imagenet2012', tmp_path / 'data')


def test_cifar10(cifar10, tmp_path, no_network):
    builder = builders.prepare('cifar10', tmp_path / 'data', tmp_path / 'manual')
    assert builder.info.full_name == f'cifar10/{tfds.builder_cls("cifar10").VERSION}'
    assert builder.info.features['label'].names == archives.CIFAR10_CLASSES
    for split, (images, labels) in cifar10[1].items():
        found = {e['id'].decode(): e for e in builder.as_data_source(split)}
        assert len(found) == len(images)
        for place, (image, label) in enumerate(zip(images, labels, strict=True)):
            example = found[f'{split}_{place:05d}']
            np.testing.assert_array_equal(example['image'], image)
            assert example['label'] == label


def test_cifar10_without_a_network(tmp_path, no_network):
    with pytest.raises(RuntimeError, match=r'cifar-10-binary\.tar\.gz into a folder.*--manual_dir'):
        builders.prepare('cifar10', tmp_path / 'data')


@pytest.mark.parametrize('name', ['mnist', 'fashion_mnist', 'cifar10'])
def test_a_folder_without_the_files_is_told_before_any_download(name, tmp_path, monkeypatch):
    monkeypatch.setattr(builders, '_download_and_prepare', lambda *args: pytest.fail('it began'))
    (tmp_path / 'manual').mkdir()
    present, *missing = builders._FILES[name]
    if missing:
        (tmp_path / 'manual' / present).touch()
    lacks = ', '.join(missing or [present])
    message = rf'--manual_dir=\S*manual lacks {lacks}\. Leave it out'
    with pytest.raises(ValueError, match=message):
        builders.prepare(name, tmp_path / 'data', tmp_path / 'manual')


def test_attempts_to_download_are_quiet(tmp_path, no_network, caplog, capfd):
    with pytest.raises(RuntimeError, match='fashion_mnist could not be downloaded'):
        builders.prepare('fashion_mnist', tmp_path)
    assert 'Retrying' not in caplog.text + capfd.readouterr().err


def test_any_prepared_set_is_read(tmp_path):
    Shapes(data_dir=tmp_path).download_and_prepare(file_format='array_record')
    builder = builders.prepare('shapes', tmp_path)
    assert builder.info.full_name == 'shapes/2.0.0'
    assert sorted(e['image'][0, 0, 0] for e in builder.as_data_source('train')) == [0, 1, 2, 3]


def test_other_features_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Shapes, 'target', 'form')
    Shapes(data_dir=tmp_path).download_and_prepare(file_format='array_record')
    with pytest.raises(ValueError, match=r"name='shapes': wanted.*label[\s\S]*'form': ClassLabel"):
        builders.prepare('shapes', tmp_path)


def test_images_are_no_text(digits_dir):
    with pytest.raises(ValueError, match=r"name='digits': wanted a set with text, Text, but it"):
        builders.prepare('digits', digits_dir, wanted=builders.TEXT_FEATURES)


def test_damaged_folder_of_another_set(tmp_path):
    Shapes(data_dir=tmp_path).download_and_prepare(file_format='array_record')
    cut_shard(tmp_path / 'shapes' / '2.0.0', 'train', 0.5)
    with pytest.raises(ValueError, match=r'shapes.2\.0\.0 cannot be read: .*Delete it'):
        builders.prepare('shapes', tmp_path)
    os.truncate(tmp_path / 'shapes' / '2.0.0' / 'dataset_info.json', 20)
    with pytest.raises(RuntimeError, match=r'shapes can neither be read.*JSON'):
        builders.prepare('shapes', tmp_path)


def test_unknown_set(tmp_path, no_network):
    with pytest.raises(ValueError, match=r"name='no_such_set'.*known to TFDS, or one prepared in"):
        builders.prepare('no_such_set', tmp_path)


@pytest.mark.parametrize('name', ['cifar100', 'svhn_cropped'])
def test_what_cannot_be_prepared_here(name, tmp_path, no_network):
    message = (
        rf'{name} can neither be read.*here[\s\S]*tfds build {name} --file_format=array_record'
    )
    with pytest.raises(RuntimeError, match=message):
        builders.prepare(name, tmp_path)
    assert not list((tmp_path / name).glob('[0-9]*'))
