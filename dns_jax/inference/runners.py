"""Runners: several ways to compute a chain, one of them for each of its layers.

Owns the functions that run a network, and the choice among them by time; `stages` and `kernels`
own how a layer is computed. Compaction (`dns_jax.inference.compact`) belongs before any of it.

A layer is computed as

  - `dense`: by a matrix product or a convolution, zeros and all;
  - `sparse`: from its kept weights alone;
  - `native`: the same by a kernel in C++ (`dns_jax.inference.native`), with JAX on CPU.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dns_jax.inference import native
from dns_jax.inference.chain import Chain, Weighted, Weights, run_chain, trace_shapes
from dns_jax.inference.kernels import Unsuitable, make_jax, make_scipy
from dns_jax.inference.stages import KERNEL_KINDS, is_in_order, make_pipeline

Kinds = Mapping[str, str]
"""How each layer with weights is computed, by its name."""

Runner = Callable[[Any], Any]
"""Maps a batch of inputs to outputs, as `dns_jax.inference.chain.run_chain` does."""


class Choice(NamedTuple):
    """What `choose_kinds` found."""

    kinds: dict[str, str]  #: by layer
    seconds: dict[str, dict[str, float]]  #: of a call of the layer by itself, by layer, then kind


def jax_runner(
    chain: Chain,
    params: Weights,
    input_shape: Sequence[int],
    kinds: Kinds,
    batch_last: bool = False,
) -> Runner:
    """Makes a jitted function of JAX.

    Without `native` layers it runs on any device and is differentiable in its inputs.

    Args:
      chain: the layers.
      params: their weights, concrete; zero where pruned.
      input_shape: of one example, without a batch axis.
      kinds: `{layer name: 'dense', 'sparse' or 'native'}`, for every layer with weights.
      batch_last: whether a network that is all dense is computed with the batch as the last axis
        too, as all others are; which is faster depends on the network.

    Returns:
      A function of inputs (batch, …) float32; it is compiled anew for each size of a batch. It
      raises ValueError if they have another shape.

    Raises:
      ValueError: if the chain does not fit, or `kinds` is not about its layers.
      Unsuitable: if a sparse convolution has more than 4,096 kept weights.
      RuntimeError: if a layer is `native` and there is no kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from dns_jax.inference.chain import Dense
      >>> params = {'fc': {'kernel': jnp.array([[0.0], [2.0]]), 'bias': jnp.array([1.0])}}
      >>> run = jax_runner((Dense('fc'),), params, (2,), {'fc': 'sparse'})
      >>> run(jnp.array([[7.0, 3.0]]))
      Array([[7.]], dtype=float32)
    """
    pipeline = make_pipeline(chain, params, input_shape, kinds, KERNEL_KINDS)
    if 'native' in kinds.values() and (reason := native.build_failure()):
        raise RuntimeError(reason)
    if set(kinds.values()) <= {'dense'} and not batch_last:
        weights: Any = {
            name: {leaf: jnp.asarray(params[name][leaf], jnp.float32) for leaf in params[name]}
            for name in kinds
        }
        run = jax.jit(lambda weights, inputs: run_chain(chain, weights, inputs))
        return lambda inputs: run(weights, _check_inputs(inputs, input_shape))

    made = [make_jax(stage) for stage in pipeline.stages]

    @jax.jit
    def run_stages(weights, inputs):
        outputs = inputs.reshape(len(inputs), -1)
        # Images are gathered even in order: XLA would transpose them anew in each layer's loops.
        if len(pipeline.shape) > 1 or not is_in_order(pipeline.rows, input_shape):
            outputs = jnp.take(outputs, pipeline.rows, axis=1, mode='clip')
        outputs = outputs.T.reshape(*pipeline.shape, -1)
        for own, (_, compute) in zip(weights, made, strict=True):
            outputs = compute(own, outputs)
        return _batch_major(outputs)

    weights = [jax.tree.map(jnp.asarray, own) for own, _ in made]
    return lambda inputs: run_stages(weights, _check_inputs(inputs, input_shape))


def scipy_runner(chain: Chain, params: Weights, input_shape: Sequence[int], kinds: Kinds) -> Runner:
    """Makes a function of NumPy and SciPy; JAX takes no part in its calls.

    A sparse convolution is a CSR matrix with a row for each pixel of each filter.

    Args:
      chain: the layers.
      params: their weights, concrete; zero where pruned.
      input_shape: of one example, without a batch axis.
      kinds: `{layer name: 'dense' or 'sparse'}`, for every layer with weights.

    Returns:
      A function of inputs (batch, …), NumPy float32. It raises ValueError if they have another
      shape.

    Raises:
      ValueError: if the chain does not fit, or `kinds` is not about its layers.
      Unsuitable: if the matrix of a sparse convolution has more than 2**24 entries.

    Example:
      >>> import numpy as np
      >>> from dns_jax.inference.chain import Dense
      >>> params = {'fc': {'kernel': np.float32([[0], [2]]), 'bias': np.float32([1])}}
      >>> run = scipy_runner((Dense('fc'),), params, (2,), {'fc': 'sparse'})
      >>> run(np.float32([[7, 3]]))
      array([[7.]], dtype=float32)
    """
    pipeline = make_pipeline(chain, params, input_shape, kinds, ('dense', 'sparse'))
    computes = [make_scipy(stage) for stage in pipeline.stages]
    in_order = is_in_order(pipeline.rows, input_shape)

    def run(inputs):
        outputs = _check_inputs(inputs, input_shape).reshape(len(inputs), -1).T
        outputs = np.ascontiguousarray(outputs) if in_order else outputs[pipeline.rows]
        outputs = outputs.reshape(*pipeline.shape, -1)
        for compute in computes:
            outputs = compute(outputs)
        return np.ascontiguousarray(_batch_major(outputs))

    return run


def choose_kinds(
    make_runner: Callable[..., Runner],
    offered: Sequence[str],
    chain: Chain,
    params: Weights,
    input_shape: Sequence[int],
    batch: int,
    turns: int = 15,
) -> Choice:
    """Chooses how to compute each layer, by the time it takes on this machine.

    Each layer is timed alone in every kind. Then, in the network made of the fastest, each layer is
    tried in every kind again. Last, the outcome is timed against the all-dense network.

    Args:
      make_runner: `jax_runner` or `scipy_runner`.
      offered: the kinds to choose from. `native` is left out where there is no kernel, `sparse`
        where it is unsuitable; dense takes the place of an empty offer.
      chain: the layers, as for `make_runner`.
      params: as for `make_runner`.
      input_shape: as for `make_runner`.
      batch: examples in a call.
      turns: how often each way is timed.

    Returns:
      The kinds, and the times they were chosen by.

    Raises:
      ValueError: if nothing is offered, `batch` or `turns` is below 1, or as `make_runner` does.

    Example:
      >>> import numpy as np
      >>> from dns_jax.inference.chain import Dense
      >>> params = {'fc': {'kernel': np.eye(2, dtype=np.float32), 'bias': np.zeros(2, np.float32)}}
      >>> choose_kinds(scipy_runner, ['dense'], (Dense('fc'),), params, (2,), batch=1).kinds
      {'fc': 'dense'}
    """
    if not offered or not set(offered) <= set(KERNEL_KINDS):
        raise ValueError(f'offered must be some of {KERNEL_KINDS}, but is {offered}')
    if min(batch, turns) < 1:
        raise ValueError(f'batch={batch} and turns={turns} must be 1 or more')
    if native.build_failure():
        offered = [kind for kind in offered if kind != 'native'] or ['dense']
    kinds, seconds = {}, {}
    for layer, shape in zip(chain, trace_shapes(chain, params, input_shape), strict=False):
        if isinstance(layer, Weighted):
            ways = {kind: ((layer,), shape, {layer.name: kind}) for kind in offered}
            own = _time_ways(make_runner, ways, params, batch, turns) or {'dense': math.inf}
            kinds[layer.name], seconds[layer.name] = min(own, key=own.__getitem__), own
    # A layer by itself pays for its layout twice, within the network it may not pay at all.
    for name in kinds:
        ways = {kind: (chain, input_shape, {**kinds, name: kind}) for kind in seconds[name]}
        whole = _time_ways(make_runner, ways, params, batch, turns)
        kinds[name] = min(whole, key=whole.__getitem__)
    dense = dict.fromkeys(kinds, 'dense')
    if 'dense' in offered and kinds != dense:
        ways = {'dense': (chain, input_shape, dense), 'chosen': (chain, input_shape, kinds)}
        whole = _time_ways(make_runner, ways, params, batch, turns)
        kinds = dense if whole['dense'] < whole['chosen'] else kinds
    return Choice(kinds, seconds)


def recorded_kinds(text: str, chain: Chain) -> dict[str, str]:
    """Reads kinds that were chosen before, for `jax_runner` on this machine.

    Args:
      text: a JSON object of them, as `experiments.export` records in a sparse file.
      chain: the layers.

    Returns:
      ``{layer name: kind}``, dense in place of native where there is no kernel.

    Raises:
      ValueError: if they are not kinds of these layers.

    Example:
      >>> from dns_jax.inference.chain import Dense
      >>> recorded_kinds('{"fc": "sparse"}', (Dense('fc'),))
      {'fc': 'sparse'}
    """
    try:
        kinds = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'kinds {text[:80]!r} cannot be read: {error}') from error
    names = {layer.name for layer in chain if isinstance(layer, Weighted)}
    is_table = isinstance(kinds, dict) and kinds.keys() == names
    if not is_table or not all(kind in KERNEL_KINDS for kind in kinds.values()):
        raise ValueError(
            f'kinds must give one of {KERNEL_KINDS} for each of {names}, but is {text[:80]}'
        )
    if native.build_failure():
        return {name: 'dense' if kind == 'native' else kind for name, kind in kinds.items()}
    return kinds


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]], turns: int, least: float = 0.002
) -> dict[str, np.ndarray]:
    """Times functions that take turns, so that all see the same changes of the machine.

    Args:
      calls: the functions, by any names; a JAX array that one returns is waited for.
      turns: how many each has, 1 or more, after one that is not counted.
      least: of a turn, in seconds; a function is called as often as that takes.

    Returns:
      Seconds per call, (turns,) for each name.

    Example:
      >>> sorted(time_in_turns({'a': lambda: 1, 'b': lambda: 2}, turns=3, least=0))
      ['a', 'b']
    """

    def seconds(call, repeats):
        started = time.perf_counter()
        for _ in range(repeats):
            jax.block_until_ready(call())
        return (time.perf_counter() - started) / repeats

    repeats = {}
    for name, call in calls.items():
        jax.block_until_ready(call())  # compiles
        repeats[name] = 1 + int(least / max(seconds(call, 1), 1e-9))
    times = {name: np.zeros(turns) for name in calls}
    for turn in range(turns):
        for name, call in calls.items():
            times[name][turn] = seconds(call, repeats[name])
    return times


def _check_inputs(inputs: Any, input_shape: Sequence[int]) -> Any:
    if inputs.shape[1:] != tuple(input_shape) or not inputs.shape[0]:
        wanted = ', '.join(map(str, input_shape))
        raise ValueError(
            f'inputs must have the shape (batch, {wanted}) with batch at least 1, but have '
            f'{inputs.shape}'
        )
    return inputs


def _batch_major(outputs: Any) -> Any:
    return outputs.transpose(-1, *range(1, outputs.ndim - 1), 0)


def _time_ways(make_runner, ways, params, batch, turns) -> dict[str, float]:
    calls = {}
    for name, (chain, shape, kinds) in ways.items():
        try:
            run = make_runner(chain, params, shape, kinds)
        except Unsuitable:
            continue
        inputs = np.random.default_rng(0).random((batch, *shape), np.float32)
        inputs = jnp.asarray(inputs) if make_runner is jax_runner else inputs
        calls[name] = lambda run=run, inputs=inputs: run(inputs)
    return {name: float(np.median(times)) for name, times in time_in_turns(calls, turns).items()}
