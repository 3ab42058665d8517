"""Tests of inference.shrink on random networks with random masks: outputs are the masked one's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dns_jax import apply_masks
from dns_jax.inference.shrink import shrink

ACTIVATIONS = (
    jax.nn.relu,
    jax.nn.gelu,
    jnp.tanh,
    jax.nn.silu,
    lambda x: jax.nn.gelu(x, approximate=False),
    lambda x: jnp.exp(-jnp.square(x)),
    lambda x: jnp.where(x > 0, x, jnp.expm1(jnp.minimum(x, 0))),
    lambda x: jnp.maximum(x, 0.1 * x),
    lambda x: x**3 / (1 + x**2),
    lambda x: jnp.log1p(jnp.abs(x)) * jnp.sign(x),
    lambda x: jnp.clip(x, -1, 0.5),
    lambda x: jax.nn.leaky_relu(jax.lax.stop_gradient(x)),
    lambda x: jax.checkpoint(jnp.sin)(x),
    lambda x: jax.nn.sigmoid(x) * (x >= 0.2).astype(jnp.float32),
)


class Network:
    """Layers, one after the other, each a function of all params and of what comes before."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.params, self.layers = {}, []

    def flip(self, chance=0.5):
        return self.random.random() < chance

    def choose(self, *options):
        return options[self.random.integers(len(options))]

    def weight(self, *shape):
        """Makes a weight and says its name."""
        name = f'w{len(self.params):02}'
        scale = np.sqrt(np.prod(shape[:-1])) if len(shape) > 1 else 2
        self.params[name] = (self.random.normal(size=shape) / scale).astype(np.float32)
        return name

    def masks(self):
        """Random masks with dead rows, columns, blocks and heads."""
        severe = self.choose(0.1, 0.3, 0.6)

        def mask(leaf):
            if self.flip(0.15):
                return np.ones((), bool)
            made = self.random.random(leaf.shape) < self.choose(1, 1, 1, 0.7, 0.3)
            for axis, length in enumerate(leaf.shape):
                if self.flip(severe):
                    dead = self.random.random(length) < self.choose(0.2, 0.5)
                    np.moveaxis(made, axis, 0)[dead] = False
            if leaf.ndim > 1 and self.flip(severe / 2):
                made[tuple(slice(None, length // 2) for length in leaf.shape)] = False
            return made

        return jax.tree.map(mask, self.params)

    def bias(self, units):
        name = self.weight(units)
        return lambda params, x: x + params[name].reshape((1,) * (x.ndim - 1) + (-1,))

    def batch_norm(self, units):
        mean, scale, shift, log = (self.weight(units) for _ in range(4))

        def layer(params, x):
            m, s, b, v = (
                params[name].reshape((1,) * (x.ndim - 1) + (-1,))
                for name in (mean, scale, shift, log)
            )
            return (x - m) * jax.lax.rsqrt(jnp.square(v) + 0.1) * s + b

        return layer

    def activation(self, units):
        del units
        function = self.choose(*ACTIVATIONS)
        return lambda params, x: function(x)

    def layer_norm(self, units):
        scale, shift, root = self.weight(units), self.weight(units), self.flip()

        def layer(params, x):
            centred = x if root else x - x.mean(-1, keepdims=True)
            x = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 0.1)
            shape = (1,) * (x.ndim - 1) + (-1,)
            return x * params[scale].reshape(shape) + params[shift].reshape(shape)

        return layer

    def dense(self, inputs, units):
        name, turned = self.weight(inputs, units), self.flip(0.2)
        if turned:
            self.params[name] = self.params[name].T

        def layer(params, x):
            return jnp.einsum('...i,oi->...o', x, params[name]) if turned else x @ params[name]

        return layer

    def convolution(self, inputs, units, same):
        groups = self.choose(*(g for g in (1, 1, 1, 2, 3) if inputs % g == units % g == 0))
        if units % inputs == 0 and self.flip():
            groups = inputs
        size = self.choose((1, 1), (3, 3), (2, 3))
        name = self.weight(*size, inputs // groups, units)
        settings = {'padding': 'SAME', 'window_strides': (1, 1)}
        if not same:
            settings['padding'] = self.choose('SAME', 'VALID', ((1, 0), (0, 2)))
            settings['window_strides'] = self.choose((1, 1), (2, 2), (1, 2))
            settings['rhs_dilation'] = self.choose((1, 1), (1, 1), (2, 1))
            if not isinstance(settings['padding'], str):
                settings['lhs_dilation'] = self.choose((1, 1), (1, 2))
        return lambda params, x: jax.lax.conv_general_dilated(
            x,
            params[name],
            **settings,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            feature_group_count=groups,
        )

    def pool(self):
        size, step = self.choose((2, 2), (1, 3)), self.choose((1, 1), (2, 2))
        padding = self.choose('SAME', 'VALID')
        name = self.choose('max', 'sum')

        def layer(params, x):
            del params
            first, function = {'max': (-jnp.inf, jax.lax.max), 'sum': (0.0, jax.lax.add)}[name]
            return jax.lax.reduce_window(x, first, function, (1, *size, 1), (1, *step, 1), padding)

        return layer

    def attention(self, units):
        heads, size = self.choose(2, 3), self.choose(1, 2, 4)
        plain = self.flip()
        shape = (heads * size,) if plain else (heads, size)
        names = [self.weight(units, *shape) for _ in range(3)]
        biases = [self.weight(*shape) for _ in range(3)]
        out = self.weight(*shape, units)
        causal = self.flip(0.3)

        def layer(params, x):
            batch, length, _ = x.shape
            q, k, v = (
                (
                    jnp.tensordot(x, params[name], 1)
                    + params[bias].reshape((1, 1, *params[bias].shape))
                ).reshape(batch, length, heads, size)
                for name, bias in zip(names, biases, strict=True)
            )
            scores = jnp.einsum('bqhd,bkhd->bhqk', q, k) / np.float32(size**0.5)
            if causal:
                mask = jnp.tril(jnp.ones((1, 1, length, length), bool))
                scores = jnp.where(mask, scores, np.float32(-1e9))
            mixed = jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(scores), v)
            if plain:
                return mixed.reshape(batch, length, heads * size) @ params[out]
            return jnp.einsum('bqhd,hdo->bqo', mixed, params[out])

        return layer

    def run(self, layers, params, x):
        for layer in layers:
            x = layer(params, x)
        return x

    def block(self, kind, units):
        """A few layers that keep the shape."""
        middle = self.choose(units, 4, 6)
        if kind == 'image':
            layers = [self.convolution(units, middle, same=True)]
        else:
            layers = [self.dense(units, middle)]
        layers += [self.some(middle) for _ in range(self.random.integers(3))]
        last = self.convolution(middle, units, same=True) if kind == 'image' else None
        layers.append(last or self.dense(middle, units))
        if kind == 'tokens' and self.flip(0.7):
            layers = [self.attention(units)]
        if self.flip():
            layers.insert(0, self.some(units))
        how = self.choose('residual', 'residual', 'gate', 'concatenate')
        if how == 'concatenate':
            return 2 * units, lambda params, x: jnp.concatenate(
                [x, self.run(layers, params, x)], -1
            )
        if how == 'gate':
            return units, lambda params, x: x * jax.nn.sigmoid(self.run(layers, params, x))
        return units, lambda params, x: x + self.run(layers, params, x)

    def some(self, units):
        kinds = [self.bias, self.bias, self.batch_norm, self.activation, self.activation]
        return self.choose(*kinds, self.layer_norm)(units)

    def move(self, units):
        """Layers that move entries."""
        how = self.choose('split', 'turn', 'pad', 'slice', 'flip', 'take')
        if how == 'split':
            return units, lambda params, x: jnp.concatenate(jnp.split(x, 2, -1)[::-1], -1)
        if how == 'turn' and units % 2 == 0:

            def turn(params, x):
                parted = x.reshape(*x.shape[:-1], units // 2, 2)
                return jnp.swapaxes(parted, -1, -2).reshape(x.shape)

            return units, turn
        if how == 'pad':
            edges = self.choose((1, 2, 0), (0, 1, 1))
            added = 3 if edges[2] == 0 else units
            return units + added, lambda params, x: jax.lax.pad(
                x, np.float32(0.5), [(0, 0, 0)] * (x.ndim - 1) + [edges]
            )
        if how == 'slice':
            return (units + 1) // 2, lambda params, x: x[..., ::2]
        if how == 'take':
            return 3, lambda params, x: jnp.take(x, np.array([1, 0, 1]), -1, mode='clip')
        return units, lambda params, x: jnp.flip(x, -1)

    def build(self):
        """Gives the function and inputs."""
        kind = self.choose('image', 'vector', 'tokens')
        units = self.choose(4, 6)
        layers = []
        if kind == 'image':
            inputs = self.random.normal(size=(2, 6, 7, 3)).astype(np.float32)
            layers.append(self.convolution(3, units, same=False))
        elif kind == 'tokens' and self.flip():
            inputs, table = self.random.integers(0, 7, (2, 4)), self.weight(7, units)
            layers.append(lambda params, x: jnp.take(params[table], x, axis=0))
        else:
            shape = (3, 5) if kind == 'vector' else (2, 4, 5)
            inputs = self.random.normal(size=shape).astype(np.float32)
            layers.append(self.dense(5, units))
        for _ in range(self.random.integers(2, 6)):
            if units > 1 and units % 2 == 0 and self.flip(0.2):
                units, layer = self.move(units)
            elif self.flip() and units <= 12:
                units, layer = self.block(kind, units)
            elif kind == 'image' and self.flip(0.2):
                layer = self.pool()
            elif self.flip(0.3):
                after = self.choose(4, 6)
                if kind == 'image':
                    layer = self.convolution(units, after, same=True)
                else:
                    layer = self.dense(units, after)
                units = after
            else:
                layer = self.some(units)
            layers.append(layer)
        return self.finish(kind, layers, inputs)

    def finish(self, kind, layers, inputs):
        if kind != 'vector':
            how = self.choose('flatten', 'mean', 'max', 'first', 'all')
            ends = {
                'flatten': lambda params, x: x.reshape(x.shape[0], -1),
                'mean': lambda params, x: x.mean(tuple(range(1, x.ndim - 1))),
                'max': lambda params, x: x.max(tuple(range(1, x.ndim - 1))),
                'first': lambda params, x: x[(slice(None), *[0] * (x.ndim - 2))],
                'all': lambda params, x: x,
            }
            layers.append(ends[how])
        layers = list(layers)
        before = jax.eval_shape(lambda params, x: self.run(layers, params, x), self.params, inputs)
        layers.append(self.dense(before.shape[-1], 3))
        if self.flip():
            layers.append(self.bias(3))
        if self.flip(0.2):
            layers.append(lambda params, x: jax.nn.log_softmax(x))
        return (lambda params, x: self.run(layers, params, x)), inputs


def check(seed):
    """Compares a random network, and says how many entries its weights have, before and after."""
    network = Network(seed)
    apply, inputs = network.build()
    masks = network.masks()
    small = shrink(apply, network.params, masks, inputs)
    wanted = jax.jit(apply)(apply_masks(network.params, masks), inputs)
    given = jax.jit(small.apply)(small.params, inputs)
    assert given.dtype == wanted.dtype
    scale = max(1, np.abs(wanted).max())
    np.testing.assert_allclose(given / scale, wanted / scale, atol=1e-5, err_msg=f'seed {seed}')
    for path, (before, after) in small.leaves.items():
        assert small.params[path].shape == after
        assert all(0 < one <= other for one, other in zip(after, before, strict=True))
    return [sum(np.size(leaf) for leaf in tree.values()) for tree in (network.params, small.params)]


def test_random_networks():
    before, after = np.sum([check(seed) for seed in range(30)], 0)
    assert after < 0.6 * before


@pytest.mark.slow
@pytest.mark.parametrize('first', range(30, 300, 30))
def test_more_random_networks(first):
    for seed in range(first, first + 30):
        check(seed)
