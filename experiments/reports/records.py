"""What a run leaves in its folder: the names of the files, its phases, and its records read."""

import json
from pathlib import Path
from typing import Any

METRICS_FILE = 'metrics.jsonl'
SUMMARY_FILE = 'summary.json'
REPORT_FILE = 'report.html'
PHASES = ('reference', 'surgery', 'finetuning')


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """Reads the records of a run.

    Returns:
      The records in the order written. A last line without its end, as a killed writer leaves
      it, is no record.

    Raises:
      ValueError: if a line is damaged; the message names the file and the line.
      OSError: if the file is missing or cannot be read.
    """
    path = Path(folder) / METRICS_FILE
    records = []
    for number, line in enumerate(path.read_bytes().split(b'\n')[:-1], start=1):
        try:
            record = json.loads(line)
            if record['phase'] not in PHASES or not isinstance(record['step'], int):
                raise ValueError(f'phase {record["phase"]!r}, step {record["step"]!r}')
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f'{path}, line {number}, is damaged: {error!r}') from error
        records.append(record)
    return records
