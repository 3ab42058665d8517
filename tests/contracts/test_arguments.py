"""One table of invalid arguments, of everything that makes a schedule, rule, pruner or optimizer.

A row is a factory, arguments that are fine, and one that is not, with values it refuses; the
message is held to its last letter, as it must name the argument, its value and what was wanted.
"""

import ast
import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import dns_jax
from dns_jax import (
    Rule,
    average_weights,
    caffe_inv,
    caffe_multistep,
    caffe_poly,
    caffe_sgd,
    caffe_sigmoid,
    caffe_step,
    densities,
    global_density,
    importance,
    layer_density,
    log_linear_density,
    mean_std,
    optimizers,
    polynomial_density,
    prune,
    prune_to,
    pruners,
    schedules,
    sparse_training,
    surgery,
    thresholds,
    update_at,
    update_probability,
)
from dns_jax.pruners import by_rules, regrowing
from dns_jax.thresholds import weight_std

KEY = jax.random.key(0)
RULE = Rule(mean_std(1.0), update_probability())


class Row(NamedTuple):
    factory: Any
    fine: dict
    argument: str
    values: tuple
    wanted: str  # what the message says of the argument; {} stands for the value's repr
    error: type = ValueError


AT_LEAST = 'must be finite in float32 and at least {}, but is {{}}'.format
STEP = 'must be a whole number from {} to 2147483647, but is {{}}'.format
NOT_STEPS = (-1, 1.5, 2**31, math.nan, math.inf, -math.inf)
SHARE = 'must be in (0, 1], but is {}'
BAND = 'must be in [0, 1), but is {}'
LARGEST = float(jnp.finfo(jnp.float32).max)
NOT_SHARES = (0, -0.5, 1.5, math.nan, math.inf)
NOT_BANDS = (1, 2, -0.1, math.nan)
KEYS = (
    *(jax.random.PRNGKey(0), jnp.zeros(2, jnp.uint32), jax.random.split(KEY, 2)),
    *(0, 1.5, None, 'key', object()),
)
RAMP = {'final': 0.5, 'start': 1, 'end': 9}
GRADUAL = {'density': 0.5, 'start': 0, 'end': 10, 'every': 2, 'key': KEY}
REGROW = {'density': 0.5, 'every': 1, 'stop': 9, 'key': KEY}
ROUNDS = {'rounds': [0], 'key': KEY}
PARTS = {'pruner': optax.identity(), 'optimizer': optax.identity()}


def ramps(factory):
    """What both ramps of a density refuse."""
    return [
        *(Row(factory, RAMP, name, NOT_SHARES, SHARE) for name in ('final', 'initial')),
        Row(factory, RAMP, 'start', NOT_STEPS, STEP(0)),
        Row(factory, RAMP, 'end', (1, *NOT_STEPS), STEP(2)),
    ]


SCHEDULES = [
    *(
        Row(update_probability, {}, name, (-1, -1e-4, math.nan, math.inf, 1e39), AT_LEAST(0))
        for name in ('gamma', 'power')
    ),
    *(Row(update_probability, {}, name, NOT_STEPS, STEP(0)) for name in ('start', 'stop')),
    Row(update_probability, {'start': 10}, 'stop', (9, *NOT_STEPS), STEP(10)),
    Row(update_at, {}, 'steps', ([], ()), 'must name at least one step, but is {}'),
    *ramps(polynomial_density),
    *ramps(log_linear_density),
    *(
        Row(
            *(factory, fine, 'power', (0, -1.0, math.inf, math.nan, 1e39)),
            'must be finite in float32 and above 0, but is {}',
        )
        for factory, fine in [(polynomial_density, RAMP), (caffe_poly, {'base': 1, 'steps': 1})]
    ),
    Row(caffe_step, {'base': 1, 'gamma': 1}, 'step_size', (0, *NOT_STEPS), STEP(1)),
    Row(caffe_inv, {'base': 1, 'power': 1}, 'gamma', (-1, -1e-9, math.nan, 1e39), AT_LEAST(0)),
    Row(caffe_poly, {'base': 1, 'power': 1}, 'steps', (0, *NOT_STEPS), STEP(1)),
    Row(caffe_sigmoid, {'base': 1, 'gamma': 1}, 'middle', NOT_STEPS, STEP(0)),
    Row(
        *(caffe_multistep, {'base': 1, 'gamma': 1}, 'boundaries', ([5, 3], [1, 2, 1])),
        'must ascend, but are {}',
    ),
]

RULES = [
    Row(
        *(mean_std, {}, 'c_rate', (math.nan, math.inf, -math.inf, 1e39, -1e39)),
        'must be finite in float32, but is {}',
    ),
    Row(weight_std, {}, 'c_rate', (-0.1, math.nan, math.inf, 1e39), AT_LEAST(0)),
    *(Row(rule, {}, 'density', NOT_SHARES, SHARE) for rule in (layer_density, global_density)),
    Row(
        global_density,
        {'density': 0.5},
        'floor',
        (-0.1, 1.5, math.nan),
        'must be in [0, 1], but is {}',
    ),
    Row(mean_std, {'c_rate': 0.5}, 'hysteresis', NOT_BANDS, BAND),
    *(
        Row(rule, {'density': 0.5}, 'hysteresis', NOT_BANDS, BAND)
        for rule in (layer_density, global_density)
    ),
    Row(
        *(global_density, {'density': 0.5}, 'score', ('lamp', 'std', '', None)),
        "must be 'norm', 'rms' or 'erk', but is {}",
    ),
]
# The key, the layers that take part and the importance are checked by surgery for all of them.
PRUNERS = [
    Row(
        *(surgery, {'rules': RULE}, 'key', KEYS),
        'must be one typed PRNG key, from jax.random.key, but is {}',
        TypeError,
    ),
    Row(pruners.han, ROUNDS, 'c_rate', (-0.1, {'*': -0.1}, math.nan), AT_LEAST(0)),
    Row(pruners.iterative, ROUNDS, 'density', (*NOT_SHARES, {'*': -0.5}), SHARE),
    Row(pruners.one_shot, {'step': 0, 'key': KEY}, 'density', (*NOT_SHARES, {'a': 2}), SHARE),
    Row(pruners.straight_through, {'key': KEY}, 'density', (*NOT_SHARES, {'*': 0}), SHARE),
    *(
        Row(pruner, GRADUAL, *wanted)
        for pruner in (pruners.gradual, pruners.ac_dc)
        for wanted in (
            ('density', (*NOT_SHARES, {'*': 0}), SHARE),
            ('every', (0, *NOT_STEPS), STEP(1)),
            ('start', NOT_STEPS, STEP(0)),
            ('end', (0, *NOT_STEPS), STEP(1)),
        )
    ),
    Row(pruners.regrow, REGROW, 'density', (*NOT_SHARES, {'*': 0}), SHARE),
    *(
        Row(pruner, {first: 0.5, 'key': KEY}, 'rounds', values, wanted)
        for pruner, first in [(pruners.han, 'c_rate'), (pruners.iterative, 'density')]
        for values, wanted in [
            (([], ()), 'must name at least one step, but is {}'),
            (([3, -1],), STEP(0).format(-1)),
            (([1.5, 3],), STEP(0).format(1.5)),
        ]
    ),
    Row(
        *(pruners.iterative, {'density': 0.5, 'key': KEY}, 'rounds', ([5, 5], [3, 5, 3])),
        'must not name a step twice, but is {}',
    ),
    Row(pruners.one_shot, {'density': 0.5, 'key': KEY}, 'step', NOT_STEPS, STEP(0)),
    Row(pruners.regrow, REGROW, 'every', (0, *NOT_STEPS), STEP(1)),
    Row(pruners.regrow, REGROW, 'stop', NOT_STEPS, STEP(0)),
    Row(pruners.regrow, REGROW, 'drop', (1.5, -0.1, math.nan), 'must be in [0, 1], but is {}'),
    Row(prune_to, {'steps': 9}, 'compression', (0.5, math.nan, math.inf, 1e39), AT_LEAST(1)),
    Row(prune_to, {'steps': 9}, 'density', NOT_SHARES, SHARE),
    Row(prune_to, {'density': 0.5}, 'steps', (0, *NOT_STEPS), STEP(1)),
    Row(prune_to, {'density': 0.5, 'steps': 9}, 'start', NOT_STEPS, STEP(0)),
]

OTHERS = [
    Row(caffe_sgd, {'learning_rate': 0.1}, 'momentum', (1, -0.5, math.nan), BAND),
    *(
        Row(
            caffe_sgd,
            {'learning_rate': 0.1},
            name,
            (-1e-3, math.nan),
            'must be at least 0, but is {}',
        )
        for name in ('weight_decay', 'bias_scale')
    ),
    Row(average_weights, {}, 'decay', (1, -0.5, math.nan), BAND),
    Row(sparse_training.decay_pruned, PARTS, 'rate', (-1e-4, math.nan, 1e39), AT_LEAST(0)),
    Row(
        *(sparse_training.slow_pruned, PARTS, 'share', (-0.1, 1.1, math.nan)),
        'must be in [0, 1], but is {}',
    ),
    Row(
        sparse_training.scale_dropout,
        {'masks': jnp.ones(3, bool)},
        'rate',
        (-0.1, 1.0, math.nan),
        BAND,
    ),
]

TABLE = [*SCHEDULES, *RULES, *PRUNERS, *OTHERS]


def innermost(value):
    """The number in a table of one pattern."""
    return next(iter(value.values())) if isinstance(value, dict) else value


@pytest.mark.parametrize(
    ('row', 'value'),
    [
        pytest.param(row, value, id=f'{row.factory.__name__}-{row.argument}-{number}')
        for row in TABLE
        for number, value in enumerate(row.values)
    ],
)
def test_bad_arguments(row, value):
    with pytest.raises(row.error) as caught:
        row.factory(**{**row.fine, row.argument: value})
    assert str(caught.value) == f'{row.argument} {row.wanted.format(repr(innermost(value)))}'


# Values at the very ends of their ranges, that are accepted.
ENDS = [
    (update_probability, {'gamma': 0, 'power': 0, 'stop': 7, 'start': 7}),
    (update_probability, {'gamma': LARGEST, 'power': LARGEST}),
    (update_at, {'steps': [0]}),
    (polynomial_density, {'final': 1, 'start': 0, 'end': 1, 'initial': 1, 'power': 1e-9}),
    (log_linear_density, {'final': 1e-9, 'start': 0, 'end': 1, 'initial': 1}),
    (caffe_step, {'base': 1, 'gamma': 1, 'step_size': 1}),
    (caffe_inv, {'base': 1, 'gamma': 0, 'power': 1}),
    (caffe_poly, {'base': 1, 'power': 1e-9, 'steps': 1}),
    (caffe_poly, {'base': 1, 'power': LARGEST, 'steps': 1}),
    (caffe_sigmoid, {'base': 1, 'gamma': -1, 'middle': 0}),
    (caffe_multistep, {'base': 1, 'gamma': 1, 'boundaries': [3, 3]}),
    (mean_std, {'c_rate': -1e9, 'hysteresis': 0}),
    (mean_std, {'c_rate': -LARGEST}),
    (weight_std, {'c_rate': 0}),
    (layer_density, {'density': 1, 'hysteresis': 0}),
    (global_density, {'density': 1, 'hysteresis': 0}),
    (surgery, {'rules': RULE._replace(refresh_every=1), 'key': KEY}),
    (pruners.han, {'c_rate': 0, 'rounds': [0], 'key': KEY}),
    (pruners.one_shot, {'density': 1, 'step': 0, 'key': KEY}),
    (pruners.iterative, {'density': 1, 'rounds': [0], 'key': KEY}),
    (pruners.straight_through, {'density': 1, 'key': KEY}),
    *(
        (pruner, {'density': 1, 'start': 0, 'end': 1, 'every': 1, 'key': KEY})
        for pruner in (pruners.gradual, pruners.ac_dc)
    ),
    *((pruners.regrow, {**REGROW, 'density': 1, 'drop': drop}) for drop in (0, 1)),
    *((prune_to, {'steps': 1, name: 1}) for name in ('compression', 'density')),
    (caffe_sgd, {'learning_rate': 0, 'momentum': 0, 'weight_decay': 0, 'bias_scale': 0}),
    (average_weights, {'decay': 0}),
    (sparse_training.decay_pruned, {**PARTS, 'rate': 0}),
    (sparse_training.slow_pruned, {**PARTS, 'share': 0}),
    (sparse_training.scale_dropout, {'rate': 0, 'masks': jnp.ones(3, bool)}),
]


@pytest.mark.parametrize(
    ('factory', 'arguments'), ENDS, ids=[factory.__name__ for factory, _ in ENDS]
)
def test_the_ends_of_the_ranges_are_fine(factory, arguments):
    assert factory(**arguments) is not None


@pytest.mark.parametrize('steps', [[-1], [3, -2], [math.nan], [1, 1.5], [2**31]])
def test_the_first_bad_step_is_named(steps):
    for factory in (update_at, functools.partial(caffe_multistep, 1.0, 0.5)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the next line says which
            factory(steps)
        name = 'steps' if factory is update_at else 'boundaries'
        assert str(caught.value) == f'{name} {STEP(0).format(steps[-1])}'


@pytest.mark.parametrize('every', [-1, -250, 1.5, 2**31])
def test_rules_are_named_by_their_patterns(every):
    for rules, pattern in [
        (RULE._replace(refresh_every=every), '*'),
        ({'fc2': RULE, 'fc1': RULE._replace(refresh_every=every)}, 'fc1'),
    ]:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the next line says which
            surgery(rules, KEY)
        message = f'refresh_every of {pattern!r} {STEP(0).format(every)}'
        assert str(caught.value) == message
    with pytest.raises(
        ValueError, match=r"^refresh_every of '\*' must be at least 1 .*is 0$"
    ) as no:
        surgery(RULE, KEY, importance=importance.taylor)
    assert f'importance={importance.taylor!r}' in str(no.value)


# These refuse for others, or what an update is given: test_training has that.
ELSEWHERE = {'train_kept', 'check_finite'}


def factories():
    """The public functions of these modules that refuse something, by their docstrings."""
    rules = schedules, thresholds, densities, prune, by_rules, regrowing
    for module in (*rules, optimizers, sparse_training):
        tree = ast.parse(inspect.getsource(module))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
                function = getattr(module, node.name)
                if 'Raises:\n' in inspect.getdoc(function):
                    yield function
    yield dns_jax.surgery


def test_every_factory_that_refuses_something_is_in_the_table():
    wanted = {function.__name__ for function in factories()} - ELSEWHERE
    assert wanted == {row.factory.__name__ for row in TABLE}
    assert wanted == {factory.__name__ for factory, _ in ENDS}
