"""Every data set, prepared and read through TFDS without TensorFlow, its arrays cached.

The first `load` of a set prepares its standard TFDS folder in the ArrayRecord format, decodes it,
and writes `data_dir/dns_jax_cache/<name>-<version>.npz`; later ones read that file alone.
"""

import dataclasses
import gzip
import io
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dns_jax.files import write_whole

_CLASSES = 10
_FILES = {
    'train_images': 'train-images-idx3-ubyte.gz',
    'train_labels': 'train-labels-idx1-ubyte.gz',
    'test_images': 't10k-images-idx3-ubyte.gz',
    'test_labels': 't10k-labels-idx1-ubyte.gz',
}


@dataclasses.dataclass(frozen=True)
class _Source:
    """What a prepared set must hold, and how many training images end it as validation images."""

    version: str
    train: int
    test: int
    validation: int


_SOURCES = {
    'digits': _Source('1.0.0', train=1_437, test=360, validation=200),
    'mnist': _Source('3.0.1', train=60_000, test=10_000, validation=5_000),
    'fashion_mnist': _Source('3.0.1', train=60_000, test=10_000, validation=5_000),
}
DATASETS = tuple(_SOURCES)


@dataclasses.dataclass(frozen=True)
class Split:
    """Images, (examples, 28, 28, 1) uint8, and their labels, (examples,) int32."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The three splits of a data set; its labels count from 0 to 9."""

    name: str
    train: Split
    validation: Split
    test: Split


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    train_on_all: bool = False,
) -> Dataset:
    """Loads a data set, preparing it first where that has not been done.

    Args:
      name: one of `DATASETS`. `digits` comes with scikit-learn, the others are downloaded.
      data_dir: local folder of the prepared sets; by default that of TFDS, `TFDS_DATA_DIR` or
        `~/tensorflow_datasets`.
      manual_dir: folder with files downloaded by hand, taken in place of a download.
      train_on_all: whether `train` holds the validation images too.

    Returns:
      The data set, its validation split the last images that TFDS gives for training: 5,000, or
      200 for `digits`.

    Raises:
      ValueError: an argument is wrong, or what `data_dir` holds is damaged or unreadable.
      OSError: nothing can be written to `data_dir`.
      RuntimeError: files are neither at hand nor to be had from the network.
    """
    if name not in _SOURCES:
        raise ValueError(f'name={name!r}: wanted one of {", ".join(DATASETS)}')
    if manual_dir is not None and not os.path.isdir(os.path.expanduser(manual_dir)):
        raise ValueError(f'manual_dir={manual_dir!r}: wanted a folder that exists')
    if data_dir is None:
        # The words of TFDS, said again because importing it takes longer than all that follows.
        data_dir = os.environ.get('TFDS_DATA_DIR') or os.path.join('~', 'tensorflow_datasets')
    if not os.fspath(data_dir) or '://' in os.fspath(data_dir):
        raise ValueError(f'data_dir={data_dir!r}: wanted a local folder')
    folder = pathlib.Path(data_dir).expanduser()
    source = _SOURCES[name]
    cache = folder / 'dns_jax_cache' / f'{name}-{source.version}.npz'
    if not cache.exists():
        _make_writable(cache.parent, data_dir)
        _write_cache(cache, _prepare(name, folder, manual_dir))
    arrays = _read_cache(cache, source)
    whole = Split(arrays['train_images'], arrays['train_labels'])
    start = source.train - source.validation
    return Dataset(
        name=name,
        train=whole if train_on_all else Split(whole.images[:start], whole.labels[:start]),
        validation=Split(whole.images[start:], whole.labels[start:]),
        test=Split(arrays['test_images'], arrays['test_labels']),
    )


def _make_writable(folder: pathlib.Path, data_dir: str | os.PathLike[str]) -> None:
    """Makes the cache folder, so that a `data_dir` of no use fails before the long work begins."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f'{folder} is read-only')
    except OSError as error:
        raise OSError(
            f'data_dir={data_dir!r}: wanted a folder that can be made and written to, but {error}'
        ) from error


def _write_cache(cache: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
    write_whole(cache, content.getvalue())


def _read_cache(cache: pathlib.Path, source: _Source) -> dict[str, np.ndarray]:
    """Reads {train,test}_{images,labels}, and holds them to what the source promises."""
    expected = {}
    for split, count in (('train', source.train), ('test', source.test)):
        expected[f'{split}_images'] = ((count, 28, 28, 1), np.dtype(np.uint8))
        expected[f'{split}_labels'] = ((count,), np.dtype(np.int32))
    with open(cache, 'rb') as file:
        try:
            with np.load(file, allow_pickle=False) as stored:
                arrays = dict(stored)
            found = {key: (array.shape, array.dtype) for key, array in arrays.items()}
            if found != expected:
                raise ValueError(f'it holds {found}, wanted {expected}')
            labels = np.concatenate([arrays['train_labels'], arrays['test_labels']])
            if labels.min() < 0 or labels.max() >= _CLASSES:
                raise ValueError(f'its labels reach outside 0 to {_CLASSES - 1}')
        except Exception as error:  # Damaged bytes raise a dozen types, all of one meaning.
            raise ValueError(f'{cache} is damaged: {error}. Delete it and run again.') from error
    return arrays


def _prepare(
    name: str, folder: pathlib.Path, manual_dir: str | os.PathLike[str] | None
) -> dict[str, np.ndarray]:
    """Prepares the TFDS folder of a set where there is none; reads it as `_read_cache` does."""
    # Imported only where a set is prepared: one that is cached need not wait for it.
    import tensorflow_datasets as tfds

    source = _SOURCES[name]
    prepared = folder / name / source.version
    builder_class = _digits_builder() if name == 'digits' else _idx_builder(name)
    if not prepared.exists():
        config = tfds.download.DownloadConfig(
            manual_dir=manual_dir, try_download_gcs=False, force_checksums_validation=True
        )
        builder = builder_class(data_dir=folder)
        try:
            builder.download_and_prepare(download_config=config, file_format='array_record')
        except OSError:
            if not prepared.exists():  # If it exists now, another process was quicker.
                raise
    try:
        if not (prepared / 'dataset_info.json').is_file():
            raise ValueError('it has no dataset_info.json, so it was never finished')
        builder = builder_class(data_dir=folder)
        formats = sorted(each.value for each in builder.info.available_file_formats())
        if 'array_record' not in formats:
            raise ValueError(
                f'its format is {formats}, which needs TensorFlow; wanted array_record'
            )
        return {**_decode(builder, 'train', source.train), **_decode(builder, 'test', source.test)}
    except Exception as error:  # Damaged files raise a dozen types, all of one meaning.
        raise ValueError(
            f'{prepared} cannot be read: {error}. Delete it or choose another data_dir, run again.'
        ) from error


def _decode(builder, split: str, count: int) -> dict[str, np.ndarray]:
    """Decodes a split of a prepared TFDS builder, which must hold `count` examples."""
    examples = builder.as_data_source(split)
    if len(examples) != count:
        raise ValueError(f'its {split} split holds {len(examples)} examples, wanted {count}')
    images, labels = np.empty((count, 28, 28, 1), np.uint8), np.empty((count,), np.int32)
    title = f'Decoding {builder.name} {split}'
    for index, example in enumerate(tqdm(examples, title, unit=' images', disable=None)):
        images[index], labels[index] = example['image'], example['label']
    return {f'{split}_images': images, f'{split}_labels': labels}


def _generate_examples(builder, images: np.ndarray, labels: np.ndarray):
    """Yields keys and examples; TFDS needs TensorFlow to encode arrays, but not PIL images."""
    del builder
    for key, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield key, {'image': Image.fromarray(image), 'label': int(label)}


def _digits_builder() -> type:
    """Makes the TFDS builder of scikit-learn's digits, which keeps their order."""
    import sklearn.datasets
    import tensorflow_datasets as tfds

    class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Digits of scikit-learn, enlarged from 8x8 to 28x28 pixels."""

        VERSION = tfds.core.Version(_SOURCES['digits'].version)
        _generate_examples = _generate_examples

        def _info(self):
            image = tfds.features.Image(shape=(28, 28, 1))
            label = tfds.features.ClassLabel(num_classes=_CLASSES)
            features = tfds.features.FeaturesDict({'image': image, 'label': label})
            return tfds.core.DatasetInfo(
                builder=self, description=self.__doc__, features=features, disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            del dl_manager  # Nothing to download.
            images, labels = sklearn.datasets.load_digits(return_X_y=True)
            images = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
            bilinear = Image.Resampling.BILINEAR
            images = [np.asarray(Image.fromarray(i).resize((28, 28), bilinear)) for i in images]
            count = _SOURCES['digits'].train
            return {
                'train': self._generate_examples(images[:count], labels[:count]),
                'test': self._generate_examples(images[count:], labels[count:]),
            }

    return Digits


def _idx_builder(name: str) -> type:
    """Makes the stock TFDS builder of a set over again, its files read by gzip and NumPy."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import download_manager, downloader

    # With its own ten retries, TFDS takes 3.5 minutes to find that there is no network.
    downloader.MAX_RETRIES = 4
    stock: Any = tfds.builder_cls(name)
    failures = (OSError, tfds.download.DownloadError, download_manager.NonMatchingChecksumError)

    class Idx(stock, skip_registration=True):  # pyright: ignore
        name = stock.name
        _generate_examples = _generate_examples

        def _split_generators(self, dl_manager):
            try:
                files = dl_manager.download({key: self.URL + _FILES[key] for key in _FILES})
            except failures as error:
                raise RuntimeError(
                    f'{self.name} is not to be had: {error}\nEither connect to the network, or put '
                    f'{", ".join(_FILES.values())} into a folder and name it with --manual_dir.'
                ) from error
            arrays = {key: _read_idx(file) for key, file in files.items()}
            return {
                'train': self._generate_examples(arrays['train_images'], arrays['train_labels']),
                'test': self._generate_examples(arrays['test_images'], arrays['test_labels']),
            }

    return Idx


def _read_idx(path: os.PathLike[str]) -> np.ndarray:
    """Reads a gzipped IDX file of bytes: 0, 0, 8, the rank, the shape as >i4, then the values."""
    with gzip.open(path) as file:
        content = file.read()
    rank = content[3]
    shape = np.frombuffer(content, '>i4', count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
