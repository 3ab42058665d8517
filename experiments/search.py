"""Thresholds nobody has to guess: searches the smallest network whose error is allowed.

python -m experiments.search --flagfile=experiments/flagfiles/search_lenet300_digits.flags

A trial is surgery and fine-tuning of one reference network, the same for all. Among the trials
whose validation error is allowed, that which keeps the fewest parameters wins; the test images are
never looked at. Any number of processes with the same flags work on one study. One that was
stopped or killed loses the trial it was at, which does not count, and goes on when it is started
again.
"""

from typing import Any

from experiments.config import command_line
from experiments.sweeps.flags import SearchConfig
from experiments.sweeps.space import choice_at, make_config
from experiments.training.plan import make_plan


def search(config: SearchConfig) -> dict[str, Any]:
    """Takes part in a study until it has all its trials, then writes and prints what it found.

    Returns:
      The best trial. The folder then holds `best.flags`, `importance.png` and `pareto.png`.

    Raises:
      ValueError: if flags do not fit each other, the network, the study or the folder, or Optuna
        is not installed.
      OSError: if the folder or the database cannot be read or written.
      Diverged: if training of the reference breaks down.
      RuntimeError: if no trial has an allowed error.
      Stopped: after SIGTERM or SIGINT.
    """
    for share in (0.0, 1.0):  # flags that fit no run are refused before there is a trial
        make_plan(make_config(config, choice_at(config, share)))
    # What takes long to import comes once nothing is left to refuse.
    try:
        from experiments.sweeps import trials
    except ImportError as error:
        if error.name not in ('optuna', 'sqlalchemy'):
            raise
        raise ValueError('experiments.search needs Optuna, the extra `search`') from error
    return trials.take_part(config)


if __name__ == '__main__':
    command_line.launch({}, search, SearchConfig)
