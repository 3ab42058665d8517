"""The summary of a run: what it must hold, and how its file is read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Summary = Mapping[str, Any]

SUMMARY_KEYS = (
    'network',
    'dataset',
    'seed',
    'steps',
    'reference_error',
    'test_error',
    'validation_error',
    'parameters',
    'kept',
    'compression',
    'seconds',
    'commit',
    'jax',
    'per_layer',
)
# What adds up over the layers; the two ratios follow from the sums.
LAYER_COUNTS = ('parameters', 'kept', 'multiply_adds', 'kept_multiply_adds', 'bytes', 'kept_bytes')
LAYER_KEYS = (*LAYER_COUNTS, 'density', 'compression')
_TEXTS = ('network', 'dataset', 'commit', 'jax')
_LARGEST = 1e100  # so that no sum, percentage or ratio leaves what a float can hold


def read_summary(path: Path) -> dict[str, Any]:
    """Reads a `summary.json`.

    Returns:
      What it holds, whatever that is; `check_summary` says whether it is whole.

    Raises:
      ValueError: if it is no JSON object.
      OSError: if it is missing or cannot be read.
    """
    try:
        summary = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    if not isinstance(summary, dict):
        raise ValueError(f'{path} is damaged: it holds no summary of a run')
    return summary


def read_whole_summary(path: Path) -> dict[str, Any]:
    """Reads a `summary.json` that must hold all that a report shows.

    Raises:
      ValueError: if it is damaged, or `check_summary` finds something.
      OSError: if it is missing or cannot be read.
    """
    summary = read_summary(path)
    try:
        check_summary(summary)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return summary


def check_summary(summary: Summary) -> None:
    """Checks that a summary holds all that a report shows.

    Raises:
      ValueError: if it, or one of its layers, lacks a key, or has another value than a finite
        number or a text; the message names the key.
    """
    _check_entry('the summary', summary, SUMMARY_KEYS)
    if not isinstance(summary.get('flags', {}), Mapping):
        raise ValueError(f'the summary has the flags {str(summary["flags"])[:80]}')
    if not isinstance(summary.get('unit', '%'), str):
        raise ValueError(f'the summary has the unit {str(summary["unit"])[:80]}')
    for layer, entry in summary['per_layer'].items():
        _check_entry(f"the summary's per_layer['{layer}']", entry, LAYER_KEYS)


def _check_entry(name: str, entry: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(entry, Mapping):
        raise ValueError(f'{name} must have keys, but is {str(entry)[:80]}')
    for key in keys:
        if key not in entry:
            raise ValueError(f"{name} lacks the key '{key}'")
        value = entry[key]
        if key in _TEXTS:
            is_sound = isinstance(value, str)
        elif key == 'per_layer':
            is_sound = isinstance(value, Mapping)
        elif key == 'compression' and not entry['kept']:
            is_sound = True  # none at all, where nothing is kept
        else:
            is_sound = isinstance(value, int | float) and abs(value) < _LARGEST
        if not is_sound:
            raise ValueError(f'{name} has the {key} {str(value)[:80]}')
