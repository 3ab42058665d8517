"""Checkpoints of a training state, written by orbax and read back bit for bit.

A checkpoint holds the leaves of the state as one flat list, and next to it the path, shape, dtype
and checksum of each. Orbax alone joins tree paths with dots, so `{'a.b': x, 'a': {'b': y}}` comes
back with one value twice, it converts to the dtype that a restore asks for without a word, and it
reads a flipped bit as another number.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from experiments.devices import hosts

PyTree = Any


class Checkpoints:
    """The newest checkpoints of one phase of a run, in one folder.

    Use it as a context manager: saves go on in the background, and leaving waits for them.

    Args:
      folder: where the checkpoints lie; made, with its parents, if it is missing.
      keep: how many checkpoints to keep, the newest; at least 1.

    Raises:
      ValueError: if `keep` is below 1.
      NotADirectoryError: if `folder` is a file.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        if keep < 1:
            raise ValueError(f'keep is {keep}; wanted at least 1 checkpoint')
        self._folder = pathlib.Path(folder).absolute()
        if self._folder.exists() and not self._folder.is_dir():
            raise NotADirectoryError(f'{self._folder} is a file; wanted a folder of checkpoints')
        self._manager = ocp.CheckpointManager(
            self._folder,
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
        """Waits until every save is on disk; the object cannot be used afterwards.

        Raises:
          OSError: if a save failed.
        """
        with self._named_failures():
            self._manager.close()

    def save(self, step: int, state: PyTree, notes: Any = None) -> None:
        """Saves `state` in the background; an error there is raised by the next call.

        `state` may be donated at once: orbax has copied it by then or, on CPU, holds its buffers,
        and XLA then writes elsewhere. Older checkpoints go only after this one is whole.

        Args:
          step: number of steps taken; above that of every checkpoint in the folder.
          state: pytree of `jax.Array`, typed keys among them.
          notes: what `notes` is to give back; anything that JSON holds.

        Raises:
          TypeError: if a leaf is not a `jax.Array`.
          ValueError: if there are no leaves, a leaf is empty, or `step` is not the newest.
          OSError: if this save, or the one before it, failed.
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
            raise ValueError(f'step is {step}; {self._folder} already holds step {newest}')
        checksums = map(int, jax.device_get(_checksums(list(leaves.values()))))
        descriptions = [
            [path, _describe(leaf), checksum]
            for (path, leaf), checksum in zip(leaves.items(), checksums, strict=True)
        ]
        contents = {'leaves': descriptions, 'notes': notes}
        arguments = ocp.args.Composite(
            tree=ocp.args.JsonSave({**contents, 'seal': _seal(contents)}),
            leaves=ocp.args.StandardSave(list(leaves.values())),
        )
        with self._named_failures():
            self._manager.save(step, args=arguments)

    def notes(self, step: int) -> Any:
        """Returns what was noted with the checkpoint of a step.

        Args:
          step: of a checkpoint that was restored.

        Returns:
          As given to `save`, after a round trip through JSON.
        """
        return self._read_contents(step)['notes']

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
            raise FileNotFoundError(f'{self._folder} holds steps {steps}; wanted {wanted}')
        damaged = []
        for candidate in sorted(steps, reverse=True) if step is None else [step]:
            state = None
            try:
                state = self._read(candidate, like)
            except OSError as error:
                logging.warning('%s', error)
            # All processes go on from one checkpoint, so none may miss its part.
            if hosts.max_over_processes(state is None):
                damaged.append(candidate)
                continue
            hosts.on_first(functools.partial(self._set_aside, damaged))
            self._manager.reload()
            return candidate, state
        raise OSError(f'{self._folder}: cannot read any of the checkpoints of steps {damaged}')

    @contextlib.contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Turns what orbax raises of a failed save, of any kind, into an error that says so."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # another process is gone
        except Exception as error:
            reason = _first_line(error)
            message = f'{self._folder}: a checkpoint cannot be saved: {reason}'
            raise OSError(message) from error

    def _set_aside(self, steps: list[int]) -> None:
        for step in steps:
            folder = self._folder / str(step)
            folder.rename(self._folder / f'damaged-{step}-{time.time_ns()}')

    def _steps(self) -> list[int]:
        """Returns the steps whose checkpoints are whole on disk, once pending saves are."""
        with self._named_failures():
            self._manager.wait_until_finished()
        self._manager.reload()
        return list(self._manager.all_steps())

    def _read_contents(self, step: int) -> dict[str, Any]:
        """Returns what is known of the leaves, and the notes."""
        arguments = ocp.args.Composite(tree=ocp.args.JsonRestore())
        contents = dict(self._manager.restore(step, args=arguments)['tree'])
        if 'seal' not in contents:
            raise ValueError('it has no checksums: an earlier version wrote it')
        if contents.pop('seal') != _seal(contents):
            raise ValueError('the list of its leaves has changed since it was written')
        return contents

    def _read(self, step: int, like: PyTree) -> PyTree:
        """Returns the state saved at `step`; ValueError if unlike `like`, OSError if damaged."""
        wanted = {path: _abstract(leaf) for path, leaf in _leaves_by_path(like).items()}
        try:
            described = self._read_contents(step)['leaves']
            saved = {path: description for path, description, _ in described}
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
                checksums = map(int, jax.device_get(_checksums(leaves)))
                for (path, _, wanted_sum), found in zip(described, checksums, strict=True):
                    if found != wanted_sum:
                        raise ValueError(f'{path} has the checksum {found}; wanted {wanted_sum}')
        except Exception as error:  # A cut file makes orbax raise a bare Exception.
            message = (
                f'{self._folder}: the checkpoint of step {step} cannot be read: '
                f'{_first_line(error)}'
            )
            raise OSError(message) from error
        if differences:
            raise ValueError(
                f'{self._folder}: the checkpoint of step {step} differs from the state wanted'
                f' in {len(differences)} leaves: ' + '; '.join(differences[:5])
            )
        restored = dict(zip(saved, leaves, strict=True))
        return jax.tree.unflatten(jax.tree.structure(like), [restored[path] for path in wanted])


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


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    """Sums up each leaf by its bits and their places, the same however it lies on devices."""
    return list(map(_checksum, leaves))


def _checksum(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    width = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
    places = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        places += place * jnp.uint32(math.prod(bits.shape[axis + 1 :]) % 2**32)
    # Mixed as MurmurHash3 ends: one to one, so that no flipped bit is lost, and so thoroughly that
    # several, or numbers that change places, do not cancel out but by a chance of 2^-32.
    mixed = _mix(bits ^ _mix(places))
    return mixed.sum(dtype=jnp.uint32)


def _mix(numbers: jax.Array) -> jax.Array:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        numbers = (numbers ^ (numbers >> shift)) * jnp.uint32(factor)
    return numbers ^ (numbers >> 16)


def _first_line(error: Exception) -> str:
    return str(error).partition('\n')[0] or type(error).__name__


def _seal(contents: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(contents, sort_keys=True).encode())
