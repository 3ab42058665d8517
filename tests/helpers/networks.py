"""Random small chains with masks, and what they give in NumPy, from the definitions."""

import jax
import numpy as np
from hypothesis import strategies as st

from dns_jax.inference.chain import Convolution, Dense, Flatten, MaxPool, Relu, Select

LENET5 = (
    *(Convolution('conv1'), MaxPool(2), Convolution('conv2'), MaxPool(2)),
    *(Flatten(), Dense('fc1'), Relu(), Dense('fc2')),
)
LENET300 = (Flatten(), Dense('fc1'), Relu(), Dense('fc2'), Relu(), Dense('fc3'))
SMALL_CHAIN = (Convolution('a'), Relu(), Flatten(), Dense('b'))
SMALL_PARAMS = {
    'a': {'kernel': np.eye(3, dtype=np.float32)[..., None, None], 'bias': np.ones(1, np.float32)},
    'b': {'kernel': np.eye(4, dtype=np.float32), 'bias': np.zeros(4, np.float32)},
}


def forward(chain, params, example):
    """What the network gives for one example, in float64."""
    x = np.asarray(example, np.float64)
    for layer in chain:
        if isinstance(layer, Dense | Convolution):
            kernel, bias = (
                np.asarray(params[layer.name][leaf], float) for leaf in ('kernel', 'bias')
            )
        match layer:
            case Dense():
                x = x @ kernel + bias
            case Convolution():
                rows, columns = kernel.shape[:2]
                if layer.padding == 'SAME':  # the odd one out goes to the end
                    above, left = (rows - 1) // 2, (columns - 1) // 2
                    x = np.pad(x, ((above, rows - 1 - above), (left, columns - 1 - left), (0, 0)))
                windows = np.lib.stride_tricks.sliding_window_view(x, (rows, columns), (0, 1))
                x = np.einsum('yxcij,ijcf->yxf', windows, kernel) + bias
            case MaxPool(size):
                height, width = x.shape[0] // size, x.shape[1] // size
                windows = x[: height * size, : width * size]
                x = windows.reshape(height, size, width, size, -1).max((1, 3))
            case Relu():
                x = np.where(x > 0, x, 0)
            case Flatten():
                x = np.array(list(x.flat))
            case Select(indices):
                x = np.stack([x[..., index] for index in indices], -1)
    return x


def random_weights(random, shape, density):
    """A kernel and bias with masks; columns and rows are often wholly pruned."""
    weights = {'kernel': random.normal(size=shape), 'bias': random.normal(size=shape[-1:])}
    masks = {name: random.random(leaf.shape) < density for name, leaf in weights.items()}
    for axis in (-1, -2):
        lengths = [1] * len(shape)
        lengths[axis] = shape[axis]
        masks['kernel'] &= random.random(lengths) < random.choice([0.3, 0.7, 1])
    if random.random() < 0.2:  # kept whole
        masks['bias'] = np.array(True)
    return {name: leaf.astype(np.float32) for name, leaf in weights.items()}, masks


@st.composite
def networks(draw, paddings=('VALID', 'SAME')):
    """A chain, its params, its masks and the shape of an example."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0, 0.05, 0.3, 1]))
    chain, params, masks = [], {}, {}

    def add(layer, shape):
        chain.append(layer)
        params[layer.name], masks[layer.name] = random_weights(random, shape, density)

    channels = draw(st.integers(1, 3))
    shape = first = (draw(st.integers(6, 9)), draw(st.integers(6, 9)), channels)
    if draw(st.booleans()):
        for number in range(draw(st.integers(1, 2))):
            padding = draw(st.sampled_from(paddings))
            size = draw(st.integers(1, min(3, *shape[:2])))
            filters = draw(st.integers(1, 4))
            add(Convolution(f'conv{number}', padding), (size, size, shape[-1], filters))
            lost = 0 if padding == 'SAME' else size - 1
            shape = (shape[0] - lost, shape[1] - lost, filters)
            if draw(st.booleans()):
                chain.append(Relu())
            if min(shape[:2]) > 3 and draw(st.booleans()):
                pooling = draw(st.integers(2, 3))
                chain.append(MaxPool(pooling))
                shape = (shape[0] // pooling, shape[1] // pooling, filters)
            if filters > 1 and draw(st.booleans()):
                chain.append(Select(tuple(range(1, filters))))
                shape = (*shape[:2], filters - 1)
    chain.append(Flatten())
    inputs = int(np.prod(shape))
    for number in range(draw(st.integers(1, 3))):
        units = draw(st.integers(1, 5))
        add(Dense(f'fc{number}'), (inputs, units))
        inputs = units
        if draw(st.booleans()):
            chain.append(Relu())
    return tuple(chain), params, masks, first


def full(masks, params):
    """Masks as they come back: those of leaves that take no part in full."""
    return jax.tree.map(
        lambda mask, leaf: np.asarray(mask) if np.ndim(mask) else np.ones(np.shape(leaf), bool),
        masks,
        params,
    )


def random_network(seed=0, scale=0.05):
    """A convolution, a layer that it is flattened into, and one that is kept whole."""
    random = np.random.default_rng(seed)
    shapes = {'a': (3, 3, 2, 6), 'b': (4 * 6, 30), 'c': (30, 5)}
    params = {
        layer: {
            'kernel': random.normal(size=shape).astype(np.float32),
            'bias': random.normal(size=shape[-1]).astype(np.float32),
        }
        for layer, shape in shapes.items()
    }
    masks = jax.tree.map(lambda leaf: random.random(leaf.shape) < scale, params)
    masks['c'] = {'kernel': np.array(True), 'bias': random.random(5) < 0.5}
    return params, masks
