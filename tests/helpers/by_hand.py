"""Trains a small network with surgery, and again by hand, for tests that compare the two.

By hand the optimizer knows nothing of surgery: the gradient is taken at W⊙T, and NumPy updates T in
the paper's words from the W that the gradient was taken at. σ is 1, so there is no luck.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from oracle import discriminate, masked

from dns_jax import (
    Rule,
    Thresholds,
    apply_masks,
    get_masks,
    has_axes,
    masked_value_and_grad,
    surgery,
)

STEPS = 20
# A program runs for 20 short steps: it is not worth much work of the compiler.
jit = functools.partial(
    jax.jit,
    compiler_options={
        'xla_backend_optimization_level': 0,
        'xla_llvm_disable_expensive_passes': True,
    },
)
BANDS = {'fc1': (0.4, 0.5), 'fc2': (0.45, 0.6)}


def start(dtype=np.float32):
    random = np.random.default_rng(0)
    shapes = {'fc1': {'kernel': (4, 5), 'bias': (5,)}, 'fc2': {'kernel': (5, 3)}}
    return jax.tree.map(
        lambda shape: np.asarray(0.7 * random.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def noise(dtype=np.float32):
    """Other images with other labels at every step, so that weights go to and fro."""
    random = np.random.default_rng(1)
    return [
        (
            np.asarray(random.normal(size=(6, 4)), dtype),
            np.asarray(random.normal(size=(6, 3)), dtype),
        )
        for _ in range(STEPS)
    ]


def error(params, batch):
    images, labels = batch
    hidden = jnp.tanh(jnp.matmul(images, params['fc1']['kernel']) + params['fc1']['bias'][None])
    return jnp.sum((jnp.matmul(hidden, params['fc2']['kernel']) - labels) ** 2) / 4


def cut(bands=BANDS, key=None, sigma=lambda step: 1.0):
    """Surgery with fixed thresholds for each layer, by the last part of its name."""
    rule = Rule(
        lambda layers, masks, step: {
            layer: Thresholds(*bands[layer.split('/')[-1]]) for layer in layers
        },
        sigma,
    )
    return surgery(rule, jax.random.key(0) if key is None else key, has_axes)


def leniently(optimizer):
    """Lets an optimizer mix types and ranks, as many of optax do; surgery beside it must not."""
    return under('standard', 'allow', optimizer)


def strictly(optimizer):
    """What stands inside of a lenient one is as strict as the tests are."""
    return under('strict', 'raise', optimizer)


def under(dtypes, ranks, optimizer):
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params):
        with jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion(ranks):
            return optimizer.init(params)

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion(ranks):
            return optimizer.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


class Setting(NamedTuple):
    """What is the same with surgery and by hand, if not as usual."""

    params: Any = start()
    loss: Callable[..., Any] = error
    batches: list[Any] = noise()
    bands: dict[str, tuple[float, float]] = BANDS
    extra: tuple[str, ...] = ()  # arguments of the optimizer's update, by name
    per_example: bool = False  # whether it wants the gradient of each example
    weights_of: Callable[[Any], Any] = lambda params: params  # where the gradient is taken
    masks_of: Callable[[Any], Any] = get_masks  # the masks of those weights, from the state
    between: Callable[[int, Any], Any] = lambda step, state: state  # what is done before a step
    due: Callable[[int, str], bool] = lambda step, layer: True  # whether masks change, by hand


class Run(NamedTuple):
    """What there is after every step."""

    weights: list[Any]
    masks: list[Any]
    params: Any  # at the end, with those that are no weights
    state: Any  # at the end
    traces: int


def extra_arguments(names, value, gradients, loss, mask):
    """The optimizer's arguments by name: the loss, and its gradient, of W at W⊙T."""
    known = {
        'value': value,
        'grad': gradients,
        'value_fn': lambda weights: loss(mask(weights)),
        'obj_fn': lambda weights: loss(mask(weights)),
        'grad_fn': lambda weights, step: jax.grad(loss)(mask(weights)),
    }
    return {name: known[name] for name in names}


def init(optimizer, params):
    """Makes a state without weak types: those of optax's line searches cost a second trace."""
    return jax.tree.map(
        lambda leaf: leaf.astype(leaf.dtype) if getattr(leaf, 'weak_type', False) else leaf,
        optimizer.init(params),
    )


def step_of(optimizer, setting):
    """Makes the step of training for an optimizer that has surgery in it."""
    differentiate = masked_value_and_grad(setting.loss)
    if setting.per_example:
        differentiate = jax.vmap(differentiate, (None, None, 0))

    def step(params, state, batch):
        weights, masks = setting.weights_of(params), setting.masks_of(state)
        value, gradients = differentiate(weights, masks, batch)
        extra = extra_arguments(
            setting.extra,
            value,
            gradients,
            lambda weights: setting.loss(weights, batch),
            lambda weights: apply_masks(weights, masks),
        )
        updates, state = optimizer.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def train(optimizer, setting, **options):
    """Trains with surgery, in steps that are jitted with these options."""
    step, traces = step_of(optimizer, setting), []

    @functools.partial(jit, **options)
    def counted(params, state, batch):
        traces.append(1)
        return step(params, state, batch)

    params, state, history = setting.params, init(optimizer, setting.params), []
    for count, batch in enumerate(setting.batches):
        params, state = counted(params, setting.between(count, state), batch)
        history.append(jax.device_get((setting.weights_of(params), setting.masks_of(state))))
    weights, masks = zip(*history, strict=True)
    return Run([*weights], [*masks], params, state, len(traces))


@functools.cache
def differentiated(loss, per_example):
    value_and_grad = jax.value_and_grad(loss)
    return jit(jax.vmap(value_and_grad, (None, 0)) if per_example else value_and_grad)


def train_by_hand(optimizer, setting):
    """Trains with an optimizer that has no surgery in it."""
    optimizer = optax.with_extra_args_support(optimizer)
    loss, traces = setting.loss, []

    @jit
    def move(params, state, value, gradients, masks, batch):
        traces.append(1)

        def mask(weights):
            return jax.tree.map(lambda leaf, mask: leaf * mask.astype(leaf.dtype), weights, masks)

        extra = extra_arguments(
            setting.extra, value, gradients, lambda weights: loss(weights, batch), mask
        )
        updates, state = optimizer.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    params, state, history = setting.params, init(optimizer, setting.params), []
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), setting.weights_of(params))
    for count, batch in enumerate(setting.batches):
        weights = jax.device_get(setting.weights_of(params))
        network = masked(weights, masks)
        value, gradients = differentiated(loss, setting.per_example)(network, batch)
        state = setting.between(count, state)
        params, state = move(params, state, value, gradients, masks, batch)
        masks = update_masks(weights, masks, setting, count)
        history.append((jax.device_get(setting.weights_of(params)), masks))
    weights, masks = zip(*history, strict=True)
    return Run([*weights], [*masks], params, state, len(traces))


def update_masks(weights, masks, setting, count):
    """h_k for every layer that has a band, and is due."""
    return {
        layer: {
            name: discriminate(np.float32(leaf), masks[layer][name], *setting.bands[layer])
            for name, leaf in leaves.items()
        }
        if layer in setting.bands and setting.due(count, layer)
        else masks[layer]
        for layer, leaves in weights.items()
    }


def count_changes(run):
    """How many connections were pruned, and how many spliced, after the first update."""
    masks = np.array([np.concatenate([*map(np.ravel, jax.tree.leaves(m))]) for m in run.masks])
    return int((masks[:-1] & ~masks[1:]).sum()), int((~masks[:-1] & masks[1:]).sum())


def check_equal(run, by_hand):
    """The same masks after every step, and the same weights."""
    for count in range(len(by_hand.masks)):
        for got, want in zip(
            jax.tree.leaves(run.masks[count]), jax.tree.leaves(by_hand.masks[count]), strict=True
        ):
            np.testing.assert_array_equal(got, np.broadcast_to(want, got.shape), f'step {count}')
        for got, want in zip(
            jax.tree.leaves(run.weights[count]),
            jax.tree.leaves(by_hand.weights[count]),
            strict=True,
        ):
            assert got.dtype == want.dtype
            np.testing.assert_allclose(
                np.float64(got), np.float64(want), 1e-5, 1e-6, err_msg=f'step {count}'
            )
