"""Tests of data.texts: which windows come when, how a text is split, and what is refused."""

import hashlib
import json
import os
import sys

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from shapes_builder import Shapes
from tensorflow_datasets.core.download import checksums

from experiments.data import streams, texts

TEXT = bytes(np.random.default_rng(0).choice(list(b'\n !?abcXYZ'), 230).astype(np.uint8))
TRAIN, VALIDATION = 207, 11  # of 230 characters; 12 are left to test


def make_split(characters, context):
    tokens = np.random.default_rng(characters).integers(0, 65, (characters,), np.uint8)
    return texts.TextSplit(tokens, context)


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Puts a text and its checksum in the place of tiny Shakespeare's; returns its folder."""
    known = tfds.builder_cls('tiny_shakespeare').url_infos
    (url,) = known

    def publish(text=TEXT):
        checksum = hashlib.sha256(text).hexdigest()
        monkeypatch.setitem(known, url, checksums.UrlInfo(len(text), checksum, 'input.txt'))
        folder = tmp_path / 'manual'
        folder.mkdir(exist_ok=True)
        (folder / 'input.txt').write_bytes(text)
        return folder

    return publish


@pytest.fixture
def load(publish, tmp_path, no_network):
    """Loads the short text, which lies prepared."""
    texts.load('tiny_shakespeare', 1, tmp_path / 'data', publish())

    def load(context=4, **options):
        return texts.load('tiny_shakespeare', context, tmp_path / 'data', **options)

    return load


def spell(loaded, split):
    return bytes(loaded.alphabet[token] for token in split.tokens)


@pytest.mark.parametrize(('characters', 'context'), [(50, 7), (9, 8), (2, 1), (300, 1)])
def test_windows_to_train_on(characters, context):
    split = make_split(characters, context)
    assert len(split) == characters - context
    numbers = np.random.default_rng(1).permutation(len(split)).astype(np.int32)
    arrays = jax.device_put(split.arrays)
    for gather, place in ((split.gather, split.arrays), (jax.jit(split.gather), arrays)):
        inputs, labels = map(np.asarray, gather(place, numbers))
        assert inputs.shape == labels.shape == (len(split), context)
        assert inputs.dtype == labels.dtype == np.int32
        for row, number in enumerate(numbers):
            for column in range(context):
                assert inputs[row, column] == split.tokens[number + column]
                assert labels[row, column] == split.tokens[number + column + 1]


@pytest.mark.parametrize(
    ('characters', 'parts'), [(4, 1), (5, 1), (768, 1), (769, 1), (770, 2), (1537, 2), (1538, 3)]
)
def test_windows_to_evaluate_on(characters, parts):
    split = make_split(characters, context=3)
    batches = list(split.batches())
    assert len(batches) == parts
    for inputs, labels in batches:
        assert inputs.shape == labels.shape == (256, 3)
        assert inputs.dtype == labels.dtype == np.int32
    place = 0
    for inputs, labels in batches:
        for row in range(256):
            for column in range(3):
                more = place + 1 < characters
                assert inputs[row, column] == (split.tokens[place] if more else 0)
                assert labels[row, column] == (split.tokens[place + 1] if more else -1)
                place += 1


def test_splits_are_those_of_tfds(load, tmp_path):
    loaded = load()
    assert (loaded.name, loaded.alphabet) == ('tiny_shakespeare', b'\n !?XYZabc')
    whole = load(train_on_all=True)
    end = TRAIN + VALIDATION
    for split, part in (
        ((loaded, loaded.train), TEXT[:TRAIN]),
        ((loaded, loaded.validation), TEXT[TRAIN:end]),
        ((loaded, loaded.test), TEXT[end:]),
        ((whole, whole.train), TEXT[:end]),
        ((whole, whole.validation), TEXT[TRAIN:end]),
        ((whole, whole.test), TEXT[end:]),
    ):
        assert spell(*split) == part
        assert (split[1].tokens.dtype, split[1].context) == (np.uint8, 4)
    stock = tfds.builder('tiny_shakespeare', data_dir=tmp_path / 'data')
    assert stock.info.full_name == 'tiny_shakespeare/1.0.0'
    assert stock.info.file_format is tfds.core.FileFormat.ARRAY_RECORD
    stored = tfds.builder_from_directory(stock.data_path).info
    assert (stored.description, stored.citation) == (stock.info.description, stock.info.citation)
    assert 'Karpathy' in stored.citation
    (example,) = stock.as_data_source('validation')
    assert example == {'text': TEXT[TRAIN:end]}
    assert type(stock).__module__.startswith('tensorflow_datasets.')
    assert 'tensorflow' not in sys.modules


def test_alphabet_is_that_of_all_splits(publish, tmp_path, no_network):
    """However rare a character is: who trains on a part may test on all."""
    folder = publish(b'c' * TRAIN + b'b' * VALIDATION + b'a' * 12)
    loaded = texts.load('tiny_shakespeare', 4, tmp_path / 'data', folder)
    assert loaded.alphabet == b'abc'
    splits = loaded.train, loaded.validation, loaded.test
    assert [set(split.tokens.tolist()) for split in splits] == [{2}, {1}, {0}]


def test_windows_must_fit_into_each_split(load):
    assert [len(split) for split in (load(10).train, load(10).validation)] == [197, 1]
    for context in (-1, 0, 11, 300):
        characters = 207 if context in (-1, 0, 300) else 11
        message = f'context={context}: wanted a positive number .* fewer than the {characters} of'
        with pytest.raises(ValueError, match=message):
            load(context)


def test_the_text_of_tfds(text_files, tmp_path, no_network):
    """Whose checksum TFDS knows."""
    loaded = texts.load('tiny_shakespeare', 64, tmp_path, text_files)
    splits = loaded.train, loaded.validation, loaded.test
    assert [len(split.tokens) for split in splits] == [1_003_854, 55_770, 55_770]
    alphabet = b"\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert loaded.alphabet == alphabet
    spelled = np.frombuffer(alphabet, np.uint8)[np.concatenate([each.tokens for each in splits])]
    assert spelled.tobytes() == (text_files / 'input.txt').read_bytes()
    assert spelled.tobytes().startswith(b'First Citizen:\nBefore we proceed')
    inputs, labels = loaded.train.gather(loaded.train.arrays, np.array([3, 1_003_789], np.int32))
    first = [bytes(alphabet[token] for token in row[:5]) for row in (inputs[0], labels[0])]
    assert first == [b'st Ci', b't Cit']
    assert labels[1, -1] == loaded.train.tokens[-1]


def test_a_changed_text_is_refused(publish, tmp_path, no_network):
    path = publish() / 'input.txt'
    path.write_bytes(TEXT[:-1] + b'!')
    with pytest.raises(RuntimeError, match='wrong checksum') as caught:
        texts.load('tiny_shakespeare', 4, tmp_path / 'data', path.parent)
    assert str(path) in str(caught.value)
    assert not (tmp_path / 'data' / 'tiny_shakespeare' / '1.0.0').exists()


def test_no_text_and_no_network_names_both_ways_out(tmp_path, no_network):
    with pytest.raises(
        RuntimeError, match=r'network, or put input\.txt into a folder.*--manual_dir'
    ):
        texts.load('tiny_shakespeare', 4, tmp_path / 'data')
    (tmp_path / 'manual').mkdir()
    with pytest.raises(ValueError, match=r'--manual_dir=\S*manual lacks input\.txt\. Leave it out'):
        texts.load('tiny_shakespeare', 4, tmp_path / 'data', tmp_path / 'manual')


BAD_CALLS = {
    "name='digits': wanted one of tiny_shakespeare": {'name': 'digits'},
    "manual_dir='.*nowhere'.*folder that exists": {'manual_dir': '/nowhere'},
    "data_dir='gs://bucket/sets'.*local folder": {'data_dir': 'gs://bucket/sets'},
}


@pytest.mark.parametrize('message', BAD_CALLS)
def test_bad_arguments(message, tmp_path):
    arguments = {'name': 'tiny_shakespeare', 'context': 4, 'data_dir': tmp_path}
    with pytest.raises(ValueError, match=message):
        texts.load(**{**arguments, **BAD_CALLS[message]})


def test_data_dir_must_be_writable(publish, tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    with pytest.raises(OSError, match='below'):
        texts.load('tiny_shakespeare', 4, tmp_path / 'file' / 'below', publish())


def flip(folder):
    path = next(folder.glob('*train*'))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def drop_test(folder):
    path = folder / 'dataset_info.json'
    info = json.loads(path.read_text())
    info['splits'] = [split for split in info['splits'] if split['name'] != 'test']
    path.write_text(json.dumps(info))


DAMAGES = {
    'has no dataset_info.json': lambda folder: (folder / 'dataset_info.json').unlink(),
    'JSON': lambda folder: os.truncate(folder / 'dataset_info.json', 20),
    'train.array_record.* is missing': lambda folder: next(folder.glob('*train*')).unlink(),
    'holds 0 records, wanted 1': lambda folder: os.truncate(next(folder.glob('*test*')), 60),
    'test': drop_test,
    '': flip,
}


@pytest.mark.parametrize('cause', DAMAGES)
def test_damaged_folder(cause, load, tmp_path):
    DAMAGES[cause](tmp_path / 'data' / 'tiny_shakespeare' / '1.0.0')
    message = rf'(?s)tiny_shakespeare.1\.0\.0 cannot be read: .*{cause}.*Delete it'
    with pytest.raises(ValueError, match=message):
        load()


def test_a_text_is_no_set_of_images(load, tmp_path):
    message = r"name='tiny_shakespeare': wanted a set with image, Image and label, ClassLabel"
    with pytest.raises(ValueError, match=message):
        streams.open_streams('tiny_shakespeare', 28, 'whole', tmp_path / 'data')


def test_images_are_no_text(tmp_path):
    fields = {'VERSION': tfds.core.Version('1.0.0')}
    images = type('TinyShakespeare', (Shapes,), fields, skip_registration=True)
    images(data_dir=tmp_path).download_and_prepare(file_format='array_record')
    with pytest.raises(ValueError, match=r"name='tiny_shakespeare': wanted a set with text, Text"):
        texts.load('tiny_shakespeare', 4, tmp_path)
