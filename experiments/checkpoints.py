"""Checkpoints of a training state, written by orbax and read back bit for bit.

A checkpoint holds the leaves of the state as one flat list, and next to it the path, shape and
dtype of each. Orbax alone joins tree paths with dots, so `{'a.b': x, 'a': {'b': y}}` comes back
with one value twice, and it converts to the dtype that a restore asks for without a word.
"""

import functools
import os
import pathlib
import time
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from experiments import hosts

PyTree = Any


def _leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of `tree` under their paths, in the order of the tree."""
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _describe(leaf: Any) -> str:
    """Returns dtype and shape of `leaf`, such as `float32[3, 2]` or `key<fry>[]`."""
    return f'{leaf.dtype}{list(leaf.shape)}'


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns what orbax needs to restore `leaf`; where no sharding is given, on one device."""
    sharding = getattr(leaf, 'sharding', None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


class Checkpoints:
    """The newest checkpoints of one phase of a run, in one directory.

    Use it as a context manager: saves go on in the background, and leaving waits for them.

    Args:
      directory: where the checkpoints lie; made, with its parents, if it is missing.
      keep: how many checkpoints to keep, the newest; at least 1.

    Raises:
      ValueError: if `keep` is below 1.
      NotADirectoryError: if `directory` is a file.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2):
        if keep < 1:
            raise ValueError(f'keep is {keep}; wanted at least 1 checkpoint')
        self._directory = pathlib.Path(directory).absolute()
        if self._directory.exists() and not self._directory.is_dir():
            raise NotADirectoryError(f'{self._directory} is a file; wanted a checkpoint directory')
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.LatestN(keep)
            ),
            item_names=('tree', 'leaves'),
        )

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, *exception_info) -> None:
        self.close()

    def close(self) -> None:
        """Waits until every save is on disk; the object cannot be used afterwards."""
        self._manager.close()

    def save(self, step: int, state: PyTree) -> None:
        """Saves `state` in the background; an error there is raised by the next call.

        `state` may be donated at once: orbax has copied it by then or, on CPU, holds its buffers,
        and XLA then writes elsewhere. Older checkpoints go only after this one is whole.

        Args:
          step: number of steps taken; above that of every checkpoint in the directory.
          state: pytree of `jax.Array`, typed keys among them.

        Raises:
          TypeError: if a leaf is not a `jax.Array`.
          ValueError: if there are no leaves, a leaf is empty, or `step` is not the newest.
        """
        leaves = _leaves_by_path(state)
        for path, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(f'state{path} is a {type(leaf).__name__}; wanted a jax.Array')
            if not leaf.size:
                raise ValueError(f'state{path} is {_describe(leaf)}; orbax saves no empty array')
        if not leaves:
            raise ValueError(f'the state to save at step {step} has no leaves')
        newest = self._manager.latest_step()
        if newest is not None and step <= newest:
            raise ValueError(f'step is {step}; {self._directory} already holds step {newest}')
        descriptions = [[path, _describe(leaf)] for path, leaf in leaves.items()]
        self._manager.save(
            step,
            args=ocp.args.Composite(
                tree=ocp.args.JsonSave({'leaves': descriptions}),
                leaves=ocp.args.StandardSave(list(leaves.values())),
            ),
        )

    def latest_step(self) -> int | None:
        """Returns the step of the newest whole checkpoint; None if there is none."""
        return max(self._steps(), default=None)

    def restore(self, like: PyTree, step: int | None = None) -> tuple[int, PyTree]:
        """Restores a checkpoint: that of `step`, or the newest that can be read.

        Without `step`, checkpoints that cannot be read are passed over with a warning and, once
        an older one has been read, renamed to `damaged-<step>-<time>`.

        Args:
          like: pytree of arrays or `jax.ShapeDtypeStruct` with the structure, shapes, dtypes and
            shardings wanted; leaves without a sharding go to the first device.
          step: step of the checkpoint; None for the newest.

        Returns:
          The step of the checkpoint and the state.

        Raises:
          FileNotFoundError: if there is no such checkpoint.
          ValueError: if the checkpoint holds other leaves, shapes or dtypes than `like`.
          OSError: if no checkpoint asked for can be read.
        """
        steps = self._steps()
        if not steps or step not in (None, *steps):
            wanted = 'a checkpoint' if step is None else f'the checkpoint of step {step}'
            raise FileNotFoundError(f'{self._directory} holds steps {steps}; wanted {wanted}')
        damaged = []
        for candidate in sorted(steps, reverse=True) if step is None else [step]:
            state = None
            try:
                state = self._read(candidate, like)
            except OSError as error:
                logging.warning('%s', error)
            # All processes go on from one checkpoint, so none may miss its part.
            if hosts.highest(state is None):
                damaged.append(candidate)
                continue
            hosts.on_first(functools.partial(self._set_aside, damaged))
            self._manager.reload()
            return candidate, state
        raise OSError(f'{self._directory}: cannot read any of the checkpoints of steps {damaged}')

    def _set_aside(self, steps: list[int]) -> None:
        for step in steps:
            folder = self._directory / str(step)
            folder.rename(self._directory / f'damaged-{step}-{time.time_ns()}')

    def _steps(self) -> list[int]:
        """Returns the steps whose checkpoints are whole on disk, once pending saves are."""
        self._manager.wait_until_finished()
        self._manager.reload()
        return list(self._manager.all_steps())

    def _read(self, step: int, like: PyTree) -> PyTree:
        """Returns the state saved at `step`; ValueError if unlike `like`, OSError if damaged."""
        wanted = {path: _abstract(leaf) for path, leaf in _leaves_by_path(like).items()}
        try:
            arguments = ocp.args.Composite(tree=ocp.args.JsonRestore())
            saved = dict(self._manager.restore(step, args=arguments)['tree']['leaves'])
            differences = [
                f'like{path} is {_describe(wanted[path]) if path in wanted else "missing"}'
                f' but was saved as {saved.get(path, "nothing")}'
                for path in {**wanted, **saved}
                if path not in wanted or saved.get(path) != _describe(wanted[path])
            ]
            if not differences:
                targets = ocp.args.StandardRestore([wanted[path] for path in saved])
                arguments = ocp.args.Composite(leaves=targets)
                leaves = self._manager.restore(step, args=arguments)['leaves']
        except Exception as error:  # A cut file makes orbax raise a bare Exception.
            reason = str(error).partition('\n')[0] or type(error).__name__
            message = f'{self._directory}: the checkpoint of step {step} cannot be read: {reason}'
            raise OSError(message) from error
        if differences:
            raise ValueError(
                f'{self._directory}: the checkpoint of step {step} differs from the state wanted'
                f' in {len(differences)} leaves: ' + '; '.join(differences[:5])
            )
        restored = dict(zip(saved, leaves, strict=True))
        return jax.tree.unflatten(jax.tree.structure(like), [restored[path] for path in wanted])
