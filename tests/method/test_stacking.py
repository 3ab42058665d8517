"""Stacked layers are the same network, bit for bit, as if each had been written down by itself."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from layouts import LAYOUTS, MAKERS, STEPS, both, check_equal, inputs, stack, states_of, twin
from situations import slow_but

import dns_jax
from dns_jax import Rule, surgery
from dns_jax.stacking import restack, unstack

COMPAT_TABLE = 'field'


@pytest.mark.parametrize('name', slow_but(MAKERS, 'mean_std, asked again', 'norm', 'by chance'))
def test_every_transformation(name):
    stacked, apart = both('a scan', name)
    check_equal('a scan', stacked, apart)
    kernel = apart.masks['blocks']['1']['fc']['kernel']
    assert not kernel[-1].all()  # it did prune


# Between these lie the others, but for slices that are one or many.
@pytest.mark.parametrize(
    'layout',
    slow_but(
        list(LAYOUTS)[1:],
        'a scan of 12',
        'an ensemble of scans',
        'two scans by one pattern',
        'one layer',
    ),
)
def test_every_layout(layout):
    # Slices are sorted as the names they are: 0, 1, 10, 11, 2 …
    check_equal(layout, *both(layout, 'mean_std, asked again'))


@pytest.mark.slow
@pytest.mark.parametrize('layout', [name for name in LAYOUTS if name != 'a scan of 12'])
def test_a_common_threshold_in_every_layout(layout):
    check_equal(layout, *both(layout, 'biases too'))


@pytest.mark.parametrize(
    'layout', slow_but(['a scan', 'a scan along axis 1', 'an ensemble of scans'], 'a scan')
)
def test_counts_events_sizes_and_files(layout, tmp_path):
    sparse = pytest.importorskip('dns_jax.files.sparse')
    stacked, apart = both(layout, 'biases too' if layout != 'a scan' else 'norm')
    how = LAYOUTS[layout][0]
    weights = inputs(layout)[0]
    for step in (3, STEPS - 1):
        now, before = (
            jax.tree.map(lambda leaf, at=at: leaf[at], stacked.masks) for at in (step, step - 1)
        )
        twin_now, twin_before = (
            jax.tree.map(lambda leaf, at=at: leaf[at], apart.masks) for at in (step, step - 1)
        )
        params = jax.tree.map(lambda leaf, step=step: leaf[step], weights)
        whole = stack(layout, params)
        slices, masks, old = unstack(how, whole, now, before)
        chex.assert_trees_all_equal(slices, params)
        assert dns_jax.count_kept(masks) == dns_jax.count_kept(twin_now)
        assert dns_jax.count_events(old, masks) == dns_jax.count_events(twin_before, twin_now)
        assert dns_jax.measure_sizes(slices, masks) == dns_jax.measure_sizes(params, twin_now)
        assert (
            dns_jax.measure_sizes(whole, now).total == dns_jax.measure_sizes(params, twin_now).total
        )
        for tree, kept, name in ((slices, masks, 'stacked'), (params, twin_now, 'apart')):
            sparse.save_sparse(tmp_path / name, tree, kept)
        assert (tmp_path / 'stacked').read_bytes() == (tmp_path / 'apart').read_bytes()


def test_unstack_against_numpy_and_back():
    for layout, (how, _, _) in LAYOUTS.items():
        params = twin(layout, 0)
        whole = stack(layout, params)
        (apart,) = unstack(how, whole)
        chex.assert_trees_all_equal(apart, params)
        chex.assert_trees_all_equal(restack(how, whole, apart), whole)


def test_rules_of_some_slices():
    rules = {
        'blocks/0/*': Rule(dns_jax.layer_density(0.5)),
        'blocks/2/fc': Rule(dns_jax.mean_std(0.5), 0.5, 2),
    }
    weights, gradients = inputs('a scan')
    apart = states_of(surgery(rules, jax.random.key(1)), weights, gradients)
    stacked = states_of(
        surgery(rules, jax.random.key(1), stacked={'blocks': 0}),
        stack('a scan', weights, 1),
        stack('a scan', gradients, 1),
    )
    check_equal('a scan', stacked, apart)
    assert set(stacked.thresholds) == {'blocks/0/fc', 'blocks/2/fc'}
    assert stacked.masks['blocks']['fc']['kernel'][:, 1].all()


def test_slices_that_take_no_part():
    whole = stack('a scan', twin('a scan', 0))
    pruner = surgery(
        Rule(dns_jax.mean_std(0.3), 1.0, 1),
        jax.random.key(0),
        takes_part=lambda path, leaf: path.endswith('kernel') and 'blocks/0' not in path,
        stacked={'blocks': 0},
    )
    state, update = pruner.init(whole), jax.jit(pruner.update)
    for _ in range(2):
        _, state = update(whole, state, whole)
    assert set(state.thresholds) == {'blocks/1/fc', 'blocks/2/fc', 'head'}
    kernel = state.masks['blocks']['fc']['kernel']
    assert kernel[0].all()
    assert not kernel[1].all()


def test_without_the_word_a_stack_is_one_layer():
    whole = stack('a scan', twin('a scan', 0))
    state = surgery(Rule(dns_jax.layer_density(0.25)), jax.random.key(0)).init(whole)
    assert set(state.thresholds) == {'blocks/fc', 'head'}


def test_tuples_of_stacked_kernels_and_biases():
    # Nothing says that the second is a bias but its axes in a slice.
    stacked = {'blocks': (jnp.ones((4, 3, 3)), jnp.ones((4, 3)))}
    masks = (
        surgery(Rule(dns_jax.layer_density(0.5)), jax.random.key(0), stacked={'blocks': 0})
        .init(stacked)
        .masks
    )
    assert masks['blocks'][0].shape == (4, 3, 3)
    assert masks['blocks'][1].shape == ()


WRONG = [
    ({'block': 0}, 'block'),
    ({'blocks': 3}, 'axis 3'),
    ({'blocks': 1, 'norm': 0}, 'norm'),
    ({'blocks/fc/kernels': 0}, 'kernels'),
    ({'blocks': -1}, '-1'),
]


@pytest.mark.parametrize(('how', 'named'), WRONG)
def test_what_is_wrong_is_named(how, named):
    whole = stack('a scan', twin('a scan', 0))
    with pytest.raises(ValueError, match=named):
        surgery(Rule(dns_jax.layer_density(0.5)), jax.random.key(0), stacked=how).init(whole)


def test_masks_given_for_a_stack_go_on():
    how = LAYOUTS['a scan'][0]
    whole = stack('a scan', twin('a scan', 0))
    first = surgery(Rule(dns_jax.layer_density(0.5)), jax.random.key(0), stacked=how)
    _, state = jax.jit(first.update)(whole, first.init(whole), whole)
    for masks in (state.masks, jax.device_get(state.masks)):
        second = surgery(
            Rule(dns_jax.layer_density(0.25)), jax.random.key(0), masks=masks, stacked=how
        )
        start = second.init(whole)
        chex.assert_trees_all_equal(start.masks, state.masks)
    # Of unequal scale, each layer keeps a quarter.
    _, after = jax.jit(second.update)(whole, start, whole)
    kept = dns_jax.count_kept(unstack(how, whole, after.masks)[1])
    assert kept == {**{f'blocks/{number}/fc': 12 for number in range(3)}, 'head': 10}


def test_masks_given_where_a_stack_took_no_part():
    how = {'blocks': 0}
    whole = stack('a scan', twin('a scan', 0))
    masks = jax.tree.map(lambda leaf: jnp.ones((), bool), whole)
    masks['head']['kernel'] = jnp.ones((8, 5), bool)
    pruner = surgery(Rule(dns_jax.layer_density(0.25)), jax.random.key(0), masks=masks, stacked=how)
    _, state = jax.jit(pruner.update)(whole, pruner.init(whole), whole)
    assert dns_jax.count_kept(state.masks) == {'head': 10}


def test_optimizer_around_a_stack():
    whole = stack('a scan', twin('a scan', 0))
    optimizer = optax.chain(
        dns_jax.prune_to(density=0.2, steps=4, stacked={'blocks': 0}), optax.sgd(0.1)
    )
    state = optimizer.init(whole)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        whole, state = step(whole, state)
    masks = dns_jax.get_masks(state)
    assert sum(dns_jax.count_kept(masks).values()) == round(0.2 * (3 * 48 + 40))
