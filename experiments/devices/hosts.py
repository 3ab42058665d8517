"""Many processes, one run: how they find each other, agree, and notice that one is gone.

All take the same steps on one mesh; the first alone writes, but for checkpoints, which all write.
Their folders must be the same shared ones.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

R = TypeVar('R')

_HEARTBEAT_TIMEOUT = 30  # seconds without a sign of life after which a process counts as gone


def parse_distributed(text: str) -> dict[str, Any]:
    """Reads where the processes meet.

    Args:
      text: `auto`, or `HOST:PORT,PROCESSES,PROCESS`, such as `10.0.0.1:9999,2,0`.

    Returns:
      The arguments of `jax.distributed.initialize`; none for `auto`.

    Raises:
      ValueError: if the text is neither.
    """
    if text == 'auto':
        return {}
    address, *numbers = text.split(',')
    host, _, port = address.rpartition(':')
    if (
        not host
        or not port.isdecimal()
        or len(numbers) != 2
        or not all(map(str.isdecimal, numbers))
    ):
        raise ValueError(
            f'--distributed={text} must be auto or HOST:PORT,PROCESSES,PROCESS, as in '
            '10.0.0.1:9999,2,0'
        )
    processes, process = map(int, numbers)
    if process >= processes:
        raise ValueError(
            f'--distributed={text} names process {process} of {processes}; they count from 0'
        )
    return {'coordinator_address': address, 'num_processes': processes, 'process_id': process}


def with_processes(action: Callable[[Any], R]) -> Callable[[Any], R]:
    """Lets an action be done by many processes together, where its configuration says so.

    Returns:
      The action. It raises RuntimeError where the others do not answer.
    """

    def join_and_act(config):
        if not config.distributed:
            return action(config)
        jax.distributed.initialize(
            **parse_distributed(config.distributed),
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=_HEARTBEAT_TIMEOUT,
        )
        try:
            return action(config)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).partition('\n')[0]
            if reason.startswith(('RESOURCE_EXHAUSTED', 'INVALID_ARGUMENT')):
                raise  # no fault of another process
            raise RuntimeError(
                f'process {jax.process_index()} of {jax.process_count()} cannot go on, most likely '
                f'because another is gone: {reason}. Start all of them again with --resume.'
            ) from error

    return join_and_act


def is_first() -> bool:
    """Says whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def on_first(action: Callable[[], Any]) -> None:
    """Does something in the first process alone; where it fails there, all fail.

    Raises:
      Exception: as the action did, in the first process.
      RuntimeError: in the others.
    """
    failure = None
    if is_first():
        try:
            action()
        except Exception as error:  # Whatever it is, the others wait to hear of it.
            failure = error
    failed = max_over_processes(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError('the first process could not go on; its own message says why')


def max_over_processes(number: int) -> int:
    """Finds the highest number that any process gives.

    Args:
      number: this process's, 0 or more.

    Returns:
      The highest, in every process.
    """
    if jax.process_count() == 1:
        return int(number)
    return int(multihost_utils.process_allgather(np.int32(number)).max())
