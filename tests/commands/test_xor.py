"""Tests of xor: the points, the networks side by side, what is counted and drawn."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xor_course
from PIL import Image
from xor_course import KEY, make_surgery

import dns_jax
from experiments import xor
from experiments.networks.logic import Xor
from experiments.xor import XorConfig

pytestmark = pytest.mark.usefixtures('promotion')


points = pytest.fixture(scope='module')(xor_course.make_points)
params = pytest.fixture(scope='module')(xor_course.make_params)
course = pytest.fixture(scope='module')(xor_course.train)


def test_points_lie_around_the_corners(points):
    corners = np.round(np.array(points.places))
    assert {tuple(corner) for corner in corners} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert np.bincount((2 * corners[:, 0] + corners[:, 1]).astype(int)).min() > 400
    np.testing.assert_array_equal(points.labels, corners[:, 0] != corners[:, 1])
    assert np.std(np.array(points.places) - corners) == pytest.approx(0.1, rel=0.05)


def test_the_network_is_that_of_the_paper(params):
    sizes = {path: leaf.shape[1:] for path, leaf in jax.tree.leaves_with_path(params)}
    assert sorted(sizes.values()) == [(1,), (2, 5), (5,), (5, 1)]
    assert sum(leaf[0].size for leaf in jax.tree.leaves(params)) == 21
    point, own = np.array([0.3, -0.2]), jax.tree.map(lambda leaf: np.array(leaf[0]), params)
    hidden = 1 / (1 + np.exp(-(point @ own['fc1']['kernel'] + own['fc1']['bias'])))
    logit = hidden @ own['fc2']['kernel'] + own['fc2']['bias']
    found = Xor().apply({'params': own}, jnp.asarray(point[None], jnp.float32))
    np.testing.assert_allclose(found, logit, rtol=1e-5)


def test_side_by_side_each_network_is_the_one_alone(course, params, points):
    alone = xor.train_networks(
        make_surgery(),
        jax.tree.map(lambda leaf: leaf[1:2], params),
        jax.random.split(KEY, 3)[1:2],
        points,
        200,
    )
    for one, other in zip(jax.tree.leaves(course), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one[1], other[0], atol=1e-5)
    assert course.masks['fc1']['kernel'].shape == (3, 101, 2, 5)
    # The course begins with what it is given, and other seeds take other ways.
    for one, other in zip(jax.tree.leaves(course.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one[:, 0], other)
    assert (course.masks['fc1']['kernel'][0] != course.masks['fc1']['kernel'][1]).any()


def test_a_dense_network_learns_xor(params, points):
    nothing = dns_jax.surgery({}, KEY)
    dense = xor.train_networks(nothing, params, jax.random.split(KEY, 3), points, 3_000)
    before = xor.measure_error(jax.tree.map(lambda leaves: leaves[:, :1], dense), points)
    after = xor.measure_error(dense, points)
    assert before.min() > 20
    assert after.min() < 1


def test_error_and_counts_are_those_of_the_end(course, points):
    errors, kept, returned = (
        xor.measure_error(course, points),
        xor.count_kept(course),
        xor.count_returned(course),
    )
    for at in range(3):
        own = jax.tree.map(lambda leaf, at=at: np.array(leaf[at]), course)
        masks = np.concatenate([leaf.reshape(101, -1) for leaf in jax.tree.leaves(own.masks)], 1)
        assert kept[at] == masks[-1].sum() < 21
        back = np.concatenate([leaf[-1].ravel() for leaf in jax.tree.leaves(own.returned)])
        assert returned[at] == (back & masks[-1]).sum()
        # What is seen pruned at a record and kept in the end has returned; some between records.
        seen = masks[-1] & ~masks.all(axis=0)
        assert not (seen & ~back).any()
        pruned = jax.tree.map(lambda w, t: w[-1] * t[-1], own.params, own.masks)
        logits = Xor().apply({'params': pruned}, points.places)
        wrong = (np.array(logits) > 0) != np.array(points.labels)
        assert errors[at] == pytest.approx(100 * wrong.mean(), abs=1e-4)


def test_the_rounds_of_han_never_splice(params, points):
    pruner = xor.make_pruner('Han et al.', 0.3, 200)
    han = xor.train_networks(pruner, params, jax.random.split(KEY, 3), points, 200)
    assert (xor.count_returned(han) == 0).all()
    for leaf in jax.tree.leaves(han.masks):
        kept = np.array(leaf).reshape(3, 101, -1).sum(-1)
        assert (np.diff(kept, axis=1) <= 0).all()
    assert (xor.count_kept(han) < 21).all()


@pytest.mark.slow
def test_where_nothing_is_solved_there_is_no_course(tmp_path, params):
    config = XorConfig(workdir=str(tmp_path), seeds=1, steps=100, solved=0.0)
    (tmp_path / 'course.gif').write_bytes(b'old')
    result = xor.solve(config)
    assert result['reference_error'] is None
    assert result['smallest'] == {'surgery': [None], 'Han et al.': [None]}
    assert {path.name for path in tmp_path.iterdir()} == {'xor.csv', 'xor.md', 'smallest.png'}


def test_each_network_counts_by_its_best_c():
    rows = [
        dict(zip(xor.COLUMNS, row, strict=True))
        for row in (
            ('surgery', 0.0, 0, 0.5, 0.4, 17, 3),
            ('surgery', 0.0, 1, 2.5, 0.4, 16, 2),
            ('surgery', 0.4, 0, 0.5, 0.9, 12, 5),
            ('surgery', 0.4, 1, 2.5, 1.1, 11, 1),
            ('Han et al.', 0.1, 0, 0.5, 0.4, 19, 0),
            ('Han et al.', 0.1, 1, 2.5, 30.0, 18, 0),
        )
    ]
    result = xor.summarise(rows, XorConfig(seeds=2))
    assert result['smallest'] == {'surgery': [12, 16], 'Han et al.': [19, None]}
    assert (result['references_solved'], result['reference_error']) == (1, 0.5)
    cells = {
        tuple(cell.strip() for cell in line.strip('|').split('|'))
        for line in result['table'].splitlines()
    }
    assert ('surgery', '0', '2 of 2', '1 of 1', '16 (16 to 17)', '2 (2 to 3)') in cells
    assert ('surgery', '0.4', '1 of 2', '1 of 1', '12', '5') in cells
    assert ('Han et al.', '0.5', '0 of 2', '0 of 1', '', '') in cells


@pytest.mark.slow
def test_the_whole_thing(tmp_path, capsys):
    config = XorConfig(workdir=str(tmp_path / 'xor'), seeds=3, steps=150, solved=100.0)
    xor.solve(config)
    *table, _, place, last = capsys.readouterr().out.splitlines()
    assert str(config.workdir) in place
    assert list(json.loads(last)['smallest']) == ['surgery', 'Han et al.']
    folder = tmp_path / 'xor'
    assert (folder / 'xor.md').read_text().splitlines() == table[: len(table)]
    with (folder / 'xor.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 12
    assert list(rows[0]) == list(xor.COLUMNS)
    for name in ('smallest.png', 'course.png'):
        assert (folder / name).read_bytes().startswith(b'\x89PNG')
    with Image.open(folder / 'course.gif') as film:
        assert film.n_frames > 25


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'noise': 0.0}, '--noise=0.0 must be above 0'),
        ({'noise': np.inf}, '--noise must be finite in float32, but is inf'),
        ({'noise': 1e39}, '--noise must be finite in float32, but is 1e'),
        ({'solved': -1.0}, '--solved=-1.0 must be a percentage'),
    ],
)
def test_bad_flags(fields, message):
    with pytest.raises(ValueError, match=message):
        XorConfig(**fields)
