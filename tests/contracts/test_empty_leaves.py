"""Leaves of size zero, as adapters of rank 0 are."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from situations import KEY, MAKERS, array, slow_but

import dns_jax
from dns_jax import (
    Rule,
    apply_masks,
    count_kept,
    global_density,
    layer_density,
    measure_sizes,
    surgery,
)

COMPAT_TABLE = 'field'
EMPTY = {
    'an empty bias': lambda: {'fc': {'kernel': array(8, 6), 'bias': jnp.zeros((0,))}},
    'an adapter of rank 0': lambda: {
        'fc': {'kernel': array(8, 6)},
        'lora': {'lora_a': jnp.zeros((8, 0)), 'lora_b': jnp.zeros((0, 6))},
    },
    'beside in one layer': lambda: {'fc': {'kernel': array(8, 6), 'lora_a': jnp.zeros((8, 0))}},
}


@pytest.mark.parametrize(
    ('name', 'tree'),
    [
        ('erk', 'an adapter of rank 0'),
        *(
            pytest.param(name, tree, marks=pytest.mark.slow)
            for name, tree in itertools.product(list(MAKERS)[:-1], EMPTY)
            if tree == 'beside in one layer' or name in ('mean_std', 'erk', 'prune_to', 'RigL')
        ),
    ],
)
def test_empty_leaves_count_nothing_and_stay(name, tree):
    pruner, params = MAKERS[name](), EMPTY[tree]()
    state, update = pruner.init(params), jax.jit(pruner.update)
    alone = {'fc': {'kernel': params['fc']['kernel']}}
    alone_state, alone_update = pruner.init(alone), jax.jit(pruner.update)
    for _ in range(3):
        _, state = update(params, state, params)
        _, alone_state = alone_update(alone, alone_state, alone)
    if name not in ('SET', 'RigL', 'gradient', 'chance'):  # whose numbers depend on the leaves
        chex.assert_trees_all_equal(state.masks['fc']['kernel'], alone_state.masks['fc']['kernel'])
    masked = apply_masks(params, state.masks)
    chex.assert_trees_all_equal_shapes_and_dtypes(masked, params)
    assert dns_jax.find_empty_layers(state.masks) == []
    assert set(count_kept(state.masks)) == {'fc'}
    sizes = measure_sizes(params, state.masks)
    assert (
        sizes.total == measure_sizes(alone, {'fc': {'kernel': state.masks['fc']['kernel']}}).total
    )
    if 'lora' in params:
        assert sizes.layers['lora'].parameters == 0


@pytest.mark.parametrize(
    'takes_part',
    [pytest.param(dns_jax.is_kernel, marks=pytest.mark.slow), dns_jax.has_axes],
)
@pytest.mark.parametrize('tree', slow_but(EMPTY, 'an empty bias', 'an adapter of rank 0'))
def test_empty_leaves_in_files_and_back(tree, takes_part, tmp_path):
    sparse = pytest.importorskip('dns_jax.files.sparse')
    params = EMPTY[tree]()
    pruner = surgery(Rule(layer_density(0.5)), KEY, takes_part=takes_part)
    _, state = jax.jit(pruner.update)(params, pruner.init(params), params)
    sparse.save_sparse(tmp_path / 'f', params, state.masks)
    back = sparse.load_sparse(tmp_path / 'f')
    chex.assert_trees_all_equal_shapes(back.params, params)
    again = surgery(Rule(layer_density(0.25)), KEY, masks=back.masks)
    after = again.init(params)
    jax.eval_shape(again.update, params, after, params)
    assert dns_jax.find_empty_layers(after.masks) == []
    assert dns_jax.measure_sizes(params, after.masks).total.parameters == sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )


def test_metrics_of_masks_that_are_empty_themselves():
    params = {'a': jnp.zeros((0, 3)), 'b': {'kernel': array(2, 2)}}
    masks = {'a': jnp.ones((0, 3), bool), 'b': {'kernel': jnp.ones((2, 2), bool)}}
    assert dns_jax.find_empty_layers(masks) == []
    total = measure_sizes(params, masks).total
    assert (total.parameters, total.density, total.compression) == (4, 1.0, 1.0)
    pruner = surgery(Rule(global_density(0.5)), KEY, masks=masks)
    _, state = jax.jit(pruner.update)(params, pruner.init(params), params)
    assert count_kept(state.masks)['b'] == 2
    nothing = {'a': jnp.zeros((0, 3))}
    size = measure_sizes(nothing, {'a': jnp.ones((), bool)}).total
    assert size.parameters == size.kept == 0
    assert size.density in (0.0, 1.0) or np.isnan(size.density)  # and no ZeroDivisionError
