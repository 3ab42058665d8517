"""Rules by density: every count, floor and unit against NumPy, at steps that jump wildly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from density_layers import draw, jitted, kept_by, numbers, sizes_of, unit_of, wanted_of

import dns_jax
from dns_jax import Rule, importance, surgery
from dns_jax.thresholds import weight_std

COMPAT_TABLE = 'field'
DENSITIES = [0.003, 0.02, 0.1, 1 / 3, 0.5, 0.77, 1.0]


@pytest.mark.parametrize(
    ('score', 'hysteresis', 'floor'),
    [
        ('norm', 0.1, 0.05),
        ('rms', 0.0, 1.0),
        pytest.param('norm', 0.0, 0.0, marks=pytest.mark.slow),
        pytest.param('rms', 0.1, 0.05, marks=pytest.mark.slow),
    ],
)
def test_global_density_against_float64(score, hysteresis, floor):
    for seed, density in enumerate(DENSITIES):
        scales = dict(
            zip('abcd', np.random.default_rng(seed).choice([0.01, 1, 50], 4), strict=True)
        )
        layers, masks = draw(seed, scales=scales)
        bands = jitted(score, hysteresis, floor)(layers, masks, jnp.float32(density))
        found = numbers(kept_by(bands, layers, masks))
        sizes = sizes_of(layers)
        wanted = wanted_of(density, sum(sizes.values()))
        floors = {
            layer: max(1, round(floor * wanted / sum(sizes.values()) * size))
            for layer, size in sizes.items()
        }
        assert all(found[layer] >= floors[layer] - 1 for layer in sizes)
        assert min(found.values()) >= 1
        # Floors that are rounded up one by one may be more together than what is wanted.
        assert sum(found.values()) in range(wanted, max(wanted, sum(floors.values()) + 4) + 1)
        if sum(floors.values()) + 4 <= wanted:
            assert sum(found.values()) == wanted
            middles = {
                layer: float(bands[layer].high)
                / (1 + hysteresis)
                / unit_of(score, layers[layer], masks[layer])
                for layer in sizes
                if found[layer] > floors[layer] + 1
            }
            if middles:
                assert max(middles.values()) / min(middles.values()) < 1 + 1e-5


SCALES = [1e-30, 1e-20, 1.0, 1e20, 1e30]


@pytest.mark.parametrize('score', ['norm', 'rms'])
@pytest.mark.parametrize('shift', range(3))
def test_units_leave_no_range(score, shift):
    shapes = {layer: [(32, 32)] for layer in 'abcde'}
    scales = dict(zip('abcde', np.roll(SCALES, shift), strict=True))
    layers, _ = draw(shift, shapes, scales)
    masks = {layer: [np.ones((32, 32), bool)] for layer in layers}
    bands = jitted(score, 0.0)(layers, masks, jnp.float32(0.3))
    found = kept_by(bands, layers, masks)
    assert sum(numbers(found).values()) == round(0.3 * 5 * 1024)
    scores = np.concatenate(
        [
            (np.abs(leaves[0].astype(np.float64)) / unit_of(score, leaves, masks[layer])).ravel()
            for layer, leaves in layers.items()
        ]
    )
    cut = np.sort(scores)[-round(0.3 * 5 * 1024)]
    best = (scores >= cut).reshape(5, 32, 32)
    for number, layer in enumerate(layers):
        assert (best[number] != found[layer][0]).sum() <= 2


@jax.jit
def statistics(leaves):
    """Of one layer, with its bands by two rules."""
    rules = weight_std(0.7), dns_jax.mean_std(0.3)
    bands = [rule({'fc': leaves}, {}, 0)['fc'] for rule in rules]
    return dns_jax.magnitude_statistics(leaves), *bands


@pytest.mark.parametrize('scale', [*SCALES, 1e-33, 1e36])
def test_statistics_against_float64(scale):
    random = np.random.default_rng(0)
    leaves = [
        (random.normal(size=shape) * scale).astype(np.float32)
        for shape in [(64, 50), (50,), (0, 3)]
    ]
    leaves[0][random.random((64, 50)) < 0.3] = 0
    flat = np.concatenate([leaf.ravel() for leaf in leaves]).astype(np.float64)
    flat = flat[flat != 0]
    (mean, deviation), by_weights, band = statistics(leaves)
    np.testing.assert_allclose(float(mean), np.abs(flat).mean(), rtol=2e-6)
    np.testing.assert_allclose(float(deviation), np.abs(flat).std(), rtol=2e-6)
    np.testing.assert_allclose(float(by_weights.low), 0.7 * flat.std(), rtol=2e-6)
    middle = np.abs(flat).mean() + 0.3 * np.abs(flat).std()
    np.testing.assert_allclose([*map(float, band)], [0.9 * middle, 1.1 * middle], rtol=2e-6)


def test_statistics_of_more_weights_than_a_float32_counts():
    weights = np.tile(np.float32([1.0, -3.0]), 2**24)
    mean, deviation = jax.jit(dns_jax.magnitude_statistics)([weights])
    np.testing.assert_allclose([float(mean), float(deviation)], [2.0, 1.0], rtol=1e-5)


def test_a_power_of_two_changes_no_bit():
    layers, masks = draw(3)
    rules = {
        'layer': jitted('layer', 0.1),
        'norm': jitted('norm', 0.1),
        'rms': jitted('rms', 0.1),
        'mean_std': jax.jit(dns_jax.mean_std(0.3)),
        'weight_std': jax.jit(weight_std(0.3)),
    }
    for name, rule in rules.items():
        plain = rule(layers, masks, jnp.float32(0.3))
        for exponent in (-90, -40, 1, 40, 90):
            scaled = jax.tree.map(lambda leaf, by=exponent: np.ldexp(leaf, by), layers)
            bands = rule(scaled, masks, jnp.float32(0.3))
            for layer, band in bands.items():
                for found, wanted in zip(band, plain[layer], strict=True):
                    exact = np.ldexp(float(wanted), exponent)
                    # Sums of what is brought into range are taken in another order.
                    far = name in ('norm', 'rms') and abs(exponent) > 40
                    np.testing.assert_allclose(float(found), exact, rtol=3e-7 if far else 0)


def test_ordinary_weights_have_the_bits_they_had_without_scaling():
    layers, _ = draw(4)

    def by_the_book(leaves):
        sizes = [jnp.abs(leaf) for leaf in leaves]
        count = sum(jnp.sum(leaf != 0, dtype=jnp.float32) for leaf in sizes)
        mean = sum(jnp.sum(leaf) for leaf in sizes) / count
        squares = sum(jnp.sum(jnp.square(leaf - mean), where=leaf != 0) for leaf in sizes)
        return mean, jnp.sqrt(squares / count)

    for leaves in layers.values():
        leaves = [jnp.asarray(leaf) for leaf in leaves]
        assert [*map(float, dns_jax.magnitude_statistics(leaves))] == [
            *map(float, by_the_book(leaves))
        ]


LIVE_AND_DEAD = {'live': [(32, 32)], 'dead': [(32, 32)]}


@pytest.mark.parametrize('density', [0.1, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_layer_behind_stop_gradient_has_its_share(density):
    params = {layer: {'kernel': leaf} for layer, (leaf,) in draw(0, LIVE_AND_DEAD)[0].items()}
    gradients = {
        layer: {'kernel': leaf * np.float32(layer == 'live')}
        for layer, (leaf,) in draw(5, LIVE_AND_DEAD)[0].items()
    }
    pruner = surgery(
        Rule(dns_jax.global_density(density)), jax.random.key(0), importance=importance.gradient
    )
    _, state = jax.jit(pruner.update)(gradients, pruner.init(params), params)
    kept = dns_jax.count_kept(state.masks)
    assert sum(kept.values()) == round(density * 2048)
    # Uniform numbers beside normal ones, each by their norm.
    dead = np.random.default_rng(0).random(100_000)
    live = np.abs(np.random.default_rng(1).normal(size=100_000))
    together = np.concatenate([dead / np.sqrt((dead**2).sum()), live / np.sqrt((live**2).sum())])
    share = (together >= np.quantile(together, 1 - density))[:100_000].mean()
    assert abs(kept['dead'] / 1024 - max(share, 0.05 * density)) < 0.04


NETWORKS = {
    # The wide layers have small weights beside their norm, and would be left nothing.
    'VGG': {'conv1': [(27, 8)], 'conv2': [(72, 8)], 'fc6': [(128, 200)], 'fc7': [(200, 200)]},
    'tiny layers': {'big': [(100, 100)], **{f'tiny{n}': [(2,)] for n in range(6)}},
    'layers of one': {'big': [(50, 50)], **{f'one{n}': [(1,)] for n in range(6)}},
}


@pytest.mark.parametrize(
    ('network', 'score'),
    [
        ('VGG', 'rms'),
        ('layers of one', 'norm'),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [('VGG', 'norm'), ('layers of one', 'rms')]
            + [('tiny layers', score) for score in ('norm', 'rms')]
        ),
    ],
)
def test_every_layer_keeps_its_floor_within_the_density(network, score):
    for seed, density in enumerate([0.5, 0.2, 0.05]):
        layers, _ = draw(seed, NETWORKS[network])
        # One large weight each leaves the others of its layer far below those of others.
        for name in ('fc7', 'big'):
            if name in layers:
                layers[name][0].flat[0] = 1e4
        masks = {layer: [np.ones_like(leaf, bool) for leaf in own] for layer, own in layers.items()}
        bands = jitted(score, 0.1)(layers, masks, jnp.float32(density))
        found, sizes = numbers(kept_by(bands, layers, masks)), sizes_of(layers)
        wanted = wanted_of(density, sum(sizes.values()))
        assert sum(found.values()) == wanted
        for layer, size in sizes.items():
            assert found[layer] >= max(1, round(0.05 * density * size)), layer


ODD = {
    'zeros': lambda leaf: np.zeros_like(leaf),
    'one NaN': lambda leaf: np.where(np.arange(leaf.size).reshape(leaf.shape) == 3, np.nan, leaf),
    'all NaN': lambda leaf: np.full_like(leaf, np.nan),
    'one infinite': lambda leaf: np.where(
        np.arange(leaf.size).reshape(leaf.shape) == 3, np.inf, leaf
    ),
    'all equal': lambda leaf: np.ones_like(leaf),
}


@pytest.mark.parametrize(
    'odd', [odd if odd == 'one NaN' else pytest.param(odd, marks=pytest.mark.slow) for odd in ODD]
)
def test_odd_weights_end_the_search_and_empty_no_layer(odd):
    pruner = surgery(
        Rule(dns_jax.global_density(lambda step: 0.5 / (1.0 + jnp.float32(step)))),
        jax.random.key(0),
    )
    update = jax.jit(pruner.update)
    params = {name: {'kernel': jnp.asarray(own[0])} for name, own in draw(0)[0].items()}
    params['b']['kernel'] = jnp.asarray(ODD[odd](np.asarray(params['b']['kernel'])), jnp.float32)
    state = pruner.init(params)
    for _ in range(3):
        _, state = update(params, state, params)
        kept = dns_jax.count_kept(state.masks)
        # Of a layer of zeros nothing need be kept.
        assert min(kept[name] for name in kept if odd != 'zeros' or name != 'b') >= 1
        if odd == 'one NaN':  # breaks the loss in place of hiding
            assert bool(state.masks['b']['kernel'].ravel()[3])


def test_densities_of_numbers_that_float32_rounds():
    size = 9973  # a prime
    weights = jnp.asarray(np.random.default_rng(0).permutation(size) + 1.0, jnp.float32)
    rule = jax.jit(dns_jax.layer_density(lambda step: step, 0.0).__call__)
    for density in np.random.default_rng(1).uniform(0, 1, 40):
        density = round(float(density), 3) or 0.001
        band = rule({'a': [weights]}, {'a': [jnp.ones(size, bool)]}, jnp.float32(density))['a']
        assert int((weights >= band.low).sum()) == round(density * size), density


NOTHING = {
    'layer_density': lambda density: dns_jax.layer_density(density),
    'global_density': lambda density: dns_jax.global_density(density),
    'erk': lambda density: dns_jax.global_density(density, 'erk'),
}


@pytest.mark.parametrize('name', NOTHING)
def test_a_density_that_would_never_be_asked_is_refused(name):
    with pytest.raises(ValueError, match='refresh_every'):
        surgery(
            Rule(NOTHING[name](dns_jax.polynomial_density(0.1, 0, 9)), refresh_every=0),
            jax.random.key(0),
        )
    surgery(Rule(NOTHING[name](0.1), refresh_every=0), jax.random.key(0))
