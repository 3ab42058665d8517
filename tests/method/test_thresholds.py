"""Tests of thresholds."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dns_jax import (
    global_density,
    layer_density,
    log_linear_density,
    magnitude_statistics,
    mean_std,
    polynomial_density,
    update_masks,
)
from dns_jax.thresholds import weight_std

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@given(
    kernel=hnp.arrays(np.float32, (4, 3), elements=st.integers(-9, 9).map(lambda n: n / 8)),
    bias=hnp.arrays(np.float32, (3,), elements=st.integers(-9, 9).map(lambda n: n / 8)),
)
def test_statistics_are_those_of_the_nonzero_magnitudes(kernel, bias):
    chosen = np.abs(np.concatenate([kernel.ravel(), bias]).astype(np.float64))
    chosen = chosen[chosen > 0]
    mean, std = magnitude_statistics([jnp.asarray(kernel), jnp.asarray(bias)])
    if chosen.size:
        np.testing.assert_allclose([mean, std], [chosen.mean(), chosen.std()], atol=1e-6)
    else:
        assert (float(mean), float(std)) == (0.0, 0.0)


@pytest.mark.parametrize('dtype', DTYPES)
def test_statistics_in_float32_for_all_dtypes(dtype):
    # A sum of 60,000 does not fit float16, and stalls at 256 in bfloat16.
    weights = jnp.where(jnp.arange(80_000) % 4 == 0, 0.5, -1.5).astype(dtype)
    mean, std = jax.jit(magnitude_statistics)([weights])
    assert mean.dtype == std.dtype == jnp.float32
    assert mean.shape == std.shape == ()
    np.testing.assert_allclose(mean, 1.25, rtol=1e-5)
    np.testing.assert_allclose(std, np.sqrt(0.1875), rtol=1e-5)


def test_statistics_of_a_large_mean_do_not_cancel():
    # The mean of squares less the square of the mean would lose all its digits here.
    random = np.random.default_rng(0)
    weights = (1000 + random.normal(size=5000)).astype(np.float32)
    _, std = magnitude_statistics([jnp.asarray(weights)])
    np.testing.assert_allclose(std, weights.astype(np.float64).std(), rtol=1e-3)


@pytest.mark.parametrize('hysteresis', [0.0, 0.1, 0.25, 0.9])
@pytest.mark.parametrize('c_rate', [-5.0, -1.0, 0.0, 0.5, 3])
def test_mean_std(c_rate, hysteresis):
    weights = {'a': [jnp.array([[1.0, -3.0]]), jnp.array([0.0])], 'b': [jnp.array([-0.5, 0.5])]}
    bands = mean_std(c_rate, hysteresis)(weights, {}, jnp.int32(7))
    assert list(bands) == ['a', 'b']
    for layer, mean, deviation in [('a', 2.0, 1.0), ('b', 0.5, 0.0)]:
        middle = max(mean + c_rate * deviation, 0)
        want = [(1 - hysteresis) * middle, (1 + hysteresis) * middle]
        np.testing.assert_allclose([*bands[layer]], want, rtol=1e-6)
        assert bands[layer].low.dtype == bands[layer].high.dtype == jnp.float32
        assert bands[layer].low.shape == bands[layer].high.shape == ()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('c_rate', [0.0, 0.5, 3])
def test_std_is_that_of_the_nonzero_weights(c_rate, dtype):
    random = np.random.default_rng(0)
    drawn = [np.asarray(1 + random.normal(size=shape), dtype) for shape in [(7, 5), (5,)]]
    drawn[0][2:4], drawn[1][0] = 0, 0
    layers = {
        'a': drawn,
        'one weight': [np.array([0, -2], dtype)],
        'minus ones': [np.array([-1, 1, -1, 0, 2], dtype)],
        'zeros': [np.zeros(3, dtype)],
    }
    bands = jax.jit(weight_std(c_rate))(layers, {}, jnp.int32(7))
    assert bands.keys() == layers.keys()
    for layer, leaves in layers.items():
        chosen = np.concatenate([leaf.astype(np.float64).ravel() for leaf in leaves])
        chosen = chosen[chosen != 0]
        want = c_rate * chosen.std() if chosen.size else 0.0
        np.testing.assert_allclose([*bands[layer]], [want, want], rtol=1e-6, atol=1e-9)


def test_hysteresis_of_the_paper_is_the_default():
    low, high = mean_std(0.0)({'a': [jnp.array([1.0])]}, {}, 0)['a']
    np.testing.assert_allclose([low, high], [0.9, 1.1], rtol=1e-6)


def test_layer_of_zeros_has_an_empty_band():
    low, high = mean_std(2.0)({'a': [jnp.zeros((2, 2))]}, {}, 0)['a']
    assert (float(low), float(high)) == (0.0, 0.0)


# What 1 + η and 1 − η are to each other, in whole numbers.
WHOLE = {0.0: (1, 1), 0.1: (11, 9), 0.5: (3, 1)}


def order_of(weights, masks, hysteresis):
    """What h_k ranks by: |w| / (1 − η) where kept, |w| / (1 + η) where not; times a constant."""
    kept, pruned = WHOLE[hysteresis]
    return np.abs(weights) * np.where(masks, kept, pruned)


def flat(leaves):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in leaves])


def flat_masks(leaves):
    return flat(leaves) > 0


@functools.cache
def updater(factory, *arguments):
    """Jits an update with σ = 1 by a rule's thresholds; it returns the masks and the thresholds.

    The rule's schedule is the step itself, so that one program serves all densities.
    """
    rule = factory(lambda step: step, *arguments)

    @jax.jit
    def update(layers, masks, step):
        bands = rule(layers, masks, step)
        return updated(layers, masks, bands), bands

    return update


def updated(layers, masks, bands):
    return update_masks(jax.random.key(0), layers, masks, bands, dict.fromkeys(layers, 1.0))


def check_largest(got, order, masks, wanted, tolerance=0.0):
    """Checks that the first in order are kept, at least `wanted`, and all or none of a tie."""
    last = np.sort(order)[-wanted]
    close = np.abs(order - last) <= tolerance * last
    assert got[(order > last) & ~close].all()
    assert not got[(order < last) & ~close].any()
    assert got.sum() >= wanted
    for side in (masks, ~masks):
        assert len(set(got[(order == last) & side])) <= 1


# One weight; a few; more than a block of 128 and not a multiple of it; a convolution.
LAYERS = [[(1,)], [(3, 2), (2,)], [(13, 10), (7,)], [(3, 3, 4, 8), (8,)]]


@given(
    shapes=st.sampled_from(LAYERS),
    hysteresis=st.sampled_from([0.1, 0.5]),
    # Densities that a float32 knows exactly; the last wants less than half a weight.
    density=st.integers(1, 64).map(lambda n: n / 64) | st.just(2.0**-12),
    largest=st.sampled_from([0, 1, 40, 2**13]),
    kept=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**31 - 1),
)
def test_layer_density_keeps_the_wanted_number(shapes, hysteresis, density, largest, kept, seed):
    # Of whole numbers, those that differ in rank differ by more than float32 rounds.
    random = np.random.default_rng(seed)
    weights = [random.integers(-largest, largest + 1, shape) for shape in shapes]
    masks = [random.random(shape) < kept for shape in shapes]
    layer = {'a': [np.float32(leaf) / 64 for leaf in weights]}
    new, bands = updater(layer_density, hysteresis)(layer, {'a': masks}, np.float32(density))
    got, order = flat_masks(new['a']), order_of(flat(weights), flat_masks(masks), hysteresis)
    wanted = max(round(density * order.size), 1)
    check_largest(got, order, flat_masks(masks), wanted)
    if np.sum(order >= np.sort(order)[-wanted]) == wanted:
        assert got.sum() == wanted
    for bound in bands['a']:
        assert (bound.shape, bound.dtype) == ((), jnp.float32)
        assert np.isfinite(bound)


@pytest.mark.parametrize('dtype', DTYPES)
def test_threshold_of_a_full_layer_is_a_quantile(dtype):
    # Of n values, counted up from 0, the k-th largest stands at n − k. That is their quantile
    # 1 − k/n by the method `higher`, which rounds (1 − k/n)(n − 1) = n − 1 − k + k/n up.
    # `inverted_cdf` gives the one before it, at which k + 1 are kept.
    random = np.random.default_rng(0)
    leaves = [
        jnp.asarray(random.normal(size=(13, 10)), dtype),
        jnp.asarray(3 * random.normal(size=7), dtype),
    ]
    sizes, masks = np.abs(flat(leaves)), {'a': [np.ones(leaf.shape, bool) for leaf in leaves]}
    for wanted in (1, 2, 5, 68, 136, 137):
        density = np.float32(wanted / 137)
        quantile = np.quantile(sizes, 1 - wanted / 137, method='higher')
        _, bands = updater(layer_density, 0.0)({'a': leaves}, masks, density)
        assert float(bands['a'].low) == float(bands['a'].high) == quantile
        # With a band, by default of a tenth, all that are kept must reach its lower end.
        _, bands = updater(layer_density)({'a': leaves}, masks, density)
        assert quantile * (1 - 3e-7) < float(bands['a'].low) <= quantile
        np.testing.assert_allclose(bands['a'].high, quantile * 11 / 9, rtol=1e-6)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('rule', [(layer_density,), (global_density, 'norm')])
def test_all_of_a_tie_are_kept(rule, dtype):
    # One is wanted, of eighty that are largest; 0.1 and 0.3 are exact in no type.
    small = np.arange(130) % 13 < 5
    layer = {'a': [jnp.where(small, 0.1, -0.3).astype(dtype)]}
    for mask in (np.ones(130, bool), np.zeros(130, bool)):
        for density, kept in [(0.001, ~small), (80 / 130, ~small), (81 / 130, small | ~small)]:
            new, _ = updater(*rule)(layer, {'a': [mask]}, np.float32(density))
            np.testing.assert_array_equal(new['a'][0], kept)


@pytest.mark.parametrize('score', ['norm', 'rms', 'erk'])
def test_all_of_a_network_of_zeros_are_kept(score):
    layers = {'a': [jnp.zeros((3, 2)), jnp.zeros(2)], 'b': [jnp.zeros((4, 3))]}
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), layers)
    new, bands = updater(global_density, score)(layers, masks, np.float32(0.5))
    assert all(leaf.all() for leaf in jax.tree.leaves(new))
    assert all(np.isfinite(bound) for bound in jax.tree.leaves(bands))


def layers_of_all_kinds(dtype=jnp.float32):
    """Layers of several scales and shares of masks; of d nothing was kept."""
    random = np.random.default_rng(3)
    layers, masks = {}, {}
    for layer, scale, kept, shapes in [
        ('a', 0.1, 0.9, [(5, 4), (4,)]),
        ('b', 60.0, 0.2, [(30, 3), (3,)]),  # the squares do not fit a float16
        ('c', 1.0, 0.5, [(2, 2, 1, 6)]),
        ('d', 3.0, 0.0, [(3, 3)]),
    ]:
        layers[layer] = [(scale * random.normal(size=shape)).astype(dtype) for shape in shapes]
        masks[layer] = [random.random(shape) < kept for shape in shapes]
    return layers, masks


AXES = {'a': 5 + 4, 'b': 30 + 3, 'c': 2 + 2 + 1 + 6, 'd': 3 + 3}


def unit_of(weights, masks, score):
    """What the weights of a layer are measured in."""
    if score == 'rms':
        return math.sqrt(np.mean(weights**2))
    return max(math.sqrt(np.sum(weights[masks] ** 2)), np.max(np.abs(weights)))


def erdos_renyi_kernel(axes, sizes, wanted):
    """Tries every set of layers to keep whole, until one ε serves all the others."""
    for whole in itertools.product([False, True], repeat=len(sizes)):
        whole = np.array(whole)
        rest = axes[~whole].sum()
        given = (wanted - sizes[whole].sum()) / rest * axes if rest else np.full(len(axes), np.inf)
        if np.all(np.where(whole, given >= sizes, (given >= 0) & (given <= sizes))):
            return np.minimum(given, sizes)
    raise AssertionError('no ε')


def divide_with_floors(ratios, wanted):
    """How many each layer keeps: as many as are above τ, and at least its floor.

    The floor is a twentieth of what it had in equal shares, and one; τ the largest that will do.
    """
    share = wanted / sum(map(len, ratios))
    floors = [max(round(0.05 * share * len(own)), 1) for own in ratios]
    for tau in np.sort(np.concatenate(ratios))[::-1]:
        numbers = [
            max(int(np.sum(own >= tau)), floor) for own, floor in zip(ratios, floors, strict=True)
        ]
        if sum(numbers) >= wanted:
            return numbers
    raise AssertionError('no τ')


@pytest.mark.parametrize(
    ('dtype', 'arguments'),
    [
        (jnp.bfloat16, ()),
        (jnp.float16, ('rms', 0.1)),
        *itertools.product([jnp.float32], [(), ('norm', 0.0), ('rms', 0.5), ('erk', 0.1)]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(DTYPES[1:], [(), ('rms', 0.1), ('erk', 0.1)])
        ),
    ],
)
def test_global_density_by_brute_force(dtype, arguments):
    score, hysteresis = arguments or ('norm', 0.1)
    layers, masks = layers_of_all_kinds(dtype)
    weights = {layer: flat(leaves) for layer, leaves in layers.items()}
    before = {layer: flat_masks(leaves) for layer, leaves in masks.items()}
    order = {layer: order_of(weights[layer], before[layer], hysteresis) for layer in layers}
    sizes = np.array([len(leaf) for leaf in weights.values()])
    for density in (1e-4, 0.03, 0.1, 0.3, 0.5, 0.8, 0.97, 1.0):
        new, _ = updater(global_density, *arguments)(layers, masks, np.float32(density))
        got = {layer: flat_masks(leaves) for layer, leaves in new.items()}
        wanted = max(round(density * sizes.sum()), 1)
        if score == 'erk':
            shares = erdos_renyi_kernel(np.array([*AXES.values()]), sizes, wanted)
            for layer, share in zip(layers, np.maximum(shares, 1), strict=True):
                kept = int(got[layer].sum())
                check_largest(got[layer], order[layer], before[layer], kept, 1e-6)
                last = order[layer][got[layer]].min()
                above = np.sum(order[layer] > last * (1 + 1e-6))
                # Without ties kept is above + 1, and this says that it is the share, rounded.
                assert above + 1 - 0.501 < share < kept + 0.501
            continue
        ratio = [order[layer] / unit_of(weights[layer], before[layer], score) for layer in layers]
        numbers = divide_with_floors(ratio, wanted)
        for layer, number in zip(layers, numbers, strict=True):
            check_largest(got[layer], order[layer], before[layer], number, 1e-6)
        kept = sum(leaf.sum() for leaf in got.values())
        assert dtype != jnp.float32 or kept == max(wanted, len(layers))


@pytest.mark.parametrize('shape', [(1, 4), (3, 6), (2, 3, 4, 5)])
def test_one_layer_alone_gets_the_density_by_erk(shape):
    # Of (1, 4), fewer weights than the axes add up to; of (3, 6), twice as many.
    size = math.prod(shape)
    layer = {'a': [np.random.default_rng(0).normal(size=shape).astype(np.float32)]}
    for wanted in (1, size // 2, size - 1, size):
        masks = {'a': [np.ones(shape, bool)]}
        new, _ = updater(global_density, 'erk')(layer, masks, np.float32(wanted / size))
        assert flat_masks(new['a']).sum() == wanted


@pytest.mark.parametrize('rule', [layer_density(0.5), global_density(0.5)])
def test_masks_that_are_fewer_than_the_weights(rule):
    layer = {'a': [jnp.ones((2, 3)), jnp.ones(3)]}
    with pytest.raises(ValueError, match='zip'):
        rule(layer, {'a': [jnp.ones((2, 3), bool)]}, 0)


def test_layer_of_which_nothing_was_kept_comes_back_by_its_largest_weight():
    layers, masks = layers_of_all_kinds()
    largest = np.argmax(np.abs(flat(layers['d'])))
    for arguments in [(), ('rms', 0.1), ('erk', 0.1)]:
        new, _ = updater(global_density, *arguments)(layers, masks, np.float32(0.2))
        assert flat_masks(new['d'])[largest]
    # Measured by the norm of what it keeps, 0, all of it would come back at any density.
    new, _ = updater(global_density)(layers, masks, np.float32(0.01))
    assert np.flatnonzero(flat_masks(new['d'])).tolist() == [largest]


@pytest.mark.parametrize('score', ['norm', 'rms'])
def test_layer_of_zeros_goes_first(score):
    random = np.random.default_rng(0)
    layers = {'a': [jnp.asarray(random.normal(size=(6, 5)), jnp.float32)], 'z': [jnp.zeros(10)]}
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), layers)
    for wanted, kept in [(1, 1), (20, 20), (30, 30), (31, 40), (40, 40)]:
        new, _ = updater(global_density, score)(layers, masks, np.float32(wanted / 40))
        assert int(flat_masks(new['a']).sum()) == min(kept, 30)
        assert flat_masks(new['z']).tolist() == [kept > 30] * 10


@pytest.mark.parametrize(
    ('factory', 'schedule', 'density_at'),
    [
        (layer_density, 0.3, lambda step: 0.3),
        (
            layer_density,
            polynomial_density(0.05, 4, 8),
            lambda step: 0.05 + 0.95 * (1 - np.clip((step - 4) / 4, 0, 1)) ** 3,
        ),
        (
            global_density,
            log_linear_density(0.02, 2, 10, 0.9),
            lambda step: 0.9 * (0.02 / 0.9) ** np.clip((step - 2) / 8, 0, 1),
        ),
        (global_density, lambda step: 0.5, lambda step: 0.5),
    ],
    ids=['number', 'polynomial', 'log-linear', 'own'],
)
def test_density_of_the_step(factory, schedule, density_at):
    rule = factory(schedule)
    layers, masks = layers_of_all_kinds()
    jitted = jax.jit(rule)
    groups = [[layer] for layer in layers] if factory is layer_density else [list(layers)]
    for step in (0, 3, 6, 10, 99):
        new = updated(layers, masks, jitted(layers, masks, jnp.int32(step)))
        for group in groups:
            masks_of_group = np.concatenate([flat_masks(new[layer]) for layer in group])
            # One of each layer at least.
            wanted = max(density_at(step) * masks_of_group.size, len(group))
            assert abs(masks_of_group.sum() - wanted) < 0.501
