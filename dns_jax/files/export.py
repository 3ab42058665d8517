"""Pruned networks for other programs: plain safetensors, ONNX and StableHLO files.

Owns what the files look like. All weights are written, zeros in their places: whoever wants the
gain of the zeros compacts the network first. No file needs dns_jax to be read.
"""

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from dns_jax._core.checks import needs_extra
from dns_jax.files._contents import check_float32, check_metadata, sort_metadata
from dns_jax.files.writing import write_whole
from dns_jax.inference.chain import (
    Chain,
    Dense,
    Flatten,
    MaxPool,
    Relu,
    Select,
    Weighted,
    Weights,
    run_chain,
    run_layer,
    trace_shapes,
)
from dns_jax.layers import map_leaves, named_leaves
from dns_jax.typing import Params

with needs_extra('sparse'):
    from safetensors.numpy import save

Apply = Callable[[Any, Any], Any]
"""Any function of params and a batch of inputs that JAX can trace, such as Flax's `apply`."""

_OPSET = 17  # of ONNX: old enough for most runtimes, and all that a chain needs
_OPSET_OF_FUNCTIONS = 20  # the first with GELU
_LOCATIONS = 'jax_traceback_in_locations_limit'
_PLATFORMS = {'cpu', 'cuda', 'rocm', 'tpu'}


def save_dense(
    path: str | os.PathLike[str], params: Params, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes all weights of a network to a plain safetensors file, whole or not at all.

    A leaf is a float32 tensor of its shape, named by its path with dots, such as `fc1.kernel`, as
    Flax networks elsewhere and those of PyTorch have it. `safetensors.numpy.load_file` reads it.
    The same network gives the same bytes.

    Args:
      path: the file, in a folder that exists; one that is there is replaced.
      params: the weights, masked already (`dns_jax.apply_masks`), concrete arrays of float32 or a
        narrower floating-point type.
      metadata: free strings to store beside the weights, such as the name of the network.

    Raises:
      ValueError: if there are no leaves, two have one name, or a weight is not finite.
      TypeError: if a leaf is not of a type that float32 can hold, or `metadata` not strings alone.
      OSError: if the file cannot be written; what was there before is then as it was.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from safetensors.numpy import load_file
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_dense(f'{folder}/tiny.safetensors', {'fc1': {'bias': jnp.array([0.0, 2.0])}})
      ...     load_file(f'{folder}/tiny.safetensors')
      {'fc1.bias': array([0., 2.], dtype=float32)}

    Reference:
      The format of safetensors, https://github.com/huggingface/safetensors.
    """
    tensors = {}
    for path_of_leaf, leaf in named_leaves(params):
        name = path_of_leaf.replace('/', '.')
        if name in tensors or name == '__metadata__':  # the latter is the format's own
            raise ValueError(f'params has a leaf whose name {name!r} is taken')
        tensors[name] = _float32(name, leaf)
    if not tensors:
        raise ValueError('params must have at least one leaf')
    entries = dict(metadata or {})
    check_metadata(entries)
    write_whole(Path(path), sort_metadata(save(tensors, entries)))


def save_onnx(
    path: str | os.PathLike[str],
    chain: Chain | Apply,
    params: Params,
    input_shape: Sequence[int],
    dtype: Any = jnp.float32,
) -> None:
    """Writes a network as an ONNX model, whole or not at all.

    The model has one input, `inputs`, and one output, `outputs`, as those of `run_chain`: float32,
    and of any batch size. The same network gives the same bytes.

    Args:
      path: the file, in a folder that exists; one that is there is replaced.
      chain: the layers, at least one; or a function of params and inputs (batch, …). `jax2onnx`
        does not know all primitives, and no scan of Flax's.
      params: the weights, as in `save_dense`; for a chain entries for other names are ignored.
      input_shape: of one example, without a batch axis.
      dtype: of the inputs.

    Raises:
      ValueError: if the chain is empty or does not fit, or a weight is not finite.
      TypeError: if a layer is none of `inference.chain`, or a weight of a type float32 cannot hold.
      Exception: whatever `jax2onnx` raises of a function that it cannot convert.
      ImportError: without the extra `onnx`.
      OSError: if the file cannot be written; what was there before is then as it was.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> import onnxruntime
      >>> from dns_jax.inference.chain import Relu
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_onnx(f'{folder}/relu.onnx', (Relu(),), {}, (2,))
      ...     session = onnxruntime.InferenceSession(f'{folder}/relu.onnx')
      >>> session.run(None, {'inputs': np.array([[-1, 2]], np.float32)})
      [array([[0., 2.]], dtype=float32)]

    Reference:
      ONNX, operators of version 17 for a chain and 20 for a function, https://onnx.ai/onnx.
    """
    run, of_function = _bind(chain, params, input_shape, _run_for_onnx), callable(chain)
    shape = (*jax.export.symbolic_shape('batch'), *input_shape)
    with _silent():
        with needs_extra('onnx'):
            import jax2onnx
            import onnx

        model = jax2onnx.to_onnx(
            run,
            [jax.ShapeDtypeStruct(shape, dtype)],
            model_name='function' if of_function else 'chain',
            opset=_OPSET_OF_FUNCTIONS if of_function else _OPSET,
            input_names=['inputs'],
            output_names=['outputs'],
        )
    if of_function:  # what is noted of the shapes within is wrong around convolutions
        del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    write_whole(Path(path), model.SerializeToString(deterministic=True))


def save_stablehlo(
    path: str | os.PathLike[str],
    chain: Chain | Apply,
    params: Params,
    input_shape: Sequence[int],
    platforms: Sequence[str] = ('cpu', 'cuda', 'tpu'),
    dtype: Any = jnp.float32,
) -> None:
    """Writes a network as a program that JAX runs without dns_jax, whole or not at all.

    It is StableHLO, the weights inside, as `jax.export` serializes it, and computes `run_chain`
    in float32 for any batch size. `jax.export.deserialize` reads it, in this version of JAX and,
    as JAX promises, for some months of later ones. The same network gives the same bytes.

    Args:
      path: the file, in a folder that exists; one that is there is replaced.
      chain: the layers, or a function of params and inputs (batch, …) that JAX can trace.
      params: the weights, as in `save_dense`; for a chain entries for other names are ignored.
      input_shape: of one example, without a batch axis.
      platforms: what it is to run on; none of it need be there now.
      dtype: of the inputs.

    Raises:
      ValueError: if the chain is empty or does not fit, a weight is not finite, or a platform
        not known.
      TypeError: if a layer is none of `inference.chain`, or a weight of a type float32 cannot hold.
      ImportError: without the extra `stablehlo`.
      OSError: if the file cannot be written; what was there before is then as it was.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from dns_jax.inference.chain import Relu
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_stablehlo(f'{folder}/relu.stablehlo', (Relu(),), {}, (2,))
      ...     network = jax.export.deserialize(Path(folder, 'relu.stablehlo').read_bytes())
      >>> network.call(jnp.array([[-1.0, 2.0]]))
      Array([[0., 2.]], dtype=float32)

    Reference:
      StableHLO, https://openxla.org/stablehlo.
    """
    if isinstance(platforms, str) or not platforms or set(platforms) - _PLATFORMS:
        raise ValueError(f'platforms must be some of {sorted(_PLATFORMS)}, not {platforms!r}')
    run = _bind(chain, params, input_shape, run_chain)
    shape = (*jax.export.symbolic_shape('batch'), *input_shape)
    # Leaves out the caller's files and lines, which would change the bytes.
    limit = jax.config.values[_LOCATIONS]
    jax.config.update(_LOCATIONS, 0)
    try:
        export = jax.export.export(jax.jit(run), platforms=platforms)
        exported = export(jax.ShapeDtypeStruct(shape, dtype))
    finally:
        jax.config.update(_LOCATIONS, limit)
    with needs_extra('stablehlo'):
        content = exported.serialize()
    write_whole(Path(path), bytes(content))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps jax2onnx from print and log: of plugins that do not fit this JAX, none is needed."""
    names = 'jax2onnx.plugins.plugin_system', 'onnx_ir.serde'
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(action='ignore', category=DeprecationWarning),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _bind(
    chain: Chain | Apply,
    params: Params,
    input_shape: Sequence[int],
    run_layers: Callable[[Chain, Weights, jax.Array], jax.Array],
) -> Callable[[jax.Array], Any]:
    """Makes a function of the inputs alone, with weights in float32, of a chain that fits."""
    if callable(chain):
        return partial(chain, map_leaves(_float32, params))
    if not chain:
        raise ValueError('chain must have at least one layer')
    trace_shapes(chain, params, input_shape)
    weights = {
        name: {part: _float32(f'{name}/{part}', leaf) for part, leaf in params[name].items()}
        for name in (layer.name for layer in chain if isinstance(layer, Weighted))
    }
    return partial(run_layers, chain, weights)


def _float32(name: str, leaf: Any) -> np.ndarray:
    weights = np.asarray(leaf)
    check_float32(name, weights)
    return weights.astype(np.float32, order='C')  # which safetensors takes for granted


def _run_for_onnx(chain: Chain, weights: Weights, inputs: jax.Array) -> jax.Array:
    """Does as `run_chain`, by functions that jax2onnx turns into nodes that run fast."""
    with needs_extra('onnx'):
        from flax import linen

    for layer in chain:
        match layer:
            case Dense(name):  # `@` gives a Gemm beside its bias, which runtimes leave so
                inputs = jnp.matmul(inputs, weights[name]['kernel']) + weights[name]['bias'][None]
            case MaxPool(size):
                inputs = linen.max_pool(inputs, window_shape=(size, size), strides=(size, size))
            case Relu():
                inputs = jax.nn.relu(inputs)
            case Flatten():  # with -1, for else the model works its batch size out
                inputs = jnp.reshape(inputs, (-1, math.prod(inputs.shape[1:])))
            case Select(indices):
                inputs = jnp.take(inputs, np.array(indices, np.int32), axis=-1)
            case _:
                inputs = run_layer(layer, weights[layer.name], inputs)
    return inputs
