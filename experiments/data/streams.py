"""Sets too large for memory: batches read, decoded and cropped by Grain while a network trains.

Which images, crops and mirrorings a training batch holds depends on the seed, the batch size and
the batch's number alone: training may stop and go on anywhere, on as many hosts and workers.
"""

import contextlib
import dataclasses
import functools
import os
import resource
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import flags

from experiments.data import builders, resident
from experiments.data.crops import CROPS, crop_image

_THREADS = min(os.cpu_count() or 1, 8)  # Each decodes a batch, so more would fill the memory.


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
    """Images of one split, decoded when they are asked for.

    Attributes:
      source: the encoded examples: mappings with `image`, the bytes of a file; `label`, from 0;
        and perhaps `file_name`. Each worker gets a copy.
      title: what errors call the split.
      classes: number of classes.
      image_size: height and width of the images given, pixels.
      crop: one of `CROPS`.
      workers: number of processes that decode; with 0, threads of this one do.
    """

    source: Sequence[Any]
    title: str
    classes: int
    image_size: int
    crop: str
    workers: int = 0

    def __len__(self) -> int:
        return len(self.source)

    def train_batches(
        self, seed: Sequence[int], batch_size: int, start: int, rows: slice = slice(None)
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Gives batches of all images in random order, again and again, without an end.

        Args:
          seed: integers from 0 that order, crops and mirroring are drawn from.
          batch_size: images of a batch, over all hosts.
          start: number of the first batch to give, from 0; no earlier one is read.
          rows: the part of every batch to give, without a step.

        Returns:
          An iterator over images, (rows, image_size, image_size, 3) uint8, and their labels,
          (rows,) int32. Close or drop it, and its workers end.

        Raises:
          ValueError: an argument is wrong; or, from the iterator, an image cannot be read.
          RuntimeError: from the iterator, a worker died.
        """
        rows = _check_rows(rows, batch_size)
        if start < 0:
            raise ValueError(f'start={start}: wanted the number of a batch, from 0')
        if any(number < 0 for number in seed):
            raise ValueError(f'seed={seed}: wanted integers from 0')
        grain_seed = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
        examples = grain.MapDataset.range(len(self)).seed(grain_seed).shuffle().repeat()
        batches = examples.random_map(_draw_seed).batch(batch_size)[start:]
        return self._iterate(batches.map(functools.partial(self._train_rows, rows)))

    def batches(
        self, batch_size: int, rows: slice = slice(None)
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Gives batches of all images once, in order, cropped as for evaluation.

        Args:
          batch_size: images of a batch, over all hosts.
          rows: the part of every batch to give, without a step.

        Returns:
          An iterator as of `train_batches`. What the last batch lacks is zeros, labelled -1.

        Raises:
          ValueError: an argument is wrong; or, from the iterator, an image cannot be read.
          RuntimeError: from the iterator, a worker died.
        """
        rows = _check_rows(rows, batch_size)
        batches = grain.MapDataset.range(len(self)).batch(batch_size)
        return self._iterate(batches.map(functools.partial(self._evaluation_rows, rows)))

    def _iterate(self, batches: grain.MapDataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if self.workers and not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Else Grain starts no workers outside of `app.run`.
        threads = 1 if self.workers else _THREADS
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        dataset = batches.to_iter_dataset(options).mp_prefetch(
            grain.MultiprocessingOptions(num_workers=self.workers), _leave_signals_to_the_run
        )
        iterator = iter(dataset)
        try:
            for images, labels in iterator:  # Of workers, they are views of shared memory.
                yield np.asarray(images), np.asarray(labels)
        finally:
            iterator.close()  # Else an error that is kept would keep the workers.

    def _train_rows(self, rows: slice, batch: tuple[np.ndarray, np.ndarray]):
        indices, seeds = (part[rows] for part in batch)
        generators = [np.random.default_rng(seed) for seed in seeds]
        return self._read(len(indices), indices, generators)

    def _evaluation_rows(self, rows: slice, batch: np.ndarray):
        indices = batch[rows]
        return self._read(rows.stop - rows.start, indices, [None] * len(indices))

    def _read(
        self, count: int, indices: np.ndarray, generators: Sequence[np.random.Generator | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reads `count` rows; those that have no index stay zeros, labelled -1."""
        images = np.zeros((count, self.image_size, self.image_size, 3), np.uint8)
        labels = np.full((count,), -1, np.int32)
        for row, (index, generator) in enumerate(zip(indices, generators, strict=True)):
            where = f'{self.title}, image {index}'
            try:
                example = self.source[int(index)]
                where += f' {example["file_name"].decode()!r}' if 'file_name' in example else ''
                if not 0 <= example['label'] < self.classes:
                    raise ValueError(f'label {example["label"]}, wanted 0 to {self.classes - 1}')
                images[row] = crop_image(example['image'], self.image_size, self.crop, generator)
                labels[row] = example['label']
            except Exception as error:  # Damaged bytes raise a dozen types, all of one meaning.
                raise ValueError(f'{where}: {error}') from error
        return images, labels


@dataclasses.dataclass(frozen=True)
class StreamedDataset:
    """The three splits of a streamed set.

    Attributes:
      name: of the set.
      classes: number of classes; labels count from 0.
      image_shape: (height, width, 3) of the images given, pixels.
      train: the images to train on.
      validation: the last images that TFDS gives for training.
      test: for ImageNet, whose test labels are secret, those that TFDS calls validation.
    """

    name: str
    classes: int
    image_shape: tuple[int, int, int]
    train: StreamedSplit
    validation: StreamedSplit
    test: StreamedSplit


def open_streams(
    name: str,
    image_size: int,
    crop: str,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    train_on_all: bool = False,
    workers: int = 0,
) -> StreamedDataset:
    """Opens a set of labelled images, preparing it first where that has not been done.

    Args:
      name: of a set, as of `builders.prepare`.
      image_size: height and width of the images to give, pixels.
      crop: one of `CROPS`. `caffe` stretches each image to a square of 256/227 of `image_size`
        and cuts out a random place, mirrored or not; to evaluate, the centre. `random_resized`
        cuts out 8 to 100 % of the area at a ratio of width to height of 3/4 to 4/3, mirrored or
        not; to evaluate, the central square of 224/256 of the shorter side. `whole` stretches
        each image. All resize bilinearly, with antialiasing, and make grey images RGB.
      data_dir: local folder of the prepared sets; by default that of TFDS, `TFDS_DATA_DIR` or
        `~/tensorflow_datasets`.
      manual_dir: folder with files downloaded by hand, taken in place of a download.
      train_on_all: whether `train` holds the validation images too.
      workers: number of processes that decode; with 0, threads of this one do. For each of them,
        about five batches lie in shared memory.

    Returns:
      The set. Its validation split is as large as `resident.load` makes it; of other sets, 5 %
      of the training images, but at most 50,000.

    Raises:
      ValueError: an argument is wrong, or what `data_dir` or `manual_dir` holds is damaged.
      OSError: nothing can be written to `data_dir`.
      RuntimeError: files are neither at hand nor to be had, or it takes TensorFlow to prepare them.
    """
    if image_size < 1:
        raise ValueError(f'image_size={image_size}: wanted a positive number of pixels')
    if crop not in CROPS:
        raise ValueError(f'crop={crop!r}: wanted one of {", ".join(CROPS)}')
    if workers < 0:
        raise ValueError(f'workers={workers}: wanted a number of processes, from 0')
    _raise_limit_of_open_files()
    builder = builders.prepare(name, *resident.resolve_folders(data_dir, manual_dir))
    features, parts = builder.info.features, _name_parts(name, builder.info.splits, train_on_all)
    # Only what is asked for is decoded, and by other means.
    encoded = {
        key: tfds.decode.SkipDecoding()
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }

    def open_split(part: str) -> StreamedSplit:
        with builders.naming_folder(builder.data_path):
            source = builder.as_data_source(part, decoders=encoded)
        title = f'{builder.data_path} {part}'
        return StreamedSplit(
            source, title, features['label'].num_classes, image_size, crop, workers
        )

    return StreamedDataset(
        name=name,
        classes=features['label'].num_classes,
        image_shape=(image_size, image_size, 3),
        **{split: open_split(part) for split, part in parts.items()},
    )


def _name_parts(name: str, splits: Any, train_on_all: bool) -> dict[str, str]:
    """Says in the words of TFDS what of a set each of our splits is."""
    others = ('validation',) if name == 'imagenet2012' else ('test', 'validation')
    test = next((split for split in others if split in splits), None)
    if 'train' not in splits or test is None:
        raise ValueError(
            f'name={name!r}: wanted the splits train and {" or ".join(others)}, it has '
            f'{", ".join(splits)}'
        )
    count = splits['train'].num_examples
    validation = resident.VALIDATION_IMAGES.get(name, min(50_000, round(0.05 * count)))
    if not 0 < validation < count:
        raise ValueError(f'name={name!r}: {count} training images are too few to split')
    start = count - validation
    train = 'train' if train_on_all else f'train[:{start}]'
    return {'train': train, 'validation': f'train[{start}:]', 'test': test}


def _leave_signals_to_the_run(worker: int, workers: int) -> None:
    """Lets a worker go on after a signal to all of a job, as the run has steps to end with it."""
    del worker, workers
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _raise_limit_of_open_files() -> None:
    """Asks for as many open files as may be: every reader keeps each file of its set open."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS says that there is no limit, and takes no more than this.
    wanted = max(now, 10_240) if most == resource.RLIM_INFINITY else most
    if now != resource.RLIM_INFINITY:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _draw_seed(index: int, generator: np.random.Generator) -> tuple[int, int]:
    """Returns an image's index and the seed of its crop: images are not decoded before batched."""
    return index, int(generator.integers(2**63))


def _check_rows(rows: slice, batch_size: int) -> slice:
    """Returns the rows with both ends, both from 0."""
    if batch_size < 1:
        raise ValueError(f'batch_size={batch_size}: wanted a positive number of images')
    start, stop, step = rows.indices(batch_size)
    if step != 1 or start >= stop or (rows.stop or 0) > batch_size:
        raise ValueError(f'rows={rows}: wanted a part of {batch_size} rows, without a step')
    return slice(start, stop)
