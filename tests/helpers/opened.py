"""Runs for tests that look into them: opened from configurations, and done."""

from experiments.config.command_line import make
from experiments.training.plan import make_plan
from experiments.training.side_by_side import run_together
from experiments.training.task import Run, Task


def open_runs(*configs, on_record=lambda record: None):
    """Opens runs that differ in seed and places alone."""
    task = Task(configs[0])
    return [Run(task, make_plan(config), on_record) for config in configs]


def open_run(config):
    """Opens one run."""
    return open_runs(config)[0]


def do(*configs, on_record=lambda record: None):
    """Does runs side by side, and returns their summaries."""
    return run_together(Task(configs[0]), [make_plan(config) for config in configs], on_record)


def change(config, **fields):
    """Changes fields of a configuration, or flags that it holds of others."""
    own = dict(vars(config))
    return make(type(config), **{**own.pop('shared'), **own, **fields})
