"""Texts, whole: prepared through TFDS without TensorFlow, kept as numbers of characters.

A network learns to say of each character in a window which one follows.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.data.resident import resolve_folders

DATASETS = ('tiny_shakespeare',)
_SPLITS = ('train', 'validation', 'test')
_EVALUATION_BATCH = 256  # windows


@dataclasses.dataclass(frozen=True)
class TextSplit:
    """A text, and the windows of it that a network sees.

    Attributes:
      tokens: (characters,) uint8, places in the alphabet.
      context: characters of a window.

    Raises:
      ValueError: no window of so many characters, and the one that follows it, is in the text.
    """

    tokens: np.ndarray
    context: int

    def __post_init__(self):
        count = len(self.tokens)
        if not 0 < self.context < count:
            raise ValueError(
                f'context={self.context}: wanted a positive number of characters, fewer than the '
                f'{count} of the text'
            )

    def __len__(self) -> int:
        """Number of windows to train on, one from each place that has enough after it."""
        return len(self.tokens) - self.context

    @property
    def arrays(self) -> tuple[np.ndarray]:
        """What `gather` reads, to be put on the device: the tokens."""
        return (self.tokens,)

    def gather(self, arrays: Any, numbers: Any) -> tuple[Any, Any]:
        """Cuts the windows of a batch out: a pure function, for NumPy or under `jax.jit`.

        Args:
          arrays: of this split.
          numbers: of windows, which are the places that they begin at, (batch,) int32.

        Returns:
          The tokens of the windows, and for each the one that follows it, both (batch, context)
          int32.
        """
        (tokens,) = arrays
        steps = np.arange(self.context + 1, dtype=np.int32)
        windows = tokens[numbers[:, None] + steps[None]].astype(np.int32)
        return windows[:, :-1], windows[:, 1:]

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Gives windows side by side: of the split, each token but the first is a label once.

        Returns:
          An iterator over tokens and those that follow, both (256, context) int32. What the last
          windows lack is 0, labelled -1; it comes after all that counts.
        """
        count, size = len(self.tokens) - 1, _EVALUATION_BATCH * self.context
        for start in range(0, count, size):
            stop = min(start + size, count)
            inputs, labels = np.zeros(size, np.int32), np.full(size, -1, np.int32)
            inputs[: stop - start] = self.tokens[start:stop]
            labels[: stop - start] = self.tokens[start + 1 : stop + 1]
            yield inputs.reshape(-1, self.context), labels.reshape(-1, self.context)


@dataclasses.dataclass(frozen=True)
class Texts:
    """The three splits of a text.

    Attributes:
      name: one of `DATASETS`.
      train: the text to train on.
      validation: what follows it.
      test: what follows that.
      alphabet: the characters of all three, in order; a token is a place in it.
    """

    name: str
    train: TextSplit
    validation: TextSplit
    test: TextSplit
    alphabet: bytes


def load(
    name: str,
    context: int,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    train_on_all: bool = False,
) -> Texts:
    """Loads a text, preparing it first where that has not been done.

    Args:
      name: one of `DATASETS`. `tiny_shakespeare` has 1,115,394 characters, 65 different ones; TFDS
        splits it in 90, 5 and 5 %.
      context: characters of a window.
      data_dir: local folder of the prepared sets; by default that of TFDS, `TFDS_DATA_DIR` or
        `~/tensorflow_datasets`.
      manual_dir: folder with the file downloaded by hand, `input.txt`, taken in place of a
        download.
      train_on_all: whether the validation text follows in `train` too.

    Returns:
      The text. Its alphabet is that of all splits, whichever are trained on.

    Raises:
      ValueError: an argument is wrong, a split is too short for the context, or what `data_dir`
        or `manual_dir` holds is damaged or unreadable.
      OSError: nothing can be written to `data_dir`.
      RuntimeError: the file is neither at hand nor to be had from the network.
    """
    if name not in DATASETS:
        raise ValueError(f'name={name!r}: wanted one of {", ".join(DATASETS)}')
    parts = _read(name, *resolve_folders(data_dir, manual_dir))
    characters, tokens = np.unique(np.concatenate(list(parts.values())), return_inverse=True)
    ends = np.cumsum([len(part) for part in parts.values()])
    train, validation, test = np.split(tokens.astype(np.uint8), ends[:-1])
    if train_on_all:
        train = np.concatenate([train, validation])
    return Texts(
        name=name,
        train=TextSplit(train, context),
        validation=TextSplit(validation, context),
        test=TextSplit(test, context),
        alphabet=characters.tobytes(),
    )


def _read(name: str, *folders: Any) -> dict[str, np.ndarray]:
    """Reads the bytes of each split, preparing the set where there is none."""
    # Takes seconds to import.
    from experiments.data import builders

    builder = builders.prepare(name, *folders, wanted=builders.TEXT_FEATURES)
    with builders.naming_folder(builder.data_path):
        texts = {
            split: b''.join(example['text'] for example in builder.as_data_source(split))
            for split in _SPLITS
        }
    return {split: np.frombuffer(text, np.uint8) for split, text in texts.items()}
