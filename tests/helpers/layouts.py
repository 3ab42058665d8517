"""Networks with stacked layers, and their twins in which each layer is written down by itself."""

import functools

import chex
import jax
import numpy as np

import dns_jax
from dns_jax import Rule, importance, pruners, surgery, update_probability
from dns_jax._trees import nest_leaves
from dns_jax.layers import named_leaves
from dns_jax.thresholds import weight_std

STEPS = 10
SHAPES = {'fc/kernel': (8, 6), 'fc/bias': (6,), 'norm/scale': (6,)}
OUTER = {'embed/embedding': (9, 8), 'head/kernel': (8, 5), 'head/bias': (5,)}
# Of each layout, what is said of it, the paths of its stacked leaves in the twin, from the outside
# in, and the axis of each stack. A path has the number of a slice in place of {}.
LAYOUTS = {
    'a scan': ({'blocks': 0}, {'blocks/{}/': (3,)}, (0,)),
    'a scan along axis 1': ({'blocks': 1}, {'blocks/{}/': (3,)}, (1,)),
    'a scan of 12': ({'blocks': 0}, {'blocks/{}/': (12,)}, (0,)),
    'one layer': ({'blocks': 0}, {'blocks/{}/': (1,)}, (0,)),
    'an ensemble': ({'': 0}, {'{}/': (3,)}, (0,)),
    'scans in a scan': (
        {'stages': 0, 'stages/blocks': 0},
        {'stages/{}/blocks/{}/': (2, 3)},
        (0, 0),
    ),
    'an ensemble of scans': ({'': 0, 'blocks': 1}, {'{}/blocks/{}/': (2, 3)}, (0, 1)),
    'two scans by one pattern': ({'*coder': 0}, {'encoder/{}/': (2,), 'decoder/{}/': (3,)}, (0,)),
    'one stack of a leaf': ({'w': 0}, {'w/{}/': (4,)}, (0,)),
}


def spread(path, counts):
    """The paths of all slices, the last count running fastest."""
    return [path.format(*index) for index in np.ndindex(*counts)]


def paths_of(layout):
    """Maps the path of each leaf, as it is stacked, to those of its slices and their counts."""
    _, nodes, _ = LAYOUTS[layout]
    found = {}
    for node, counts in nodes.items():
        shapes = {'': (7, 5)} if layout == 'one stack of a leaf' else SHAPES
        for path in shapes:
            whole = (node + path).rstrip('/')
            stacked = '/'.join(part for part in whole.split('/') if part != '{}')
            found[stacked] = spread(whole, counts), counts, shapes[path]
    whole_tree = layout in ('an ensemble', 'an ensemble of scans')
    members = next(iter(nodes.values()))[0]
    for path, shape in OUTER.items():
        if whole_tree:
            found[path] = spread('{}/' + path, (members,)), (members,), shape
        else:
            found[path] = [path], (), shape
    return found


def twin(layout, seed):
    """The network with every layer by itself."""
    leaves = []
    for slices, _, shape in paths_of(layout).values():
        for number, path in enumerate(slices):
            random = np.random.default_rng([seed, number, *path.encode()])
            scale = random.choice([0.1, 1.0, 3.0])  # layers of unequal scale
            leaves.append((path, (scale * random.normal(size=shape)).astype(np.float32)))
    return nest_leaves(leaves)


def stack(layout, tree, lead=0):
    """Stacks the twin by NumPy; `lead` axes in front, such as of steps, stay there."""
    found, axes = dict(named_leaves(tree)), LAYOUTS[layout][2]
    leaves = []
    for path, (slices, counts, shape) in paths_of(layout).items():
        arrays = [np.asarray(found[name]) for name in slices]
        arrays = [
            array
            if array.ndim > lead
            else np.broadcast_to(
                array.reshape(array.shape + (1,) * len(shape)), array.shape + shape
            )
            for array in arrays
        ]
        for length, axis in reversed(list(zip(counts, axes, strict=False))):
            groups = range(0, len(arrays), length)
            arrays = [np.stack(arrays[at : at + length], axis + lead) for at in groups]
        leaves.append((path, arrays[0]))
    return nest_leaves(leaves)


DENSITY = dns_jax.polynomial_density(0.2, 1, 7)
ALWAYS = update_probability(power=0, stop=9)
MAKERS = {
    'mean_std': lambda key, **kw: surgery(Rule(dns_jax.mean_std(0.3), 0.6), key, **kw),
    'mean_std, asked again': lambda key, **kw: surgery(
        Rule(dns_jax.mean_std(0.3), 0.6, 3), key, **kw
    ),
    'weight_std': lambda key, **kw: surgery(Rule(weight_std(0.8), 1, 2), key, **kw),
    'layer_density': lambda key, **kw: surgery(
        Rule(dns_jax.layer_density(DENSITY), update_probability(0.1, stop=9)), key, **kw
    ),
    'norm': lambda key, **kw: surgery(
        Rule(dns_jax.global_density(DENSITY), ALWAYS), key, splicing=False, **kw
    ),
    'rms': lambda key, **kw: surgery(
        Rule(dns_jax.global_density(DENSITY, 'rms', 0.2), ALWAYS, 3), key, **kw
    ),
    'erk': lambda key, **kw: surgery(Rule(dns_jax.global_density(DENSITY, 'erk'), 0.7), key, **kw),
    'prune_to': lambda key, **kw: dns_jax.prune_to(density=0.2, steps=8, key=key, **kw),
    'compression': lambda key, **kw: dns_jax.prune_to(compression=2.1, steps=8, start=1, **kw),
    'biases too': lambda key, **kw: surgery(
        Rule(dns_jax.global_density(0.3)), key, takes_part=dns_jax.has_axes, **kw
    ),
    'by gradient': lambda key, **kw: surgery(
        Rule(dns_jax.global_density(0.3)), key, importance=importance.gradient, **kw
    ),
    'by taylor': lambda key, **kw: pruners.iterative(
        0.2, [1, 3, 7], key, importance=importance.taylor, **kw
    ),
    'by chance': lambda key, **kw: pruners.gradual(
        0.2, 0, 9, 3, key, importance=importance.chance, **kw
    ),
    'Han': lambda key, **kw: pruners.han(0.5, [0, 2, 6], key, **kw),
    'SET': lambda key, **kw: pruners.regrow(0.3, 2, 9, key, growth=importance.chance, **kw),
    'RigL': lambda key, **kw: pruners.regrow(0.3, 2, 9, key, 0.5, **kw),
}


def inputs(layout):
    """Weights and gradients of every step, of the twin."""
    trees = [twin(layout, step) for step in range(2 * STEPS)]
    return tuple(
        jax.tree.map(lambda *leaves: np.stack(leaves), *part)
        for part in (trees[:STEPS], trees[STEPS:])
    )


def states_of(pruner, weights, gradients):
    def step(state, now):
        state = pruner.update(now[1], state, now[0])[1]
        return state, state

    first = pruner.init(jax.tree.map(lambda leaf: leaf[0], weights))
    return jax.jit(lambda: jax.lax.scan(step, first, (weights, gradients))[1])()


@functools.cache
def both(layout, name, seed=0):
    """The states after each step, of the network as it is stacked and of the twin."""
    weights, gradients = inputs(layout)
    key, make = jax.random.key(seed), MAKERS[name]
    apart = states_of(make(key), weights, gradients)
    stacked = states_of(
        make(key, stacked=LAYOUTS[layout][0]),
        stack(layout, weights, 1),
        stack(layout, gradients, 1),
    )
    return stacked, apart


def check_equal(layout, stacked, apart):
    chex.assert_trees_all_equal(stacked.thresholds, apart.thresholds)
    masks = stack(layout, apart.masks, 1)
    for (path, mask), (_, wanted) in zip(
        named_leaves(stacked.masks), named_leaves(masks), strict=True
    ):
        wanted = np.asarray(wanted)
        if mask.ndim == 1:  # takes no part, at any step
            assert wanted.all(), path
        else:
            np.testing.assert_array_equal(np.asarray(mask), wanted, err_msg=path)
