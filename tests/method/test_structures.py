"""Tests of structures: groups that are pruned and spliced together, against NumPy, step by step."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dns_jax import Rule, get_masks, global_density, layer_density, mean_std, surgery
from dns_jax.structures import Blocks, NofM, Structure, Units

STEPS = 50
SHAPES = {'conv': (2, 3, 4, 8), 'fc': (12, 8)}
STRUCTURES = {
    'outputs': Units(-1),
    'inputs by their largest': Units(-2, pool='max'),
    'filters': Units((-2, -1), pool='mean'),
    'blocks': Blocks((4, 2)),
    'single': Blocks((1, 1)),
    '2:4': NofM(2, 4),
    '1:4 along the outputs': NofM(1, 4, axis=-1, hysteresis=0.3),
}
RULES = {
    'statistics': mean_std(0.1),
    'a density': layer_density(0.3),
    'a density over all': global_density(0.3, 'rms', floor=0.0),
}


@functools.cache
def wandering():
    """Weights that wander: some grow while others shrink."""
    random = np.random.default_rng(5)
    walk = {
        layer: random.normal(size=shape) + np.cumsum(random.normal(0, 0.15, (STEPS, *shape)), 0)
        for layer, shape in SHAPES.items()
    }
    return {layer: {'kernel': path.astype(np.float32)} for layer, path in walk.items()}


def group_numbers(structure, shape):
    """Numbers the group of each weight."""
    places = np.indices(shape)
    if isinstance(structure, Units):
        axes = np.atleast_1d(structure.axis) % len(shape)
        chosen = [places[axis] for axis in axes]
    else:  # a block has one entry along the axes before its own
        sizes = (1,) * (len(shape) - 2) + structure.shape
        chosen = [place // size for place, size in zip(places, sizes, strict=True)]
    _, numbers = np.unique(np.reshape(chosen, (len(chosen), -1)), axis=1, return_inverse=True)
    return numbers.reshape(shape)


def importances(structure, weights):
    """What stands for |w|: the root mean square of a group, its mean or its largest, or |w|."""
    weights = np.abs(weights.astype(np.float64))
    if isinstance(structure, NofM):
        return weights
    pool = {
        'rms': lambda members: np.sqrt(np.mean(members**2)),
        'mean': np.mean,
        'max': np.max,
    }[structure.pool]
    numbers = group_numbers(structure, weights.shape)
    of_group = [pool(weights[numbers == number]) for number in range(numbers.max() + 1)]
    return np.array(of_group)[numbers]


def best_of(structure, magnitudes, mask):
    """N of each M, one after the other, a kept one ahead of a pruned one by the band."""
    if not isinstance(structure, NofM):
        return np.ones_like(mask)
    ahead = np.where(mask, 1 + structure.hysteresis, 1 - structure.hysteresis) * magnitudes
    rows = np.moveaxis(ahead, structure.axis, -1)
    best = np.zeros(rows.shape, bool)
    for row in np.ndindex(rows.shape[:-1]):
        for start in range(0, rows.shape[-1], structure.m):
            order = np.argsort(-rows[row][start : start + structure.m], kind='stable')
            best[row][start + order[: structure.n]] = True
    return np.moveaxis(best, -1, structure.axis)


def thresholds_of(rule, structure, magnitudes, masks, limits):
    """t of each layer, in the words of the rules' docstrings."""
    if rule == 'statistics':
        firsts = {
            layer: leaf.ravel()[first_of_each(structure, leaf.shape)]
            for layer, leaf in magnitudes.items()
        }
        return {layer: max(w.mean() + 0.1 * w.std(), 0) for layer, w in firsts.items()}
    together = [list(SHAPES)] if rule == 'a density over all' else [[layer] for layer in SHAPES]
    found = {}
    for layers in together:
        unit = {
            layer: np.sqrt(np.mean(magnitudes[layer] ** 2)) if len(layers) > 1 else 1.0
            for layer in layers
        }
        # Where t may lie at most, for a weight to be kept.
        highest = np.concatenate(
            [
                (magnitudes[layer] / unit[layer] / np.where(masks[layer], 0.9, 1.1))[limits[layer]]
                for layer in layers
            ]
        )
        wanted = min(round(0.3 * sum(masks[layer].size for layer in layers)), len(highest))
        middle = np.sort(highest)[::-1][wanted - 1] * (1 - 1e-6)
        found |= {layer: middle * unit[layer] for layer in layers}
    return found


def first_of_each(structure, shape):
    if isinstance(structure, NofM):
        return np.arange(np.prod(shape))
    return np.unique(group_numbers(structure, shape).ravel(), return_index=True)[1]


def expected(structure, rule):
    """The masks after every step."""
    masks = {layer: np.ones(shape, bool) for layer, shape in SHAPES.items()}
    history = []
    for step in range(STEPS):
        magnitudes = {
            layer: importances(structure, leaves['kernel'][step])
            for layer, leaves in wandering().items()
        }
        limits = {layer: best_of(structure, magnitudes[layer], masks[layer]) for layer in SHAPES}
        if rule != 'statistics' or not step:
            middles = thresholds_of(rule, structure, magnitudes, masks, limits)
        for layer in SHAPES:
            low, high = 0.9 * middles[layer], 1.1 * middles[layer]
            kept = (magnitudes[layer] >= high) | (masks[layer] & (magnitudes[layer] >= low))
            masks[layer] = kept & limits[layer]
        history.append(dict(masks))
    return history


def masks_of_run(rule, **options):
    transform = surgery(rule, jax.random.key(0), **options)
    walk = jax.tree.map(jnp.asarray, wandering())
    first = jax.tree.map(lambda leaf: leaf[0], walk)

    def step(state, params):
        _, state = transform.update(params, state, params)
        return state, get_masks(state)

    return jax.device_get(jax.jit(lambda: jax.lax.scan(step, transform.init(first), walk)[1])())


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('structure', STRUCTURES)
def test_masks_are_those_of_numpy_for_50_steps(structure, rule):
    structure, every = STRUCTURES[structure], None if rule == 'statistics' else 1
    masks = masks_of_run(Rule(RULES[rule], refresh_every=every, structure=structure))
    changes = 0
    for step, wanted in enumerate(expected(structure, rule)):
        for layer in SHAPES:
            np.testing.assert_array_equal(masks[layer]['kernel'][step], wanted[layer], str(step))
    changes = sum(
        (np.diff(masks[layer]['kernel'].astype(int), axis=0) > 0).sum() for layer in SHAPES
    )
    assert changes > 0  # something came back


@pytest.mark.parametrize('structure', ['outputs', 'blocks'])
def test_a_followed_density_is_off_by_less_than_a_group(structure):
    structure = STRUCTURES[structure]
    masks = masks_of_run(Rule(global_density(0.3), structure=structure))
    kept = sum(masks[layer]['kernel'].reshape(STEPS, -1).sum(1) for layer in SHAPES)
    largest = max(
        np.bincount(group_numbers(structure, shape).ravel()).max() for shape in SHAPES.values()
    )
    wanted = round(0.3 * sum(np.prod(shape) for shape in SHAPES.values()))
    assert (abs(kept - wanted) < largest).all()


def test_two_of_four_are_kept_exactly_at_every_update_and_come_back():
    masks = masks_of_run(Rule(structure=NofM(2, 4)))
    for layer, shape in SHAPES.items():
        own = masks[layer]['kernel'].reshape(STEPS, -1, shape[-2] // 4, 4, shape[-1])
        assert (own.sum(3) == 2).all()
        assert (np.diff(own.astype(int), axis=0) == 1).any()


def test_a_density_of_one_prunes_no_zeros_beside_n_of_m():
    params = {'a': {'kernel': jnp.ones((4, 2))}, 'b': {'kernel': jnp.zeros((2, 2))}}
    rule = Rule(global_density(1.0), structure={'a': NofM(2, 4)})
    transform = surgery(rule, jax.random.key(0))
    _, state = jax.jit(transform.update)(params, transform.init(params), params)
    assert {layer: int(own['kernel'].sum()) for layer, own in state.masks.items()} == {
        'a': 4,
        'b': 4,
    }


def test_the_band_of_n_of_m_decides_between_near_equals():
    mask = jnp.array([[True], [False]])
    for larger, changes in ((1.2, False), (1.3, True)):  # 1.1 / 0.9 is 1.22
        limit = NofM(1, 2).limit(jnp.array([[1.0], [larger]]), mask)
        assert bool(limit[1, 0]) == changes


def test_odd_numbers_are_ordered():
    for values, kept in (
        ([0.0, 0.0, 0.0, 0.0], [1, 1, 0, 0]),  # equals by position
        ([1.0, jnp.nan, 2.0, 3.0], [0, 1, 0, 1]),  # a NaN breaks the loss, not the pattern
        ([jnp.inf, 1.0, -jnp.inf, jnp.nan], [1, 0, 1, 0]),
    ):
        limit = NofM(2, 4).limit(jnp.array(values)[:, None], jnp.ones((4, 1), bool))
        np.testing.assert_array_equal(limit[:, 0], kept)
    wide = jnp.asarray(np.random.default_rng(0).integers(0, 9, (64, 3)), jnp.float32)
    limit = NofM(5, 32).limit(wide, jnp.ones_like(wide, bool))  # sorted, not compared in pairs
    order = np.argsort(-np.asarray(wide).reshape(2, 32, 3), 1, kind='stable')[:, :5]
    np.testing.assert_array_equal(
        np.sort(np.nonzero(limit.reshape(2, 32, 3).transpose(0, 2, 1))[2].reshape(2, 3, 5)),
        np.sort(order.transpose(0, 2, 1)),
    )


@pytest.mark.parametrize('scale', [1e-30, 1.0, 1e30])
def test_a_root_mean_square_stays_in_the_range_of_floats(scale):
    score = Units().score(jnp.array([[3.0, 1.0], [4.0, 1.0]]) * scale)
    np.testing.assert_allclose(score[0] / scale, [12.5**0.5, 1.0], rtol=1e-6)


@pytest.mark.parametrize('odd', [jnp.inf, jnp.nan, 1e30])
def test_an_odd_weight_changes_no_other_group(odd):
    score = Units().score(jnp.ones((2, 4)).at[0, 0].set(odd))[0]
    np.testing.assert_allclose(score[0], odd / 2**0.5, rtol=1e-6)
    np.testing.assert_array_equal(score[1:], 1.0)


def test_groups_of_any_size_lie_beside_each_other():
    scales = np.array([1e-30, 1e-20, 1e-14, 1.0, 1e25, 0.0])
    weights = (np.random.default_rng(1).normal(size=(50, 6)) * scales).astype(np.float32)
    wanted = np.sqrt(np.mean(weights.astype(np.float64) ** 2, 0))
    np.testing.assert_allclose(Units().score(jnp.asarray(weights))[0], wanted, rtol=1e-6)


@pytest.mark.parametrize('number', [4, 20])
def test_what_is_no_number_goes_first(number):
    order = jnp.arange(float(number))[:, None].at[1].set(jnp.nan)
    largest = NofM(1, number).largest(order)
    np.testing.assert_array_equal(np.flatnonzero(largest), [1])


def test_of_zeros_those_that_are_kept_stay():
    mask = jnp.array([[False], [True], [True], [False]])
    limit = NofM(2, 4).limit(jnp.zeros((4, 1)), mask)
    np.testing.assert_array_equal(limit, mask)


def test_a_followed_density_of_less_than_a_group_empties_no_layer():
    walk = np.concatenate(
        [wandering()['fc']['kernel'][:, :8], wandering()['fc']['kernel'][:, 4:]], 1
    )
    transform = surgery(Rule(layer_density(0.1), structure=Units()), jax.random.key(0))
    update, state = jax.jit(transform.update), transform.init({'kernel': jnp.asarray(walk[0])})
    for step in [*range(STEPS), *[STEPS - 1] * 20]:  # it wanders, then stands still
        params = {'kernel': jnp.asarray(walk[step])}
        _, state = update(params, state, params)
        assert state.masks['kernel'].any(), step


def test_blocks_of_one_weight_are_weights():
    weights = jnp.asarray(wandering()['fc']['kernel'][0])
    assert Blocks((1, 1)).score(weights) is weights


def test_leaves_of_one_axis_are_pruned_weight_by_weight():
    params = {'kernel': jnp.ones((4, 2)), 'bias': jnp.array([0.1, 3.0])}
    transform = surgery(
        Rule(mean_std(0.0), structure=Units()), jax.random.key(0), lambda path, leaf: True
    )
    _, state = transform.update(params, transform.init(params), params)
    np.testing.assert_array_equal(get_masks(state)['bias'], [False, True])


def test_each_layer_may_have_a_structure_of_its_own():
    params = {
        name: {'kernel': jnp.asarray(np.random.default_rng(1).normal(size=(8, 8)), jnp.float32)}
        for name in 'abc'
    }
    rules = {
        'a': Rule(structure=NofM(1, 4)),
        'b': Rule(layer_density(0.5), structure=Units()),
        '*': Rule(layer_density(0.25)),
    }
    transform = surgery(rules, jax.random.key(0))
    _, state = jax.jit(transform.update)(params, transform.init(params), params)
    masks = jax.device_get(get_masks(state))
    assert (masks['a']['kernel'].reshape(2, 4, 8).sum(1) == 1).all()
    assert sorted(masks['b']['kernel'].sum(0)) == [0] * 4 + [8] * 4
    assert masks['c']['kernel'].sum() == 16


def test_given_masks_keep_groups_of_which_they_keep_a_part():
    params = {'kernel': jnp.ones((2, 4))}
    masks = {'kernel': jnp.array([[True, False, False, False], [False, False, True, False]])}
    transform = surgery(Rule(mean_std(9.0), structure=Units()), jax.random.key(0), masks=masks)
    np.testing.assert_array_equal(transform.init(params).masks['kernel'], [[1, 0, 1, 0]] * 2)


@pytest.mark.parametrize(
    ('structure', 'message'),
    [
        (
            Blocks((3, 2)),
            r"'fc/kernel'.* axis 0 of its shape \(8, 6\) has 8 entries, in groups of 3",
        ),
        (Blocks((1, 1, 1)), 'more axes than'),
        (Units(2), 'axis that .fc/kernel. of shape'),
        (NofM(2, 4, axis=-1), r'axis -1 of .fc/kernel.*\(8, 6\) has 6 entries'),
        (NofM(2, 4, axis=3), 'axis that'),
    ],
)
def test_what_does_not_fit_a_leaf_is_refused_by_name(structure, message):
    transform = surgery(Rule(mean_std(0.0), structure=structure), jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        transform.init({'fc': {'kernel': jnp.ones((8, 6))}})


@pytest.mark.parametrize(
    ('make', 'error', 'message'),
    [
        (lambda: Blocks(()), ValueError, 'shape must have'),
        (lambda: Blocks((0, 2)), ValueError, 'shape must have'),
        (lambda: Units(pool='sum'), ValueError, 'pool must be one of'),
        (lambda: NofM(5, 4), ValueError, 'n must be from 1 to m'),
        (lambda: NofM(0, 4), ValueError, 'n must be from 1 to m'),
        (lambda: NofM(2, 4, hysteresis=1.0), ValueError, 'hysteresis'),
        (lambda: surgery(Rule(), jax.random.key(0)), TypeError, 'thresholds'),
        (lambda: surgery(Rule(structure=Units()), jax.random.key(0)), TypeError, 'thresholds'),
        (lambda: surgery(Rule(structure={}), jax.random.key(0)), TypeError, 'thresholds'),
        (
            lambda: surgery(Rule(mean_std(0.0), structure='2:4'), jax.random.key(0)),
            TypeError,
            'structure',
        ),
    ],
)
def test_bad_structures_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_structure_is_single_weights_by_default():
    assert Rule(mean_std(0.0)).structure == Structure()


@pytest.mark.parametrize(
    ('structure', 'spec'),
    [
        *itertools.product([Units(), Units(-2), Blocks((-1, 1))], [('x', None), (None, 'x')]),
        (NofM(2, 4), (None, 'x')),
        (Blocks((4, 1)), (None, 'x')),
    ],
)
def test_explicit_meshes_give_what_one_device_gives(structure, spec):
    mesh = jax.make_mesh((8,), ('x',), (jax.sharding.AxisType.Explicit,))
    params = {'kernel': jnp.asarray(np.random.default_rng(2).normal(size=(16, 32)), jnp.float32)}
    thresholds = None if isinstance(structure, NofM) else layer_density(0.4)
    transform = surgery(Rule(thresholds, structure=structure), jax.random.key(0))
    _, alone = jax.jit(transform.update)(params, transform.init(params), params)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
        _, state = jax.jit(transform.update)(spread, transform.init(spread), spread)
    np.testing.assert_array_equal(state.masks['kernel'], alone.masks['kernel'])
