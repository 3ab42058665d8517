"""The small data sets, whole: prepared through TFDS without TensorFlow, cached as arrays.

The first `load` of a set prepares its standard TFDS folder in the ArrayRecord format, decodes it,
and writes `data_dir/dns_jax_cache/<name>-<version>.npz`; later ones read that file alone.

A set that cannot be prepared here, `cifar10_part`, is decoded by every `load`: its folder may be
shared and is only read, and a copy elsewhere could grow stale without a sign.
"""

import dataclasses
import functools
import io
import math
import os
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from dns_jax.files.writing import write_whole

_CLASSES = 10
_EVALUATION_BATCH = 1_000  # images


@dataclasses.dataclass(frozen=True)
class _Source:
    """What a prepared set must hold, and how many training images end it as validation images."""

    version: str
    train: int
    test: int
    validation: int
    image_shape: tuple[int, int, int] = (28, 28, 1)
    prepared_here: bool = True  # else `data_dir` is only read


_CIFAR_SHAPE = (32, 32, 3)
_SOURCES = {
    'digits': _Source('1.0.0', train=1_437, test=360, validation=200),
    'mnist': _Source('3.0.1', train=60_000, test=10_000, validation=5_000),
    'fashion_mnist': _Source('3.0.1', train=60_000, test=10_000, validation=5_000),
    'cifar10': _Source('3.0.2', 50_000, 10_000, validation=5_000, image_shape=_CIFAR_SHAPE),
    'cifar10_part': _Source('1.0.0', 45_000, 6_000, 5_000, _CIFAR_SHAPE, prepared_here=False),
}
DATASETS = tuple(_SOURCES)
DATA_DIR_HELP = 'Folder of prepared sets; by default $TFDS_DATA_DIR or ~/tensorflow_datasets.'
MANUAL_DIR_HELP = "Folder with the set's published files; by default they are downloaded."
VALIDATION_IMAGES = {name: source.validation for name, source in _SOURCES.items()}
IMAGE_SHAPES = {name: source.image_shape for name, source in _SOURCES.items()}
GREY_DATASETS = tuple(name for name, shape in IMAGE_SHAPES.items() if shape[-1] == 1)


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and their labels.

    Attributes:
      images: (examples, height, width, channels) uint8, the last three as in `IMAGE_SHAPES`.
      labels: (examples,) int32.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """What `gather` reads, to be put on the device: the images and the labels."""
        return self.images, self.labels

    @staticmethod
    def gather(arrays: Any, numbers: Any) -> tuple[Any, Any]:
        """Picks the examples of a batch: a pure function, for NumPy or under `jax.jit`.

        Args:
          arrays: of a split.
          numbers: of examples, (batch,) int32.

        Returns:
          Their images, (batch, height, width, channels) uint8, and labels, (batch,) int32.
        """
        images, labels = arrays
        return images[numbers], labels[numbers]

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Gives all images and labels in order, in parts to evaluate a network on."""
        for start in range(0, len(self), _EVALUATION_BATCH):
            part = slice(start, start + _EVALUATION_BATCH)
            yield self.images[part], self.labels[part]


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
      name: one of `DATASETS`. `digits` comes with scikit-learn, the others are downloaded, but for
        `cifar10_part`, which must lie prepared in `data_dir`.
      data_dir: local folder of the prepared sets; by default that of TFDS, `TFDS_DATA_DIR` or
        `~/tensorflow_datasets`.
      manual_dir: folder with files downloaded by hand, taken in place of a download.
      train_on_all: whether `train` holds the validation images too.

    Returns:
      The data set, its validation split the last images that TFDS gives for training: 5,000, or
      200 for `digits`.

    Raises:
      ValueError: an argument is wrong, or what `data_dir` holds is damaged or unreadable.
      OSError: nothing can be written to `data_dir`, which of `cifar10_part` is not asked.
      RuntimeError: files are neither at hand nor to be had from the network, or
        `dataset_info.json` of `cifar10_part` is damaged.
    """
    _check_name(name)
    folder, manual_dir = resolve_folders(data_dir, manual_dir)
    source = _SOURCES[name]
    if source.prepared_here:
        cache = folder / 'dns_jax_cache' / f'{name}-{source.version}.npz'
        if not cache.exists():
            _make_writable(cache.parent, os.fspath(folder))
            _write_cache(cache, _prepare(name, folder, manual_dir))
        arrays = _read_cache(cache, source)
    else:
        arrays = _prepare(name, folder, manual_dir)
    whole = Split(arrays['train_images'], arrays['train_labels'])
    start = source.train - source.validation
    return Dataset(
        name=name,
        train=whole if train_on_all else Split(whole.images[:start], whole.labels[:start]),
        validation=Split(whole.images[start:], whole.labels[start:]),
        test=Split(arrays['test_images'], arrays['test_labels']),
    )


def check_image_shape(name: str, image_shape: tuple[int, int, int]) -> None:
    """Checks that the images of a set fit a network, before any data are opened.

    Args:
      name: one of `DATASETS`.
      image_shape: (height, width, channels) of the images that the network takes, pixels.

    Raises:
      ValueError: there is no such set, or its images have another shape.
    """
    _check_name(name)
    found = IMAGE_SHAPES[name]
    if found != image_shape:
        fitting = [each for each, shape in IMAGE_SHAPES.items() if shape == image_shape]
        raise ValueError(
            f'name={name!r}: its images are {_times(found)}, wanted {_times(image_shape)}, as '
            f'those of {", ".join(fitting) or "no set here"} are'
        )


def resolve_folders(
    data_dir: str | os.PathLike[str] | None, manual_dir: str | os.PathLike[str] | None
) -> tuple[pathlib.Path, pathlib.Path | None]:
    """Resolves and checks the folders that every set is read from.

    Raises:
      ValueError: `manual_dir` does not exist, or `data_dir` is not local.
    """
    manual = None if manual_dir is None else pathlib.Path(manual_dir).expanduser()
    if manual is not None and not manual.is_dir():
        raise ValueError(f'manual_dir={manual_dir!r}: wanted a folder that exists')
    if data_dir is None:
        # The words of TFDS, said again because importing it takes longer than all that follows.
        data_dir = os.environ.get('TFDS_DATA_DIR') or os.path.join('~', 'tensorflow_datasets')
    if not os.fspath(data_dir) or '://' in os.fspath(data_dir):
        raise ValueError(f'data_dir={data_dir!r}: wanted a local folder')
    return pathlib.Path(data_dir).expanduser(), manual


def batch_indices(
    seed: tuple[int, ...], examples: int, batch_size: int, start: int, steps: int
) -> np.ndarray:
    """Chooses the images of some steps: one shuffled epoch after the other, without gaps.

    A pure function of its arguments, so that a resumed run sees the same batches.

    Args:
      seed: of the shuffles, one number or more.
      examples: images in the training split.
      batch_size: images per step.
      start: the first step.
      steps: how many steps.

    Returns:
      Indices into the split, (steps, batch_size) int32.
    """
    first, last = start * batch_size, (start + steps) * batch_size
    epochs = range(first // examples, (last - 1) // examples + 1)
    order = np.concatenate([_shuffled_epoch(seed, examples, epoch) for epoch in epochs])
    offset = epochs[0] * examples
    return order[first - offset : last - offset].reshape(steps, batch_size)


@functools.lru_cache(maxsize=4)
def _shuffled_epoch(seed: tuple[int, ...], examples: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([*seed, epoch]).permutation(examples).astype(np.int32)


def _check_name(name: str) -> None:
    if name not in DATASETS:
        raise ValueError(f'name={name!r}: wanted one of {", ".join(DATASETS)}')


def _make_writable(folder: pathlib.Path, data_dir: str) -> None:
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
        expected[f'{split}_images'] = ((count, *source.image_shape), np.dtype(np.uint8))
        expected[f'{split}_labels'] = ((count,), np.dtype(np.int32))
    with open(cache, 'rb') as file:
        try:
            with zipfile.ZipFile(file) as stored:
                names = sorted(stored.namelist())
                if names != sorted(f'{key}.npy' for key in expected):
                    raise ValueError(f'it holds {names}, wanted {list(expected)}')
                arrays = {key: _read_array(stored, key, *form) for key, form in expected.items()}
            for split in ('train', 'test'):
                _check_labels(arrays[f'{split}_labels'])
        except Exception as error:  # Damaged bytes raise a dozen types, all of one meaning.
            raise ValueError(f'{cache} is damaged: {error}. Delete it and run again.') from error
    return arrays


def _read_array(
    stored: zipfile.ZipFile, key: str, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Reads an array that must have a form; no memory is taken for what it claims to have."""
    with stored.open(f'{key}.npy') as file:
        np.lib.format.read_magic(file)
        found = np.lib.format.read_array_header_1_0(file)
        if found != (shape, False, dtype):
            raise ValueError(f'{key} is {found}, wanted {(shape, False, dtype)}')
        size = dtype.itemsize * math.prod(shape)
        content = bytearray(file.read(size + 1))  # one more, for only the end has the checksum
        return np.frombuffer(content, dtype).reshape(shape)


def _prepare(
    name: str, folder: pathlib.Path, manual_dir: str | os.PathLike[str] | None
) -> dict[str, np.ndarray]:
    """Prepares the TFDS folder of a set where there is none; reads it as `_read_cache` does."""
    # Imported only where a set is prepared: one that is cached need not wait for TFDS.
    from experiments.data import builders

    source = _SOURCES[name]
    builder = builders.prepare(name, folder, manual_dir)
    with builders.naming_folder(builder.data_path):
        if str(builder.version) != source.version:
            raise ValueError(f'its version is {builder.version}, wanted {source.version}')
        return {
            **_decode(builder, 'train', source.train, source.image_shape),
            **_decode(builder, 'test', source.test, source.image_shape),
        }


def _decode(
    builder, split: str, count: int, image_shape: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """Decodes a split of a prepared TFDS builder, which must hold `count` examples."""
    # Brings JAX, which processes that decode images later on need not wait for.
    from experiments.devices import progress

    examples = builder.as_data_source(split)
    if len(examples) != count:
        raise ValueError(f'its {split} split holds {len(examples)} examples, wanted {count}')
    images, labels = np.empty((count, *image_shape), np.uint8), np.empty((count,), np.int32)
    title = f'decoding {builder.name} {split}'
    for index, example in enumerate(progress.bar(examples, title, unit=' images')):
        image = example['image']
        if image.shape != image_shape:  # NumPy would stretch one of a single channel.
            raise ValueError(f'image {index} of {split} is {image.shape}, wanted {image_shape}')
        images[index], labels[index] = image, example['label']
    _check_labels(labels)
    return {f'{split}_images': images, f'{split}_labels': labels}


def _check_labels(labels: np.ndarray) -> None:
    if labels.min() < 0 or labels.max() >= _CLASSES:
        raise ValueError(f'its labels reach outside 0 to {_CLASSES - 1}')


def _times(image_shape: tuple[int, int, int]) -> str:
    return 'x'.join(map(str, image_shape))
