"""The pictures of `experiments.xor`: its connections over time, and how small networks get."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from experiments.reports.plots import BLACK, BLUE, GREEN, ORANGE

_INPUTS = [(0.0, 3.0), (0.0, 1.0), (0.0, -1.0)]  # the last is the bias
_HIDDEN = [(1.0, 4.0 - at) for at in range(5)]
_HIDDEN_BIAS = (1.0, -1.0)
_OUTPUT = (2.0, 2.0)
_SHOWN = (0, 1, 5, 20, 60, 100)  # records of `course_figure`, in percent of the steps


def smallest_figure(smallest: Mapping[str, Sequence[int | None]]) -> Figure:
    """Share of the seeds for which a method solved XOR with so many connections, or fewer.

    Args:
      smallest: by method, the connections of each seed's smallest network, None where none solved.
    """
    figure = Figure(figsize=(8, 4.5), dpi=100, layout='constrained')
    axes = figure.subplots()
    axes.set_title('XOR solved, and with how many of 21 connections')
    counts = np.arange(22)
    for (method, numbers), colour in zip(smallest.items(), (BLUE, ORANGE), strict=True):
        found = np.array([number for number in numbers if number is not None])
        shares = [100 * np.count_nonzero(found <= count) / len(numbers) for count in counts]
        axes.step(counts, shares, where='post', color=colour, label=method)
    axes.grid(color='0.9')
    axes.set_xlim(0, 21)
    axes.set_ylim(0, 101)
    axes.set_xticks(counts[::3])
    axes.set_xlabel('connections kept, at most')
    axes.set_ylabel('networks that solve XOR (%)')
    axes.legend(frameon=False)
    return figure


def course_figure(course: Any, steps: int) -> Figure:
    """The network at some moments of its surgery, as a graph.

    Args:
      course: its `experiments.xor.Course`, axes (records, …).
      steps: of the surgery.
    """
    figure = Figure(figsize=(11, 6.5), dpi=100)
    records = len(course.masks['fc1']['kernel']) - 1
    for axes, percent in zip(figure.subplots(2, 3).flat, _SHOWN, strict=True):
        record = percent * records // 100
        _draw_network(axes, course, record)
        axes.set_title(f'after {record * steps // records:,} steps', fontsize=10)
    _add_legend(figure)
    return figure


def animate(course: Any, steps: int) -> bytes:
    """The same as an animated GIF, one picture for each record."""
    pictures = []
    records = len(course.masks['fc1']['kernel']) - 1
    moments = range(0, records + 1, 2)
    figure = Figure(figsize=(5, 4), dpi=70)
    axes = figure.subplots()
    for record in moments:
        axes.clear()
        _draw_network(axes, course, record)
        axes.set_title(f'after {record * steps // records:,} steps', fontsize=10)
        if not record:
            _add_legend(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format='png')
        pictures.append(Image.open(buffer).convert('P', palette=Image.Palette.ADAPTIVE, colors=32))
    durations = [200] * (len(moments) - 1) + [3000]  # milliseconds
    content = io.BytesIO()
    pictures[0].save(
        content, 'GIF', save_all=True, append_images=pictures[1:], duration=durations, loop=0
    )
    return content.getvalue()


_KINDS = {'kept': BLUE, 'returned': GREEN, 'pruned': '0.75'}


def _add_legend(figure: Figure) -> None:
    handles = [
        Line2D([], [], color=colour, linestyle=':' if kind == 'pruned' else '-')
        for kind, colour in _KINDS.items()
    ]
    figure.legend(handles, _KINDS, loc='lower center', ncols=3, frameon=False, fontsize=9)


def _draw_network(axes: Any, course: Any, record: int) -> None:
    """Draws every connection, thicker where its weight is larger, and the units."""
    ends = {
        ('fc1', 'kernel'): [[(one, other) for other in _HIDDEN] for one in _INPUTS[:2]],
        ('fc1', 'bias'): [(_INPUTS[2], other) for other in _HIDDEN],
        ('fc2', 'kernel'): [[(one, _OUTPUT)] for one in _HIDDEN],
        ('fc2', 'bias'): [(_HIDDEN_BIAS, _OUTPUT)],
    }
    lines, colours, widths, styles = [], [], [], []
    for (layer, leaf), places in ends.items():
        weights = np.abs(course.params[layer][leaf][record]).ravel()
        kept = course.masks[layer][leaf][record].ravel()
        returned = course.returned[layer][leaf][record].ravel()
        largest = np.abs(course.params[layer]['kernel'][record]).max()
        for at, line in enumerate(np.asarray(places).reshape(-1, 2, 2)):
            now = kept[at]
            kind = 'pruned' if not now else 'returned' if returned[at] else 'kept'
            lines.append(line)
            colours.append(_KINDS[kind])
            styles.append('-' if now else ':')
            widths.append(0.5 + 3 * min(weights[at] / largest, 1) if now else 0.8)
    axes.add_collection(
        LineCollection(lines, colors=colours, linewidths=widths, linestyles=styles, zorder=1)
    )
    places = [*_INPUTS, *_HIDDEN, _HIDDEN_BIAS, _OUTPUT]
    axes.scatter(*zip(*places, strict=True), s=180, color='white', edgecolors=BLACK, zorder=3)
    for place, name in zip(places, _NAMES, strict=True):
        axes.text(*place, name, ha='center', va='center', fontsize=8, zorder=4)
    axes.set_axis_off()


_NAMES = ('x₁', 'x₂', '1', '', '', '', '', '', '1', 'y')
