"""Three networks that learn the paper's XOR under surgery."""

import jax

from experiments import xor
from experiments.networks.logic import Xor

KEY = jax.random.key(3)


def make_points():
    return xor.make_points(KEY, 2_000, 0.1)


def make_params():
    places = make_points().places[:1]
    init = jax.vmap(lambda key: Xor().init(key, places)['params'])
    return init(jax.random.split(KEY, 3))


def make_surgery():
    return xor.make_pruner('surgery', 0.5, 200)


def train():
    keys = jax.random.split(KEY, 3)
    return xor.train_networks(make_surgery(), make_params(), keys, make_points(), 200)
