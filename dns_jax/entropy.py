"""What a coded file is made of: numbers, texts, and symbols and masks under a range coder.

Owns how they become bytes; what they mean is the concern of `codec`.

Symbols are coded by the counts of those before, which are renewed after ever longer blocks. The
counts are exact in float64, and constriction only adds and divides them, so that all machines
agree.

A mask is a grid of units (its last axis) × inputs (all others). Marked first are the units and
the inputs that have kept weights at all, the inputs given whether the unit that feeds them, in
the kernel before, has any. What remains of the grid is walked unit by unit, and the gaps
between kept weights are coded: the length of a gap in bits, then the bits. Work and memory grow
with the size of the mask, in NumPy, without a loop over weights.
"""

from collections.abc import Iterator
from typing import Any

import constriction
import numpy as np

_stream: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue]
_PRIOR = 0.25  # the count that a symbol starts with
_UNIFORM_BITS = 16  # coded at once; constriction allows 23


class Encoder:
    """Writes symbols to a stream."""

    def __init__(self):
        self._coder = _stream.queue.RangeEncoder()

    def symbols(self, values: np.ndarray, alphabet: int) -> None:
        """Writes integers from 0 to `alphabet` − 1."""
        if alphabet < 2:
            return
        values = values.astype(np.int32)
        counts = np.full(alphabet, _PRIOR)
        for block in _blocks(len(values)):
            self._coder.encode(values[block], _categorical(counts))
            counts += np.bincount(values[block], minlength=alphabet)

    def bits(self, values: np.ndarray, widths: np.ndarray) -> None:
        """Writes integers below 2**width, each with a width of its own."""
        for low, wide, sizes in _parts(widths):
            part = (values[wide] >> low) & (sizes - 1)
            self._coder.encode(part.astype(np.int32), _uniform(), sizes)

    def getvalue(self) -> bytes:
        """What was written."""
        return self._coder.get_compressed().astype('<u4').tobytes()


class Decoder:
    """Reads what an `Encoder` wrote, by the same calls in the same order.

    Raises:
      ValueError: if the bytes are no whole words, here; or no encoder wrote them, in any call,
        though most of them it cannot tell from others.
    """

    def __init__(self, data: bytes):
        if len(data) % 4:
            raise ValueError(f'its stream has {len(data)} bytes, which is no multiple of 4')
        words = np.frombuffer(data, '<u4').astype(np.uint32)
        self._coder = _stream.queue.RangeDecoder(words)

    def symbols(self, amount: int, alphabet: int) -> np.ndarray:
        """Reads integers from 0 to `alphabet` − 1."""
        values = np.zeros(amount, np.int64)
        if alphabet < 2:
            return values
        counts = np.full(alphabet, _PRIOR)
        for block in _blocks(amount):
            values[block] = self._decode(_categorical(counts), block.stop - block.start)
            counts += np.bincount(values[block], minlength=alphabet)
        return values

    def bits(self, widths: np.ndarray) -> np.ndarray:
        """Reads integers below 2**width, each with a width of its own."""
        values = np.zeros(len(widths), np.int64)
        for low, wide, sizes in _parts(widths):
            values[wide] |= self._decode(_uniform(), sizes).astype(np.int64) << low
        return values

    def _decode(self, *model_and_amount) -> np.ndarray:
        try:
            return self._coder.decode(*model_and_amount)
        except AssertionError as error:  # how constriction says that bits make no sense
            raise ValueError(f'its stream is damaged: {error}') from error


def encode_mask(coder: Encoder, mask: np.ndarray, fed: np.ndarray) -> np.ndarray:
    """Writes a mask.

    Args:
      coder: where to.
      mask: any shape, bool. Its shape and its count are known when it is read.
      fed: which units of the kernel before have kept weights, bool; of length 0 for the first.

    Returns:
      The `fed` for the next mask.
    """
    if mask.ndim and 0 < mask.sum() < mask.size:
        grid = mask.T.reshape(mask.shape[-1], -1)
        units, inputs = np.any(grid, 1), np.any(grid, 0)
        coder.symbols(units, 2)
        for side in _sides(mask.shape, fed):
            coder.symbols(inputs[side], 2)
        kept = np.flatnonzero(grid[np.ix_(units, inputs)])
        gaps = np.diff(kept, prepend=-1) - 1
        widths = np.frexp(gaps)[1]  # in bits
        coder.symbols(widths, _longest_gap(units, inputs, len(kept)).bit_length() + 1)
        wide = widths > 1  # the first bit of a gap is a one
        coder.bits(gaps[wide], widths[wide] - 1)
    return _feeds(mask, fed)


def decode_mask(
    coder: Decoder, shape: tuple[int, ...], kept: int, fed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a mask.

    Args:
      coder: where from.
      shape: of the mask.
      kept: how many are True, at most all.
      fed: as it was when the mask was written.

    Returns:
      The mask, and the `fed` for the next.

    Raises:
      ValueError: if no encoder wrote it; `units` or `inputs` without kept weights go unseen.
    """
    mask = np.full(shape, kept > 0)
    if mask.ndim and 0 < kept < mask.size:
        units = coder.symbols(shape[-1], 2) > 0
        inputs = np.zeros(mask.size // shape[-1], bool)
        for side in _sides(shape, fed):
            inputs[side] = coder.symbols(int(side.sum()), 2) > 0
        longest = _longest_gap(units, inputs, kept)
        if longest < 0:
            raise ValueError(f'a mask has {kept} kept weights in too few units and inputs')
        widths = coder.symbols(kept, longest.bit_length() + 1)
        gaps = np.where(widths > 0, 1 << np.maximum(widths - 1, 0), 0)
        gaps[widths > 1] |= coder.bits(widths[widths > 1] - 1)
        places = np.cumsum(gaps + 1) - 1
        inner = np.zeros((int(units.sum()), int(inputs.sum())), bool)
        if places[-1] >= inner.size:
            raise ValueError(f'a mask of {shape} has a kept weight outside of it')
        inner.flat[places] = True
        grid = np.zeros((len(units), len(inputs)), bool)
        grid[np.ix_(units, inputs)] = inner
        mask = np.ascontiguousarray(grid.reshape(shape[::-1]).T)
    return mask, _feeds(mask, fed)


def _sides(shape: tuple[int, ...], fed: np.ndarray) -> Iterator[np.ndarray]:
    """The inputs that a unit with kept weights feeds, and the others.

    Units repeat along the last axis of the inputs, as they do where a convolution is flattened;
    where that does not come out even, none is taken to feed.
    """
    inputs = np.zeros(shape[:-1], bool)
    if len(shape) > 1 and len(fed) and shape[-2] % len(fed) == 0:
        inputs |= np.tile(fed, shape[-2] // len(fed))
    inputs = inputs.T.ravel()
    yield inputs
    yield ~inputs


def _feeds(mask: np.ndarray, fed: np.ndarray) -> np.ndarray:
    return np.any(mask.reshape(-1, mask.shape[-1]), 0) if mask.ndim > 1 and mask.size else fed


def _longest_gap(units: np.ndarray, inputs: np.ndarray, kept: int) -> int:
    return int(units.sum()) * int(inputs.sum()) - kept


def _blocks(amount: int) -> Iterator[slice]:
    start = 0
    while start < amount:
        stop = min(start + max(1, start // 16), amount)
        yield slice(start, stop)
        start = stop


def _categorical(counts: np.ndarray):
    return _stream.model.Categorical(counts / counts.sum(), perfect=False)


def _uniform():
    return _stream.model.Uniform()


def _parts(widths: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Cuts wide integers: the lowest bit of a part, which integers reach it, its sizes."""
    for low in range(0, int(widths.max(initial=0)), _UNIFORM_BITS):
        wide = widths > low
        yield low, wide, (1 << np.minimum(widths[wide] - low, _UNIFORM_BITS)).astype(np.int32)


def number(value: int) -> bytes:
    """Writes a whole number, seven bits to a byte, the lowest first (LEB128)."""
    coded = bytearray()
    while value > 127:
        coded.append(value & 127 | 128)
        value >>= 7
    return bytes([*coded, value])


def text(value: str) -> bytes:
    """Writes a text: how many bytes it has, and those, UTF-8."""
    coded = value.encode()
    return number(len(coded)) + coded


class Reader:
    """Reads numbers, texts and bytes, one after the other.

    Raises:
      ValueError: by each method, if what is to be read is not there.
    """

    def __init__(self, data: bytes):
        self._data = data
        self._at = 0

    def take(self, amount: int) -> bytes:
        """Reads bytes."""
        taken = self._data[self._at : self._at + amount]
        if len(taken) != amount:
            raise ValueError('it ends too early')
        self._at += amount
        return taken

    def number(self) -> int:
        """Reads a number below 2**63."""
        value = 0
        for shift in range(0, 63, 7):
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError('it has a number of 2**63 or more')

    def text(self) -> str:
        """Reads a text."""
        return self.take(self.number()).decode()

    def rest(self) -> bytes:
        """Reads all that is left."""
        return self.take(len(self._data) - self._at)
