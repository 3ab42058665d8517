"""The programs whose cost is measured: one training step of a network, dense or under surgery.

They are compiled from shapes alone, so that a network need not fit into memory to be planned.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.measurements import hlo, timing
from experiments.networks import models
from experiments.training import steps as train

_INPUT = models.MNIST_INPUT  # what a fully connected network takes


class FullyConnected(nn.Module):
    """Two hidden layers of as many units each, for 28x28 pixels and 10 classes."""

    units: int
    dtype: Any = jnp.float32  # to compute in; parameters and logits are float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (batch, 28, 28, 1) to logits (batch, 10)."""
        hidden = images.reshape(images.shape[0], -1)
        for name in ('fc1', 'fc2'):
            hidden = nn.relu(nn.Dense(self.units, dtype=self.dtype, name=name)(hidden))
        return nn.Dense(10, dtype=self.dtype, name='fc3')(hidden).astype(jnp.float32)


class Task(NamedTuple):
    """A network and the batches that it takes."""

    network: nn.Module
    inputs: models.Input
    classes: int
    batch_size: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        return self.inputs.image_shape


def image_task(name: str, width: float, dtype: str, batch_size: int) -> Task:
    """Makes the task of a network for ImageNet.

    Args:
      name: `alexnet` or `vgg16`.
      width: channels and hidden units / those of the paper.
      dtype: what it computes in.
      batch_size: images per step.
    """
    network = models.NETWORKS[name](width=width, dtype=jnp.dtype(dtype))
    return Task(network, models.INPUTS[name], network.classes, batch_size)


def sized_task(weights: float, dtype: str, batch_size: int) -> Task:
    """Makes the task of the fully connected network with about so many weights.

    Args:
      weights: wanted, biases included.
      dtype: what it computes in.
      batch_size: images per step.
    """
    beside = _INPUT.size**2 + 10 + 2  # weights and biases that go with one unit, but for the square
    units = max(1, round((math.sqrt(beside**2 + 4 * weights) - beside) / 2))
    network = FullyConnected(units, jnp.dtype(dtype))
    return Task(network, _INPUT, 10, batch_size)


class CompiledStep(NamedTuple):
    """A compiled step, and what its state is made by."""

    compiled: jax.stages.Compiled
    init: Callable[[], train.TrainState]
    task: Task


def plan(task: Task, kind: str, options: Mapping[str, Any] | None = None) -> CompiledStep:
    """Compiles the training step of a network, which donates its state.

    Args:
      task: the network and its batches.
      kind: of `timing.RULES`; thresholds by density are refreshed at every step.
      options: of XLA.
    """
    optimizer = timing.make_timed_optimizer(kind, refresh_every=1)

    def init() -> train.TrainState:
        images = jnp.zeros((1, *task.image_shape))
        params = task.network.init(jax.random.key(0), images)['params']
        return train.TrainState(params, optimizer.init(params))

    step = train.make_step(task.network, optimizer, task.inputs)
    images = jax.ShapeDtypeStruct((task.batch_size, *task.image_shape), jnp.uint8)
    labels = jax.ShapeDtypeStruct((task.batch_size,), jnp.int32)
    lowered = jax.jit(step, donate_argnums=0).lower(jax.eval_shape(init), images, labels)
    return CompiledStep(lowered.compile(dict(options) if options else None), init, task)


class RunningStep:
    """A step that runs on and on, on one batch of noise."""

    def __init__(self, planned: CompiledStep):
        task, random = planned.task, np.random.default_rng(0)
        shape = (task.batch_size, *task.image_shape)
        self._batch = (
            jnp.asarray(random.integers(0, 256, shape, np.uint8)),
            jnp.asarray(random.integers(0, task.classes, task.batch_size, np.int32)),
        )
        self._compiled = planned.compiled
        self._state = jax.jit(planned.init)()

    def seconds(self, steps: int = 1) -> float:
        """Takes some steps.

        Raises:
          FloatingPointError: if the loss is no longer finite.
        """
        started, loss = time.perf_counter(), jnp.zeros(())
        for _ in range(steps):
            self._state, loss = self._compiled(self._state, *self._batch)
        jax.block_until_ready((self._state, loss))
        seconds = (time.perf_counter() - started) / steps
        if not jnp.isfinite(loss):
            raise FloatingPointError(f'the loss is {loss}, so the time of a step says nothing')
        return seconds


def count_weights(task: Task) -> int:
    """Counts the parameters of a network."""
    return sum(leaf.size for leaf in jax.tree.leaves(models.shapes(task.network, task.image_shape)))


def count_flop(task: Task) -> dict[str, int]:
    """Counts the work of a step in its products alone: two operations for each multiply-add.

    Each weight is used at every position three times: forward, for the gradient of the layer's
    inputs, and for its own. Only the images need no gradient.

    Args:
      task: the network, whose layers sort in their order.

    Returns:
      `{multiply_adds, flop}`: of one image forward, and of a step.
    """
    params = models.shapes(task.network, task.image_shape)
    places = models.count_positions(task.network, task.image_shape)
    products = {name: params[name]['kernel'].size * places.get(name, 1) for name in sorted(params)}
    total, first = sum(products.values()), next(iter(products.values()))
    return {'multiply_adds': total, 'flop': 2 * task.batch_size * (3 * total - first)}


def describe_memory(planned: CompiledStep) -> dict[str, Any]:
    """Says what memory a step needs, as XLA plans it.

    Returns:
      Bytes: `arguments`, `outputs`, of these `aliased`, `temporaries`; `planned`, all together;
      XLA's `peak`, which need not count temporaries; and in the text of the program: `masks`,
      `masked_weights` (all copies W⊙T), `masked_weights_at_once`, `copied_weights` and
      `copied_masks` of arguments; last the number of masks held as floats.
    """
    analysis: Any = planned.compiled.memory_analysis()
    sizes = {
        'arguments': analysis.argument_size_in_bytes,
        'outputs': analysis.output_size_in_bytes,
        'aliased': analysis.alias_size_in_bytes,
        'temporaries': analysis.temp_size_in_bytes,
    }
    masks = jax.eval_shape(planned.init).masks
    mask_shapes = [mask.shape for mask in jax.tree.leaves(masks) if mask.ndim]
    program = hlo.parse(planned.compiled.as_text() or '')
    masked = hlo.masked_weights(program, mask_shapes)
    copied = hlo.copied_parameters(program)
    return {
        **sizes,
        'planned': sizes['arguments'] + sizes['outputs'] - sizes['aliased'] + sizes['temporaries'],
        'peak': analysis.peak_memory_in_bytes,
        'masks': sum(map(math.prod, mask_shapes)),
        'masked_weights': sum(array.bytes for line in masked for array in line.arrays),
        'masked_weights_at_once': hlo.most_at_once(program, {line.name for line in masked}),
        'copied_weights': copied.get('f32', 0),
        'copied_masks': copied.get('pred', 0),
        'masks_as_floats': len(hlo.masks_as_floats(program, mask_shapes)),
    }


def count_by_xla(planned: CompiledStep) -> dict[str, float]:
    """Returns XLA's own counts, `{flop, bytes}`: all operations, and all that they read and write.

    Returns:
      The counts; 0 where XLA gives none.
    """
    analysis: Any = planned.compiled.cost_analysis() or {}
    return {'flop': analysis.get('flops', 0.0), 'bytes': analysis.get('bytes accessed', 0.0)}


def measure_machine(dtype: str, side: int, floats: int) -> dict[str, float]:
    """Measures how fast one large matrix product and one pass over memory are.

    Args:
      dtype: what the product is computed in.
      side: of the square matrices.
      floats: float32 numbers that are read and written.

    Returns:
      `{flop_per_s, bytes_per_s}`.
    """
    matrix = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
    numbers = jnp.zeros(floats)
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    add = jax.jit(lambda numbers: numbers + 1, donate_argnums=0).lower(numbers).compile()
    product_times, pass_times = [], []
    for _ in range(9):
        started = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        between = time.perf_counter()
        numbers = add(numbers).block_until_ready()
        product_times.append(between - started)
        pass_times.append(time.perf_counter() - between)
    return {
        'flop_per_s': 2 * side**3 / float(np.median(product_times)),
        'bytes_per_s': 8 * floats / float(np.median(pass_times)),
    }
