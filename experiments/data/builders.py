"""Sets as TFDS folders of array_record files, prepared and checked without TensorFlow."""

import contextlib
import io
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader  # pyright: ignore
from PIL import Image
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from experiments.data.archives import (
    iterate_classes,
    iterate_images,
    list_files,
    read_cifar10,
    read_idx,
)
from experiments.data.crops import open_image

_IDX_FILES = {
    'train_images': 'train-images-idx3-ubyte.gz',
    'train_labels': 'train-labels-idx1-ubyte.gz',
    'test_images': 't10k-images-idx3-ubyte.gz',
    'test_labels': 't10k-labels-idx1-ubyte.gz',
}
# The published files that a set is prepared from.
_FILES = {
    'mnist': tuple(_IDX_FILES.values()),
    'fashion_mnist': tuple(_IDX_FILES.values()),
    'cifar10': ('cifar-10-binary.tar.gz',),
    'imagenet2012': ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'),
    'tiny_shakespeare': ('input.txt',),
}
# What a set must hold, by the names that TFDS gives it.
IMAGE_FEATURES = {'image': tfds.features.Image, 'label': tfds.features.ClassLabel}
TEXT_FEATURES = {'text': tfds.features.Text}
_IMAGENET_COUNTS = {'train': 1_281_167, 'validation': 50_000}
_DOWNLOAD_FAILURES = (OSError, tfds.download.DownloadError, NonMatchingChecksumError)


def prepare(
    name: str,
    data_dir: str | os.PathLike[str],
    manual_dir: str | os.PathLike[str] | None = None,
    wanted: dict[str, type] = IMAGE_FEATURES,
) -> Any:
    """Prepares a set, unless that has been done, and checks its folder.

    Args:
      name: `digits`, `mnist`, `fashion_mnist`, `cifar10`, `imagenet2012`, `tiny_shakespeare`, or
        any set that lies prepared in `data_dir` or that TFDS can prepare without TensorFlow.
      data_dir: local folder of the prepared sets.
      manual_dir: folder with files downloaded by hand, taken in place of a download. ImageNet
        needs `ILSVRC2012_img_train.tar` and `ILSVRC2012_img_val.tar` in it.
      wanted: `IMAGE_FEATURES` or `TEXT_FEATURES`: what the set must hold.

    Returns:
      A TFDS builder that reads the folder: every split's files are there and hold as many
      examples as promised. Whether each image can be decoded shows when it is read.

    Raises:
      ValueError: there is no such set, it does not hold what is wanted, `manual_dir` lacks a
        file of it, an archive is damaged or not the one wanted, or what `data_dir` holds is
        damaged or unreadable.
      RuntimeError: files are neither at hand nor to be had, or it takes TensorFlow to prepare them.
      OSError: nothing can be written to `data_dir`.
    """
    # With its own ten retries, TFDS takes 3.5 minutes to find that there is no network.
    downloader.MAX_RETRIES = 4
    # It tells of every attempt; the error that ends them says all.
    logging.getLogger('urllib3.connectionpool').setLevel(logging.ERROR)
    data_dir = pathlib.Path(data_dir).expanduser()
    manual_dir = None if manual_dir is None else pathlib.Path(manual_dir).expanduser()
    builder_class = _builder_class(name)
    if builder_class is None:
        folder = _prepare_other(name, data_dir, manual_dir)
    else:
        # The folder is looked for by hand: TFDS makes no builder where it is damaged.
        folder = data_dir / name / str(builder_class.VERSION)
        if not folder.exists():
            _check_files(name, data_dir, manual_dir)
            _download_and_prepare(builder_class(data_dir=data_dir), manual_dir)
    with naming_folder(folder):
        if not (folder / 'dataset_info.json').is_file():
            raise ValueError('it has no dataset_info.json, so it was never finished')
        builder = tfds.builder_from_directory(folder)
        _check_shards(builder)
    features = builder.info.features
    kinds = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    if not all(isinstance(kinds.get(key), kind) for key, kind in wanted.items()):
        features_wanted = ' and '.join(f'{key}, {kind.__name__}' for key, kind in wanted.items())
        raise ValueError(
            f'name={name!r}: wanted a set with {features_wanted}, but it has {features}'
        )
    return builder


@contextlib.contextmanager
def naming_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Names a prepared folder in whatever goes wrong while it is read.

    Raises:
      ValueError: something went wrong.
    """
    try:
        yield
    except Exception as error:  # Damaged files raise a dozen types, all of one meaning.
        raise ValueError(
            f'{folder} cannot be read: {error}. Delete it or choose another data_dir, run again.'
        ) from error


def _builder_class(name: str) -> Any:
    """Returns a builder that needs no TensorFlow, or None where there is only that of TFDS."""
    match name:
        case 'digits':
            return Digits
        case 'mnist' | 'fashion_mnist':
            return _idx_builder(name)
        case 'cifar10':
            return _cifar10_builder()
        case 'imagenet2012':
            return _imagenet_builder()
        case 'tiny_shakespeare':
            return _tiny_shakespeare_builder()
    return None


def _check_files(name: str, data_dir: pathlib.Path, manual_dir: pathlib.Path | None) -> None:
    """Holds a folder of files downloaded by hand to all that a set needs, before any download."""
    if name == 'imagenet2012':
        manual_dir = manual_dir or data_dir / 'downloads' / 'manual'  # where TFDS looks
        advice = 'Get the files from https://image-net.org/download-images and name their folder'
    else:
        advice = 'Leave it out to download the files, or name a folder that holds them'
    if manual_dir is None:
        return
    missing = [file for file in _FILES.get(name, ()) if not (manual_dir / file).is_file()]
    if missing:
        raise ValueError(f'--manual_dir={manual_dir} lacks {", ".join(missing)}. {advice}.')


def _download_and_prepare(builder: Any, manual_dir: pathlib.Path | None) -> None:
    # Brings JAX, which processes that decode images later on need not wait for.
    from experiments.devices import progress

    if not progress.are_wanted():
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(
        manual_dir=manual_dir, try_download_gcs=False, force_checksums_validation=True
    )
    try:
        builder.download_and_prepare(download_config=config, file_format='array_record')
    except OSError:
        if not builder.data_path.exists():  # If it exists now, another process was quicker.
            raise


def _prepare_other(
    name: str, data_dir: pathlib.Path, manual_dir: pathlib.Path | None
) -> pathlib.Path:
    """Returns the folder of a set without a builder here, prepared by TFDS where it must be."""
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.data_path.exists():
            _download_and_prepare(builder, manual_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f'name={name!r}: wanted a set known to TFDS, or one prepared in {data_dir}'
        ) from error
    except Exception as error:  # TFDS has hundreds of builders, each fails in its own way.
        raise RuntimeError(
            f'{data_dir / name} can neither be read nor be prepared here: {error}\nDelete what is '
            'left of it, prepare it where TensorFlow is installed, by `tfds build '
            f'{name} --file_format=array_record`, and put it there.'
        ) from error
    return pathlib.Path(builder.data_path)


def _check_shards(builder: Any) -> None:
    """Holds a prepared folder to the format and the numbers of examples that it promises."""
    formats = sorted(each.value for each in builder.info.available_file_formats())
    if 'array_record' not in formats:
        raise ValueError(f'its format is {formats}, which needs TensorFlow; wanted array_record')
    for split in builder.info.splits.values():
        for path, promised in zip(split.filepaths, split.shard_lengths, strict=True):
            if not path.is_file():
                raise ValueError(f'{path.name} is missing')
            # Where a file is cut, its reader counts no records, and raises once it is closed.
            reader = ArrayRecordReader(os.fspath(path))
            found = reader.num_records()
            if found != promised:
                raise ValueError(f'{path.name} holds {found} records, wanted {promised}')
            reader.close()


def _generate_examples(builder, images: np.ndarray, labels: np.ndarray):
    """Yields keys and examples; TFDS needs TensorFlow to encode arrays, but not PIL images."""
    del builder
    for key, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield key, {'image': Image.fromarray(image), 'label': int(label)}


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Digits of scikit-learn, enlarged from 8x8 to 28x28 pixels, in their own order."""

    VERSION = tfds.core.Version('1.0.0')
    _generate_examples = _generate_examples

    def _info(self):
        image = tfds.features.Image(shape=(28, 28, 1))
        label = tfds.features.ClassLabel(num_classes=10)
        features = tfds.features.FeaturesDict({'image': image, 'label': label})
        return tfds.core.DatasetInfo(
            builder=self, description=self.__doc__, features=features, disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # Nothing to download.
        import sklearn.datasets  # Here, lest every worker of a stream imports it.

        images, labels = sklearn.datasets.load_digits(return_X_y=True)
        images = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        bilinear = Image.Resampling.BILINEAR
        images = [np.asarray(Image.fromarray(i).resize((28, 28), bilinear)) for i in images]
        count = 1_437  # Of 1,797: four of five.
        return {
            'train': self._generate_examples(images[:count], labels[:count]),
            'test': self._generate_examples(images[count:], labels[count:]),
        }


def _not_downloaded(name: str, error: Exception) -> RuntimeError:
    return RuntimeError(
        f'{name} could not be downloaded: {error}\nEither connect to the network, or put '
        f'{", ".join(_FILES[name])} into a folder and name it with --manual_dir.'
    )


def _idx_builder(name: str) -> type:
    """Makes the stock TFDS builder of a set over again, its files read by gzip and NumPy."""
    stock: Any = tfds.builder_cls(name)

    class Idx(stock, skip_registration=True):  # pyright: ignore
        name = stock.name
        _generate_examples = _generate_examples

        def _split_generators(self, dl_manager):
            try:
                files = dl_manager.download({key: self.URL + _IDX_FILES[key] for key in _IDX_FILES})
            except _DOWNLOAD_FAILURES as error:
                raise _not_downloaded(self.name, error) from error
            arrays = {key: read_idx(file) for key, file in files.items()}
            return {
                'train': self._generate_examples(arrays['train_images'], arrays['train_labels']),
                'test': self._generate_examples(arrays['test_images'], arrays['test_labels']),
            }

    return Idx


def _cifar10_builder() -> type:
    """Makes the stock TFDS builder of CIFAR-10 over again, its files read by tarfile and NumPy."""
    stock: Any = tfds.builder_cls('cifar10')

    class Cifar10(stock, skip_registration=True):  # pyright: ignore
        name = stock.name

        def _split_generators(self, dl_manager):
            files = self._cifar_info
            try:
                path = dl_manager.download(files.url)
            except _DOWNLOAD_FAILURES as error:
                raise _not_downloaded(self.name, error) from error
            names, train, test = read_cifar10(path, files)
            self.info.features['label'].names = names
            return {
                'train': self._generate_examples('train', train),
                'test': self._generate_examples('test', test),
            }

        def _generate_examples(self, split, rows):
            images = np.ascontiguousarray(rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            for key, example in _generate_examples(self, images, rows[:, 0]):
                yield key, {**example, 'id': f'{split}_{key:05d}'}

    return Cifar10


def _tiny_shakespeare_builder() -> type:
    """Makes the stock TFDS builder of a text over again, its file read without TensorFlow."""
    stock: Any = tfds.builder_cls('tiny_shakespeare')

    class TinyShakespeare(stock, skip_registration=True):  # pyright: ignore
        name = stock.name
        pkg_dir_path = stock.pkg_dir_path  # What TFDS tells of the set lies there,
        url_infos = stock.url_infos  # and the checksum of its file.

        def _split_generators(self, dl_manager):
            (url,) = self.url_infos
            try:
                path = dl_manager.download(url)
            except _DOWNLOAD_FAILURES as error:
                raise _not_downloaded(self.name, error) from error
            text = pathlib.Path(path).read_bytes()
            first = int(0.9 * len(text))
            second = first + int(0.5 * (len(text) - first))
            parts = {'train': text[:first], 'validation': text[first:second], 'test': text[second:]}
            return {split: self._generate_examples(split, part) for split, part in parts.items()}

    return TinyShakespeare


def _imagenet_builder() -> type:
    """Makes the stock TFDS builder of ImageNet over again, without its optional test split."""
    stock: Any = tfds.builder_cls('imagenet2012')

    class Imagenet2012(stock, skip_registration=True):  # pyright: ignore
        name = stock.name

        def _split_generators(self, dl_manager):
            train, validation = (dl_manager.manual_dir / file for file in _FILES[self.name])
            # Listing takes seconds, so that a wrong archive is found before hours of work.
            _check_classes(train)
            images = iterate_images(validation, _label_validation_images(validation))
            return {
                'train': self._generate_examples('train', train, iterate_classes(train)),
                'validation': self._generate_examples('validation', validation, images),
            }

        def _generate_examples(self, split, path, images):
            count = 0
            for file_name, content, label in images:
                image = _as_plain_jpeg(content, f'{path}: {file_name}')
                yield file_name, {'file_name': file_name, 'image': image, 'label': label}
                count += 1
            wanted = _IMAGENET_COUNTS[split]
            if count != wanted:
                raise ValueError(f'{path} holds {count:,} images, wanted {wanted:,}')

    return Imagenet2012


def _read_synsets(file: str) -> list[str]:
    """Returns the classes that a file of TFDS's own lists."""
    return tfds.core.tfds_path(f'datasets/imagenet2012/{file}').read_text(encoding='utf-8').split()


def _check_classes(path: pathlib.Path) -> None:
    """Holds the training archive to one tar of each class."""
    wanted, found = {f'{each}.tar' for each in _read_synsets('labels.txt')}, set(list_files(path))
    if found != wanted:
        missing, unknown = sorted(wanted - found), sorted(found - wanted)
        raise ValueError(
            f'{path} holds {len(found & wanted)} of {len(wanted)} class archives; {len(missing)} '
            f'are missing, as {missing[:3]}, and {len(unknown)} are unknown, as {unknown[:3]}'
        )


def _label_validation_images(path: pathlib.Path) -> dict[str, str]:
    """Returns the class of each validation image; they are listed in the order of the names."""
    names, synsets = sorted(list_files(path)), _read_synsets('validation_labels.txt')
    if len(names) != len(synsets):
        raise ValueError(f'{path} holds {len(names):,} images, wanted {len(synsets):,}')
    return dict(zip(names, synsets, strict=True))


def _as_plain_jpeg(content: bytes, where: str) -> bytes:
    """Returns an image as it is if it is a JPEG in grey or RGB, else converted to one in RGB.

    In the published archives, 22 images are CMYK and one is a PNG in spite of its name.
    """
    try:
        with open_image(content) as image:
            # MPO is a JPEG that further images follow.
            if image.format in ('JPEG', 'MPO') and image.mode in ('L', 'RGB'):
                # To decode all takes long. Without the end marker, a file may still be whole.
                if not content.endswith(b'\xff\xd9'):
                    image.load()
                return content
            converted = io.BytesIO()
            image.convert('RGB').save(converted, 'JPEG', quality=100)
            return converted.getvalue()
    except Exception as error:  # Damaged bytes raise a dozen types, all of one meaning.
        raise ValueError(f'{where} is no whole image: {error}') from error
