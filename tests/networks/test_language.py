"""Tests of networks.language against a forward pass in NumPy, block by block, and its sizes."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dns_jax
from dns_jax.layers import named_leaves
from experiments.networks.language import STACKED, Block, Gpt

TINY = Gpt(characters=7, depth=3, width=8, heads=2, context=6)


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def texts(length=6, seed=0):
    return np.random.default_rng(seed).integers(0, TINY.characters, (2, length), np.int32)


def shapes_of(network, length=1, dtype=jnp.int32):
    tokens = jax.ShapeDtypeStruct((1, length), dtype)
    return jax.eval_shape(network.init, jax.random.key(0), tokens)['params']


@functools.cache
def params_of(network):
    """Numbers for all leaves, none of which is as it starts."""
    shapes = shapes_of(network)
    leaves = [
        random(leaf.shape, seed) * np.float32(0.4) + np.float32(path.endswith('scale'))
        for seed, (path, leaf) in enumerate(named_leaves(shapes))
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


@functools.partial(jax.jit, static_argnums=0)
def apply(network, tokens):
    return network.apply({'params': params_of(network)}, tokens)


def counted(network):
    """Parameters by hand: two norms, 4w² of attention and 8w² of the dense layers in a block."""
    width, letters = network.width, network.characters
    block = 2 * 2 * width + 12 * width**2 + (3 + 1 + 4 + 1) * width
    embeddings = (letters + network.context) * width
    return embeddings + network.depth * block + 2 * width + letters * width * (not network.tied)


@pytest.mark.parametrize(
    ('network', 'parameters'),
    [(Gpt(), 421_632), (Gpt(tied=True), 413_312), (Gpt(depth=6, width=384, context=256), None)],
)
def test_parameters_are_those_counted_by_hand(network, parameters):
    found = sum(leaf.size for leaf in jax.tree.leaves(shapes_of(network)))
    assert found == counted(network) == (parameters or found)


BLOCK = {
    **{'attend/kernel': (8, 24), 'project/kernel': (8, 8)},
    **{'up/kernel': (8, 32), 'down/kernel': (32, 8)},
    **{'attend/bias': (24,), 'project/bias': (8,), 'up/bias': (32,), 'down/bias': (8,)},
    **{f'norm{number}/{leaf}': (8,) for number in (1, 2) for leaf in ('scale', 'bias')},
}
ABOVE = {
    **{'tokens/embedding': (7, 8), 'positions/embedding': (6, 8)},
    **{'norm/scale': (8,), 'norm/bias': (8,)},
}


@pytest.mark.parametrize('tied', [False, True])
def test_the_leaves_and_what_they_are(tied):
    """Taken apart as the library does it: only kernels are pruned, in every block."""
    (apart,) = dns_jax.unstack(STACKED, params_of(TINY.clone(tied=tied)))
    found = dict(named_leaves(apart))
    blocks = {
        f'blocks/{block}/{leaf}': shape for block in range(3) for leaf, shape in BLOCK.items()
    }
    output = {} if tied else {'output/kernel': (8, 7)}
    assert {path: leaf.shape for path, leaf in found.items()} == {**blocks, **ABOVE, **output}
    pruned = {path for path, leaf in found.items() if dns_jax.is_kernel(path, leaf)}
    assert pruned == {
        *(path for path in blocks if path.endswith('kernel')),
        *output,
    }


def normalise(hidden, params):
    deviations = hidden - hidden.mean(-1, keepdims=True)
    spread = np.sqrt((deviations**2).mean(-1, keepdims=True) + 1e-6)
    return deviations / spread * params['scale'] + params['bias']


def dense(hidden, params):
    return hidden @ params['kernel'] + params.get('bias', 0)


def attend(text, params, heads):
    """Looks back from each character of one text, head by head."""
    mixed = dense(text, params)
    found = np.zeros_like(text)
    size = text.shape[-1] // heads
    for head in range(heads):
        query, key, value = (
            part[:, head * size : (head + 1) * size] for part in np.split(mixed, 3, axis=-1)
        )
        for place in range(len(text)):
            weights = np.exp(key[: place + 1] @ query[place] / math.sqrt(size))
            found[place, head * size : (head + 1) * size] = (
                weights @ value[: place + 1] / weights.sum()
            )
    return found


def in_numpy(network, tokens):
    """The logits of one text, in float64."""
    (params,) = dns_jax.unstack(STACKED, params_of(network))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, float), params)
    embedding = params['tokens']['embedding']
    hidden = embedding[tokens] + params['positions']['embedding'][: len(tokens)]
    for number in range(network.depth):
        block = params['blocks'][str(number)]
        seen = attend(normalise(hidden, block['norm1']), block['attend'], network.heads)
        hidden = hidden + dense(seen, block['project'])
        raised = dense(normalise(hidden, block['norm2']), block['up'])
        # GELU as GPT-2 has it.
        inner = math.sqrt(2 / math.pi) * (raised + 0.044715 * raised**3)
        hidden = hidden + dense(raised * (1 + np.tanh(inner)) / 2, block['down'])
    hidden = normalise(hidden, params['norm'])
    return hidden @ embedding.T if network.tied else dense(hidden, params['output'])


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('length', [6, 4])
def test_logits_are_those_in_numpy(tied, length):
    network, tokens = TINY.clone(tied=tied), texts(length)
    logits = apply(network, tokens)
    assert (logits.shape, logits.dtype) == ((2, length, 7), jnp.float32)
    wanted = np.stack([in_numpy(network, text) for text in tokens])
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


def test_the_scan_computes_what_its_blocks_do_one_by_one():
    params, tokens = params_of(TINY), texts()
    (apart,) = dns_jax.unstack(STACKED, params)

    @jax.jit
    def one_by_one(tokens):
        hidden = (
            jnp.asarray(params['tokens']['embedding'])[tokens]
            + params['positions']['embedding'][None]
        )
        for number in range(TINY.depth):
            block = Block(TINY.heads, 0.02, jnp.float32)
            hidden, _ = block.apply({'params': apart['blocks'][str(number)]}, hidden, None)
        hidden = nn.LayerNorm().apply({'params': params['norm']}, hidden)
        return hidden @ params['output']['kernel']

    np.testing.assert_allclose(apply(TINY, tokens), one_by_one(tokens), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('place', range(6))
def test_a_character_changes_no_earlier_logits(place):
    tokens = texts(seed=1)
    changed = tokens.copy()
    changed[:, place] = (changed[:, place] + 1) % TINY.characters
    before, after = apply(TINY, tokens), apply(TINY, changed)
    np.testing.assert_array_equal(before[:, :place], after[:, :place])
    assert (np.abs(before[:, place:] - after[:, place:]).max(-1) > 1e-3).all()


def test_half_precision_is_within_its_rounding_and_logits_are_whole():
    tokens = texts(seed=2)
    with jax.numpy_dtype_promotion('standard'):  # which Flax takes for granted
        logits = apply(TINY.clone(dtype=jnp.bfloat16), tokens)
    whole = apply(TINY, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, whole, atol=0.05 * np.abs(whole).max())
    assert not np.array_equal(logits, whole)


def test_every_layer_computes_in_half_precision():
    (apart,) = dns_jax.unstack(STACKED, params_of(TINY))
    block, hidden = Block(TINY.heads, 0.02, jnp.bfloat16), jnp.zeros((1, 6, 8), jnp.bfloat16)
    calls = {
        'of the network': lambda: TINY.clone(dtype=jnp.bfloat16).apply(
            {'params': params_of(TINY)}, texts(), capture_intermediates=True
        ),
        'of a block': lambda: block.apply(
            {'params': apart['blocks']['0']}, hidden, None, capture_intermediates=True
        ),
    }
    with jax.numpy_dtype_promotion('standard'):
        found = {
            name: dict(named_leaves(jax.eval_shape(call)[1]['intermediates']))
            for name, call in calls.items()
        }
    assert found['of the network'].pop('__call__/0').dtype == jnp.float32
    # Two embeddings, the last norm, and the output; four layers, two norms, and what they give.
    assert [len(outputs) for outputs in found.values()] == [4, 7]
    dtypes = {output.dtype for outputs in found.values() for output in outputs.values()}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}


def test_weights_start_as_those_of_gpt2():
    """Normal numbers of 0.02, less where many layers write to one sum; no block is as another."""
    network = Gpt(depth=8, width=32)
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    for path, leaf in named_leaves(params):
        if path.endswith(('kernel', 'embedding')):
            writes = path.endswith(('project/kernel', 'down/kernel'))
            spread = np.asarray(leaf).std() / 0.02 * (4 if writes else 1)
            # Of 2,048 weights, the fewest, 5 % are three times the error of the spread.
            assert spread == pytest.approx(1, abs=0.05), path
        else:
            np.testing.assert_array_equal(leaf, float(path.endswith('scale')))
    kernel = params['blocks']['attend']['kernel']
    assert len({float(block[0, 0]) for block in kernel}) == 8


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'width': 10, 'heads': 4}, 'width=10 must be a multiple of heads=4'),
        *(
            ({name: 0}, f'{name}=0 must be at least 1')
            for name in ('characters', 'depth', 'width', 'heads', 'context')
        ),
    ],
)
def test_networks_that_there_are_not(options, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(TINY.clone(**options))


def test_texts_that_it_cannot_read():
    with pytest.raises(ValueError, match=r'shape \(1, 7\) must have no more than context=6'):
        shapes_of(TINY, length=7)
    with pytest.raises(ValueError, match='dtype float32 must be integers'):
        shapes_of(TINY, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r'tokens of shape \(6,\) .* must be integers, \(batch'):
        jax.eval_shape(TINY.init, jax.random.key(0), jnp.zeros(6, jnp.int32))


def test_unrolled_it_is_the_same_network_block_by_block():
    unrolled, (apart,) = TINY.clone(unrolled=True), dns_jax.unstack(STACKED, params_of(TINY))
    assert jax.tree.map(np.shape, apart) == jax.tree.map(np.shape, shapes_of(unrolled))
    got = unrolled.apply({'params': apart}, texts())
    np.testing.assert_allclose(got, apply(TINY, texts()), rtol=1e-5, atol=1e-6)
    assert 'scan' not in str(jax.make_jaxpr(unrolled.apply)({'params': apart}, texts()))
