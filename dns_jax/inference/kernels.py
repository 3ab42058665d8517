"""Steps of the runners: the layers of a chain for feature-major arrays, and what computes each.

Arrays are (channels, height, width, batch) and (elements, batch), so that a kept weight meets
whole rows of numbers. Owns how a pruned layer is computed, by JAX and by SciPy.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from dns_jax.inference import native
from dns_jax.inference.chain import (
    Chain,
    Convolution,
    Dense,
    Flatten,
    Layer,
    MaxPool,
    Relu,
    Select,
    Weighted,
    Weights,
    max_pool,
    trace_shapes,
)

KINDS = ('dense', 'sparse', 'native')
"""How a layer with weights can be computed; SciPy has the first two alone."""

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


class Step(NamedTuple):
    """A layer made for feature-major arrays; what it does not have is empty."""

    layer: Layer
    shape: tuple[int, ...]  #: of what comes in, without the batch
    kernel: np.ndarray = np.zeros(0, np.float32)  #: (units, inputs), (filters, channels, h, w)
    bias: np.ndarray = np.zeros(0, np.float32)  #: (units,)
    rows: np.ndarray = np.zeros(0, int)  #: which it keeps of what comes in
    kind: str = ''  #: how it is computed


class Plan(NamedTuple):
    """A chain for feature-major arrays."""

    rows: np.ndarray  #: which of an example's flat inputs come first, second, …
    shape: tuple[int, ...]  #: what they make, without the batch
    steps: list[Step]


def plan_steps(
    chain: Chain,
    params: Weights,
    input_shape: Sequence[int],
    kinds: Mapping[str, str],
    known: Sequence[str],
) -> Plan:
    """Checks everything and makes the steps.

    Args:
      chain: the layers.
      params: their weights, concrete.
      input_shape: of one example, without a batch axis.
      kinds: how each layer with weights is computed, by its name.
      known: the kinds there are.

    Returns:
      The plan.

    Raises:
      TypeError, ValueError: if the chain does not fit, or `kinds` is not about its layers.

    Example:
      >>> import numpy as np
      >>> from dns_jax.inference.chain import Dense, Flatten, Relu
      >>> params = {'fc': {'kernel': np.ones((4, 1)), 'bias': np.zeros(1)}}
      >>> chain, kinds = (Flatten(), Dense('fc'), Relu()), {'fc': 'dense'}
      >>> plan = plan_steps(chain, params, (2, 2, 1), kinds, KINDS)
      >>> plan.shape, [type(step.layer).__name__ for step in plan.steps]
      ((4,), ['Dense', 'Relu'])
    """
    shapes = trace_shapes(chain, params, input_shape)
    names = [layer.name for layer in chain if isinstance(layer, Weighted)]
    if sorted(kinds) != sorted(names) or not set(kinds.values()) <= set(known):
        raise ValueError(f'kinds must give one of {known} for each of {names}, but is {kinds}')
    rows, steps = np.arange(np.prod(shapes[0])), []
    if len(shapes[0]) > 1 and chain[:1] != (Flatten(),):
        rows = np.moveaxis(rows.reshape(shapes[0]), -1, 0).ravel()
    for layer, before in zip(chain, shapes, strict=False):
        step = Step(layer, _feature_major(before))
        match layer:
            case Dense() | Convolution():
                kernel, bias = (np.asarray(params[layer.name][leaf]) for leaf in ('kernel', 'bias'))
                order = (-1, -2, *range(kernel.ndim - 2))
                kernel = np.ascontiguousarray(kernel.transpose(order), np.float32)
                step = step._replace(
                    kernel=kernel, bias=bias.astype(np.float32), kind=kinds[layer.name]
                )
            case Flatten() if len(before) == 1 or not steps:
                continue
            case Flatten():
                image = np.arange(np.prod(before)).reshape(step.shape)
                step = step._replace(rows=np.moveaxis(image, 0, -1).ravel())
            case Select(indices) if len(before) == 1 and not steps:
                rows = rows[np.array(indices)]
                continue
            case Select(indices) if steps and isinstance(steps[-1].layer, Flatten):
                steps[-1] = steps[-1]._replace(rows=steps[-1].rows[np.array(indices)])
                continue
            case Select(indices):
                step = step._replace(rows=np.array(indices))
        steps.append(step)
    first = steps[0].shape if steps else _feature_major(shapes[-1])
    return _read_in_place(Plan(rows, first, steps), int(np.prod(shapes[0])))


def is_in_order(rows: np.ndarray, shape: Sequence[int]) -> bool:
    """Says whether rows are all that an array has, as they are.

    Args:
      rows: their numbers.
      shape: of the array.

    Returns:
      Whether to take them changes nothing.

    Example:
      >>> import numpy as np
      >>> is_in_order(np.arange(4), (2, 2)), is_in_order(np.arange(3), (2, 2))
      (True, False)
    """
    return np.array_equal(rows, np.arange(np.prod(shape)))


def make_jax(step: Step) -> tuple[Any, Callable[[Any, jax.Array], jax.Array]]:
    """Makes the computation of a step by JAX.

    Args:
      step: the step.

    Returns:
      The step's arrays, float32 and int32, and a function of them and of the inputs, (…, batch)
      float32, to be traced; it gives (…, batch) float32.

    Raises:
      Unsuitable: if a sparse convolution keeps more than `MAX_KEPT_WEIGHTS`.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from dns_jax.inference.chain import Dense
      >>> kernel, bias = np.array([[0, 2]], np.float32), np.ones(1, np.float32)
      >>> arrays, compute = make_jax(Step(Dense('fc'), (2,), kernel, bias, kind='sparse'))
      >>> compute(arrays, jnp.array([[7.0], [3.0]]))
      Array([[7.]], dtype=float32)
    """
    match step.layer:
        case Relu():
            return (), lambda _, x: jnp.maximum(x, 0)
        case MaxPool(size):
            # A gather keeps XLA from fusing the pooling into every sum that reads it.
            rows = np.arange(step.shape[0], dtype=np.int32)
            return rows, lambda rows, x: _take(max_pool(x, size, axis=1), rows)
        case Flatten() if is_in_order(step.rows, step.shape):
            return (), lambda _, x: x.reshape(-1, x.shape[-1])
        case Flatten():
            return np.int32(step.rows), lambda rows, x: _take(x.reshape(-1, x.shape[-1]), rows)
        case Select():
            return np.int32(step.rows), lambda rows, x: _take(x, rows)
    return _JAX_LAYERS[type(step.layer), step.kind](step)


def make_scipy(step: Step) -> Callable[[np.ndarray], np.ndarray]:
    """Makes the computation of a step by NumPy and SciPy.

    Args:
      step: the step.

    Returns:
      A function of the inputs, (…, batch) float32, that gives (…, batch) float32.

    Raises:
      Unsuitable: if the matrix of a sparse convolution has more than `MAX_MATRIX_ENTRIES`.

    Example:
      >>> import numpy as np
      >>> from dns_jax.inference.chain import Dense
      >>> kernel, bias = np.array([[0, 2]], np.float32), np.ones(1, np.float32)
      >>> compute = make_scipy(Step(Dense('fc'), (2,), kernel, bias, kind='sparse'))
      >>> compute(np.array([[7], [3]], np.float32))
      array([[7.]], dtype=float32)
    """
    match step.layer:
        case Relu():
            return lambda x: np.maximum(x, 0)
        case MaxPool(size):
            return lambda x: max_pool(x, size, axis=1)
        case Flatten() if is_in_order(step.rows, step.shape):
            return lambda x: x.reshape(-1, x.shape[-1])
        case Flatten():
            return lambda x: x.reshape(-1, x.shape[-1])[step.rows]
        case Select():
            return lambda x: x[step.rows]
    return _SCIPY_LAYERS[type(step.layer), step.kind](step)


def _feature_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[-1], *shape[:-1])


def _read_in_place(plan: Plan, inputs: int) -> Plan:
    """Lets sparse products take what they read from where it is, unless a copy is far smaller.

    Zeros of a sparse kernel cost nothing, so all that a copy gains is that what is read lies closer
    together. Below three quarters that is taken to pay; where exactly it does was not measured.
    """
    # What puts the inputs in order is such a step too.
    steps = [Step(Flatten(), (inputs,), rows=plan.rows), *plan.steps]
    shape = plan.shape
    for index, (before, step) in enumerate(itertools.pairwise(steps)):
        whole = math.prod(before.shape)
        is_sparse = isinstance(step.layer, Dense) and step.kind != 'dense'
        if is_sparse and isinstance(before.layer, Flatten) and len(before.rows) > whole * 3 // 4:
            kernel = np.zeros((len(step.kernel), whole), np.float32)
            kernel[:, before.rows] = step.kernel
            steps[index] = before._replace(rows=np.arange(whole))
            steps[index + 1] = step._replace(kernel=kernel, shape=(whole,))
            shape = shape if index else (whole,)
    return Plan(steps[0].rows, shape, steps[1:])


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    # The rows are all there: to clip spares the default's check.
    return jnp.take(x, rows, axis=0, mode='clip')


def _jax_dense_product(step: Step):
    def compute(weights, x):
        kernel, bias = weights
        return kernel @ x + bias[:, None]

    return (step.kernel, step.bias), compute


def _jax_dense_convolution(step: Step):
    def compute(weights, x):
        kernel, bias = weights
        axes = ('CHWN', 'OIHW', 'CHWN')
        x = jax.lax.conv_general_dilated(
            _pad(step, x), kernel, (1, 1), 'VALID', dimension_numbers=axes
        )
        return x + bias[:, None, None, None]

    return (step.kernel, step.bias), compute


def _pad(step: Step, images: Any) -> Any:
    """Puts zeros around images where the convolution wants outputs as large as they are."""
    if isinstance(step.layer, Convolution) and step.layer.padding == 'SAME':
        lost = [side - 1 for side in step.kernel.shape[2:]]
        widths = [(0, 0), *((side // 2, side - side // 2) for side in lost), (0, 0)]
        return (np if isinstance(images, np.ndarray) else jnp).pad(images, widths)
    return images


def _jax_sparse_product(step: Step):
    """Pads the kept weights of all units to one number, so that slot by slot they are arrays."""
    counts = np.count_nonzero(step.kernel, axis=1)
    unit, position = np.nonzero(step.kernel)
    slot = np.arange(len(unit)) - np.repeat(np.cumsum(counts) - counts, counts)
    values = np.zeros((len(counts), max(counts.max(initial=0), 1)), np.float32)
    positions = np.zeros(values.shape, np.int32)
    values[unit, slot], positions[unit, slot] = step.kernel[unit, position], position

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

    return (values, positions, step.bias), compute


def _jax_sparse_convolution(step: Step):
    if (kept := np.count_nonzero(step.kernel)) > MAX_KEPT_WEIGHTS:
        raise Unsuitable(
            f'{step.layer} keeps {kept} weights; sparse, it may keep {MAX_KEPT_WEIGHTS}'
        )

    def compute(bias, x):
        x = _pad(step, x)
        height, width = (1 + x.shape[axis] - step.kernel.shape[1 + axis] for axis in (1, 2))
        # Columns and batch in one axis: XLA then takes whole vectors at any size of the batch.
        batch = x.shape[-1]
        x = x.reshape(*x.shape[:2], -1)
        filters = []
        for index, kernel in enumerate(step.kernel):
            total = jnp.full((height, width * batch), bias[index])
            for channel, row, column in zip(*np.nonzero(kernel), strict=True):
                piece = x[channel, row : row + height, column * batch : (column + width) * batch]
                total = total + kernel[channel, row, column] * piece
            filters.append(total)
        return jnp.stack(filters).reshape(-1, height, width, batch)

    return step.bias, compute


def _jax_native(step: Step):
    kernel = step.kernel if step.kernel.ndim == 4 else step.kernel[..., None, None]
    _, height, width = _padded_shape(step)
    unit, channel, row, column = np.nonzero(kernel)
    taps = native.Taps(
        starts=np.searchsorted(unit, np.arange(len(kernel) + 1)).astype(np.int32),
        positions=((channel * height + row) * width + column).astype(np.int32),
        values=kernel[unit, channel, row, column],
    )
    rows, columns = height - kernel.shape[2] + 1, width - kernel.shape[3] + 1

    def compute(bias, x):
        x = _pad(step, x).reshape(-1, x.shape[-1])
        outputs = native.sum_weighted_slices(x, taps, bias, rows, width, columns)
        return outputs if isinstance(step.layer, Convolution) else outputs[:, 0, 0]

    return step.bias, compute


def _padded_shape(step: Step) -> tuple[int, int, int]:
    """The shape of the images that the convolution slides over; a vector is of single pixels."""
    channels, *sides = step.shape
    if isinstance(step.layer, Convolution) and step.layer.padding == 'SAME':
        sides = [whole + part - 1 for whole, part in zip(sides, step.kernel.shape[2:], strict=True)]
    height, width = sides or (1, 1)
    return channels, height, width


def _scipy_dense_product(step: Step):
    return lambda x: step.kernel @ x + step.bias[:, None]


def _scipy_dense_convolution(step: Step):
    def compute(x):
        windows = np.lib.stride_tricks.sliding_window_view(
            _pad(step, x), step.kernel.shape[2:], axis=(1, 2)
        )
        products = np.tensordot(step.kernel, windows, axes=((1, 2, 3), (0, 4, 5)))
        return products + step.bias[:, None, None, None]

    return compute


def _scipy_sparse_product(step: Step):
    matrix = scipy.sparse.csr_array(step.kernel)
    return lambda x: _multiply(matrix, x) + step.bias[:, None]


def _scipy_sparse_convolution(step: Step):
    """One row for each pixel of each filter, one column for each of each channel."""
    channels, height, width = _padded_shape(step)
    filters, _, rows, columns = step.kernel.shape
    shape = filters, height - rows + 1, width - columns + 1
    unit, channel, row, column = np.nonzero(step.kernel)
    if (entries := unit.size * shape[1] * shape[2]) > MAX_MATRIX_ENTRIES:
        raise Unsuitable(f'{step.layer} makes {entries} entries; there may be {MAX_MATRIX_ENTRIES}')
    y, x = np.indices(shape[1:]).reshape(2, -1, 1)  # each pixel, for each weight
    matrix = scipy.sparse.csr_array(
        (
            np.broadcast_to(step.kernel[unit, channel, row, column], (y.size, unit.size)).ravel(),
            (
                ((unit * shape[1] + y) * shape[2] + x).ravel(),
                ((channel * height + y + row) * width + x + column).ravel(),
            ),
        ),
        shape=(np.prod(shape), channels * height * width),
    )
    bias = np.repeat(step.bias, shape[1] * shape[2])[:, None]

    def compute(x):
        outputs = _multiply(matrix, _pad(step, x).reshape(-1, x.shape[-1]))
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
