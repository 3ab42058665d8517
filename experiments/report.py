"""What a run reports: its summary, its tables, its pictures.

A run leaves `metrics.jsonl` in its folder and ends with a summary. This module turns the two into
`summary.json`, `report.md` and `plots/*.png`, and into tables for the terminal.
"""

import io
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dns_jax.files import write_whole
from experiments import plots
from experiments.summaries import LAYER_COUNTS, Summary, check_summary
from experiments.workdir import read_records

NETWORK_NAMES = {
    'lenet300': 'LeNet-300-100',
    'lenet5': 'LeNet-5',
    'alexnet': 'AlexNet',
    'vgg16': 'VGG-16',
}
# Percent of its parameters that each layer keeps in the paper's table 4 and in table 5 of Han et
# al. 2015, and of the whole network.
PUBLISHED_SHARES = {
    'alexnet': {
        'Guo et al.': {
            **{'conv1': 53.8, 'conv2': 40.6, 'conv3': 29.0, 'conv4': 32.3, 'conv5': 32.5},
            **{'fc6': 3.7, 'fc7': 6.6, 'fc8': 4.6, 'total': 5.7},
        },
        'Han et al.': {
            **{'conv1': 84, 'conv2': 38, 'conv3': 35, 'conv4': 37, 'conv5': 37},
            **{'fc6': 9, 'fc7': 9, 'fc8': 25, 'total': 11},
        },
    },
    'vgg16': {
        'Han et al.': {
            **{'conv1_1': 58, 'conv1_2': 22, 'conv2_1': 34, 'conv2_2': 36},
            **{'conv3_1': 53, 'conv3_2': 24, 'conv3_3': 42},
            **{'conv4_1': 32, 'conv4_2': 27, 'conv4_3': 34},
            **{'conv5_1': 35, 'conv5_2': 29, 'conv5_3': 36},
            **{'fc6': 4, 'fc7': 4, 'fc8': 23, 'total': 7.5},
        },
    },
}
RESULT_HEADER = ('network', 'parameters → kept', 'error: reference → after surgery', 'compression')
FRONTIER_HEADER = (
    *('network', 'seeds', 'compression', 'kept'),
    *('error of the reference', 'error after surgery'),
)
# Heading: the column of a comparison, its format and unit.
COMPARE_COLUMNS = {
    'compression': ('compression', '.1f', '×'),
    'error of the reference': ('reference_error', '.2f', ' %'),
    'error': ('test_error', '.2f', ' %'),
    'steps to reach it': ('steps_to_reach', ',.0f'),
    'time': ('pruning_seconds', '.0f', ' s'),
    'state': ('state_mebibytes', '.1f', ' MiB'),
}
CUT_COLUMNS = {
    'before the cut': ('cut_before', '.2f', ' %'),
    'after it': ('cut_after', '.2f', ' %'),
    'in the end': ('cut_end', '.2f', ' %'),
    'compression': ('compression', '.1f', '×'),
}
RETURN_COLUMNS = {
    'ever pruned': ('returns_pruned', ',.0f'),
    'returned': ('returns_returned', ',.0f'),
    'of these kept': ('returns_returned_kept', ',.0f'),
    'loss': ('returns_loss', '.4f'),
    'without these': ('returns_loss_without', '.4f'),
    'others': ('returns_others_removed', ',.0f'),
    'without these others': ('returns_loss_without_others', '.4f'),
}
LAYER_HEADER = (
    'layer',
    'parameters',
    'kept',
    'kept %',
    'compression',
    'multiply-adds',
    'kept',
    'bytes',
    'kept',
)


def _short_count(count: int) -> str:
    """431080 → '431K', 3986 → '4.0K', 61e6 → '61M': the form of the paper's tables."""
    if count < 1000:
        return f'{count}'
    # 999.5K would print as 1000K: from there on it is 1.0M.
    unit, suffix = (1e3, 'K') if count < 999.5e3 else (1e6, 'M')
    return f'{count / unit:.{1 if count / unit < 9.95 else 0}f}{suffix}'


def _times(entry: Mapping[str, Any]) -> str:
    """The compression of a network or a layer as text; without bound where nothing is kept."""
    if not entry['kept']:
        return '∞'
    return f'{entry["compression"]:,.{0 if entry["compression"] >= 99.95 else 1}f}×'


def _result_cells(summary: Summary) -> tuple[str, ...]:
    network = NETWORK_NAMES.get(summary['network']) or summary['network']
    return (
        network,
        f'{_short_count(summary["parameters"])} → {_short_count(summary["kept"])}',
        f'{summary["reference_error"]:.2f} % → {summary["test_error"]:.2f} %',
        _times(summary),
    )


def _layer_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Rows of text, one per layer in the summary's order, and the total of them."""
    layers = summary['per_layer']
    total: dict[str, float] = {
        key: sum(entry[key] for entry in layers.values()) for key in LAYER_COUNTS
    }
    total['density'] = total['kept'] / max(total['parameters'], 1)
    total['compression'] = total['parameters'] / max(total['kept'], 1)
    rows = []
    for layer, entry in [*layers.items(), ('total', total)]:
        parameters, kept, *costs = (f'{entry[key]:,}' for key in LAYER_COUNTS)
        density = f'{100 * entry["density"]:.2f}'
        rows.append((layer, parameters, kept, density, _times(entry), *costs))
    return rows


def published_table(summary: Summary) -> str:
    """What each layer keeps, beside what it keeps in papers: table 4 of Guo et al.

    Args:
      summary: the run's summary.

    Returns:
      A Markdown table; empty where no paper tells of the network's layers.
    """
    published = PUBLISHED_SHARES.get(summary['network'], {})
    layers = {*summary['per_layer'], 'total'}
    if not published or not all(layers <= shares.keys() for shares in published.values()):
        return ''
    total = {key: summary[key] for key in ('parameters', 'kept')}
    rows = [
        (
            layer,
            f'{entry["parameters"]:,}',
            f'{100 * entry["kept"] / max(entry["parameters"], 1):.1f}',
            *(f'{shares[layer]:g}' for shares in published.values()),
        )
        for layer, entry in [*summary['per_layer'].items(), ('total', total)]
    ]
    return table(('layer', 'parameters', 'kept %', *(f'{name} %' for name in published)), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table padded to straight columns, so that it reads as well on a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(' | '.join([f'| {first.ljust(widths[0])}', *cells]) + ' |')
    rule = ['-' * (widths[0] + 2), *('-' * (width + 1) + ':' for width in widths[1:])]
    lines.insert(1, f'|{"|".join(rule)}|')
    return '\n'.join(lines)


def format_table(summary: Summary) -> str:
    """The result and the layers for the terminal: aligned tables, an empty line between them.

    Args:
      summary: the run's summary.

    Raises:
      ValueError: the summary lacks a key.
    """
    check_summary(summary)
    result = table(RESULT_HEADER, [_result_cells(summary)])
    tables = result, table(LAYER_HEADER, _layer_rows(summary)), published_table(summary)
    return '\n\n'.join(filter(None, tables))


def frontier_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The runs of a sweep in Markdown, a row per target: medians and ranges over seeds.

    Args:
      rows: with at least `network`, `target`, `compression`, `kept`, `reference_error` and
        `test_error`, sorted by network and target.
    """
    lines = []
    for (network, _), group in itertools.groupby(rows, lambda row: (row['network'], row['target'])):
        runs = list(group)
        lines.append(
            (
                NETWORK_NAMES.get(network) or network,
                f'{len(runs)}',
                middle_and_range(runs, 'compression', '.1f', '×'),
                middle_and_range(runs, 'kept', ',.0f'),
                middle_and_range(runs, 'reference_error', '.2f', ' %'),
                middle_and_range(runs, 'test_error', '.2f', ' %'),
            )
        )
    return table(FRONTIER_HEADER, lines)


def compare_tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """The runs of a comparison in Markdown, a row per variant and target: medians and ranges.

    Args:
      rows: of `experiments.compare`, those of one variant and target side by side. Where some of
        them were cut, or counted what returned, tables of that follow.
    """
    groups = [
        (name, list(group))
        for (name, _), group in itertools.groupby(rows, lambda row: (row['variant'], row['target']))
    ]

    parts = []
    for columns in (COMPARE_COLUMNS, CUT_COLUMNS, RETURN_COLUMNS):
        key = next(iter(columns.values()))[0]
        lines = [
            (name, f'{len(runs)}', *(middle_and_range(runs, *cell) for cell in columns.values()))
            for name, runs in groups
            if runs[0].get(key, '') != ''
        ]
        if lines:
            parts.append(table(('variant', 'seeds', *columns), lines))
    return '\n\n'.join(parts)


def middle_and_range(
    rows: Sequence[Mapping[str, Any]], name: str, form: str, unit: str = ''
) -> str:
    """The median of a quantity over runs, and in brackets its range."""
    values = [row[name] for row in rows]
    middle, low, high = statistics.median(values), min(values), max(values)
    if f'{low:{form}}' == f'{high:{form}}':
        return f'{middle:{form}}{unit}'
    return f'{middle:{form}}{unit} ({low:{form}} to {high:{form}})'


def markdown(summary: Summary, pictures: Sequence[Path] = ()) -> str:
    """A run's report in Markdown: result, layers, pictures, flags and environment.

    Args:
      summary: the run's summary.
      pictures: files in the report's folder `plots`.

    Raises:
      ValueError: the summary lacks a key.
    """
    check_summary(summary)
    network, *_ = _result_cells(summary)
    flags = summary.get('flags', {})
    seen = ', of images that it was trained on' if flags.get('train_on_all') else ''
    parts = [
        f'# {network} on {summary["dataset"]}, seed {summary["seed"]}',
        table(RESULT_HEADER, [_result_cells(summary)]),
        f'Errors are on the test set. Validation error after surgery: '
        f'{summary["validation_error"]:.2f} %{seen}.',
        '## Layers',
        table(LAYER_HEADER, _layer_rows(summary)),
    ]
    if published := published_table(summary):
        parts += ['## Beside published results', published]
    if pictures:
        parts.append('## Course of the run')
        parts += [f'![{path.stem.replace("_", " ")}](plots/{path.name})' for path in pictures]
    if flags:
        # The network is no flag, but the choice of the script; None is a flag left out.
        lines = [
            f'--{name}={value}'
            for name, value in flags.items()
            if name != 'network' and value is not None
        ]
        parts += ['## Flags', '\n'.join(['```', *lines, '```'])]
    parts += [
        '## Environment',
        f'{summary["steps"]} steps in {summary["seconds"]:,.0f} s, commit '
        f'{summary["commit"]}, jax {summary["jax"]}.',
    ]
    return '\n\n'.join(parts) + '\n'


def write(
    workdir: str | Path, summary: Summary, first_layer_mask: np.ndarray | None = None
) -> list[Path]:
    """Writes `summary.json`, `plots/*.png` and `report.md` into a run's folder.

    Every file is whole or not there. The summary goes first, so that damaged records never cost
    a result; the report goes last, so that it never links to a missing picture.

    Args:
      workdir: the run's folder, which holds `metrics.jsonl`.
      summary: the run's summary, of plain Python values; its optional 'flags', name to value,
        are shown as the lines of a flagfile.
      first_layer_mask: bool array of shape (784, units), where the first layer sees the pixels.

    Returns:
      The paths of the files, in the order written. Without surgery records there is no picture
      of density and surgery.

    Raises:
      ValueError: the summary lacks a key, the mask has another shape, a record is damaged or
        there are none.
      OSError: a file cannot be written; the message names it.
    """
    workdir = Path(workdir)
    check_summary(summary)
    pixels = {}
    if first_layer_mask is not None:
        pixels['first_layer'] = plots.first_layer_figure(first_layer_mask)
    paths = [workdir / 'summary.json']
    write_whole(paths[0], (json.dumps(summary, indent=2) + '\n'))
    records = read_records(workdir)
    if not records:
        raise ValueError(f'{workdir / "metrics.jsonl"} holds no records')
    figures = {'training': plots.training_figure(records)}
    if any(record['phase'] == 'surgery' for record in records):
        figures |= {
            'density': plots.density_figure(records, summary),
            'surgery': plots.surgery_figure(records),
        }
    (workdir / 'plots').mkdir(exist_ok=True)
    for name, figure in (figures | pixels).items():
        content = io.BytesIO()
        figure.savefig(content, format='png')
        paths.append(workdir / 'plots' / f'{name}.png')
        write_whole(paths[-1], content.getvalue())
    paths.append(workdir / 'report.md')
    write_whole(paths[-1], markdown(summary, paths[1:-1]))
    return paths
