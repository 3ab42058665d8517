"""What the stream of a coded file is made of: symbols and masks under a range coder.

Owns how they become bits; what they mean is the concern of `codec`.

Symbols are coded by the counts of those before, which are renewed after ever longer blocks. The
counts are exact in float64, and constriction only adds and divides them, so that all machines
agree.

A mask is a grid of units (its last axis) × inputs (all others). Marked first are the units and
the inputs that have kept weights at all, the inputs given whether the unit that feeds them, in
the kernel before, has any. What remains of the grid is walked unit by unit, and the gaps
between kept weights are coded: the length of a gap in bits, then the bits. Work and memory grow
with the size of the mask, in NumPy, without a loop over weights. What is as long as there are
kept weights is held in narrow integers, and worked on in blocks.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from dns_jax._core.checks import needs_extra

with needs_extra('codec'):
    import constriction

_stream: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue]
_PRIOR = 0.25  # the count that a symbol starts with
_UNIFORM_BITS = 16  # coded at once; constriction allows 23
_BLOCK = 2**18  # gaps, wide integers or places of a mask, worked on at once


class Encoder:
    """Writes symbols to a stream.

    Example:
      >>> import numpy as np
      >>> encoder = Encoder()
      >>> encoder.symbols(np.array([0, 2, 2, 1]), 3)
      >>> Decoder(encoder.getvalue()).symbols(4, 3)
      array([0, 2, 2, 1], dtype=uint8)
    """

    def __init__(self):
        self._coder = _stream.queue.RangeEncoder()

    def symbols(self, values: np.ndarray, alphabet: int) -> None:
        """Writes integers of a small range.

        Args:
          values: from 0 to `alphabet` − 1, of one axis.
          alphabet: how many there may be; nothing is written where it is 0 or 1.
        """
        if alphabet < 2:
            return
        counts = np.full(alphabet, _PRIOR)
        for block in _blocks(len(values)):
            part = values[block].astype(np.int32)
            self._coder.encode(part, _categorical(counts))
            counts += np.bincount(part, minlength=alphabet)

    def bits(self, values: np.ndarray, widths: np.ndarray) -> None:
        """Writes integers of any size, each with a width of its own.

        Args:
          values: below 2**width each, of one axis.
          widths: in bits, from 0 to 31.
        """
        for low, wide, sizes in _parts(widths):
            part = (values[wide] >> low) & (sizes - 1)
            self._coder.encode(part.astype(np.int32), _uniform(), sizes)

    def getvalue(self) -> bytes:
        """Ends the stream.

        Returns:
          What was written, in words of four bytes.
        """
        return self._coder.get_compressed().astype('<u4').tobytes()


class Decoder:
    """Reads what an `Encoder` wrote, by the same calls in the same order.

    Args:
      data: what `Encoder.getvalue` gave.

    Raises:
      ValueError: if the bytes are no whole words.

    Example:
      >>> import numpy as np
      >>> encoder, widths = Encoder(), np.array([3, 1])
      >>> encoder.bits(np.array([5, 1]), widths)
      >>> Decoder(encoder.getvalue()).bits(widths)
      array([5, 1], dtype=int32)
    """

    def __init__(self, data: bytes):
        if len(data) % 4:
            raise ValueError(f'its stream has {len(data)} bytes, which is no multiple of 4')
        words = np.frombuffer(data, '<u4').astype(np.uint32)
        self._coder = _stream.queue.RangeDecoder(words)

    def symbols(self, amount: int, alphabet: int) -> np.ndarray:
        """Reads integers of a small range.

        Args:
          amount: how many.
          alphabet: as they were written with.

        Returns:
          The integers, of the narrowest unsigned type that holds the alphabet.

        Raises:
          ValueError: if no encoder wrote them; of most bytes that cannot be told.
        """
        values = np.zeros(amount, np.min_scalar_type(max(alphabet - 1, 0)))
        if alphabet < 2:
            return values
        counts = np.full(alphabet, _PRIOR)
        for block in _blocks(amount):
            values[block] = self._decode(_categorical(counts), block.stop - block.start)
            counts += np.bincount(values[block], minlength=alphabet)
        return values

    def bits(self, widths: np.ndarray) -> np.ndarray:
        """Reads integers of any size, each with a width of its own.

        Args:
          widths: as they were written with.

        Returns:
          The integers, int32.

        Raises:
          ValueError: if no encoder wrote them; of most bytes that cannot be told.
        """
        values = np.zeros(len(widths), np.int32)
        for low, wide, sizes in _parts(widths):
            values[wide] |= self._decode(_uniform(), sizes) << low
        return values

    def _decode(self, *model_and_amount) -> np.ndarray:
        try:
            return self._coder.decode(*model_and_amount)
        except AssertionError as error:  # how constriction says that bits make no sense
            raise ValueError(f'its stream is damaged: {error}') from error


def encode_mask(coder: Encoder, mask: np.ndarray, live_units: np.ndarray) -> np.ndarray:
    """Writes a mask.

    Args:
      coder: where to.
      mask: any shape, bool. Its shape and its count are known when it is read.
      live_units: which units of the kernel before have kept weights, bool; of length 0 for the
        first mask.

    Returns:
      The live units for the next mask: this kernel's, or the same again where the mask is of no
      kernel, bool of one axis.

    Example:
      >>> import numpy as np
      >>> encoder, mask = Encoder(), np.array([[True, False], [True, True]])
      >>> encode_mask(encoder, mask, np.zeros(0, bool))
      array([ True,  True])
    """
    if mask.ndim and 0 < mask.sum() < mask.size:
        grid = mask.T.reshape(mask.shape[-1], -1)
        units, inputs = np.any(grid, 1), np.any(grid, 0)
        coder.symbols(units, 2)
        for side in _split_inputs(mask.shape, live_units):
            coder.symbols(inputs[side], 2)
        widths, wide_gaps = _gaps(grid[np.ix_(units, inputs)].ravel())
        coder.symbols(widths, _longest_gap(units, inputs, len(widths)).bit_length() + 1)
        coder.bits(wide_gaps, widths[widths > 1] - 1)  # the first bit of a gap is a one
    return _live_units(mask, live_units)


def decode_mask(
    coder: Decoder, shape: tuple[int, ...], kept: int, live_units: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a mask.

    Args:
      coder: where from.
      shape: of the mask.
      kept: how many are True, at most all.
      live_units: as they were when the mask was written.

    Returns:
      The mask, bool, and the live units for the next, as `encode_mask` gives them.

    Raises:
      ValueError: if the stream is damaged and that shows. A unit or input marked live without a
        kept weight goes unseen; `codec.load_coded` finds it by encoding anew.

    Example:
      >>> import numpy as np
      >>> encoder, mask = Encoder(), np.array([[True, False], [True, True]])
      >>> live_units = encode_mask(encoder, mask, np.zeros(0, bool))
      >>> decode_mask(Decoder(encoder.getvalue()), (2, 2), 3, np.zeros(0, bool))[0]
      array([[ True, False],
             [ True,  True]])
    """
    size = math.prod(shape)
    if not shape or not 0 < kept < size:
        mask = np.full(shape, kept > 0)
    else:
        units = coder.symbols(shape[-1], 2) > 0
        inputs = np.zeros(size // shape[-1], bool)
        for side in _split_inputs(shape, live_units):
            inputs[side] = coder.symbols(int(side.sum()), 2) > 0
        longest = _longest_gap(units, inputs, kept)
        if longest < 0:
            raise ValueError(f'a mask has {kept} kept weights in too few units and inputs')
        widths = coder.symbols(kept, longest.bit_length() + 1)
        rows, columns = np.flatnonzero(units), np.flatnonzero(inputs)
        grid = np.zeros((len(units), len(inputs)), bool)
        for places in _places(widths, coder.bits(widths[widths > 1] - 1)):
            if places[-1] >= len(rows) * len(columns):
                raise ValueError(f'a mask of {shape} has a kept weight outside of it')
            row, column = np.divmod(places, len(columns))
            grid[rows[row], columns[column]] = True
        mask = np.ascontiguousarray(grid.reshape(shape[::-1]).T)
    return mask, _live_units(mask, live_units)


def _gaps(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measures the gaps before the kept weights of a flat mask that has some.

    Returns:
      The width of each in bits, uint8, and those gaps that have two bits or more, without their
      first, int32.
    """
    widths, wide_gaps = [], []
    before = -1
    for start in range(0, len(kept), _BLOCK):
        places = np.flatnonzero(kept[start : start + _BLOCK]) + start
        if len(places):
            gaps = np.diff(places, prepend=before) - 1
            before = places[-1]
            widths.append(np.frexp(gaps)[1].astype(np.uint8))
            wide = widths[-1] > 1
            first = 1 << (widths[-1][wide].astype(np.int64) - 1)
            wide_gaps.append((gaps[wide] - first).astype(np.int32))
    return np.concatenate(widths), np.concatenate(wide_gaps)


def _places(widths: np.ndarray, wide_gaps: np.ndarray) -> Iterator[np.ndarray]:
    """Turns what `_gaps` gave into the places of the kept weights, int64, block by block."""
    before, used = -1, 0
    for start in range(0, len(widths), _BLOCK):
        block = widths[start : start + _BLOCK].astype(np.int64)
        gaps = (1 << block) >> 1  # the first bit of each, none where it has no bits
        wide = np.flatnonzero(block > 1)
        gaps[wide] |= wide_gaps[used : used + len(wide)]
        places = before + np.cumsum(gaps + 1)
        yield places
        before, used = places[-1], used + len(wide)


def _split_inputs(shape: tuple[int, ...], live_units: np.ndarray) -> Iterator[np.ndarray]:
    """The inputs that a unit with kept weights feeds, and the others.

    Units repeat along the last axis of the inputs, as they do where a convolution is flattened;
    where that does not come out even, none is taken to feed.
    """
    inputs = np.zeros(shape[:-1], bool)
    if len(shape) > 1 and len(live_units) and shape[-2] % len(live_units) == 0:
        inputs |= np.tile(live_units, shape[-2] // len(live_units))
    inputs = inputs.T.ravel()
    yield inputs
    yield ~inputs


def _live_units(mask: np.ndarray, live_units: np.ndarray) -> np.ndarray:
    return (
        np.any(mask.reshape(-1, mask.shape[-1]), 0) if mask.ndim > 1 and mask.size else live_units
    )


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
    """Cuts wide integers: the lowest bit of a part, the places of those that reach it, its sizes.

    All lowest parts come before all higher ones, either block by block.
    """
    for low in range(0, int(widths.max(initial=0)), _UNIFORM_BITS):
        for start in range(0, len(widths), _BLOCK):
            wide = np.flatnonzero(widths[start : start + _BLOCK] > low) + start
            if len(wide):
                bits = np.minimum(widths[wide] - low, _UNIFORM_BITS)
                yield low, wide, 1 << bits.astype(np.int32)
