"""Rules by density: every count, floor and unit against NumPy, at steps that jump wildly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dns_jax
from dns_jax import Rule, _following, _search, importance, pruners, surgery, update_probability
from dns_jax.thresholds import weight_std

COMPAT_TABLE = 'field'


SHAPES = {'a': [(13, 7), (7,)], 'b': [(31, 9)], 'c': [(5, 4)], 'd': [(60, 40)]}


def draw(seed, shapes=None, scales=None, dtype=np.float32):
    """Weights and masks of some layers."""
    random = np.random.default_rng(seed)
    shapes = shapes or SHAPES
    layers = {
        layer: [
            (random.normal(size=shape) * (scales or {}).get(layer, 1.0)).astype(dtype)
            for shape in own
        ]
        for layer, own in shapes.items()
    }
    masks = {layer: [random.random(shape) < 0.5 for shape in own] for layer, own in shapes.items()}
    return layers, masks


def kept_by(bands, layers, masks):
    """What h_k keeps, by equation (3): the mask of each leaf."""
    kept = {}
    for layer, leaves in layers.items():
        low, high = (np.float32(bound) for bound in bands[layer])
        kept[layer] = [
            np.where(mask, np.abs(leaf) >= low, np.abs(leaf) >= high)
            for leaf, mask in zip(leaves, masks[layer], strict=True)
        ]
    return kept


def numbers(kept):
    return {layer: int(sum(mask.sum() for mask in leaves)) for layer, leaves in kept.items()}


def sizes_of(layers):
    return {layer: sum(leaf.size for leaf in leaves) for layer, leaves in layers.items()}


@functools.cache
def jitted(score, hysteresis, floor=0.05):
    """The rule with its density in place of the step, compiled once for each shape."""
    density = lambda step: step  # noqa: E731
    if score == 'layer':
        return jax.jit(dns_jax.layer_density(density, hysteresis).__call__)
    return jax.jit(dns_jax.global_density(density, score, hysteresis, floor).__call__)


def wanted_of(density, size):
    return int(np.clip(np.round(np.float32(density) * np.float32(size)), 1, size))


def unit_of(score, leaves, masks):
    """In float64, by the documentation of `global_density`."""
    wide = [np.abs(leaf.astype(np.float64)) for leaf in leaves]
    if score == 'rms':
        return np.sqrt(np.mean(np.concatenate([leaf.ravel() for leaf in wide]) ** 2))
    squares = sum((leaf[mask] ** 2).sum() for leaf, mask in zip(wide, masks, strict=True))
    return max(np.sqrt(squares), *(leaf.max() for leaf in wide))


DENSITIES = [0.003, 0.02, 0.1, 1 / 3, 0.5, 0.77, 1.0]


@pytest.mark.parametrize('hysteresis', [0.0, 0.1, 0.6])
def test_layer_density_is_exact_and_its_threshold_the_largest(hysteresis):
    for seed, density in enumerate(DENSITIES):
        layers, masks = draw(seed)
        bands = jitted('layer', hysteresis)(layers, masks, jnp.float32(density))
        found = numbers(kept_by(bands, layers, masks))
        for layer, size in sizes_of(layers).items():
            wanted = wanted_of(density, size)
            assert found[layer] == wanted
            # By brute force over every place where the number can change.
            flat = np.concatenate([leaf.ravel() for leaf in layers[layer]])
            mask = np.concatenate([leaf.ravel() for leaf in masks[layer]])
            edges = np.sort(np.where(mask, 1 / (1 - hysteresis), 1 / (1 + hysteresis)) * abs(flat))
            middle = (float(bands[layer].low) + float(bands[layer].high)) / 2
            np.testing.assert_allclose(middle, edges[-wanted], rtol=1e-5)


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


def test_two_equal_layers_share_half_and_half_at_every_scale():
    weights = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    masks = {layer: [np.ones((32, 32), bool)] for layer in 'ab'}
    for scale in (2.0**-100, 2.0**-66, 2.0**-20, 1.0, 2.0**66, 2.0**100):
        layers = {'a': [weights], 'b': [weights * np.float32(scale)]}
        for score in ('norm', 'rms'):
            bands = jitted(score, 0.1)(layers, masks, jnp.float32(0.4))
            found = kept_by(bands, layers, masks)
            assert (found['a'][0] != found['b'][0]).sum() <= 1  # by the last bit of a sum
            assert abs(found['a'][0].sum() - 0.4 * 1024) <= 1


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
    mean, deviation = dns_jax.magnitude_statistics([jnp.asarray(leaf) for leaf in leaves])
    np.testing.assert_allclose(float(mean), np.abs(flat).mean(), rtol=2e-6)
    np.testing.assert_allclose(float(deviation), np.abs(flat).std(), rtol=2e-6)
    band = weight_std(0.7)({'fc': [jnp.asarray(leaf) for leaf in leaves]}, {}, 0)['fc']
    np.testing.assert_allclose(float(band.low), 0.7 * flat.std(), rtol=2e-6)
    band = dns_jax.mean_std(0.3)({'fc': [jnp.asarray(leaf) for leaf in leaves]}, {}, 0)['fc']
    middle = np.abs(flat).mean() + 0.3 * np.abs(flat).std()
    np.testing.assert_allclose([*map(float, band)], [0.9 * middle, 1.1 * middle], rtol=2e-6)


def test_statistics_of_more_weights_than_a_float32_counts():
    weights = jnp.tile(jnp.array([1.0, -3.0], jnp.float32), 2**24)
    mean, deviation = dns_jax.magnitude_statistics([weights])
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


@pytest.mark.parametrize('density', [0.1, 0.5])
def test_a_layer_behind_stop_gradient_has_its_share(density):
    params = {
        layer: {'kernel': jax.random.normal(jax.random.key(at), (32, 32))}
        for at, layer in enumerate(('live', 'dead'))
    }
    gradients = {
        'live': {'kernel': jax.random.normal(jax.random.key(5), (32, 32))},
        'dead': {'kernel': jnp.zeros((32, 32))},
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


# Floors.

NETWORKS = {
    # The wide layers have small weights beside their norm, and would be left nothing.
    'VGG': {'conv1': [(27, 8)], 'conv2': [(72, 8)], 'fc6': [(128, 200)], 'fc7': [(200, 200)]},
    'tiny layers': {'big': [(100, 100)], **{f'tiny{n}': [(2,)] for n in range(6)}},
    'layers of one': {'big': [(50, 50)], **{f'one{n}': [(1,)] for n in range(6)}},
}


@pytest.mark.parametrize('network', NETWORKS)
@pytest.mark.parametrize('score', ['norm', 'rms'])
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


def test_fewer_wanted_than_layers_leaves_one_each():
    layers, masks = draw(0, {layer: [(3, 3)] for layer in 'abcdefgh'})
    for score in ('norm', 'rms'):
        bands = jitted(score, 0.1)(layers, masks, jnp.float32(0.01))
        assert set(numbers(kept_by(bands, layers, masks)).values()) == {1}


def test_a_floor_brings_an_emptied_layer_back():
    layers, masks = draw(0, {'a': [(20, 20)], 'b': [(20, 20)]})
    masks['a'][0][:] = False
    bands = jitted('norm', 0.1)(layers, masks, jnp.float32(0.1))
    found = numbers(kept_by(bands, layers, masks))
    assert found['a'] >= 2
    assert sum(found.values()) == 80


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
    'odd',
    [odd if odd == 'one NaN' else pytest.param(odd, marks=pytest.mark.slow) for odd in ODD],
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
        assert min(kept.values()) >= 1
        if odd == 'one NaN':  # breaks the loss in place of hiding
            assert bool(state.masks['b']['kernel'].ravel()[3])


# Followed.


def distinct(random, shape, dtype):
    """Weights whose magnitudes do not tie, in a dtype however narrow."""
    size = int(np.prod(shape))
    if dtype == jnp.bfloat16:
        bits = 0x3C00 + random.permutation(size).astype(np.uint16)  # of numbers above 0, ascending
        values = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16)
    else:
        values = jnp.asarray(np.abs(random.normal(size=size)) + 1e-3, dtype)
    signs = jnp.asarray(random.choice([-1.0, 1.0], size), dtype)
    return (values * signs).reshape(shape)


FOLLOWED = {
    # rule of a density schedule, steps of updates, all steps, dtype, options of surgery
    'cubic': (dns_jax.polynomial_density(0.1, 0, 20), 24, jnp.float32, {}, {}),
    'awkward': (dns_jax.log_linear_density(0.0371, 2, 17), 19, jnp.float32, {}, {}),
    'bfloat16': (dns_jax.polynomial_density(0.13, 0, 15), 16, jnp.bfloat16, {}, {}),
    'no band': (dns_jax.polynomial_density(0.1, 0, 20), 23, jnp.float32, {'hysteresis': 0.0}, {}),
    'wide band': (dns_jax.polynomial_density(0.1, 0, 9), 11, jnp.float32, {'hysteresis': 0.7}, {}),
    'up and down': (lambda step: 0.3 + 0.25 * jnp.sin(jnp.float32(step)), 17, jnp.float32, {}, {}),
    'a number': (0.2, 13, jnp.float32, {}, {}),
    'every 4': (dns_jax.polynomial_density(0.1, 0, 10), 15, jnp.float32, {}, {'refresh_every': 4}),
    'every 100': (
        dns_jax.polynomial_density(0.1, 0, 9),
        11,
        jnp.float32,
        {},
        {'refresh_every': 100},
    ),
    'coins': (dns_jax.polynomial_density(0.1, 0, 9), 12, jnp.float32, {}, {'gamma': 0.3}),
    'late': (dns_jax.polynomial_density(0.1, 5, 9), 13, jnp.float32, {}, {'start': 4}),
}


@pytest.mark.parametrize(
    ('name', 'score'),
    [
        ('awkward', 'norm'),
        ('every 4', 'layer'),
        *(
            pytest.param(name, 'norm', marks=pytest.mark.slow)
            for name in FOLLOWED
            if name != 'awkward'
        ),
        *(
            pytest.param(name, 'layer', marks=pytest.mark.slow)
            for name in ('cubic', 'coins', 'bfloat16')
        ),
    ],
)
def test_followed_numbers_while_weights_jump(name, score):
    schedule, stop, dtype, options, other = FOLLOWED[name]
    refresh, gamma, start = (
        other.get(key, default)
        for key, default in (('refresh_every', None), ('gamma', 0.0), ('start', 0))
    )
    rule = (dns_jax.layer_density if score == 'layer' else dns_jax.global_density)(
        schedule, **options
    )
    pruner = surgery(
        Rule(rule, update_probability(gamma, stop=stop, start=start), refresh), jax.random.key(0)
    )
    random, steps = np.random.default_rng(0), stop + 4
    shapes = {'a': (13, 7), 'b': (31, 9), 'c': (5, 4), 'd': (60, 40)}
    trees = []
    for _ in range(steps):
        jump = random.choice([1e-3, 1.0, 1e3], 4)
        trees.append(
            {
                layer: {'kernel': distinct(random, shape, dtype) * jnp.asarray(by, dtype)}
                if dtype != jnp.bfloat16
                else {'kernel': distinct(random, shape, dtype)}
                for (layer, shape), by in zip(shapes.items(), jump, strict=True)
            }
        )
    weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    @jax.jit
    def run(weights):
        def step(state, params):
            state = pruner.update(params, state, params)[1]
            return state, state.masks

        return jax.lax.scan(step, pruner.init(trees[0]), weights)[1]

    masks = jax.device_get(run(weights))
    sizes = {layer: int(np.prod(shape)) for layer, shape in shapes.items()}
    groups = [[layer] for layer in sizes] if score == 'layer' else [list(sizes)]
    for step in range(steps):
        for group in groups:
            whole = sum(sizes[layer] for layer in group)
            density = schedule(jnp.int32(step)) if callable(schedule) else schedule
            wanted = wanted_of(density, whole)
            kept = sum(int(masks[layer]['kernel'][step].sum()) for layer in group)
            if step < start:
                assert kept == whole
            elif step == stop - 1:
                assert kept == wanted
            elif step < stop and refresh is None and not gamma:
                assert abs(kept - wanted) <= _following.TOLERANCE * wanted
        if start <= step < stop and not gamma and refresh is None:
            assert all(masks[layer]['kernel'][step].any() for layer in sizes)
        if step >= stop:
            for layer in sizes:
                np.testing.assert_array_equal(
                    masks[layer]['kernel'][step], masks[layer]['kernel'][stop - 1]
                )


@pytest.mark.parametrize(
    'number', [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 4))]
)
def test_a_search_from_anywhere_finds_what_bisection_finds(number):
    random = np.random.default_rng(number)
    layers, masks = draw(number)
    rule = dns_jax.global_density(lambda step: step, hysteresis=[0.0, 0.1, 0.3, 0.6][number])

    @jax.jit
    def both(density, away):
        anew = rule(layers, masks, density)
        near = jax.tree.map(lambda bound: bound * away, anew)  # units stay by what the last were
        return anew, rule.solve(layers, masks, density, near, jnp.array(True))

    for _ in range(8):
        density = jnp.float32(random.uniform(0.01, 1))
        anew, again = both(density, jnp.float32(np.exp(random.uniform(-40, 40))))
        for layer in layers:
            for one, two in zip(
                kept_by(anew, layers, masks)[layer],
                kept_by(again, layers, masks)[layer],
                strict=True,
            ):
                np.testing.assert_array_equal(one, two)


def by_lamp(layers, wanted):
    """Layers' shares by LAMP's score, w² / Σ v² over |v| ≥ |w|, of the `wanted` largest."""
    scores = {}
    for layer, (leaf,) in layers.items():
        squares = np.sort(np.asarray(leaf, np.float64).ravel() ** 2)[::-1]
        scores[layer] = squares / np.cumsum(squares)
    last = np.sort(np.concatenate([*scores.values()]))[-wanted]
    return {layer: int((own >= last).sum()) for layer, own in scores.items()}


@pytest.mark.parametrize('density', [0.02, 0.1])
def test_shares_settle_where_every_unit_is_that_of_what_is_kept(density):
    """Without damping one layer takes what the other had, and they take turns."""
    random = np.random.default_rng(0)
    layers = {
        'normal': [random.normal(size=(300, 100)).astype(np.float32)],
        'uniform': [random.uniform(-1, 1, (100, 100)).astype(np.float32)],
        'heavy': [random.laplace(size=(100, 50)).astype(np.float32)],
    }
    params = {layer: {'kernel': jnp.asarray(leaf)} for layer, (leaf,) in layers.items()}
    pruner = surgery(Rule(dns_jax.global_density(density, hysteresis=0.0)), jax.random.key(0))

    @jax.jit
    def run(state):
        def step(state, _):
            state = pruner.update(params, state, params)[1]
            return state, dns_jax.count_kept(state.masks)

        return jax.lax.scan(step, state, length=400)[1]

    kept = jax.device_get(run(pruner.init(params)))
    wanted = by_lamp(layers, round(density * 45_000))
    for layer, number in wanted.items():
        assert abs(kept[layer][-1] - number) <= 0.1 * number + 1
        assert np.ptp(kept[layer][-100:]) <= 0.1 * number + 1


def searches_and_passes(monkeypatch):
    """Counts, when what is traced from now on runs: a list of the passes of each search."""
    passes, search = [], _search.search

    def counted(excess_at, starts, aims):
        def noted(thresholds):
            jax.debug.callback(lambda: passes.append(passes.pop() + 1), ordered=True)
            return excess_at(thresholds)

        jax.debug.callback(lambda: passes.append(0), ordered=True)
        return search(noted, starts, aims)

    monkeypatch.setattr(_search, 'search', counted)
    return passes


def test_thresholds_follow_weights_that_drift_without_a_search(monkeypatch):
    passes = searches_and_passes(monkeypatch)
    params = {'fc': {'kernel': jax.random.normal(jax.random.key(0), (200, 50))}}
    density = lambda step: 0.2 * jnp.exp(-0.005 * jnp.float32(step))  # noqa: E731
    pruner = surgery(Rule(dns_jax.layer_density(density)), jax.random.key(0))

    @jax.jit
    def run(state):
        def step(carry, key):
            state, params = carry
            state = pruner.update(params, state, params)[1]
            noise = 0.01 * jax.random.normal(key, (200, 50))
            params = jax.tree.map(lambda leaf: leaf + noise, params)
            return (state, params), state.masks['fc']['kernel'].sum()

        return jax.lax.scan(step, (state, params), jax.random.split(jax.random.key(1), 100))[1]

    kept = np.asarray(run(pruner.init(params)))
    jax.effects_barrier()
    wanted = 10_000 * np.asarray(density(np.arange(100)))
    assert (abs(kept - wanted) <= _following.TOLERANCE * wanted + 1).all()
    assert 1 <= len(passes) <= 10


def run_scaled(density, scale, steps, small=(200, 100)):
    """How many three layers keep at every step, of which the first is scaled by the step."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = small, (200, 100), (200, 100)
    layers = {n: jax.random.normal(*drawn) for n, *drawn in zip('abc', keys, shapes, strict=True)}
    pruner = surgery(Rule(dns_jax.global_density(density)), jax.random.key(0))

    def scaled(step):
        return {'a': layers['a'] * scale(jnp.float32(step))} | {n: layers[n] for n in 'bc'}

    @jax.jit
    def run(state):
        def step(state, count):
            params = {name: {'kernel': leaf} for name, leaf in scaled(count).items()}
            state = pruner.update(params, state, params)[1]
            return state, [state.masks[name]['kernel'].sum() for name in 'abc']

        return jax.lax.scan(step, state, jnp.arange(steps))[1]

    params = {name: {'kernel': leaf} for name, leaf in layers.items()}
    return np.stack(run(pruner.init(params)), 1)


@pytest.mark.parametrize(
    ('scale', 'farthest'),
    [(lambda step: jnp.where(step < 20, 1.0, 10.0), 0.3), (lambda step: 1.003**step, 0.15)],
    ids=['jump', 'drift'],
)
def test_a_layer_keeps_its_share_whatever_its_scale(scale, farthest):
    kept = run_scaled(0.1, scale, 100)
    assert (abs(kept.sum(1) - 6000) <= _following.TOLERANCE * 6000).all()
    assert (abs(kept[-1] - 2000) <= farthest * 2000).all()


def test_a_dead_layer_costs_no_search_at_every_step(monkeypatch):
    passes = searches_and_passes(monkeypatch)
    run_scaled(0.1, lambda step: 0.0 * step, 33)
    jax.effects_barrier()
    assert 1 <= len(passes) <= 8


def test_nothing_of_a_dead_layer_is_kept():
    kept = run_scaled(0.1, lambda step: 0.0 * step, 150, small=(1, 5))  # few, so no count tells
    assert (kept[1:, 0] == 0).all()
    assert (abs(kept[1:].sum(1) - 4000) <= _following.TOLERANCE * 4000 + 1).all()


def test_an_update_of_more_connections_than_an_int32_counts_is_traced():
    params = {name: {'kernel': jax.ShapeDtypeStruct((2**21, 1200), jnp.float32)} for name in 'ab'}
    for rule in (dns_jax.global_density(0.1), dns_jax.layer_density(0.1)):
        pruner = surgery(Rule(rule), jax.random.key(0))
        state = jax.eval_shape(lambda w, p=pruner: p.update(w, p.init(w), w)[1], params)
        assert state.masks['a']['kernel'].shape == (2**21, 1200)


def test_one_rule_that_is_wrong_leaves_the_number_of_another():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        n: {'kernel': jax.random.normal(key, (80, 50))} for n, key in zip('ab', keys, strict=True)
    }
    falling = lambda step: 0.3 * (1 - 0.002 * jnp.float32(step))  # noqa: E731
    rules = {'a': Rule(dns_jax.layer_density(0.1)), 'b': Rule(dns_jax.layer_density(falling))}
    pruner = surgery(rules, jax.random.key(0))

    @jax.jit
    def step(state, scale):
        weights = {'a': {'kernel': params['a']['kernel'] * scale}, 'b': params['b']}
        return pruner.update(params, state, weights)[1]

    state, lows = pruner.init(params), []
    for scale in (1.0, 3.0, 0.2, 5.0):
        state = step(state, jnp.float32(scale))
        kept = {name: int(state.masks[name]['kernel'].sum()) for name in 'ab'}
        assert abs(kept['a'] - 400) <= _following.TOLERANCE * 400
        assert abs(kept['b'] - 1200) <= _following.TOLERANCE * 1200
        lows.append(float(state.thresholds['b'].low))
    assert lows[0] < lows[1]  # fewer are wanted, though the rule of a alone was wrong


def test_a_search_from_near_takes_few_passes(monkeypatch):
    passes = searches_and_passes(monkeypatch)
    layers, masks = draw(0, shapes={'a': [(300, 100)], 'b': [(100, 100)]})
    rule = dns_jax.layer_density(lambda density: density)

    @jax.jit
    def solve(density, away):
        near = jax.tree.map(lambda bound: bound * away, rule(layers, masks, density))
        return rule.solve(layers, masks, density, near, jnp.array(False))

    for density in (0.02, 0.1, 0.5):
        for away in (0.97, 1.01):
            jax.block_until_ready(solve(jnp.float32(density), jnp.float32(away)))
    jax.effects_barrier()
    assert len(passes) == 6
    assert max(passes) <= 6


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


@pytest.mark.slow
@pytest.mark.parametrize('name', ['iterative', 'gradual', 'one_shot', 'regrow'])
def test_pruners_meet_their_density_exactly_at_each_round(name):
    make = {
        'iterative': lambda: pruners.iterative(0.07, [0, 3, 6], jax.random.key(0)),
        'gradual': lambda: pruners.gradual(0.07, 0, 6, 4, jax.random.key(0)),
        'one_shot': lambda: pruners.one_shot(0.07, 5, jax.random.key(0)),
        'regrow': lambda: pruners.regrow(0.07, 2, 7, jax.random.key(0)),
    }[name]
    pruner, shape = make(), (31, 37)
    update = jax.jit(pruner.update)
    state = pruner.init({'fc': {'kernel': jnp.zeros(shape)}})
    random = np.random.default_rng(0)
    for _ in range(8):
        params, gradients = (
            {'fc': {'kernel': jnp.asarray(random.normal(size=shape), jnp.float32)}}
            for _ in range(2)
        )
        _, state = update(gradients, state, params)
    assert dns_jax.count_kept(state.masks) == {'fc': round(0.07 * 31 * 37)}
