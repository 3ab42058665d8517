"""Tests of inference.shrink: any network gives what the masked one gives, and is small."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import LENET5, LENET300
from shrinking import check, convolve, ones_like, shapes

from dns_jax import apply_masks
from dns_jax.files.sparse import load_sparse
from dns_jax.inference.chain import Dense, Relu, run_chain
from dns_jax.inference.compact import compact
from dns_jax.inference.shrink import shrink
from dns_jax.layers import named_leaves
from experiments.zoo import FOLDER

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def randomized(tree):
    """A tree like another, with no number in it 0."""
    return jax.tree.map(lambda leaf: np.abs(normal(*leaf.shape)) + np.float32(0.1), tree)


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()['flops']


def dense(inputs, units):
    return {'kernel': normal(inputs, units), 'bias': normal(units)}


def run_dense(layer, x):
    return x @ layer['kernel'] + layer['bias'].reshape((1,) * (x.ndim - 1) + (-1,))


def test_units_go_as_compact_lets_them_go():
    chain = (Dense('a'), Relu(), Dense('b'), Relu(), Dense('c'))
    params = {'a': dense(9, 8), 'b': dense(8, 7), 'c': dense(7, 3)}
    masks = ones_like(params)
    masks['a']['kernel'][:, :2] = False  # constant
    masks['a']['kernel'][4] = False  # an input that nothing reads
    masks['b']['kernel'][3] = False  # dead
    masks['b']['kernel'][:, 1] = False
    masks['c']['kernel'][[4, 5]] = False
    small = check(lambda params, x: run_chain(chain, params, x), params, masks, normal(2, 9))
    compacted = compact(chain, params, masks, (9,))
    assert small.stayed == []
    assert shapes(small) == {
        f'{layer}/{leaf}': compacted.params[layer][leaf].shape
        for layer in 'abc'
        for leaf in ('bias', 'kernel')
    }
    assert shapes(small)['b/kernel'] == (5, 4)
    assert small.params['b']['kernel'].dtype == np.float32


@pytest.mark.parametrize(('name', 'chain'), [('lenet5', LENET5), ('lenet300', LENET300)])
def test_networks_of_the_zoo_get_as_small_as_by_compact(name, chain):
    network = load_sparse(FOLDER / f'{name}.safetensors')
    images = np.random.default_rng(0).random((2, 28, 28, 1), np.float32)

    def apply(params, x):
        return run_chain(chain, params, x)

    small = check(apply, network.params, network.masks, images)
    compacted = compact(chain, network.params, network.masks, (28, 28, 1))
    assert shapes(small) == {path: leaf.shape for path, leaf in named_leaves(compacted.params)}
    wanted = flops(
        lambda params, x: run_chain(compacted.chain, params, x), compacted.params, images
    )
    assert flops(small.apply, small.params, images) < 1.01 * wanted


class Residual(nn.Module):
    """Two convolutions beside a shortcut, with BatchNorm as it is after training."""

    @nn.compact
    def __call__(self, x):
        shortcut = nn.Conv(8, (1, 1), name='shortcut')(x)
        x = nn.Conv(6, (3, 3), name='conv1')(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name='norm1')(x))
        x = nn.Conv(8, (3, 3), strides=2, name='conv2')(x)
        x = nn.BatchNorm(use_running_average=True, name='norm2')(x)
        pooled = nn.pooling.pool(shortcut, 0.0, jax.lax.add, (2, 2), (2, 2), 'VALID')
        x = nn.relu(x + pooled / 4)
        x = nn.max_pool(x, (2, 2), (1, 1), padding='SAME')
        return nn.Dense(3, name='out')(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize('closed', [True, False])
def test_residual_network_with_batch_norm(closed):
    network, images = Residual(), normal(1, 6, 6, 3)
    variables = randomized(network.init(jax.random.key(0), images))
    masks = ones_like(variables)
    params_masks = masks['params']
    params_masks['conv1']['kernel'][..., :2] = False  # constants through BatchNorm and relu
    params_masks['conv2']['kernel'][:, :, 3] = False  # nothing reads filter 3 of conv1
    out = params_masks['out']['kernel'].reshape(3, 3, 8, 3)
    out[:, :, [1, 6]] = False  # nothing reads channels 1 and 6 of the sum
    out[0, 0, 0] = False
    if closed:
        statistics = variables['batch_stats']

        def apply(params, x):
            return network.apply({'params': params, 'batch_stats': statistics}, x)

        small = check(apply, variables['params'], params_masks, images)
        found = shapes(small)
    else:
        small = check(network.apply, variables, masks, images)
        found = {path.removeprefix('params/'): shape for path, shape in shapes(small).items()}
        assert found['batch_stats/norm1/mean'] == (3,)
        assert found['batch_stats/norm2/var'] == (6,)
    assert small.stayed == []
    assert found['conv1/kernel'] == (3, 3, 3, 3)
    assert found['norm1/scale'] == (3,)
    assert found['conv2/kernel'] == (3, 3, 3, 6)
    assert found['shortcut/kernel'] == (1, 1, 3, 6)
    assert found['out/kernel'] == (9 * 6 - 1, 3)


class Transformer(nn.Module):
    """Two blocks with LayerNorm before attention and MLP."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8, name='embed')(tokens)
        for block in range(2):
            y = nn.LayerNorm(name=f'norm_a{block}')(x)
            x = x + nn.MultiHeadDotProductAttention(4, qkv_features=12, name=f'attend{block}')(y)
            y = nn.LayerNorm(name=f'norm_b{block}')(x)
            y = nn.gelu(nn.Dense(16, name=f'up{block}')(y))
            x = x + nn.Dense(8, name=f'down{block}')(y)
        return nn.Dense(5, name='out')(x.mean(1))


def test_heads_and_units_of_a_transformer():
    network, tokens = Transformer(), np.arange(10).reshape(2, 5) % 11
    params = jax.tree.map(
        lambda leaf: normal(*leaf.shape) / 3, network.init(jax.random.key(0), tokens)['params']
    )
    masks = ones_like(params)
    masks['attend0']['value']['kernel'][:, 1] = False  # its bias stays: that head is a constant
    masks['attend0']['out']['kernel'][2] = False
    masks['attend1']['value']['kernel'][:, 0] = False
    masks['attend1']['value']['bias'][0] = False
    masks['attend1']['out']['kernel'][3, 1] = False  # a third of the values of head 3
    masks['up0']['kernel'][:, :3] = False
    masks['down0']['kernel'][[3, 7, 8]] = False
    masks['down1']['kernel'][4:] = False

    def apply(params, tokens):
        return network.apply({'params': params}, tokens)

    small = check(apply, params, masks, tokens)
    found = shapes(small)
    for name in ('query', 'key', 'value'):
        assert found[f'attend0/{name}/kernel'] == (8, 2, 3)
        assert found[f'attend0/{name}/bias'] == (2, 3)
        assert found[f'attend1/{name}/kernel'] == (8, 3, 3)
    assert found['attend0/out/kernel'] == (2, 3, 8)
    assert found['up0/kernel'] == (8, 10)
    assert found['down0/kernel'] == (10, 8)
    assert found['down1/kernel'] == (4, 8)
    assert small.stayed == []
    wanted, given = (
        flops(*each, tokens) for each in ((apply, params), (small.apply, small.params))
    )
    sizes = [
        sum(np.size(leaf) for leaf in jax.tree.leaves(tree)) for tree in (params, small.params)
    ]
    assert given / wanted < sizes[1] / sizes[0] + 0.15


def attention(params, x):
    """Heads from plain matrices, (features, heads · size)."""
    batch, length, _ = x.shape
    query, key, value = (
        run_dense(params[name], x).reshape(batch, length, 4, 3).transpose(0, 2, 1, 3)
        for name in ('query', 'key', 'value')
    )
    weights = jax.nn.softmax(query @ key.transpose(0, 1, 3, 2) / np.float32(3**0.5))
    mixed = (weights @ value).transpose(0, 2, 1, 3).reshape(batch, length, 12)
    return run_dense(params['out'], mixed)


def test_heads_of_plain_matrices():
    params = {name: dense(6, 12) for name in ('query', 'key', 'value')} | {'out': dense(12, 6)}
    masks = ones_like(params)
    masks['value']['kernel'][:, 3:6] = False  # head 1, its bias stays
    masks['out']['kernel'][9:] = False  # head 3
    small = check(attention, params, masks, normal(2, 4, 6))
    assert shapes(small) == {
        **{f'{name}/kernel': (6, 6) for name in ('query', 'key', 'value')},
        **{f'{name}/bias': (6,) for name in ('query', 'key', 'value')},
        'out/kernel': (6, 6),
        'out/bias': (6,),
    }


def test_depthwise_and_grouped_convolutions():
    params = {'deep': normal(3, 3, 1, 8), 'mix': normal(1, 1, 8, 6), 'groups': normal(2, 2, 2, 9)}

    def apply(params, x):
        x = convolve(x, params['deep'], padding='SAME', feature_group_count=8)
        x = convolve(jnp.tanh(x), params['mix'], window_strides=(2, 1))
        return convolve(
            x, params['groups'], padding=((1, 0), (0, 2)),
            rhs_dilation=(1, 2), feature_group_count=3,
        )[..., :6]  # the last group goes  # fmt: skip

    masks = ones_like(params)
    masks['deep'][..., 2] = False
    masks['mix'][:, :, 5] = False
    masks['groups'][:, :, 1, :6] = False  # the second channel of two groups
    small = check(apply, params, masks, normal(1, 7, 6, 8))
    assert shapes(small) == {
        'deep': (3, 3, 1, 6),
        'mix': (1, 1, 6, 2),
        'groups': (2, 2, 1, 6),
    }


def test_branches_that_are_joined_and_parted():
    params = {name: dense(4, 6) for name in 'ab'} | {'c': dense(12, 3), 'd': dense(5, 2)}

    def apply(params, x):
        joined = jnp.concatenate([jax.nn.silu(run_dense(params[name], x)) for name in 'ab'], -1)
        padded = jnp.pad(joined, ((0, 0), (2, 1)))
        left, right = jnp.split(padded[:, 2:-1], [5], axis=1)
        return run_dense(params['c'], joined), run_dense(params['d'], left * 2), right[:, ::-7]

    masks = ones_like(params)
    masks['a']['kernel'][:, 0] = False  # constant
    masks['c']['kernel'][[1, 8, 9]] = False
    masks['d']['kernel'][[1, 4]] = False
    small = check(apply, params, masks, normal(2, 4))
    assert shapes(small)['a/kernel'] == (4, 4)
    assert shapes(small)['b/kernel'] == (4, 4)
    assert shapes(small)['c/kernel'] == (8, 3)
    assert shapes(small)['d/kernel'] == (2, 2)


def test_constants_go_through_gelu_and_batch_norm_into_a_convolution_that_pads():
    params = {'a': normal(1, 1, 2, 4), 'bias': normal(4), 'b': normal(3, 3, 4, 2)}
    mean, scale = normal(1, 1, 1, 4), normal(1, 1, 1, 4)

    def apply(params, x):
        x = convolve(x, params['a'])
        x = jax.nn.gelu(x + params['bias'].reshape(1, 1, 1, 4), approximate=False)
        return convolve((x - mean) * scale, params['b'], padding='SAME')

    masks = ones_like(params)
    masks['a'][..., 1:3] = False
    small = check(apply, params, masks, normal(2, 5, 5, 2))
    # What a constant channel adds is less at the border, where the convolution sees padding.
    assert shapes(small) == {'a': (1, 1, 2, 2), 'bias': (2,), 'b': (3, 3, 2, 2)}


def test_dead_features_stay_for_layer_norm_and_it_is_said():
    params = {'a': dense(3, 5), 'b': dense(5, 2)}

    def apply(params, x):
        x = run_dense(params['a'], x)
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
        return run_dense(params['b'], scaled)

    masks = ones_like(params)
    masks['b']['kernel'][[1, 4]] = False
    small = check(apply, params, masks, normal(2, 3))
    assert shapes(small)['a/kernel'] == (3, 5)
    assert shapes(small)['b/kernel'] == (3, 2)
    stayed = {(each.axis, each.units, each.primitive) for each in small.stayed}
    assert stayed == {(1, (1, 4), 'reduce_sum')}
    assert 'LayerNorm' in small.stayed[0].why


def test_what_is_not_followed_stays_and_it_is_said():
    params = {'a': dense(3, 5), 'b': dense(5, 2)}

    def apply(params, x):
        x = run_dense(params['a'], x)
        total, _ = jax.lax.scan(lambda total, row: (total + row, None), jnp.zeros_like(x[0]), x)
        return run_dense(params['b'], total[None])

    masks = ones_like(params)
    masks['b']['kernel'][:3] = False
    masks['a']['kernel'][:, 0] = False  # still a constant, put where the scan reads it
    small = check(apply, params, masks, normal(4, 3))
    assert shapes(small)['a/kernel'] == (3, 4)
    assert shapes(small)['b/kernel'] == (2, 2)
    assert {each.primitive for each in small.stayed} == {'scan'}
    assert 'not followed' in small.stayed[0].why


def test_network_of_which_nothing_is_left():
    params = {'a': dense(3, 5), 'b': dense(5, 2)}
    masks = jax.tree.map(np.zeros_like, ones_like(params))
    masks['b']['bias'][:] = True
    small = check(
        lambda params, x: run_dense(params['b'], jnp.tanh(run_dense(params['a'], x))),
        params, masks, normal(4, 3),
    )  # fmt: skip
    assert shapes(small) == {'a/kernel': (1, 1), 'a/bias': (1,), 'b/kernel': (1, 1), 'b/bias': (1,)}
    assert not small.params['a']['kernel'].any()


def test_a_mask_of_no_axes_keeps_its_leaf_and_dtypes_stay():
    params = {'a': normal(3, 5).astype(jnp.bfloat16), 'b': normal(5, 2)}
    masks = {'a': np.array(False), 'b': np.arange(10).reshape(5, 2) > 3}

    def apply(params, x):
        return jnp.tanh(x @ params['a']).astype(np.float32) @ params['b']

    small = shrink(apply, params, masks, normal(4, 3).astype(jnp.bfloat16))
    assert small.leaves == {'a': ((3, 5), (3, 3)), 'b': ((5, 2), (3, 2))}
    assert small.params['a'].dtype == jnp.bfloat16
    x = normal(4, 3).astype(jnp.bfloat16)
    wanted = apply(apply_masks(params, masks), x)
    # Sums in bfloat16 are rounded in another order.
    np.testing.assert_allclose(small.apply(small.params, x), wanted, atol=2e-2)


def test_the_small_weights_can_be_trained():
    params = {'a': dense(3, 5), 'b': dense(5, 2)}
    masks = ones_like(params)
    masks['b']['kernel'][1] = False
    x = normal(4, 3)

    def apply(params, x):
        return run_dense(params['b'], jax.nn.relu(run_dense(params['a'], x)))

    small = shrink(apply, params, masks, x)
    wanted = jax.grad(lambda params: apply(params, x).sum())(apply_masks(params, masks))
    wanted = jax.tree.map(np.asarray, wanted)
    given = jax.grad(lambda params: small.apply(params, x).sum())(small.params)
    left = [0, 2, 3, 4]
    np.testing.assert_allclose(given['a']['kernel'], wanted['a']['kernel'][:, left], rtol=1e-4)
    np.testing.assert_allclose(given['b']['kernel'], wanted['b']['kernel'][left], rtol=1e-4)


def test_keys_of_random_numbers_are_left_as_they_are():
    params = {'a': normal(3, 4), 'key': jax.random.key(0)}
    masks = {'a': np.arange(4)[None] > np.zeros((3, 1)), 'key': np.array(True)}

    def apply(params, x):
        return jax.random.normal(params['key'], (1, 4)) + jnp.tanh(x @ params['a'])

    x = normal(2, 3)
    small = shrink(apply, params, masks, x)
    assert shapes(small) == {'a': (3, 3), 'key': ()}
    masked = {'a': np.where(masks['a'], params['a'], 0), 'key': params['key']}
    np.testing.assert_allclose(small.apply(small.params, x), apply(masked, x), atol=1e-6)
