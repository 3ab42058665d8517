"""What measurements share: the programs that are timed, on which cores, and what a result tells."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax
import optax
import threadpoolctl

import dns_jax
from experiments.config.command_line import is_flag

RULES = {
    'dense': None,
    'surgery': dns_jax.mean_std(c_rate=1.0),
    'density': dns_jax.global_density(0.02),
}


def make_timed_optimizer(kind: str, refresh_every: int) -> optax.GradientTransformation:
    """Makes the optimizer of a step that is timed.

    Args:
      kind: 'dense', without masks; 'surgery', with thresholds from the start and masks updated at
        every step; or 'density', with thresholds that are also refreshed.
      refresh_every: steps from one refresh to the next.

    Returns:
      Caffe's SGD behind surgery.
    """
    rules, thresholds = {}, RULES[kind]
    if thresholds:
        every = refresh_every if kind == 'density' else 0
        rules['*'] = dns_jax.Rule(thresholds, dns_jax.update_probability(power=0), every)
    return optax.chain(
        dns_jax.surgery(rules, jax.random.key(0), dns_jax.has_axes),
        dns_jax.caffe_sgd(dns_jax.caffe_inv(0.01, 1e-4, 0.75)),
    )


@contextlib.contextmanager
def on_one_core() -> Iterator[int]:
    """Keeps this thread and those that it starts on one core, where the system can do that.

    Yields:
      The number of cores they have.
    """
    if not hasattr(os, 'sched_setaffinity'):
        yield os.cpu_count() or 1
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with threadpoolctl.threadpool_limits(1):
            yield 1
    finally:
        os.sched_setaffinity(0, cores)


def describe_device() -> str:
    """Names the device and the version of JAX."""
    return f'{jax.devices()[0].device_kind}, jax {jax.__version__}'


def given_flags(config: Any) -> list[str]:
    """Writes the flags of a command that are not its defaults, but for where its result goes."""
    return [
        f'--{field.name}={getattr(config, field.name)}'
        for field in filter(is_flag, dataclasses.fields(config))
        if field.name != 'output' and getattr(config, field.name) != field.default
    ]
