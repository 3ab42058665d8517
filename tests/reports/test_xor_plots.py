"""Tests of reports.xor_plots: what is kept, pruned and returned can be told apart."""

import io

import jax
import numpy as np
import pytest
import xor_course
from matplotlib.colors import to_hex
from PIL import Image

from experiments import xor
from experiments.reports import xor_plots

pytestmark = pytest.mark.usefixtures('promotion')


def test_the_figure_is_the_share_of_networks_so_small():
    (axes,) = xor_plots.smallest_figure({'a': [9, 12, None, 12], 'b': [None] * 4}).axes
    line, other = axes.get_lines()
    shares = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert [shares[count] for count in (8, 9, 11, 12, 21)] == [0, 25, 25, 75, 75]
    assert not np.any(other.get_ydata())


def test_pictures_tell_kept_from_pruned_and_returned():
    course = xor_course.train()
    own = jax.tree.map(lambda leaf: np.array(leaf[0]), course)
    figure = xor_plots.course_figure(own, 200)
    masks = np.concatenate([leaf.reshape(101, -1) for leaf in jax.tree.leaves(own.masks)], 1)
    axes = figure.axes[-1]  # at the end
    lines = axes.collections[0]
    widths = lines.get_linewidths()
    assert len(widths) == 21
    kept = masks[-1].sum()
    colours = [to_hex(colour).upper() for colour in lines.get_colors()]
    returned = xor.count_returned(course)[0]
    assert colours.count(xor_plots.GREEN) == returned
    assert colours.count(xor_plots.BLUE) == kept - returned
    assert colours.count('#BFBFBF') == 21 - kept
    film = Image.open(io.BytesIO(xor_plots.animate(own, 200)))
    assert film.format == 'GIF'
