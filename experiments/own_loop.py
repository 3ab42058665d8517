"""Pruning in a loop of one's own: the library's short form, with its defaults alone.

python -m experiments.own_loop --flagfile=experiments/flagfiles/own_loop_cnn.flags

A CNN with BatchNorm, or a small GPT, is pruned by `dns_jax.prune_to`, and by gradual pruning along
as long a ramp, from the same dense networks on the same batches. A row of the file is one run; a
command that is given again makes those that are missing, so it may be interrupted. One process at a
time may write to a file.
"""

from experiments.config import command_line
from experiments.own_loops import runs as own_runs
from experiments.own_loops.runs import OwnLoopConfig


def compare(config: OwnLoopConfig) -> None:
    """Does every run that is missing, and prints the table of all.

    Raises:
      As `experiments.own_loops.runs.run_all` does.
    """
    print(own_runs.to_table(own_runs.run_all(config)))
    print(f'\nRows: {config.output}')


if __name__ == '__main__':
    command_line.launch({}, compare, OwnLoopConfig)
