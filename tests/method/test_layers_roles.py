"""What leaves are called and what they are, as the libraries themselves build them."""

import functools
import itertools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dns_jax
from dns_jax import Rule, caffe_sgd, has_axes, init_masks, is_kernel, layer_density, role, surgery
from dns_jax.layers import named_leaves

COMPAT_TABLE = 'field'


def array(*shape, seed=0):
    return np.float32(np.random.default_rng([seed, *shape]).normal(size=shape))


def paths(tree):
    return [path for path, _ in named_leaves(tree)]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        normal = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=16)(normal)
        x = x + nn.Dense(16)(nn.relu(nn.Dense(32)(nn.RMSNorm()(x))))
        return x, None


class Transformer(nn.Module):
    how: str = 'scan'

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 16)
        x = embed(tokens)
        x = x + self.param('pos_embedding', nn.initializers.normal(0.1), (7, 16))
        if self.how == 'scan':
            scanned = nn.scan(
                Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=2
            )
            x, _ = scanned(name='blocks')(x, None)
        else:
            for number in range(2):
                x, _ = Block(name=f'block{number}')(x)
        return embed.attend(nn.LayerNorm(name='norm')(x))


def linen(how='scan'):
    tokens = jnp.zeros((2, 7), jnp.int32)
    with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
        shapes = jax.eval_shape(Transformer(how).init, jax.random.key(0), tokens)['params']
    seeds = itertools.count()  # no weights that tie
    return jax.tree.map(lambda leaf: array(*leaf.shape, seed=next(seeds)), shapes)


def expected_of_linen(path):
    """The names that linen itself gives."""
    name = path.split('/')[-1]
    return {
        'kernel': 'kernel',
        'bias': 'bias',
        'scale': 'scale',
        'embedding': 'embedding',
        'pos_embedding': 'embedding',
    }[name]


@pytest.mark.parametrize('how', ['scan', 'loop'])
def test_linen_transformer(how):
    params = linen(how)
    assert {role(path, leaf) for path, leaf in named_leaves(params)} == {
        'kernel',
        'bias',
        'scale',
        'embedding',
    }
    for path, leaf in named_leaves(params):
        assert role(path, leaf) == expected_of_linen(path), path
        assert is_kernel(path, leaf) == path.endswith('kernel')
    masks = jax.eval_shape(init_masks, params)
    for (path, leaf), mask in zip(named_leaves(params), jax.tree.leaves(masks), strict=True):
        assert mask.shape == (leaf.shape if path.endswith('kernel') else ())


def test_linen_with_partitioned_boxes():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            x = nn.LayerNorm(
                scale_init=nn.with_partitioning(nn.initializers.ones, (None,)),
                bias_init=nn.with_partitioning(nn.initializers.zeros, (None,)),
            )(x)
            kernel = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
            bias = nn.with_partitioning(nn.initializers.zeros, (None,))
            return nn.Dense(8, kernel_init=kernel, bias_init=bias)(x), None

    scanned = nn.scan(
        Boxed,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=3,
        metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    with jax.numpy_rank_promotion('allow'):
        init = functools.partial(scanned().init, jax.random.key(0))
        params = jax.eval_shape(init, jnp.ones((2, 8)), None)['params']
    assert isinstance(params['Dense_0']['kernel'], nn.Partitioned)
    for path, leaf in named_leaves(params):
        wanted = next(part for part in path.split('/') if part in ('kernel', 'bias', 'scale'))
        assert role(path, leaf) == wanted, path


def test_linen_others():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3))(x)
            x = nn.BatchNorm(use_running_average=True)(x)
            x = nn.GroupNorm(num_groups=2)(x)
            x = nn.PReLU()(x)
            x = nn.ConvTranspose(4, (2, 2))(x)
            x = x.reshape(x.shape[0], x.shape[1], -1)
            x = nn.RNN(nn.OptimizedLSTMCell(5))(x)
            x = nn.RNN(nn.GRUCell(5))(x)
            x = nn.DenseGeneral((2, 3))(x)
            return nn.Einsum((2, 3, 4), '...ab,abc->...c')(x)

    with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
        variables = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((2, 8, 8, 1)))
    for path, leaf in named_leaves(variables['params']):
        name = path.split('/')[-1]
        wanted = {'negative_slope': 'scale'}.get(name, name)
        assert role(path, leaf) == wanted, path
    for path, leaf in named_leaves(variables['batch_stats']):
        assert role(path, leaf) == 'statistic', path


def test_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 16, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.norm2 = nnx.LayerNorm(16, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])
            self.lora = nnx.LoRA(16, 2, 16, rngs=rngs)
            self.cell = nnx.GRUCell(4, 4, rngs=rngs)
            self.position = nnx.Param(jnp.zeros((7, 16)))

    wanted = {
        **{'kernel': 'kernel', 'bias': 'bias', 'scale': 'scale', 'embedding': 'embedding'},
        **{'lora_a': 'kernel', 'lora_b': 'kernel', 'position': 'embedding'},
    }
    net = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    seen = set()
    for path, leaf in named_leaves(nnx.state(net, nnx.Param)):
        name = path.split('/')[-1]
        seen.add(name)
        assert role(path, leaf) == wanted[name], path
    assert seen == set(wanted)
    for path, leaf in named_leaves(nnx.state(net, nnx.BatchStat)):
        assert role(path, leaf) == 'statistic', path


def test_nnx_vmapped_blocks():
    class Inner(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.fc = nnx.Linear(8, 8, rngs=rngs)

    @nnx.split_rngs(splits=5)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return Inner(rngs)

    for path, leaf in named_leaves(nnx.eval_shape(lambda: nnx.state(make(nnx.Rngs(0)), nnx.Param))):
        assert leaf.shape[0] == 5
        assert role(path, leaf) == path.split('/')[-1], path


def test_haiku():
    def forward(tokens):
        x = hk.Embed(11, 16)(tokens)
        x = x + hk.get_parameter('pos_embs', (7, 16), init=jnp.zeros)
        x = hk.LayerNorm(-1, True, True)(x)
        x = hk.experimental.layer_stack(3)(
            lambda h: hk.Linear(16)(hk.LayerNorm(-1, True, True)(hk.RMSNorm(-1)(h)))
        )(x)
        x = hk.MultiHeadAttention(2, 8, w_init=hk.initializers.VarianceScaling())(x, x, x)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training=True)
        x, _ = hk.dynamic_unroll(hk.GRU(8), x, hk.GRU(8).initial_state(7))
        x = hk.Conv1D(4, 3)(x)
        return hk.Linear(4)(x)

    with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
        init = hk.transform_with_state(forward).init
        params, _ = jax.eval_shape(init, jax.random.key(0), jnp.zeros((2, 7), jnp.int32))
    wanted = {
        **{'w': 'kernel', 'b': 'bias', 'scale': 'scale', 'offset': 'bias'},
        **{'embeddings': 'embedding', 'pos_embs': 'embedding', 'w_i': 'kernel', 'w_h': 'kernel'},
    }
    seen = set()
    for path, leaf in named_leaves(params):
        name = path.split('/')[-1]
        seen.add(name)
        assert role(path, leaf) == wanted[name], path
    assert seen == set(wanted)


def test_equinox():
    class Net(eqx.Module):
        embedding: eqx.nn.Embedding
        token_embed: eqx.nn.Embedding
        wte: eqx.nn.Embedding
        layers: list
        norm: eqx.nn.LayerNorm
        ln_f: eqx.nn.RMSNorm
        attention: eqx.nn.MultiheadAttention
        cell: eqx.nn.LSTMCell
        gru: eqx.nn.GRUCell
        conv: eqx.nn.Conv2d
        pos_embed: jax.Array
        cls_token: jax.Array

    keys = jax.random.split(jax.random.key(0), 9)
    net = Net(
        *(eqx.nn.Embedding(5, 4, key=key) for key in keys[:3]),
        [eqx.nn.Linear(4, 4, key=keys[3]), eqx.nn.PReLU(), eqx.nn.GroupNorm(2, 4)],
        eqx.nn.LayerNorm((4, 4)),
        eqx.nn.RMSNorm((4, 4)),
        eqx.nn.MultiheadAttention(2, 4, use_query_bias=True, key=keys[4]),
        eqx.nn.LSTMCell(4, 4, key=keys[5]),
        eqx.nn.GRUCell(4, 4, key=keys[6]),
        eqx.nn.Conv2d(1, 2, 3, key=keys[7]),
        jnp.zeros((7, 4)),
        jnp.zeros((1, 1, 4)),
    )
    params = eqx.filter(net, eqx.is_inexact_array)
    wanted = {
        'embedding/weight': 'embedding',
        'token_embed/weight': 'embedding',
        'wte/weight': 'embedding',
        'pos_embed': 'embedding',
        'cls_token': 'embedding',
        'norm/weight': 'scale',
        'norm/bias': 'bias',
        'ln_f/weight': 'scale',
        'ln_f/bias': 'bias',
        'layers/0/weight': 'kernel',
        'layers/0/bias': 'bias',
        'layers/2/weight': 'scale',
        'layers/2/bias': 'bias',
        'attention/query_proj/weight': 'kernel',
        'attention/query_proj/bias': 'bias',
        'attention/output_proj/weight': 'kernel',
        'cell/weight_ih': 'kernel',
        'cell/weight_hh': 'kernel',
        'cell/bias': 'bias',
        'gru/weight_ih': 'kernel',
        'gru/bias_n': 'bias',
        'conv/weight': 'kernel',
        'conv/bias': 'bias',
    }
    found = dict(named_leaves(params))
    for path, kind in wanted.items():
        assert role(path, found[path]) == kind, path
    assert not is_kernel('layers/1/negative_slope', found['layers/1/negative_slope'])


def test_equinox_vmapped():
    class Inner(eqx.Module):
        linear: eqx.nn.Linear
        norm: eqx.nn.LayerNorm

    net = eqx.filter_vmap(lambda key: Inner(eqx.nn.Linear(4, 3, key=key), eqx.nn.LayerNorm(3)))(
        jax.random.split(jax.random.key(0), 6)
    )
    found = {path: role(path, leaf) for path, leaf in named_leaves(eqx.filter(net, eqx.is_array))}
    assert found == {
        'linear/weight': 'kernel',
        'linear/bias': 'bias',
        'norm/weight': 'scale',
        'norm/bias': 'bias',
    }


BY_HAND = [
    *[('W1', (4, 3), 'kernel'), ('b1', (3,), 'bias'), ('w', (4, 3), 'kernel')],
    *[('b', (6, 3), 'bias'), ('W', (6, 4, 3), 'kernel'), ('W_1', (4, 3), 'kernel')],
    *[('0/0', (4, 3), 'kernel'), ('0/1', (3,), 'bias'), ('', (4, 3), 'kernel')],
    *[('fc/weight', (4, 3), 'kernel'), ('fc/bias', (6, 3), 'bias')],
    *[('lora_a', (8, 2), 'kernel'), ('lora_b', (2, 8), 'kernel'), ('lora_A', (8, 2), 'kernel')],
    *[('lora_B', (2, 8), 'kernel'), ('q/A', (8, 2), 'kernel'), ('q/B', (2, 8), 'kernel')],
    *[('bn/gamma', (6, 8), 'scale'), ('bn/beta', (6, 8), 'bias')],
    *[('layer_norm/w', (8,), 'scale'), ('LayerNorm_0/scale', (6, 8), 'scale')],
    *[('RMSNorm_0/weight', (6, 8), 'scale'), ('ln1/weight', (6, 8), 'scale')],
    *[('batch_norm/mean', (8,), 'statistic'), ('batch_norm/running_var', (8,), 'statistic')],
    *[('wte', (50, 8), 'embedding'), ('wpe', (9, 8), 'embedding')],
    *[('tok_emb', (50, 8), 'embedding'), ('pos_emb', (1, 9, 8), 'embedding')],
    *[('position_embeddings/weight', (9, 8), 'embedding')],
    *[('relative_position_bias_table', (49, 2), 'embedding')],
    *[('cls', (1, 1, 8), 'embedding'), ('mask_token', (1, 8), 'embedding')],
    *[('posembed_input/pos_embedding', (1, 9, 8), 'embedding')],
    *[
        ('patch_embed/kernel', (4, 4, 3, 8), 'kernel'),
        ('patch_embed/weight', (8, 3, 4, 4), 'kernel'),
    ],
    *[('attn/value', (8, 2, 4), 'kernel'), ('attn/key/bias', (2, 4), 'bias')],
    *[('attn/in_proj_weight', (24, 8), 'kernel'), ('attn/in_proj_bias', (24,), 'bias')],
    *[('gru/weight_hh_l0', (24, 8), 'kernel'), ('gru/bias_hh_l0', (24,), 'bias')],
    *[('temperature', (), 'scale'), ('logit_scale', (), 'scale'), ('layer_scale', (6, 8), 'scale')],
    *[('experts/w1', (8, 4, 16), 'kernel'), ('experts/b1', (8, 16), 'bias')],
    *[('conv/kernel', (3, 3, 1, 4), 'kernel'), ('depthwise/kernel', (3, 3, 1, 4), 'kernel')],
    *[('kernel', (5,), 'kernel'), ('conv1/kernel_0', (4, 4), 'kernel')],
]


@pytest.mark.parametrize(('path', 'shape', 'wanted'), BY_HAND)
def test_by_name_where_the_name_says_it(path, shape, wanted):
    assert role(path, jax.ShapeDtypeStruct(shape, jnp.float32)) == wanted


def test_default_leaves_dense_what_is_no_kernel_and_counts_it():
    params = {**linen('loop'), 'wte': array(20, 4), 'temperature': jnp.ones(())}
    pruner = surgery(Rule(dns_jax.global_density(0.25)), jax.random.key(0))
    _, state = jax.jit(pruner.update)(params, pruner.init(params), params)
    total = kernels = 0
    for (path, leaf), mask in zip(named_leaves(params), jax.tree.leaves(state.masks), strict=True):
        total += leaf.size
        kernels += leaf.size if path.endswith('kernel') else 0
        assert mask.ndim == (leaf.ndim if path.endswith('kernel') else 0), path
    sizes = dns_jax.measure_sizes(params, state.masks)
    assert sizes.total.parameters == total
    assert sizes.total.kept == total - kernels + round(kernels / 4)
    assert sizes.total.multiply_adds == kernels
    assert sizes.total.kept_multiply_adds == round(kernels / 4)


def test_the_choice_of_the_paper_is_one_word_away():
    params = {'fc': {'kernel': array(8, 6), 'bias': array(6)}, 'temperature': jnp.ones(())}
    pruner = surgery(Rule(layer_density(0.5)), jax.random.key(0), takes_part=has_axes)
    _, state = jax.jit(pruner.update)(params, pruner.init(params), params)
    assert dns_jax.count_kept(state.masks) == {'fc': 27}
    assert state.masks['fc']['bias'].shape == (6,)


def test_caffe_gives_biases_their_rate_however_they_are_stacked():
    params = linen()
    optimizer = caffe_sgd(1.0, momentum=0.0, weight_decay=0.0)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    for path, update in named_leaves(updates):
        wanted = -2.0 if path.endswith('bias') else -1.0
        np.testing.assert_array_equal(np.asarray(update), wanted, err_msg=path)


def test_caffe_decays_what_is_said():
    params = linen()
    optimizer = caffe_sgd(1.0, momentum=0.0, weight_decay=0.5, decay_biases=False)
    zeros = optax.tree.zeros_like(params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    for (path, update), leaf in zip(named_leaves(updates), jax.tree.leaves(params), strict=True):
        wanted = 0 * leaf if path.endswith('bias') else -0.5 * leaf
        np.testing.assert_array_equal(np.asarray(update), np.asarray(wanted), err_msg=path)
