"""What computes the stages of a runner: kernels of pruned layers, by JAX and by SciPy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dns_jax._core.checks import needs_extra
from dns_jax.inference import native
from dns_jax.inference.chain import Convolution, Dense, Flatten, MaxPool, Relu, Select, max_pool
from dns_jax.inference.stages import Stage, is_in_order

with needs_extra('runners'):
    import scipy.sparse

MAX_KEPT_WEIGHTS = 4_096
"""The most kept weights of a sparse convolution in JAX.

Each becomes an instruction; that many compile in ten seconds.
"""

MAX_MATRIX_ENTRIES = 2**24
"""The most entries of the matrix of a sparse convolution in SciPy.

It has one for each kept weight and pixel.
"""


class Unsuitable(ValueError):
    """A layer cannot be computed in the way that was asked for."""


def make_jax(stage: Stage) -> tuple[Any, Callable[[Any, jax.Array], jax.Array]]:
    """Makes the computation of a stage by JAX.

    Args:
      stage: the stage.

    Returns:
      The stage's arrays, float32 and int32, and a function of them and of the inputs, (…, batch)
      float32, to be traced; it gives (…, batch) float32.

    Raises:
      Unsuitable: if a sparse convolution keeps more than `MAX_KEPT_WEIGHTS`.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from dns_jax.inference.chain import Dense
      >>> from dns_jax.inference.stages import Stage
      >>> kernel, bias = np.array([[0, 2]], np.float32), np.ones(1, np.float32)
      >>> arrays, compute = make_jax(Stage(Dense('fc'), (2,), kernel, bias, kind='sparse'))
      >>> compute(arrays, jnp.array([[7.0], [3.0]]))
      Array([[7.]], dtype=float32)
    """
    match stage.layer:
        case Relu():
            return (), lambda _, x: jnp.maximum(x, 0)
        case MaxPool(size):
            # A gather keeps XLA from fusing the pooling into every sum that reads it.
            rows = np.arange(stage.shape[0], dtype=np.int32)
            return rows, lambda rows, x: _take(max_pool(x, size, axis=1), rows)
        case Flatten() if is_in_order(stage.rows, stage.shape):
            return (), lambda _, x: x.reshape(-1, x.shape[-1])
        case Flatten():
            return np.int32(stage.rows), lambda rows, x: _take(x.reshape(-1, x.shape[-1]), rows)
        case Select():
            return np.int32(stage.rows), lambda rows, x: _take(x, rows)
    return _JAX_LAYERS[type(stage.layer), stage.kind](stage)


def make_scipy(stage: Stage) -> Callable[[np.ndarray], np.ndarray]:
    """Makes the computation of a stage by NumPy and SciPy.

    Args:
      stage: the stage.

    Returns:
      A function of the inputs, (…, batch) float32, that gives (…, batch) float32.

    Raises:
      Unsuitable: if the matrix of a sparse convolution has more than `MAX_MATRIX_ENTRIES`.

    Example:
      >>> import numpy as np
      >>> from dns_jax.inference.chain import Dense
      >>> from dns_jax.inference.stages import Stage
      >>> kernel, bias = np.array([[0, 2]], np.float32), np.ones(1, np.float32)
      >>> compute = make_scipy(Stage(Dense('fc'), (2,), kernel, bias, kind='sparse'))
      >>> compute(np.array([[7], [3]], np.float32))
      array([[7.]], dtype=float32)
    """
    match stage.layer:
        case Relu():
            return lambda x: np.maximum(x, 0)
        case MaxPool(size):
            return lambda x: max_pool(x, size, axis=1)
        case Flatten() if is_in_order(stage.rows, stage.shape):
            return lambda x: x.reshape(-1, x.shape[-1])
        case Flatten():
            return lambda x: x.reshape(-1, x.shape[-1])[stage.rows]
        case Select():
            return lambda x: x[stage.rows]
    return _SCIPY_LAYERS[type(stage.layer), stage.kind](stage)


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    # The rows are all there: to clip spares the default's check.
    return jnp.take(x, rows, axis=0, mode='clip')


def _jax_dense_product(stage: Stage):
    def compute(weights, x):
        kernel, bias = weights
        return kernel @ x + bias[:, None]

    return (stage.kernel, stage.bias), compute


def _jax_dense_convolution(stage: Stage):
    def compute(weights, x):
        kernel, bias = weights
        axes = ('CHWN', 'OIHW', 'CHWN')
        x = jax.lax.conv_general_dilated(
            _pad(stage, x), kernel, (1, 1), 'VALID', dimension_numbers=axes
        )
        return x + bias[:, None, None, None]

    return (stage.kernel, stage.bias), compute


def _pad(stage: Stage, images: Any) -> Any:
    """Puts zeros around images where the convolution wants outputs as large as they are."""
    if isinstance(stage.layer, Convolution) and stage.layer.padding == 'SAME':
        lost = [side - 1 for side in stage.kernel.shape[2:]]
        widths = [(0, 0), *((side // 2, side - side // 2) for side in lost), (0, 0)]
        return (np if isinstance(images, np.ndarray) else jnp).pad(images, widths)
    return images


def _jax_sparse_product(stage: Stage):
    """Pads the kept weights of all units to one number, so that slot by slot they are arrays."""
    counts = np.count_nonzero(stage.kernel, axis=1)
    unit, position = np.nonzero(stage.kernel)
    slot = np.arange(len(unit)) - np.repeat(np.cumsum(counts) - counts, counts)
    values = np.zeros((len(counts), max(counts.max(initial=0), 1)), np.float32)
    positions = np.zeros(values.shape, np.int32)
    values[unit, slot], positions[unit, slot] = stage.kernel[unit, position], position

    def compute(weights, x):
        values, positions, bias = weights
        if x.shape[-1] == 1:
            # A product, as XLA would fuse a sum with what gathers from it, and sum anew each time.
            sums = jnp.einsum('us,us->u', values, _take(x[:, 0], positions))
            return (sums + bias)[:, None]

        def add(total, one):
            value, position = one
            return total + value[:, None] * _take(x, position), None

        start = jnp.broadcast_to(bias[:, None], (len(bias), x.shape[-1]))
        return jax.lax.scan(add, start, (values.T, positions.T))[0]

    return (values, positions, stage.bias), compute


def _jax_sparse_convolution(stage: Stage):
    if (kept := np.count_nonzero(stage.kernel)) > MAX_KEPT_WEIGHTS:
        raise Unsuitable(
            f'{stage.layer} keeps {kept} weights; sparse, it may keep {MAX_KEPT_WEIGHTS}'
        )

    def compute(bias, x):
        x = _pad(stage, x)
        height, width = (1 + x.shape[axis] - stage.kernel.shape[1 + axis] for axis in (1, 2))
        # Columns and batch in one axis: XLA then takes whole vectors at any size of the batch.
        batch = x.shape[-1]
        x = x.reshape(*x.shape[:2], -1)
        filters = []
        for index, kernel in enumerate(stage.kernel):
            total = jnp.full((height, width * batch), bias[index])
            for channel, row, column in zip(*np.nonzero(kernel), strict=True):
                piece = x[channel, row : row + height, column * batch : (column + width) * batch]
                total = total + kernel[channel, row, column] * piece
            filters.append(total)
        return jnp.stack(filters).reshape(-1, height, width, batch)

    return stage.bias, compute


def _jax_native(stage: Stage):
    kernel = stage.kernel if stage.kernel.ndim == 4 else stage.kernel[..., None, None]
    _, height, width = _padded_shape(stage)
    unit, channel, row, column = np.nonzero(kernel)
    taps = native.Taps(
        starts=np.searchsorted(unit, np.arange(len(kernel) + 1)).astype(np.int32),
        positions=((channel * height + row) * width + column).astype(np.int32),
        values=kernel[unit, channel, row, column],
    )
    rows, columns = height - kernel.shape[2] + 1, width - kernel.shape[3] + 1

    def compute(bias, x):
        x = _pad(stage, x).reshape(-1, x.shape[-1])
        outputs = native.sum_weighted_slices(x, taps, bias, rows, width, columns)
        return outputs if isinstance(stage.layer, Convolution) else outputs[:, 0, 0]

    return stage.bias, compute


def _padded_shape(stage: Stage) -> tuple[int, int, int]:
    """The shape of the images that the convolution slides over; a vector is of single pixels."""
    channels, *sides = stage.shape
    if isinstance(stage.layer, Convolution) and stage.layer.padding == 'SAME':
        sides = [
            whole + part - 1 for whole, part in zip(sides, stage.kernel.shape[2:], strict=True)
        ]
    height, width = sides or (1, 1)
    return channels, height, width


def _scipy_dense_product(stage: Stage):
    return lambda x: stage.kernel @ x + stage.bias[:, None]


def _scipy_dense_convolution(stage: Stage):
    def compute(x):
        windows = np.lib.stride_tricks.sliding_window_view(
            _pad(stage, x), stage.kernel.shape[2:], axis=(1, 2)
        )
        products = np.tensordot(stage.kernel, windows, axes=((1, 2, 3), (0, 4, 5)))
        return products + stage.bias[:, None, None, None]

    return compute


def _scipy_sparse_product(stage: Stage):
    matrix = scipy.sparse.csr_array(stage.kernel)
    return lambda x: _multiply(matrix, x) + stage.bias[:, None]


def _scipy_sparse_convolution(stage: Stage):
    """One row for each pixel of each filter, one column for each of each channel."""
    channels, height, width = _padded_shape(stage)
    filters, _, rows, columns = stage.kernel.shape
    shape = filters, height - rows + 1, width - columns + 1
    unit, channel, row, column = np.nonzero(stage.kernel)
    if (entries := unit.size * shape[1] * shape[2]) > MAX_MATRIX_ENTRIES:
        raise Unsuitable(
            f'{stage.layer} makes {entries} entries; there may be {MAX_MATRIX_ENTRIES}'
        )
    y, x = np.indices(shape[1:]).reshape(2, -1, 1)  # each pixel, for each weight
    matrix = scipy.sparse.csr_array(
        (
            np.broadcast_to(stage.kernel[unit, channel, row, column], (y.size, unit.size)).ravel(),
            (
                ((unit * shape[1] + y) * shape[2] + x).ravel(),
                ((channel * height + y + row) * width + x + column).ravel(),
            ),
        ),
        shape=(np.prod(shape), channels * height * width),
    )
    bias = np.repeat(stage.bias, shape[1] * shape[2])[:, None]

    def compute(x):
        outputs = _multiply(matrix, _pad(stage, x).reshape(-1, x.shape[-1]))
        outputs += bias
        return outputs.reshape(*shape, -1)

    return compute


def _multiply(matrix: scipy.sparse.csr_array, x: np.ndarray) -> np.ndarray:
    # SciPy takes half the time for a vector that it takes for a matrix of one column.
    return (matrix @ x[:, 0])[:, None] if x.shape[1] == 1 else matrix @ x


_JAX_LAYERS = {
    (Dense, 'dense'): _jax_dense_product,
    (Dense, 'sparse'): _jax_sparse_product,
    (Dense, 'native'): _jax_native,
    (Convolution, 'dense'): _jax_dense_convolution,
    (Convolution, 'sparse'): _jax_sparse_convolution,
    (Convolution, 'native'): _jax_native,
}

_SCIPY_LAYERS = {
    (Dense, 'dense'): _scipy_dense_product,
    (Dense, 'sparse'): _scipy_sparse_product,
    (Convolution, 'dense'): _scipy_dense_convolution,
    (Convolution, 'sparse'): _scipy_sparse_convolution,
}
