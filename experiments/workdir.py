"""The folder of a run: who owns it, and the records written to it.

A run's `flags.json` says which numbers it computes; its `metrics.jsonl` holds one JSON object a
line. Both are written whole or not at all, and a line that a killed run had not backed by a
checkpoint is dropped on resume.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.files import write_whole
from experiments.flags import Config

FLAGS_FILE = 'flags.json'
METRICS_FILE = 'metrics.jsonl'


def claim(config: Config) -> Path:
    """Makes the folder ready for a run.

    Args:
      config: the run; `workdir`, `resume` and `overwrite` decide.

    Returns:
      The folder, with this run's `flags.json` in it.

    Raises:
      ValueError: if the folder holds a run and neither --resume nor --overwrite is given, holds
        a run with other flags on --resume, or holds other things than a run.
      OSError: if the folder cannot be written.
    """
    folder = Path(config.workdir)
    flags_file = folder / FLAGS_FILE
    identity = config.identity()
    if flags_file.exists():
        if config.overwrite:
            shutil.rmtree(folder)
        elif not config.resume:
            raise ValueError(
                f'--workdir={folder} already holds a run; continue it with --resume, replace it '
                'with --overwrite, or choose another'
            )
        elif differences := _differences(json.loads(flags_file.read_text()), identity):
            raise ValueError(f'--workdir={folder} holds a run with other flags: {differences}')
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f'--workdir={folder} is not empty and holds no run of this program')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(flags_file, json.dumps(identity, indent=2) + '\n')
    except OSError as error:
        raise OSError(
            f'--workdir={folder} must be a folder that can be written: {error}'
        ) from error
    return folder


class Records:
    """The records of a run, appended to its `metrics.jsonl`."""

    def __init__(self, folder: Path):
        self._path = folder / METRICS_FILE
        self._path.touch()

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line. Values must be exact in JSON, so that a resumed run writes the same."""
        with self._path.open('a') as file:
            file.write(json.dumps(record) + '\n')

    def rewind(self, phase: str, step: int) -> None:
        """Drops the records of a phase that come after a step, and any torn last line."""
        lines = [line for line in self._path.read_text().splitlines(True) if line.endswith('\n')]
        records = [(line, json.loads(line)) for line in lines]
        kept = [
            line for line, record in records if record['phase'] != phase or record['step'] <= step
        ]
        write_whole(self._path, ''.join(kept))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return ', '.join(f'{name} was {old.get(name)!r}, is {new.get(name)!r}' for name in names)
