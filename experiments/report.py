"""Run records to tables and plots.

A run leaves `metrics.jsonl` in its folder, one JSON object a line, and ends with a summary dict.
This module turns the two into `summary.json`, `report.md` and `plots/*.png`, and into a table for
the terminal. The figures are plain `matplotlib.figure.Figure` objects: nothing here touches pyplot,
so a report may be written from any thread, without a display and from within a notebook.
"""

import io
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

from experiments.files import write_whole

PHASES = ('reference', 'surgery')
NETWORK_NAMES = {
    'lenet300': 'LeNet-300-100',
    'lenet5': 'LeNet-5',
    'alexnet': 'AlexNet',
    'vgg16': 'VGG-16',
    'xor': 'XOR',
}
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
RESULT_HEADER = ('network', 'parameters → kept', 'error: reference → after surgery', 'compression')
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

# Okabe and Ito's colours, which stay apart under every common colour blindness; without their
# yellow, too pale for a line on white.
BLUE, ORANGE, GREEN, RED, SKY, PINK, BLACK = COLOURS = (
    '#0072B2',
    '#E69F00',
    '#009E73',
    '#D55E00',
    '#56B4E9',
    '#CC79A7',
    '#000000',
)
# Seven colours and three styles in turn tell 21 lines apart; a dashed one shows the one below it.
LINE_STYLES = ('-', '--', ':')


def read_records(workdir):
    """Reads the records of a run.

    A last line without its newline is what a killed writer leaves: it is ignored. A resumed run
    repeats the steps after its checkpoint: where the records step back, the later ones replace the
    earlier.

    Args:
        workdir: the run's folder, which holds `metrics.jsonl`.

    Returns:
        The records, a list of dicts in the order of phase and step.

    Raises:
        ValueError: a line is damaged; the message names the file and the line number.
        OSError: the file is missing or cannot be read.
    """
    path = Path(workdir) / 'metrics.jsonl'
    records = []
    for number, line in enumerate(path.read_bytes().split(b'\n')[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f'{path}, line {number}: not JSON: {error}') from error
        if (
            not isinstance(record, dict)
            or record.get('phase') not in PHASES
            or not isinstance(record.get('step'), int)
        ):
            raise ValueError(
                f"{path}, line {number}: a record needs 'phase', one of {PHASES}, "
                f"and an integer 'step', got {line.decode()[:200]}"
            )
        while records and _position(records[-1]) >= _position(record):
            records.pop()
        records.append(record)
    return records


def _position(record):
    return PHASES.index(record['phase']), record['step']


def _check_summary(summary):
    """Raises ValueError naming the first key that the summary, or one of its layers, lacks."""
    for key in SUMMARY_KEYS:
        if key not in summary:
            raise ValueError(f"the summary lacks the key '{key}'")
    for layer, entry in summary['per_layer'].items():
        for key in LAYER_KEYS:
            if key not in entry:
                raise ValueError(f"the summary's per_layer['{layer}'] lacks the key '{key}'")


def _short_count(count):
    """431080 → '431K', 3986 → '4.0K', 61e6 → '61M': the form of the paper's tables."""
    if count < 1000:
        return f'{count}'
    # 999.5K would print as 1000K: from there on it is 1.0M.
    unit, suffix = (1e3, 'K') if count < 999.5e3 else (1e6, 'M')
    return f'{count / unit:.{1 if count / unit < 9.95 else 0}f}{suffix}'


def _times(entry):
    """The compression of a network or a layer as text; without bound where nothing is kept."""
    if not entry['kept']:
        return '∞'
    return f'{entry["compression"]:,.{0 if entry["compression"] >= 99.95 else 1}f}×'


def _result_cells(summary) -> tuple[str, ...]:
    network = NETWORK_NAMES.get(summary['network']) or summary['network']
    return (
        network,
        f'{_short_count(summary["parameters"])} → {_short_count(summary["kept"])}',
        f'{summary["reference_error"]:.2f} % → {summary["test_error"]:.2f} %',
        _times(summary),
    )


def _layer_rows(summary):
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


def _table(header, rows):
    """A Markdown table padded to straight columns, so that it reads as well on a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(' | '.join([f'| {first.ljust(widths[0])}', *cells]) + ' |')
    rule = ['-' * (widths[0] + 2), *('-' * (width + 1) + ':' for width in widths[1:])]
    lines.insert(1, f'|{"|".join(rule)}|')
    return '\n'.join(lines)


def result_row(summary):
    """The run as one row of the paper's table 1, in Markdown; `RESULT_HEADER` names its columns.

    Args:
        summary: the run's summary.

    Returns:
        For example '| LeNet-5 | 431K → 4.0K | 0.91 % → 0.91 % | 108× |'.

    Raises:
        ValueError: the summary lacks a key.
    """
    _check_summary(summary)
    return f'| {" | ".join(_result_cells(summary))} |'


def format_table(summary):
    """The result and the layers for the terminal: two aligned tables, an empty line between them.

    Args:
        summary: the run's summary.

    Raises:
        ValueError: the summary lacks a key.
    """
    _check_summary(summary)
    result = _table(RESULT_HEADER, [_result_cells(summary)])
    return f'{result}\n\n{_table(LAYER_HEADER, _layer_rows(summary))}'


def _phase(records, phase):
    return [record for record in records if record['phase'] == phase]


def binned_counts(records, event, width=1000):
    """Connections pruned or spliced in each stretch of surgery steps, over all layers.

    A record counts what happened since the one before it. Where it straddles the border of two
    stretches its count is shared out by the steps on either side, so that records far apart give
    the mean rate and not spikes between zeros.

    Args:
        records: the records of a run, both phases.
        event: 'pruned' or 'spliced'.
        width: steps in a stretch.

    Returns:
        The borders, n + 1 steps, the last of them the last record's step (so the last stretch may
        be shorter), and the n counts, float64.
    """
    surgery = _phase(records, 'surgery')
    steps = [0, *(record['step'] for record in surgery)]
    totals = np.cumsum([0, *(sum(record.get(event, {}).values()) for record in surgery)])
    borders = np.append(np.arange(0, steps[-1], width), steps[-1])
    return borders, np.diff(np.interp(borders, steps, totals))


def _new_figure(title, rows=1):
    """A figure with `rows` axes above each other, which share the axis of steps."""
    figure = Figure(figsize=(9, 1.5 + 3 * rows), dpi=100, layout='constrained')
    panels = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
    panels[0].set_title(title)
    for axes in panels:
        axes.grid(color='0.9')
        axes.set_axisbelow(True)
        axes.spines[['top', 'right']].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))
    return figure, panels


def _finish(figure, axes, label):
    """Labels the steps, which start at 0, and puts the legend beside the axes."""
    axes.set_xlim(0, max(1, axes.get_xlim()[1]))
    axes.set_xlabel(label)
    figure.legend(
        *axes.get_legend_handles_labels(), loc='outside right upper', frameon=False, fontsize=9
    )
    return figure


def _set_scale(axes, values, always_logarithmic=False):
    """Sets the vertical scale: logarithmic from a decade on, with a place for zero."""
    values = np.asarray(values, float)
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        axes.set_ylim(-0.05, 1)
        return
    low, high = positive.min(), positive.max()
    with_zero = (values == 0).any()
    if always_logarithmic:
        low = min(low, high / 10)
    elif high < 10 * low:
        if with_zero:
            axes.set_ylim(bottom=0)
        return
    if with_zero:
        decade = 10.0 ** np.floor(np.log10(low))
        axes.set_yscale('symlog', linthresh=decade, linscale=0.5)
        axes.set_ylim(-0.1 * decade, 1.3 * high)
    else:
        axes.set_yscale('log')
        axes.set_ylim(0.8 * low, 1.3 * high)
        if high < 1000 * low:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter('{x:,g}'))
    axes.yaxis.set_minor_formatter('')


def _draw(axes, records, values, **style):
    """Draws a value per record over the steps; with markers while they are few, so one shows."""
    steps = [record['step'] for record in records]
    axes.plot(steps, values, marker='o' if len(records) <= 30 else None, markersize=4, **style)


def density_figure(records, summary):
    """Share of the connections that each layer keeps, in percent, over the steps of surgery."""
    surgery = _phase(records, 'surgery')
    figure, (axes,) = _new_figure('Connections kept in each layer')
    shown = []
    for index, (layer, entry) in enumerate(summary['per_layer'].items()):
        percent = [100 * record['kept'][layer] / entry['parameters'] for record in surgery]
        # The end of a path tells layers apart; a long one would leave no room for the curves.
        name = layer if len(layer) <= 20 else f'…{layer[-19:]}'
        _draw(
            axes,
            surgery,
            percent,
            color=COLOURS[index % len(COLOURS)],
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            label=f'{name}: {percent[-1]:.3g} %',
        )
        shown += percent
    _set_scale(axes, shown, always_logarithmic=True)
    axes.set_ylabel('connections kept (%)')
    return _finish(figure, axes, 'steps of surgery')


def surgery_figure(records):
    """Connections pruned and spliced per 1,000 steps of surgery, over all layers."""
    figure, (axes,) = _new_figure('Connections pruned and spliced per 1,000 steps')
    borders, pruned = binned_counts(records, 'pruned')
    _, spliced = binned_counts(records, 'spliced')
    axes.stairs(pruned, borders, fill=True, color=ORANGE, alpha=0.6, label='pruned')
    axes.stairs(spliced, borders, baseline=None, color=BLUE, linewidth=1.8, label='spliced')
    _set_scale(axes, [0, *pruned, *spliced])
    axes.set_ylabel('connections per 1,000 steps')
    return _finish(figure, axes, 'steps of surgery')


def training_figure(records):
    """Validation error and loss over the steps of both phases, the start of surgery marked."""
    figure, panels = _new_figure('Validation error and loss', rows=2)
    reference, surgery = (_phase(records, phase) for phase in PHASES)
    start = reference[-1]['step'] if reference else 0
    surgery = [{**record, 'step': start + record['step']} for record in surgery]
    for axes, key, label in zip(
        panels, ('validation_error', 'loss'), ('validation error (%)', 'training loss'), strict=True
    ):
        shown = []
        for part, colour, name in ((reference, BLACK, 'reference'), (surgery, BLUE, 'surgery')):
            if part:
                measured = [record for record in part if record.get(key) is not None]
                values = [record[key] for record in measured]
                _draw(axes, measured, values, color=colour, label=name)
                shown += values
        if reference and surgery:
            axes.axvline(start, color=RED, linestyle='--', linewidth=1, label='surgery begins')
        _set_scale(axes, shown)
        axes.set_ylabel(label)
    return _finish(figure, panels[-1], 'steps')


def first_layer_figure(mask):
    """Map of how many connections each pixel keeps; the mask's shape must be (784, units)."""
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.shape[0] != 784:
        raise ValueError(f'first_layer_mask must have the shape (784, units), got {mask.shape}')
    kept = mask.sum(axis=1).reshape(28, 28)
    figure = Figure(figsize=(6, 5), dpi=100, layout='constrained')
    axes = figure.subplots()
    axes.set_title(f'First layer: {np.count_nonzero(kept)} of 784 pixels keep a connection')
    image = axes.imshow(kept, cmap='cividis', vmin=0, vmax=max(kept.max(), 1))
    axes.set_xlabel('column (pixels)')
    axes.set_ylabel('row (pixels)')
    figure.colorbar(
        image,
        ax=axes,
        label=f'connections kept, of {mask.shape[1]}',
        ticks=MaxNLocator(nbins=8, integer=True),
    )
    return figure


def _markdown_report(summary, pictures):
    network, *_ = _result_cells(summary)
    parts = [
        f'# {network} on {summary["dataset"]}, seed {summary["seed"]}',
        _table(RESULT_HEADER, [_result_cells(summary)]),
        f'Errors are on the test set. Validation error after surgery: '
        f'{summary["validation_error"]:.2f} %.',
        '## Layers',
        _table(LAYER_HEADER, _layer_rows(summary)),
        '## Course of the run',
        *(f'![{path.stem.replace("_", " ")}](plots/{path.name})' for path in pictures),
    ]
    if 'flags' in summary:
        lines = []
        for name, value in summary['flags'].items():
            text = ','.join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            if value is not None:  # A flagfile has no word for None: it leaves the flag out.
                lines.append(f'--{name}={text}')
        parts += ['## Flags', '\n'.join(['```', *lines, '```'])]
    parts += [
        '## Environment',
        f'{summary["steps"]} steps in {summary["seconds"]:,.0f} s, commit '
        f'{summary["commit"]}, jax {summary["jax"]}.',
    ]
    return '\n\n'.join(parts) + '\n'


def write(workdir, summary, first_layer_mask=None):
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
    _check_summary(summary)
    pixels = {}
    if first_layer_mask is not None:
        pixels['first_layer'] = first_layer_figure(first_layer_mask)
    paths = [workdir / 'summary.json']
    write_whole(paths[0], (json.dumps(summary, indent=2) + '\n'))
    records = read_records(workdir)
    if not records:
        raise ValueError(f'{workdir / "metrics.jsonl"} holds no records')
    figures = {'training': training_figure(records)}
    if _phase(records, 'surgery'):
        figures |= {'density': density_figure(records, summary), 'surgery': surgery_figure(records)}
    (workdir / 'plots').mkdir(exist_ok=True)
    for name, figure in (figures | pixels).items():
        content = io.BytesIO()
        figure.savefig(content, format='png')
        paths.append(workdir / 'plots' / f'{name}.png')
        write_whole(paths[-1], content.getvalue())
    paths.append(workdir / 'report.md')
    write_whole(paths[-1], _markdown_report(summary, paths[1:-1]))
    return paths
