"""What a run reports: its summary, its tables, its pictures.

A run leaves `metrics.jsonl` in its folder and ends with a summary. This module turns the two into
`summary.json` and `report.html`, and into tables for the terminal. `sweep_report` is for many runs.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dns_jax.files.writing import write_whole
from experiments.networks.names import NETWORK_NAMES
from experiments.reports import plots, published
from experiments.reports.pages import Bar, Section, render
from experiments.reports.records import METRICS_FILE, REPORT_FILE, SUMMARY_FILE, read_records
from experiments.reports.summaries import LAYER_COUNTS, Summary, check_summary
from experiments.reports.tables import Rows, Table, format_of, to_text

RESULT_HEADER = ('network', 'parameters → kept', 'error: reference → after surgery', 'compression')
LAYER_HEADER = (
    'layer',
    'parameters',
    'kept',
    'kept %',
    'compression',
    'multiply-adds',
    'of these kept',
    'bytes',
    'bytes kept',
)


_BYTES_TEXT = (
    'The bytes kept are those of a sparse file: each kept weight stands there with its place in '
    'the layer, of 4 bytes. So a layer of 4-byte weights that keeps more than half of them takes '
    'more bytes than before.'
)
_COURSE_TEXT = (
    'A connection is pruned when it is cut, and spliced when it is put back. Surgery trains the '
    'weight of a cut connection on, and splices it once the weight has become large again.'
)


def published_tables(summary: Summary) -> list[Table]:
    """What each layer keeps, beside what it keeps in papers: table 4 of Guo et al.

    Returns:
      One table; none where no paper tells of the network's layers.
    """
    papers = published.LAYER_SHARES.get(summary['network'], {})
    layers = {*summary['per_layer'], 'total'}
    if not papers or not all(layers <= shares.keys() for shares in papers.values()):
        return []
    total = {key: summary[key] for key in ('parameters', 'kept')}
    header = ('layer', 'parameters', 'kept %', *(f'{name} %' for name in papers))
    rows = [
        (
            layer,
            f'{entry["parameters"]:,}',
            f'{100 * entry["kept"] / max(entry["parameters"], 1):.1f}',
            *(f'{shares[layer]:g}' for shares in papers.values()),
        )
        for layer, entry in [*summary['per_layer'].items(), ('total', total)]
    ]
    return [Table('Percent of its parameters that a layer keeps, here and in papers', header, rows)]


def format_table(summary: Summary) -> str:
    """The result and the layers for the terminal: aligned tables, an empty line between them.

    Raises:
      ValueError: the summary lacks a key.
    """
    check_summary(summary)
    return to_text([_result(summary), _layers(summary), *published_tables(summary)])


def card(summary: Summary) -> str:
    """What is to be told of a published network, in Markdown.

    Raises:
      ValueError: the summary lacks a key.
    """
    check_summary(summary)
    parts = [
        f'# {_title(summary)}',
        to_text([_result(summary)]),
        f'Errors are on the test set. Validation error after surgery: '
        f'{_validation_error(summary)}.',
        '## Layers',
        to_text([_layers(summary)]),
    ]
    if beside := published_tables(summary):
        parts += ['## Beside published results', to_text(beside)]
    if lines := _run_flags(summary):
        parts += ['## Flags', '\n'.join(['```', *lines, '```'])]
    parts += [
        '## Environment',
        f'{summary["steps"]} steps in {summary["seconds"]:,.0f} s, commit '
        f'{summary["commit"]}, jax {summary["jax"]}.',
    ]
    return '\n\n'.join(parts) + '\n'


def page(summary: Summary, figures: Sequence[Figure] = ()) -> str:
    """A run's report as a page: result, sizes, layers, course, flags and environment.

    Raises:
      ValueError: the summary lacks a key.
    """
    check_summary(summary)
    sections = [
        Section('Sizes', bars=_size_bars(summary)),
        Section('Layers', _BYTES_TEXT, tables=[_layers(summary)]),
    ]
    if beside := published_tables(summary):
        sections.append(Section('Beside published results', tables=beside))
    if figures:
        sections.append(Section('Course of the run', _COURSE_TEXT, figures=figures))
    if lines := _run_flags(summary):
        sections.append(Section('Flags', lines=lines, is_folded=True))
    sections.append(Section('Environment', lines=describe_environment([summary])))
    _, parameters, errors, compression = _result_cells(summary)
    return render(
        _title(summary),
        f'{summary["steps"]:,} steps of surgery; {summary["seconds"]:,.0f} s since the program was '
        'last started. Errors are on the test set; the validation error after surgery is '
        f'{_validation_error(summary)}.',
        [
            (compression, 'compression'),
            (errors, 'error: reference → after surgery'),
            (parameters, 'parameters → kept'),
        ],
        sections,
    )


def to_flags(values: Mapping[str, Any]) -> list[str]:
    """Writes flags, name to value, as the lines of a flagfile; None is a flag left out."""
    return [
        f'--{name}={value}'
        for name, given in values.items()
        for value in (given if isinstance(given, list | tuple) else [given])
        if value is not None
    ]


def describe_environment(rows: Rows) -> list[str]:
    """Says what runs were made with, each version and device once."""
    return [
        f'{name}: {", ".join(dict.fromkeys(str(row[name]) for row in rows))}'
        for name in ('commit', 'jax', 'device')
        if name in rows[0]
    ]


def write(
    workdir: str | Path, summary: Summary, first_layer_mask: np.ndarray | None = None
) -> list[Path]:
    """Writes `summary.json` and `report.html` into a run's folder.

    Every file is whole or not there. The summary goes first, so that damaged records never cost
    a result.

    Args:
      workdir: the run's folder, which holds `metrics.jsonl`.
      summary: the run's summary, of plain Python values; its optional 'flags', name to value,
        are shown as the lines of a flagfile.
      first_layer_mask: bool array of shape (784, units), where the first layer sees the pixels.

    Returns:
      The paths of the two files. Without surgery records there is no picture of density and
      surgery.

    Raises:
      ValueError: the summary lacks a key, the mask has another shape, a record is damaged or
        there are none.
      OSError: a file cannot be written; the message names it.
    """
    workdir = Path(workdir)
    check_summary(summary)
    pixels = []
    if first_layer_mask is not None:
        pixels.append(plots.first_layer_figure(first_layer_mask))
    paths = [workdir / SUMMARY_FILE, workdir / REPORT_FILE]
    write_whole(paths[0], json.dumps(summary, indent=2) + '\n')
    records = read_records(workdir)
    if not records:
        raise ValueError(f'{workdir / METRICS_FILE} holds no records')
    figures = [plots.training_figure(records, summary.get('unit', '%'))]
    if any(record['phase'] == 'surgery' for record in records):
        figures += [plots.density_figure(records, summary), plots.surgery_figure(records)]
    write_whole(paths[1], page(summary, figures + pixels))
    return paths


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


def _title(summary: Summary) -> str:
    network = NETWORK_NAMES.get(summary['network']) or summary['network']
    return f'{network} on {summary["dataset"]}, seed {summary["seed"]}'


def _result(summary: Summary) -> Table:
    return Table('The result', RESULT_HEADER, [_result_cells(summary)])


def _result_cells(summary: Summary) -> tuple[str, ...]:
    network = NETWORK_NAMES.get(summary['network']) or summary['network']
    return (
        network,
        f'{_short_count(summary["parameters"])} → {_short_count(summary["kept"])}',
        f'{_measured(summary, "reference_error")} → {_measured(summary, "test_error")}',
        _times(summary),
    )


def _measured(summary: Summary, name: str) -> str:
    number, unit = format_of(summary.get('unit', '%'))
    return f'{summary[name]:{number}}{unit}'


def _layers(summary: Summary) -> Table:
    """What each layer keeps, in the summary's order, and all of them."""
    total = _total(summary)
    total['density'] = total['kept'] / max(total['parameters'], 1)
    total['compression'] = total['parameters'] / max(total['kept'], 1)
    rows = []
    for layer, entry in [*summary['per_layer'].items(), ('total', total)]:
        parameters, kept, *costs = (f'{entry[key]:,}' for key in LAYER_COUNTS)
        density = f'{100 * entry["density"]:.2f}'
        rows.append((layer, parameters, kept, density, _times(entry), *costs))
    return Table('What each layer keeps', LAYER_HEADER, rows)


def _total(summary: Summary) -> dict[str, Any]:
    layers = summary['per_layer'].values()
    return {key: sum(entry[key] for entry in layers) for key in LAYER_COUNTS}


def _size_bars(summary: Summary) -> list[Bar]:
    total = _total(summary)
    kinds = (
        ('Parameters', 'parameters', 'kept'),
        ('Multiply-adds for an image or a character', 'multiply_adds', 'kept_multiply_adds'),
        ('Bytes, dense → sparse', 'bytes', 'kept_bytes'),
    )
    return [
        Bar(name, f'{total[all_]:,}', f'{total[kept]:,}', total[kept] / max(total[all_], 1))
        for name, all_, kept in kinds
    ]


def _run_flags(summary: Summary) -> list[str]:
    # The network is no flag, but the choice of the script.
    flags = summary.get('flags', {}).items()
    return to_flags({name: value for name, value in flags if name != 'network'})


def _validation_error(summary: Summary) -> str:
    seen = summary.get('flags', {}).get('train_on_all')
    error = _measured(summary, 'validation_error')
    return f'{error}, of images that it was trained on' if seen else error
