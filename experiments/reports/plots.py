"""The pictures of a run, from its records.

Plain `matplotlib.figure.Figure` objects: nothing here touches pyplot, so that a report may be
written from any thread, without a display and from within a notebook.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

from dns_jax.files.writing import write_whole
from experiments.reports import published
from experiments.reports.records import PHASES
from experiments.reports.tables import group_rows, is_by_density

Records = Sequence[Mapping[str, Any]]

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
GREY = '#e5e5e5'  # of the grid
# What they become on a dark page, as bright as they are dark on a white one.
DARK = {
    **dict(zip(COLOURS, COLOURS, strict=True)),
    **{BLUE: '#4BA3DB', GREEN: '#2CC295', RED: '#F0792B', BLACK: '#E6E6E6', GREY: '#3A3F44'},
}
# Seven colours and three styles in turn tell 21 lines apart; a dashed one shows the one below it.
LINE_STYLES = ('-', '--', ':')


def _phase(records: Records, phase: str) -> Records:
    return [record for record in records if record['phase'] == phase]


def binned_counts(records: Records, event: str, width: int = 1000) -> tuple[np.ndarray, np.ndarray]:
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


def save(figure: Figure, path: Path, **options: Any) -> None:
    """Writes a figure as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format='png', **options)
    write_whole(path, picture.getvalue())


def style(axes: Any) -> None:
    """Gives axes the grid and the open frame that all pictures have."""
    axes.grid(color=GREY)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)


def _new_figure(title: str, rows: int = 1) -> tuple[Figure, Any]:
    """A figure with `rows` axes above each other, which share the axis of steps."""
    figure = Figure(figsize=(6.4, 1.2 + 2.4 * rows), dpi=150, layout='constrained')
    panels = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
    panels[0].set_title(title)
    for axes in panels:
        style(axes)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))
    return figure, panels


def _finish(figure: Figure, axes: Any, label: str) -> Figure:
    """Labels the steps, which start at 0, and puts the legend below."""
    axes.set_xlim(0, max(1, axes.get_xlim()[1]))
    axes.set_xlabel(label)
    return _add_legend(figure, *axes.get_legend_handles_labels())


def _add_legend(figure: Figure, handles: Any, labels: Any) -> Figure:
    """Puts the legend below, where a narrow page has room, and makes the figure taller by it."""
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.17 * -(-len(labels) // 2))
    figure.legend(handles, labels, loc='outside lower left', ncols=2, frameon=False, fontsize=9)
    return figure


def _set_scale(axes: Any, values: Any, always_logarithmic: bool = False) -> None:
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


def _draw(axes: Any, records: Records, values: Sequence[float], **style: Any) -> None:
    """Draws a value per record over the steps; with markers while they are few, so one shows."""
    steps = [record['step'] for record in records]
    axes.plot(steps, values, marker='o' if len(records) <= 30 else None, markersize=4, **style)


def density_figure(records: Records, summary: Mapping[str, Any]) -> Figure:
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


def surgery_figure(records: Records) -> Figure:
    """Connections pruned and spliced per 1,000 steps of surgery, over all layers."""
    figure, (axes,) = _new_figure('Connections pruned and spliced per 1,000 steps')
    borders, pruned = binned_counts(records, 'pruned')
    _, spliced = binned_counts(records, 'spliced')
    pruned, spliced = (1000 * counts / np.diff(borders) for counts in (pruned, spliced))
    axes.stairs(pruned, borders, fill=True, color=ORANGE, alpha=0.6, label='pruned')
    axes.stairs(spliced, borders, baseline=None, color=BLUE, linewidth=1.8, label='spliced')
    _set_scale(axes, [0, *pruned, *spliced])
    axes.set_ylabel('connections per 1,000 steps')
    return _finish(figure, axes, 'steps of surgery')


def training_figure(records: Records, unit: str = '%') -> Figure:
    """Validation error and loss over the steps of all phases, the start of each marked."""
    figure, panels = _new_figure('Validation error and loss', rows=2)
    labels = f'validation error ({unit})', 'training loss'
    for axes, key, label in zip(panels, ('validation_error', 'loss'), labels, strict=True):
        start, shown = 0, []
        for phase, colour in zip(PHASES, (BLACK, BLUE, GREEN), strict=True):
            part = _phase(records, phase)
            if not part:
                continue
            if start:
                axes.axvline(start, color=RED, linestyle='--', linewidth=1, label=f'{phase} begins')
            measured = [
                {**record, 'step': start + record['step']}
                for record in part
                if record.get(key) is not None
            ]
            values = [record[key] for record in measured]
            _draw(axes, measured, values, color=colour, label=phase)
            start += part[-1]['step']
            shown += values
        _set_scale(axes, shown)
        axes.set_ylabel(label)
    return _finish(figure, panels[-1], 'steps')


def first_layer_figure(mask: np.ndarray) -> Figure:
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


def frontier_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Test error over compression: every run, the median of each target, and what others have.

    Args:
      rows: of one network and data set, with `network`, `dataset`, `target`, `compression` and
        `test_error`.
    """
    figure, axes = _new_frontier()
    targets = sorted({row['target'] for row in rows})
    groups = [[row for row in rows if row['target'] == target] for target in targets]
    middles = [
        [float(np.median([row[name] for row in group])) for group in groups]
        for name in ('compression', 'test_error')
    ]
    axes.plot(*middles, color=BLUE, marker='o', label='here, median over seeds')
    each = [[row[name] for row in rows] for name in ('compression', 'test_error')]
    axes.scatter(*each, color=BLUE, s=14, alpha=0.5, label='here, each run')
    colours = BLACK, RED, GREEN, ORANGE, PINK
    for (who, compression, error), colour, marker in zip(
        published.find_errors(rows), colours, 'sD^vX', strict=False
    ):
        if error is None:
            axes.axvline(compression, color=colour, linestyle=':', label=who)
        else:
            axes.scatter([compression], [error], color=colour, marker=marker, label=who, zorder=3)
    axes.set_ylim(bottom=0)
    return _finish_frontier(figure, axes, rows)


def compare_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Test error over size for each variant, medians and ranges, and what others have.

    The size is a compression, or where densities are the targets the kept parameters, since
    variants may then be of several sizes.

    Args:
      rows: of one network and data set, with `network`, `dataset`, `variant`, `target`, `unit`,
        `compression`, `kept` and `test_error`.
    """
    figure, axes = _new_frontier()
    by_density = is_by_density(rows)
    size = 'kept' if by_density else 'compression'
    variants = group_rows(rows, 'variant')
    for number, ((variant,), own) in enumerate(variants.items()):
        groups = list(group_rows(own, 'target').values())
        sizes = [np.median([row[size] for row in group]) for group in groups]
        # A little apart, so that ranges at one size do not hide each other.
        apart = 0.97 + 0.06 * (number + 0.5) / len(variants)
        _draw_ranges(axes, number, np.array(sizes) * apart, groups, variant)
    # Many colours are taken by variants: others are black, told apart by marks of their own.
    found = [] if by_density else published.find_errors(rows)  # by compression
    known = [entry for entry in found if entry[2] is not None]
    for number, (who, compression, error) in enumerate(known, start=1):
        style = {'color': BLACK, 'marker': f'${number}$', 'zorder': 3}
        axes.scatter([compression], [error], label=who, **style)
    _set_scale(axes, [row['test_error'] for row in rows] + [error for _, _, error in known])
    return _finish_frontier(figure, axes, rows, by_density)


def _new_frontier() -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 3.8), dpi=150, layout='constrained')
    axes = figure.subplots()
    style(axes)
    return figure, axes


def _finish_frontier(
    figure: Figure, axes: Any, rows: Sequence[Mapping[str, Any]], by_density: bool = False
) -> Figure:
    """Scales and labels error and size, once all is drawn."""
    axes.set_title('Error and size' if by_density else 'Error and compression')
    if by_density:
        _scale_logarithmically(axes, '{x:,.0f}')
        axes.set_xlabel('parameters kept')
    else:
        _scale_logarithmically(axes, '{x:,g}×')
        axes.set_xlabel('compression: all parameters / kept parameters')
    unit = rows[0].get('unit', '%')
    axes.set_ylabel(f'test error ({unit})')
    return _add_legend(figure, *axes.get_legend_handles_labels())


def _scale_logarithmically(axes: Any, form: str) -> None:
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter(form))
    axes.xaxis.set_minor_formatter('')
    # Wide enough that points which are drawn a little apart are seen to be of one size.
    low, high = axes.get_xlim()
    middle = np.sqrt(low * high)
    axes.set_xlim(min(low, middle / 2), max(high, middle * 2))


def sizes_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Test error over the bytes of a coded file, and over the multiply-adds of an image.

    Args:
      rows: with `method`, `clusters`, `bytes`, `multiply_adds` and `test_error`. Rows of one
        method and number of clusters are its seeds; a line joins the numbers of clusters.
    """
    figure = Figure(figsize=(6.4, 6.4), dpi=150, layout='constrained')
    panels = figure.subplots(2)
    for axes, key, label in zip(
        panels,
        ('bytes', 'multiply_adds'),
        ('bytes of the coded file', 'multiply-adds of one image'),
        strict=True,
    ):
        style(axes)
        for number, ((method,), own) in enumerate(group_rows(rows, 'method').items()):
            groups = list(group_rows(own, 'clusters').values())
            places = [np.median([row[key] for row in group]) for group in groups]
            _draw_ranges(axes, number, places, groups, method)
        _set_scale(axes, [row['test_error'] for row in rows])
        _scale_logarithmically(axes, '{x:,.0f}')
        axes.set_ylabel('test error (%)')
        axes.set_xlabel(label)
    panels[0].set_title('Error and size')
    return _add_legend(figure, *panels[0].get_legend_handles_labels())


def _draw_ranges(
    axes: Any, number: int, places: Any, groups: Sequence[Sequence[Mapping[str, Any]]], label: str
) -> None:
    """Draws the test errors of one method: the median of each group of runs, and its range."""
    errors = [[row['test_error'] for row in group] for group in groups]
    middles = np.array([np.median(group) for group in errors])
    ends = np.array([[min(group), max(group)] for group in errors])
    axes.errorbar(
        places,
        middles,
        yerr=np.abs(ends.T - middles),
        color=COLOURS[number % len(COLOURS)],
        linestyle=LINE_STYLES[number // len(COLOURS) % len(LINE_STYLES)],
        marker='osD^vXP*'[number % 8],
        capsize=3,
        label=label,
    )
