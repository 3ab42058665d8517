"""The folder of a run: who owns it, and the records written to it.

A run's `flags.json` says which numbers it computes; its `metrics.jsonl` holds one JSON object a
line. Both are written whole or not at all, and a line that a killed run had not backed by a
checkpoint is dropped on resume. A lock keeps other processes out for as long as the run lives.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dns_jax.files.writing import write_whole
from experiments.reports.records import METRICS_FILE, REPORT_FILE, SUMMARY_FILE, read_records

FLAGS_FILE = 'flags.json'
NETWORK_FILE = 'pruned.safetensors'
CHECKPOINTS_FOLDER = 'checkpoints'
LOCK_FILE = '.lock'
_locks: dict[tuple[int, int], int] = {}  # of this process: descriptors by file


def claim(
    folder: Path, flags: Mapping[str, Any], resume: bool = False, overwrite: bool = False
) -> None:
    """Makes a folder ready for a run, and writes its `flags.json`.

    Other processes are kept out for as long as this one lives, or until `release`.

    Args:
      folder: of the run.
      flags: what decides its numbers.
      resume: whether to go on with the run that the folder holds.
      overwrite: whether to delete it first.

    Raises:
      ValueError: if the folder holds a run and neither --resume nor --overwrite is given, holds
        a run with other flags on --resume, or holds other things than a run.
      OSError: if another process has the folder, or it cannot be written.
    """
    check_claim(folder, flags, resume, overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
    except BlockingIOError as error:
        raise BlockingIOError(f'--workdir={folder} is in use by another process') from error
    except OSError as error:
        raise _not_writable(folder, error) from error
    # What another run did meanwhile counts.
    check_claim(folder, flags, resume, overwrite)
    if overwrite:
        _delete_run(folder)
    try:
        write_whole(folder / FLAGS_FILE, json.dumps(flags, indent=2) + '\n')
    except OSError as error:
        raise _not_writable(folder, error) from error


def release(folder: Path) -> None:
    """Lets other processes have a folder, if this one has claimed it."""
    path = folder / LOCK_FILE
    if path.exists() and _identify(path) in _locks:
        os.close(_locks.pop(_identify(path)))


def _lock(folder: Path) -> None:
    """Keeps other processes out; such a lock ends when any descriptor of its file is closed."""
    path = folder / LOCK_FILE
    if path.exists() and _identify(path) in _locks:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.lockf(descriptor, os.F_TLOCK, 0)
    except OSError:
        os.close(descriptor)
        raise
    _locks[_identify(path)] = descriptor


def _identify(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def check_claim(folder: Path, flags: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
    """Refuses a folder that `claim` would refuse, as far as can be seen without a claim."""
    if (folder / FLAGS_FILE).exists():
        recorded = read_flags(folder)
        if not (overwrite or resume):
            raise ValueError(
                f'--workdir={folder} already holds a run; continue it with --resume, replace it '
                'with --overwrite, or choose another'
            )
        if resume and (differences := _differences(recorded, flags)):
            raise ValueError(f'--workdir={folder} holds a run with other flags: {differences}')
    elif folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir()):
        raise ValueError(f'--workdir={folder} is not empty and holds no run of this program')


def _not_writable(folder: Path, error: OSError) -> OSError:
    return OSError(f'--workdir={folder} must be a folder that can be written: {error}')


class Records:
    """The records of a run, appended to its `metrics.jsonl` and, if asked for, to TensorBoard."""

    def __init__(self, folder: Path, tensorboard: bool = False):
        """Opens the records.

        Args:
          folder: of the run.
          tensorboard: whether to write events to `tensorboard` in it as well.

        Raises:
          ValueError: if `tensorboard` is asked for and tensorboardX is not installed.
        """
        self._path = folder / METRICS_FILE
        self._path.touch()
        self._events = _open_events(folder / 'tensorboard') if tensorboard else None

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one record.

        Args:
          record: `phase`, `step` and numbers, or numbers by layer.
        """
        with self._path.open('a') as file:
            file.write(json.dumps(record) + '\n')
        if self._events:
            for name, value in record.items():
                series = value if isinstance(value, Mapping) else {'': value}
                for layer, number in series.items():
                    if name not in ('phase', 'step'):
                        tag = '/'.join(filter(None, (record['phase'], name, layer)))
                        self._events.add_scalar(tag, number, record['step'])
            self._events.flush()

    def rewind(self, phase: str, step: int) -> None:
        """Drops what a resumed run will write again, and any torn last line.

        Args:
          phase: the phase that goes on.
          step: its last step that a checkpoint holds.

        Raises:
          ValueError: if a whole line is no record.
        """
        kept = [
            json.dumps(record) + '\n'
            for record in read_records(self._path.parent)
            if record['phase'] != phase or record['step'] <= step
        ]
        write_whole(self._path, ''.join(kept))


def _open_events(folder: Path):
    try:
        import tensorboardX  # optional, so imported only where asked for
    except ImportError as error:
        raise ValueError('--tensorboard needs the package tensorboardX') from error
    return tensorboardX.SummaryWriter(str(folder))


def read_flags(folder: Path) -> Mapping[str, Any]:
    """Reads what decided the numbers of a run.

    Raises:
      ValueError: if the file is damaged, or of another program.
      OSError: if it is missing or cannot be read.
    """
    path = folder / FLAGS_FILE
    try:
        flags = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    if not isinstance(flags, dict) or 'network' not in flags:
        raise ValueError(f'{path} is damaged: it holds no flags of a run')
    return flags


def _delete_run(folder: Path) -> None:
    """Deletes what a run writes, the flags last, so that a torn deletion can be repeated."""
    for name in (CHECKPOINTS_FOLDER, 'tensorboard'):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (METRICS_FILE, NETWORK_FILE, SUMMARY_FILE, REPORT_FILE, FLAGS_FILE):
        (folder / name).unlink(missing_ok=True)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return ', '.join(f'{name} was {old.get(name)!r}, is {new.get(name)!r}' for name in names)
