"""Runs that differ in seed and places alone, side by side in one program, phase by phase."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

import dns_jax
from dns_jax import importance
from experiments.training import closing, divergence, probes
from experiments.training.phases import stop_on_signals, train_side_by_side
from experiments.training.plan import Plan
from experiments.training.pruning import make_rules
from experiments.training.steps import TrainState, Weights
from experiments.training.task import Run, Task


def run_together(
    task: Task,
    plans: Sequence[Plan],
    on_record: Callable[[dict[str, Any]], None] = lambda record: None,
) -> list[dict[str, Any]]:
    """Does runs that differ in seed and places alone, side by side in one program.

    Args:
      task: of the runs, and perhaps of others.
      plans: one for each run.
      on_record: called with each record once it is written; what it raises ends the runs.

    Returns:
      The summary of each run, as written to its folder. Its `seconds` and `pruning_seconds` are
      those of this call: of all runs together, and after --resume of what was left to do.

    Raises:
      As `experiments.training.run.run` does.
    """
    started = time.perf_counter()
    runs = [Run(task, plan, on_record) for plan in plans]
    with stop_on_signals() as stopping:
        dense = train_references(runs, stopping)
        trained = time.perf_counter()
        operated = train_surgery(runs, dense, stopping)
        # Before fine-tuning, which donates the states.
        returns = [probes.find_returns(state.opt_state) for state in operated]
        finals = finetune(runs, operated, stopping)
    now = time.perf_counter()
    seconds = {'seconds': round(now - started, 1), 'pruning_seconds': round(now - trained, 1)}
    return [
        closing.finish(run, reference, final, seconds, returned)
        for run, reference, final, returned in zip(runs, dense, finals, returns, strict=True)
    ]


def train_references(runs: Sequence[Run], stopping: list[int]) -> list[Weights]:
    """Trains the dense network of each run, or takes the ones that --reference names."""
    given = [run.reference for run in runs if run.reference is not None]
    if given:
        return given
    phase = runs[0].plan.reference
    optimizer = phase.make_optimizer(runs[0].task.shapes)
    states = [run.start(optimizer, jax.tree.map(jnp.copy, run.initial)) for run in runs]
    trained = train_side_by_side(phase, runs, states, stopping)
    return [Weights(state.params, state.statistics) for state in trained]


def train_surgery(
    runs: Sequence[Run], dense: Sequence[Weights], stopping: list[int]
) -> list[TrainState]:
    """Operates on the network of each run, from its dense weights."""
    phase, pruning = runs[0].plan.surgery, runs[0].plan.pruning
    optimizer, states = phase.make_optimizer(runs[0].task.shapes), []
    for run, weights in zip(runs, dense, strict=True):
        if pruning.pruner.has_rules and pruning.importance is importance.magnitude:
            rules = make_rules(pruning, weights.params)
            (apart,) = dns_jax.unstack(pruning.stacked, weights.params)
            for warning in divergence.find_emptied_layers(rules, apart, pruning.takes_part):
                logging.warning('%s', warning)
        # A copy: the loop donates its state, and the reference is still needed.
        states.append(run.start(optimizer, jax.tree.map(jnp.copy, weights)))
    states = train_side_by_side(phase, runs, states, stopping)
    if not phase.soften:
        return states
    # What the network computed with goes on from here, and is kept.
    return [state._replace(params=phase.soften(state)) for state in states]


def finetune(
    runs: Sequence[Run], states: Sequence[TrainState], stopping: list[int]
) -> list[TrainState]:
    """Trains the kept connections of each run on, the masks frozen as surgery left them."""
    phase = runs[0].plan.finetuning
    if not phase.steps:
        return list(states)
    optimizer = phase.make_optimizer(runs[0].task.shapes)
    begun = [
        run.start(optimizer, Weights(state.params, state.statistics), state.masks)
        for run, state in zip(runs, states, strict=True)
    ]
    return train_side_by_side(phase, runs, begun, stopping)
