"""How fast a pruned network runs: every runner beside the dense network, on one core.

python -m experiments.latency --model=zoo/lenet5.safetensors

All ways take turns in one process, and each row's ratio is against the fastest dense JAX of the
same run. `fc:9216x4096:0.037` is one layer, AlexNet's largest, with random weights.
"""

import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime

from dns_jax.files.export import Apply, save_onnx
from dns_jax.files.writing import write_whole
from dns_jax.inference import native
from dns_jax.inference.chain import Chain, Dense, Weighted, trace_shapes
from dns_jax.inference.kernels import make_scipy
from dns_jax.inference.runners import (
    Runner,
    choose_kinds,
    jax_runner,
    recorded_kinds,
    scipy_runner,
    time_in_turns,
)
from dns_jax.inference.shrink import shrink
from dns_jax.inference.stages import make_pipeline
from experiments.artefacts.loading import Model, load_model
from experiments.config import command_line
from experiments.config.command_line import flag
from experiments.devices import progress
from experiments.measurements import latency_report, timing
from experiments.networks import models
from experiments.networks.language import Gpt

Calls = dict[str, Callable[[], Any]]

_DENSITIES = (0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01, 0.005)


@dataclasses.dataclass(frozen=True)
class LatencyConfig:
    """What `experiments.latency` measures."""

    model: str = flag(
        'zoo/lenet5.safetensors', 'A pruned network: its file, or fc:INPUTSxUNITS:DENSITY.'
    )
    batches: str = flag('1,64', 'Examples in a call, with commas between.')
    turns: int = flag(31, 'Timed turns of each way to run the network.', lower_bound=1)
    break_even: bool = flag(
        False, 'Also find, for a layer fc:…, the densities at which sparse is as fast as dense.'
    )
    output: str | None = flag(
        None, 'JSON file that the result is written to; by default none is written.'
    )

    def __post_init__(self):
        self.sizes()
        if self.break_even and not self.model.startswith('fc:'):
            raise ValueError(f'--break_even is of a layer, not of --model={self.model}')

    def sizes(self) -> list[int]:
        """Returns the sizes of the batches."""
        if not re.fullmatch(r'[1-9]\d{0,5}(,[1-9]\d{0,5})*', self.batches):
            raise ValueError(f'--batches={self.batches} must be numbers with commas between')
        return [int(size) for size in self.batches.split(',')]


def measure(config: LatencyConfig) -> dict[str, Any]:
    """Times every way to run a network, and prints the tables, for programs as JSON.

    Returns:
      What was measured, as `experiments.measurements.latency_report` wants it.

    Raises:
      ValueError: if the model cannot be read, or a way gives other outputs than the network.
      OSError: if the model cannot be read, or the result not written.
      RuntimeError: if this system cannot keep a process on one core.
    """
    if config.output:  # asked for at once, not after minutes
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    with timing.on_one_core() as cores:
        if cores > 1:
            raise RuntimeError('timing on one core needs os.sched_setaffinity, which is not here')
        model = load_model(config.model)
        result = {
            'model': model.name,
            'command': ' '.join(['python -m experiments.latency', *timing.given_flags(config)]),
            'device': timing.describe_device(),
            'batches': {},
            **_measure_machine(),
        }
        for batch in progress.bar(config.sizes(), 'every way', unit=' batches'):
            result['batches'][str(batch)] = _measure_batch(model, batch, config.turns)
        if model.chain:
            result['layers'] = _describe_layers(model)
        if config.break_even:
            result['break_even'] = _find_break_even(config)
    print(latency_report.latency_tables(result))
    command_line.print_result(result)
    if config.output:
        write_whole(Path(config.output), json.dumps(result, indent=2) + '\n')
    return result


def _measure_batch(model: Model, batch: int, turns: int) -> dict[str, Any]:
    inputs = _draw_inputs(model, batch)
    calls, said = _chain_calls(model, inputs) if model.chain else (_module_calls(model, inputs), {})
    dense = [name for name in calls if name.startswith('dense')]
    _check_outputs(calls, dense[0])
    # Long turns, so that a small network finds its weights in the cache, as it would in use.
    times = time_in_turns(calls, turns, least=0.02)
    best = min(np.median(times[name]) for name in dense)
    ways = {
        name: {
            'median_us': 1e6 * float(np.median(each)),
            'least_us': 1e6 * float(each.min()),
            'ratio': float(best / np.median(each)),
        }
        for name, each in times.items()
    }
    return {**said, 'ways': ways}


def _draw_inputs(model: Model, batch: int) -> np.ndarray:
    random, shape = np.random.default_rng(0), (batch, *model.input_shape)
    if isinstance(model.network, Gpt):
        return random.integers(0, model.network.characters, shape, np.int32)
    return random.random(shape, np.float32)


def _module_calls(model: Model, inputs: np.ndarray) -> Calls:
    """All ways that there are for a network that is no chain."""
    apart, on_device = model.apart(), jnp.asarray(inputs)

    def call(apply, params):
        return partial(jax.jit(apply), jax.tree.map(jnp.asarray, params), on_device)

    calls: Calls = {'dense JAX, as trained': call(model.apply, model.params)}
    if apart is not model:
        calls['dense JAX, unrolled'] = call(apart.apply, apart.params)
    small = shrink(apart.apply, apart.params, apart.masks, inputs)
    if any(before != after for before, after in small.leaves.values()):
        calls['JAX, shrunken'] = call(small.apply, small.params)
    arguments = apart.apply, apart.params, model.input_shape
    calls['ONNX Runtime'] = _onnx_call(*arguments, inputs)
    return calls


def _chain_calls(model: Model, inputs: np.ndarray) -> tuple[Calls, dict[str, Any]]:
    """All ways that there are for a chain, and the kinds that were chosen for its layers."""
    small, batch = model.compact(), len(inputs)
    on_device = jnp.asarray(inputs)
    calls = _dense_calls(model, inputs)
    result: dict[str, Any] = {'kinds': {}, 'seconds': {}}
    arguments = small.chain, small.params, model.input_shape
    for label, batch_last in (('JAX, compact', False), ('JAX, compact, batch last', True)):
        run = jax_runner(*arguments, _all_dense(small.chain), batch_last)
        calls[label] = partial(run, on_device)
    for name, (make_runner, offered) in _runners().items():
        choice = choose_kinds(make_runner, offered, *arguments, batch)
        run = make_runner(*arguments, choice.kinds)
        label = f'{name}, compact, chosen by layer'
        calls[label] = partial(run, on_device if make_runner is jax_runner else inputs)
        result['kinds'][name], result['seconds'][name] = choice.kinds, choice.seconds
    if 'kinds' in model.metadata:
        kinds = recorded_kinds(model.metadata['kinds'], model.chain)
        run = jax_runner(model.chain, model.params, model.input_shape, kinds)
        calls['JAX, as the file says'] = partial(run, on_device)
    if len(model.chain) == 1 and isinstance(model.chain[0], Dense):
        name, whole = model.chain[0].name, (model.chain, model.params, model.input_shape)
        compute = make_scipy(make_pipeline(*whole, {name: 'sparse'}, ['sparse']).stages[0])
        calls['SciPy, the product alone'] = partial(compute, np.ascontiguousarray(inputs.T))
    calls['ONNX Runtime'] = _onnx_call(model.chain, model.params, model.input_shape, inputs)
    calls['ONNX Runtime, compact'] = _onnx_call(
        small.chain, small.params, model.input_shape, inputs
    )
    return calls, result


def _dense_calls(model: Model, inputs: np.ndarray) -> Calls:
    """The masked network in all ways that JAX has for it; ratios are against the fastest."""
    calls: Calls = {}
    on_device = jnp.asarray(inputs)
    for label, batch_last in (('dense JAX', False), ('dense JAX, batch last', True)):
        arguments = model.chain, model.params, model.input_shape, _all_dense(model.chain)
        calls[label] = partial(jax_runner(*arguments, batch_last), on_device)
    params = jax.tree.map(jnp.asarray, model.params)
    name = model.metadata.get('network', '')
    if models.CHAINS.get(name) == model.chain:
        apply = jax.jit(lambda params, x: models.NETWORKS[name]().apply({'params': params}, x))
        calls['dense JAX, as trained'] = partial(apply, params, on_device)
    if len(model.chain) == 1 and isinstance(model.chain[0], Dense):
        weights = params[model.chain[0].name]
        product = jax.jit(lambda kernel, bias, x: kernel @ x + bias[:, None])
        kernel, batch_last = jnp.asarray(weights['kernel'].T), jnp.asarray(inputs.T)
        calls['dense JAX, the product alone'] = partial(
            product, kernel, weights['bias'], batch_last
        )
    return calls


def _runners() -> dict[str, tuple[Callable[..., Runner], tuple[str, ...]]]:
    """What makes runners, and of which kinds; of the last the break-even is told."""
    runners: dict[str, Any] = {'JAX': (jax_runner, ('dense', 'sparse'))}
    if not native.build_failure():
        runners['JAX and C++'] = (jax_runner, ('dense', 'sparse', 'native'))
    return {**runners, 'SciPy': (scipy_runner, ('dense', 'sparse'))}


def _onnx_call(
    chain: Chain | Apply, params: Any, input_shape: tuple[int, ...], inputs: np.ndarray
) -> Callable[[], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        save_onnx(f'{folder}/network.onnx', chain, params, input_shape, inputs.dtype)
        session = onnxruntime.InferenceSession(f'{folder}/network.onnx', options)
    return lambda: session.run(None, {'inputs': inputs})[0]


def _all_dense(chain: Chain) -> dict[str, str]:
    return {layer.name: 'dense' for layer in chain if isinstance(layer, Weighted)}


def _check_outputs(calls: Calls, dense: str) -> None:
    expected = np.asarray(calls[dense]())
    for name, call in calls.items():
        outputs = np.asarray(call())
        outputs = outputs.T if 'the product alone' in name else outputs
        error = np.abs(outputs - expected).max()
        if not error <= 1e-4 * max(1, np.abs(expected).max()):
            raise ValueError(f'{name} is off by {error} from {dense}')


def _measure_machine() -> dict[str, float]:
    """Measures what bounds all ways: multiply-adds and bytes moved in a second."""
    side = 1_024
    matrix = jnp.ones((side, side))
    product = jax.jit(jnp.matmul)
    source = np.ones(2**26, np.float32)
    target = np.zeros_like(source)
    times = time_in_turns(
        {'product': lambda: product(matrix, matrix), 'copy': lambda: np.copyto(target, source)}, 9
    )
    return {
        'multiply_adds_per_s': side**3 / float(np.median(times['product'])),
        'bytes_per_s': 2 * source.nbytes / float(np.median(times['copy'])),
    }


def _describe_layers(model: Model) -> dict[str, dict[str, int]]:
    """Counts, for one example, what each layer of the compact network must compute and move."""
    small, layers = model.compact(), {}
    shapes = trace_shapes(small.chain, small.params, model.input_shape)
    for layer, before, after in zip(small.chain, shapes, shapes[1:], strict=False):
        if isinstance(layer, Weighted):
            kernel = small.params[layer.name]['kernel']
            kept, positions = int(np.count_nonzero(kernel)), math.prod(after[:-1])
            layers[layer.name] = {
                'inputs': kernel.shape[-2],
                'units': kernel.shape[-1],
                'weights': kernel.size,
                'kept': kept,
                'multiply_adds': kernel.size * positions,
                'kept_multiply_adds': kept * positions,
                'numbers': math.prod(before) + math.prod(after),  # in and out
            }
    return layers


def _find_break_even(config: LatencyConfig) -> dict[str, dict[str, float]]:
    """Finds the density of random weights below which a runner beats the dense product.

    Returns:
      `{batch: {way: density}}`; 0 where it never does, 1 where it always does.
    """
    shape = config.model.rpartition(':')[0]
    ratios: dict[str, dict[str, list[float]]] = {}
    for density in progress.bar(_DENSITIES, 'break-even', unit=' densities'):
        model = load_model(f'{shape}:{density}')
        arguments = model.chain, model.params, model.input_shape
        for batch in config.sizes():
            inputs = np.random.default_rng(0).random((batch, *model.input_shape), np.float32)
            calls = _dense_calls(model, inputs)
            dense = list(calls)
            for name, (make_runner, offered) in _runners().items():
                own = jnp.asarray(inputs) if make_runner is jax_runner else inputs
                calls[name] = partial(make_runner(*arguments, {'fc': offered[-1]}), own)
            times = time_in_turns(calls, turns=5)
            medians = {name: np.median(each) for name, each in times.items()}
            best = min(medians[name] for name in dense)
            for name in _runners():
                of_batch = ratios.setdefault(str(batch), {})
                of_batch.setdefault(name, []).append(float(best / medians[name]))
    return {
        batch: {name: _crossing(each) for name, each in of_batch.items()}
        for batch, of_batch in ratios.items()
    }


def _crossing(ratios: list[float]) -> float:
    """Finds where the ratio passes 1 for good, between densities by their logarithms.

    Returns:
      The density; 0 if the last ratio is below 1, 1 if none is.
    """
    slower = [number for number, ratio in enumerate(ratios) if ratio < 1]
    if not slower:
        return 1.0
    last = slower[-1]
    if last == len(ratios) - 1:
        return 0.0
    above, below = (math.log(ratio) for ratio in ratios[last : last + 2])
    before, after = _DENSITIES[last : last + 2]
    return before * (after / before) ** (above / (above - below))


if __name__ == '__main__':
    command_line.launch({}, measure, LatencyConfig)
