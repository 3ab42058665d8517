"""Counts of connections against Python's own integers, far beyond 2^31."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dns_jax
from dns_jax import Rule, _sharing, count_events, count_kept, surgery
from dns_jax._core import counts
from dns_jax._core.counts import count_true

COMPAT_TABLE = 'field'
BORDERS = [0, 1, 65535, 65536, 65537, 2**24 + 1, 2**31 - 1, 2**31, 2**32 + 5, 8 * 10**9, 2**45 - 1]


def test_arithmetic_against_integers():
    random = np.random.default_rng(0)
    numbers = [*BORDERS, *(int(n) for n in random.integers(0, 2**45, 40))]
    for number in numbers:
        assert counts.to_int(counts.from_int(number)) == number
        np.testing.assert_allclose(
            float(counts.to_float(counts.from_int(number))), float(number), rtol=2e-7
        )
    pairs = jax.jit(
        lambda a, b: (
            counts.minus(a, b),
            counts.add([a, b, a]),
            counts.maximum(a, b),
            counts.minimum(a, b),
            counts.to_float(counts.minus(a, b)),
        )
    )
    for a, b in zip(numbers, random.permutation(numbers), strict=True):
        a, b = int(a), int(b)
        minus, total, largest, smallest, difference = pairs(counts.from_int(a), counts.from_int(b))
        assert counts.to_int(minus) == a - b
        assert (int(minus.high) < 0) == (a < b)
        assert counts.to_int(total) == 2 * a + b
        assert (counts.to_int(largest), counts.to_int(smallest)) == (max(a, b), min(a, b))
        assert (float(difference) == 0) == (a == b)
        assert np.sign(float(difference)) == np.sign(a - b)


@pytest.mark.parametrize('whole', [1, 2, 3, 127, 1000, 266_610, 2**24, 2**31 - 1, 2**31, 8 * 10**9])
def test_a_share_of_a_whole(whole):
    share_of = jax.jit(lambda share: counts.from_share(share, whole))
    for share in (0.0, 1e-9, 0.001, 0.05, 0.1, 1 / 3, 0.5, 0.9, 1 - 2**-24, 1.0):
        exact = float(np.float32(share)) * whole
        found = counts.to_int(share_of(jnp.float32(share)))
        assert 1 <= found <= whole
        assert abs(found - min(max(exact, 1), whole)) <= 0.5 + 1.3e-7 * whole, share
    assert counts.to_int(share_of(jnp.float32(1))) == whole


@pytest.mark.parametrize(
    'shape', [(0,), (3, 0), (1,), (127,), (128,), (129,), (128, 128), (3, 5, 7, 11), (70_001,)]
)
def test_true_entries_against_numpy(shape):
    random = np.random.default_rng(len(shape))
    for share in (0.0, 0.3, 1.0):
        mask = random.random(shape) < share
        for array in (mask, jnp.asarray(mask)):
            assert int(counts.count_true(array)) == mask.sum()
            assert counts.to_int(counts.count_all([array, array])) == 2 * mask.sum()
    assert counts.to_int(counts.count_all([])) == 0


def test_sharded_masks(mesh):
    mask = np.random.default_rng(0).random((16, 24)) < 0.3
    for spec in (jax.P('x'), jax.P(None, 'x'), jax.P()):
        placed = jax.device_put(mask, jax.NamedSharding(mesh, spec))
        assert dns_jax.count_kept({'fc': {'kernel': placed}}) == {'fc': mask.sum()}
        jitted = jax.jit(dns_jax.count_kept)({'fc': {'kernel': placed}})
        assert int(jitted['fc']) == mask.sum()


def many(leaves, ones=True):
    mask = jnp.ones(2**23, bool) if ones else jnp.zeros(2**23, bool)
    return {f'fc{number}': {'kernel': mask} for number in range(leaves)}


def in_one(path):
    del path
    return 'all'


def test_beyond_2_31_in_one_layer_of_many_leaves(monkeypatch):
    # As if each had so many connections, which take seconds to count.
    monkeypatch.setattr(counts, 'count_true', lambda mask: jnp.int32(2**23))
    masks = {f'fc{number}': {'kernel': jnp.ones(1, bool)} for number in range(257)}
    assert dns_jax.count_kept(masks, in_one) == {'all': 257 * 2**23}


@pytest.mark.slow
def test_eight_billion_over_a_thousand_leaves():
    masks = many(1000)
    weights = jnp.zeros(2**23, jnp.bfloat16)
    params = jax.tree.map(lambda mask: weights, masks)
    assert dns_jax.count_kept(masks, in_one) == {'all': 1000 * 2**23}
    events = dns_jax.count_events(masks, many(1000, False), in_one)
    assert events == {'all': dns_jax.Events(1000 * 2**23, 0)}
    total = dns_jax.measure_sizes(params, masks).total
    assert total.parameters == total.kept == total.multiply_adds == 1000 * 2**23
    assert total.bytes == 2000 * 2**23
    assert total.kept_bytes == 6000 * 2**23
    assert (total.density, total.compression) == (1.0, 1.0)
    assert dns_jax.find_empty_layers(masks, in_one) == []
    assert dns_jax.find_empty_layers(many(1000, False), in_one) == ['all']


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(2**31 + 4096,), (4, 2**29 + 1024)])
def test_beyond_2_31_in_one_leaf(shape):
    mask = np.ones(shape, bool)
    assert dns_jax.count_kept({'fc': {'kernel': jnp.asarray(mask)}}) == {'fc': 2**31 + 4096}


def test_under_jit_it_is_refused_by_name():
    masks = {'embed': {'kernel': jax.ShapeDtypeStruct((2**31,), jnp.bool_)}}
    with pytest.raises(ValueError, match="'embed'"):
        jax.eval_shape(dns_jax.count_kept, masks)
    small = {'embed': {'kernel': jax.ShapeDtypeStruct((2**31 - 1,), jnp.bool_)}}
    assert jax.eval_shape(dns_jax.count_kept, small)['embed'].dtype == jnp.int32


LARGE = {
    f'fc{number}': {'kernel': jax.ShapeDtypeStruct((60_000, 50_000), jnp.float32)}
    for number in range(3)
}
PRUNERS = {
    'layer_density': lambda: surgery(Rule(dns_jax.layer_density(0.1)), jax.random.key(0)),
    'norm': lambda: surgery(Rule(dns_jax.global_density(0.1)), jax.random.key(0)),
    'rms': lambda: surgery(Rule(dns_jax.global_density(0.1, 'rms')), jax.random.key(0)),
    'erk': lambda: surgery(
        Rule(dns_jax.global_density(dns_jax.log_linear_density(0.1, 0, 9), 'erk')),
        jax.random.key(0),
    ),
    'mean_std': lambda: surgery(Rule(dns_jax.mean_std(0.1)), jax.random.key(0)),
    'prune_to a density': lambda: dns_jax.prune_to(density=0.1, steps=10),
    'prune_to a compression': lambda: dns_jax.prune_to(compression=10, steps=10),
}


@pytest.mark.parametrize('name', PRUNERS)
def test_pruners_of_nine_billion_weights_can_be_traced(name):
    pruner = PRUNERS[name]()
    state = jax.eval_shape(pruner.init, LARGE)
    updates, after = jax.eval_shape(pruner.update, LARGE, state, LARGE)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, LARGE)


@pytest.mark.parametrize('density', [1e-8, 0.05, 1 / 3, 1.0])
def test_what_is_wanted_of_nine_billion(density):
    weights = np.broadcast_to(np.float32(1), (60_000, 50_000))  # that takes no memory
    leaves = {name: [weights] for name in LARGE}
    layers = _sharing.single_weights(leaves, leaves)
    (division,) = dns_jax.layer_density(density).divide(layers, [jnp.int32(0)])
    for share in division.shares:
        assert abs(counts.to_int(share.wanted) / (density * 3e9) - 1) < 2e-7
    rule = dns_jax.global_density(density, 'erk')
    (division,) = rule.divide(layers, [jnp.int32(0)])
    total = sum(counts.to_int(share.wanted) for share in division.shares)
    assert abs(total / (density * 9e9) - 1) < 1e-5


# Blocks of 128 are added up in bytes: sizes at their edges, and sums that a byte cannot hold.
SIZES = [0, 1, 127, 128, 129, 255, 256, 257, 128 * 255, 128 * 255 + 127, 128 * 256, 40_000, 100_003]


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('density', [0.0, 0.3, 1.0])
def test_counts(size, density):
    random = np.random.default_rng(size)
    before, after = random.random((2, size)) < density
    if not size:  # of nothing there is no layer
        assert count_kept({'a': jnp.asarray(before)}) == {}
        return
    kept = count_kept({'a': {'b': jnp.asarray(before)}})['a']
    assert kept == before.sum()
    events = count_events(jnp.asarray(before), jnp.asarray(after))['']
    assert events == ((before & ~after).sum(), (~before & after).sum())
    assert {type(number) for number in (kept, *events)} == {int}
    jitted = jax.jit(count_events)(jnp.asarray(before), jnp.asarray(after))['']
    assert jitted == events
    assert {number.dtype for number in jitted} == {jnp.dtype('int32')}


def test_count_true_of_an_axis_that_is_sharded_explicitly():
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((8,), ('x',), explicit, devices=jax.devices('cpu')[:8])
    mask = np.random.default_rng(0).random((16, 24)) < 0.7
    with jax.set_mesh(mesh):
        placed = jax.device_put(mask, jax.NamedSharding(mesh, jax.P(None, 'x')))
        assert int(jax.jit(count_true)(placed)) == mask.sum()


def test_counts_of_all_at_once():
    # Everything pruned, everything spliced: the largest sum of each column of a block.
    ones, zeros = jnp.ones((255, 129), bool), jnp.zeros((255, 129), bool)
    events = jax.jit(count_events)({'a': ones, 'b': zeros}, {'a': zeros, 'b': ones})['']
    assert (int(events.pruned), int(events.spliced)) == (255 * 129, 255 * 129)
