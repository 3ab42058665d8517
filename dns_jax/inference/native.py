"""A kernel in C++ for sparse layers on CPU, built when it is first asked for.

Owns the building and the checks in front of the kernel, `weighted_slices.cc`. Everything it does
can be had from JAX alone, more slowly: a machine without a C++ compiler lacks nothing else.
"""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_SOURCE = Path(__file__).with_name('weighted_slices.cc')
_TARGET = 'dns_jax_weighted_slices'
_CANNOT_BUILD = 'the C++ kernel of dns_jax.inference.native cannot be built by'


class Taps(NamedTuple):
    """The kept weights of a layer, grouped by what they add to; NumPy arrays."""

    starts: np.ndarray  #: (outputs + 1,) int32: where those of an output begin and end
    positions: np.ndarray  #: (kept,) int32: of the first input that a weight multiplies
    values: np.ndarray  #: (kept,) float32


@functools.cache
def build_failure() -> str:
    """Builds the kernel, once in a process, and says why that failed.

    The compiler is `c++`, or what the environment variable CXX names. The build takes some
    seconds and goes into a temporary folder, so that no stale or foreign build is ever loaded.

    Returns:
      The reason, or the empty string if the kernel is there.

    Example:
      >>> isinstance(build_failure(), str)
      True
    """
    if jax.default_backend() != 'cpu':
        return f'the C++ kernel is for CPU, but JAX runs on {jax.default_backend()}'
    compiler = shlex.split(os.environ.get('CXX', 'c++'))
    flags = ['-std=c++17', '-O3', '-march=native', '-fopenmp-simd', '-fPIC', '-shared', '-w']
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / 'weighted_slices.so'
        command = [*compiler, *flags, f'-I{jax.ffi.include_dir()}', _SOURCE, '-o', library]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            handler = ctypes.CDLL(str(library)).WeightedSlices
        except subprocess.CalledProcessError as error:
            return f'{_CANNOT_BUILD} {compiler}: {error.stderr.strip()[-500:]}'
        except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
            return f'{_CANNOT_BUILD} {compiler}: {error}'
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(handler), platform='cpu')
    return ''


def sum_weighted_slices(
    inputs: jax.Array, taps: Taps, biases: jax.Array, rows: int, stride: int, width: int
) -> jax.Array:
    """Adds up weighted slices of the inputs, on CPU.

    outputs[f, r] = biases[f] + Σ_k values[k] · inputs[positions[k] + r · stride : … + width]
    over the taps k of f. A fully connected layer is the case of one row of width 1; a convolution
    has the height of its output as rows, the width of its input as stride.

    Args:
      inputs: (elements, batch) float32.
      taps: concrete.
      biases: (outputs,) float32.
      rows: how often the taps are applied, further on each time.
      stride: by how many elements further.
      width: elements of a slice.

    Returns:
      (outputs, rows, width, batch) float32.

    Raises:
      RuntimeError: if the kernel cannot be built here.
      TypeError: if an array has another dtype.
      ValueError: if a slice would reach beyond the inputs, or shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> taps = Taps(np.int32([0, 2]), np.int32([0, 1]), np.float32([1, 10]))
      >>> inputs = jnp.array([[1.0], [2.0], [3.0]])
      >>> if not build_failure():
      ...     outputs = sum_weighted_slices(inputs, taps, jnp.zeros(1), rows=1, stride=0, width=2)
      ...     assert outputs.ravel().tolist() == [21.0, 32.0]
    """
    if reason := build_failure():
        raise RuntimeError(reason)
    _check_reach(inputs, taps, biases, rows, stride, width)
    shape = (len(biases), rows, width, inputs.shape[1])
    call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct(shape, jnp.float32))
    lengths = {'batch': inputs.shape[1], 'rows': rows, 'stride': stride, 'width': width}
    attributes = {name: np.int64(value) for name, value in lengths.items()}
    return call(inputs, *map(jnp.asarray, taps), biases, **attributes)


def _check_reach(
    inputs: jax.Array, taps: Taps, biases: jax.Array, rows: int, stride: int, width: int
) -> None:
    """Makes sure that the kernel, which looks at no bounds, reads nothing beyond its arrays."""
    wanted = {'inputs': (2, 'float32'), 'biases': (1, 'float32'), 'starts': (1, 'int32')}
    wanted |= {'positions': (1, 'int32'), 'values': (1, 'float32')}
    arrays = {'inputs': inputs, 'biases': biases, **taps._asdict()}
    for name, (axes, dtype) in wanted.items():
        if arrays[name].dtype != dtype:
            raise TypeError(f'{name} must be {dtype}, not {arrays[name].dtype}')
        if arrays[name].ndim != axes:
            raise ValueError(f'{name} must have {axes} axes, but is {arrays[name].shape}')
    # In 64 bits, as sums of what a caller gives may pass 32.
    starts, positions = (each.astype(np.int64) for each in (taps.starts, taps.positions))
    if len(positions) != len(taps.values) or len(starts) != len(biases) + 1:
        raise ValueError(
            f'taps has {len(starts)} starts, {len(positions)} positions and {len(taps.values)} '
            f'values for {len(biases)} biases'
        )
    if starts[0] != 0 or starts[-1] != len(positions) or (np.diff(starts) < 0).any():
        raise ValueError(f'starts must ascend from 0 to {len(positions)}')
    reach = positions.max(initial=0) + (rows - 1) * stride + width
    if min(rows, width) < 1 or stride < 0 or positions.min(initial=0) < 0 or reach > len(inputs):
        raise ValueError(
            f'{rows} rows of width {width} with a stride of {stride} do not lie within '
            f'{len(inputs)} inputs'
        )
