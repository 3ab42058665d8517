"""What surgery costs in the loops that users write: one jitted step called from Python, or a scan.

Times a dense step, steps in which masks move, under each structure, and one after surgery's last
step, in turns.
"""

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dns_jax
from dns_jax import packing
from dns_jax.transformation import Surgery
from experiments.networks import models

LOOPS = ('called', 'scanned')
OPTIMIZERS = {'sgd': optax.sgd(0.01, momentum=0.9), 'adam': optax.adam(1e-3)}
_ALWAYS = dns_jax.update_probability(power=0, stop=2**31 - 1)
_DENSITY = dns_jax.global_density(0.02)
# What surgery does in a loop that is timed: it follows a density for ever, or is over.
PRUNERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    'moving': lambda: _surgery(dns_jax.Rule(_DENSITY, _ALWAYS)),
    'units': lambda: _surgery(dns_jax.Rule(_DENSITY, _ALWAYS, structure=dns_jax.Units())),
    'blocks': lambda: _surgery(dns_jax.Rule(_DENSITY, _ALWAYS, structure=dns_jax.Blocks((4, 2)))),
    'two_of_four': lambda: _surgery(dns_jax.Rule(None, _ALWAYS, structure=dns_jax.NofM(2, 4))),
    'packed': lambda: packing.pack(_surgery(dns_jax.Rule(_DENSITY, _ALWAYS))),
    'after': lambda: dns_jax.prune_to(compression=50, steps=1),
}
_NETWORK, _BATCH_SIZE, _BATCHES = 'lenet300', 64, 50


class Loop(NamedTuple):
    """A loop and what it goes through."""

    run: Any  # takes params, state and batches, and gives the first two back
    batches: Any  # of one call: arrays, or a list of pairs

    def milliseconds(self, carry: tuple[Any, Any]) -> tuple[float, tuple[Any, Any]]:
        """Runs the loop over all batches; returns its time per step and what it carries."""
        started = time.perf_counter()
        carry = jax.block_until_ready(self.run(*carry, self.batches))
        return 1e3 * (time.perf_counter() - started) / _BATCHES, carry


def _surgery(rule: dns_jax.Rule) -> Surgery:
    return dns_jax.surgery(rule, jax.random.key(0))


def make_loop(loop: str, optimizer_name: str, kind: str) -> tuple[Loop, tuple[Any, Any]]:
    """Makes a loop as a user would write it.

    Returns:
      The loop, and the params and the state to begin with.
    """
    network = models.NETWORKS[_NETWORK]()
    random = np.random.default_rng(0)
    images = jnp.asarray(random.random((_BATCHES, _BATCH_SIZE, 28, 28, 1), np.float32))
    labels = jnp.asarray(random.integers(0, 10, (_BATCHES, _BATCH_SIZE), np.int32))
    params = network.init(jax.random.key(0), images[0])['params']
    optimizer = OPTIMIZERS[optimizer_name]
    if kind != 'dense':
        optimizer = optax.chain(PRUNERS[kind](), optimizer)

    def loss_fn(params, images, labels):
        logits: Any = network.apply({'params': params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, state, images, labels):
        if kind == 'dense':
            gradients = jax.grad(loss_fn)(params, images, labels)
        else:
            masks = dns_jax.get_masks(state)
            _, gradients = dns_jax.masked_value_and_grad(loss_fn)(params, masks, images, labels)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    if loop == 'scanned':
        run = jax.jit(
            lambda params, state, batches: jax.lax.scan(
                lambda carry, batch: (step(*carry, *batch), None), (params, state), batches
            )[0],
            donate_argnums=(0, 1),
        )
        return Loop(run, (images, labels)), (params, optimizer.init(params))
    jitted = functools.partial(jax.jit, donate_argnums=(0, 1))(step)
    apart = list(zip(images, labels, strict=True))

    def call(params, state, batches):
        for batch in batches:
            params, state = jitted(params, state, *batch)
        return params, state

    return Loop(call, apart), (params, optimizer.init(params))


def measure(rounds: int) -> dict[str, Any]:
    """Times all loops in turns.

    Args:
      rounds: how often, after two to warm up.

    Returns:
      `{loop: {optimizer: {dense_ms, …}}}`: the dense step in milliseconds, medians, and what it
      takes with each of `PRUNERS` of that, medians of the ratios within a round.
    """
    kinds = ('dense', *PRUNERS)
    keys = list(itertools.product(LOOPS, OPTIMIZERS, kinds))
    made = {key: make_loop(*key) for key in keys}
    carries = {key: carry for key, (_, carry) in made.items()}
    times: dict[Any, list[float]] = {key: [] for key in keys}
    for _ in range(rounds + 2):
        for key in keys:
            milliseconds, carries[key] = made[key][0].milliseconds(carries[key])
            times[key].append(milliseconds)
    medians: dict[str, Any] = {}
    for loop, name in itertools.product(LOOPS, OPTIMIZERS):
        dense, *others = (np.array(times[loop, name, kind][2:]) for kind in kinds)
        medians.setdefault(loop, {})[name] = {
            'dense_ms': float(np.median(dense)),
            **{
                kind: float(np.median(own / dense))
                for kind, own in zip(PRUNERS, others, strict=True)
            },
        }
    return medians


def format_rows(medians: dict[str, Any]) -> list[str]:
    """Writes what was measured."""
    return [
        f'{_NETWORK}, {loop} step, {name}: dense {row["dense_ms"]:.3f} ms; while masks move '
        f'×{row["moving"]:.3f}, of units ×{row["units"]:.3f}, of blocks ×{row["blocks"]:.3f}, '
        f'of 2:4 ×{row["two_of_four"]:.3f}, packed ×{row["packed"]:.3f}; after surgery '
        f'×{row["after"]:.3f}'
        for loop, by_optimizer in medians.items()
        for name, row in by_optimizer.items()
    ]
