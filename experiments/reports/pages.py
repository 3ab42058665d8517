"""Pages of results: tables and pictures in one HTML file, which needs no network and no script.

A page is light or dark as its reader's system is, and narrow enough for a phone; each picture says
in words what it shows, and what may be scrolled can be reached by keyboard.
"""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib
from matplotlib.figure import Figure

from experiments.reports import plots
from experiments.reports.tables import Table

_TEMPLATE = Path(__file__).with_name('page.html')


class Bar(NamedTuple):
    """A quantity before and after, and the share that is left of it, from 0 to 1."""

    name: str
    before: str
    after: str
    share: float


class Section(NamedTuple):
    """A part of a page under a heading: what there is of text, bars, tables, figures and lines."""

    heading: str
    text: str = ''
    bars: Sequence[Bar] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    lines: Sequence[str] = ()  # shown as they are, as of a flagfile
    is_folded: bool = False  # whether the lines are shown on demand


def render(
    title: str, lead: str, headline: Sequence[tuple[str, str]], sections: Sequence[Section]
) -> str:
    """Makes a page.

    Args:
      title: of the page.
      lead: a sentence below it.
      headline: the numbers that matter, each with what it is.
      sections: the rest.

    Returns:
      HTML, the pictures in it as SVG.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_TEMPLATE.read_text()).render(
        title=title,
        lead=lead,
        headline=headline,
        sections=sections,
        to_source=_to_source,
        describe=_describe,
        keep_together=_keep_together,
    )


def _keep_together(cell: str) -> str:
    """Lets a line end before a range or within it, but not between a number and its unit."""
    return re.sub(r'(?<!to) (?!\()', '\N{NO-BREAK SPACE}', cell)


def _to_source(figure: Figure) -> str:
    """Draws a figure as an address that holds the picture itself."""
    content = io.StringIO()
    # Text stays text; the salt and no date make equal pictures equal files.
    with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'dns_jax'}):
        figure.savefig(content, format='svg', transparent=True, metadata={'Date': None})
    svg = content.getvalue()
    for light, dark in plots.DARK.items():
        # matplotlib writes colours in small letters.
        svg = svg.replace(light.lower(), f'light-dark({light}, {dark})')
    text = f'light-dark({plots.BLACK}, {plots.DARK[plots.BLACK]})'
    style = f'<style>:root {{color-scheme: light dark; fill: {text}}}</style>'
    svg = svg.replace('<defs>', f'{style}<defs>', 1)
    return 'data:image/svg+xml;base64,' + base64.b64encode(svg.encode()).decode()


def _describe(figure: Figure) -> str:
    """Says what a figure shows: its title, what its axes are and the entries of its legend."""
    labels = [text for axes in figure.axes for text in (axes.get_ylabel(), axes.get_xlabel())]
    parts = [figure.axes[0].get_title(), ', '.join(filter(None, labels))]
    for legend in figure.legends:
        parts.append(', '.join(text.get_text() for text in legend.get_texts()))
    return '; '.join(filter(None, parts))
