"""Tests that every optimizer and building block of optax trains with surgery as it does by hand.

They are found by looking into optax, so that a new one is tested, or fails, by itself.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import STEPS, Setting, check_equal, count_changes, cut, leniently, train, train_by_hand
from factories import BLOCKS, FACTORIES, OPTIMIZERS, WRAPPERS, required
from situations import slow_but

RATE = 0.1
# What an optimizer is given besides RATE or in place of it, so that within 20 steps weights cross
# their thresholds in both directions.
ARGUMENTS = {
    'adadelta': {'learning_rate': 20.0},
    'adafactor': {'learning_rate': RATE, 'min_dim_size_to_factor': 2},
    'adagrad': {'learning_rate': 0.3},
    'cocob': {'alpha': 1.0},
    'dadapt_adamw': {'estim_lr0': 0.1},
    'dog': {'init_step': ('distance', 0.3)},
    'dpsgd': {'learning_rate': 0.4, 'l2_norm_clip': 4.0, 'noise_multiplier': 0.1, 'seed': 0},
    'galore': {'rank': 2},
    'lars': {'learning_rate': 50.0},
    'lbfgs': {'memory_size': 3},
    'momo_adam': {'learning_rate': 0.3},
    'noisy_sgd': {'key': 0},
    'prodigy': {'estim_lr0': 0.1},
    'radam': {'learning_rate': 0.5},
    'schedule_free_adamw': {'learning_rate': 0.3},
    'schedule_free_sgd': {'learning_rate': 0.3},
    'sm3': {'learning_rate': 0.3},
}
# What its update wants besides the gradient, the state and the params.
EXTRA = {
    'lbfgs': ('value', 'grad', 'value_fn'),
    'momo': ('value',),
    'momo_adam': ('value',),
    'polyak_sgd': ('value',),
    'sophia': ('obj_fn',),
}
PER_EXAMPLE = ['dpsgd']  # wants the gradient of each example
# Those that warn of themselves, all else that warns fails.
WARNINGS = {'dpsgd': '"seed" is deprecated', 'optimistic_adam': '`optimistic_adam` is deprecated'}
# What building blocks are given that do not work without.
BLOCK_ARGUMENTS = {
    'adaptive_grad_clip': (0.3,),
    'add_noise': (0.1, 0.5, 0),
    'apply_every': (3,),
    'clip': (0.5,),
    'clip_by_block_rms': (0.5,),
    'clip_by_global_norm': (0.5,),
    'ema': (0.9,),
    'freeze': (False,),
    'scale': (1.5,),
    'scale_by_learning_rate': (-1.0,),
    'scale_by_schedule': (lambda count: 1 / (1 + count),),
    'snapshot': ('norm', optax.tree.norm),
    'stateless': (lambda updates, params: updates,),
    'stateless_with_tree_map': (lambda update, weights: update,),
    'trace': (0.9,),
}
SKIPPED = {
    'differentially_private_aggregate': 'dpsgd is this and a rate',
    'hutchinson_estimator_diag_hessian': 'gives a Hessian, not updates; sophia has it inside',
    'measure_with_ema': 'gives a measurement, not updates; a wrapper has it inside',
    'scale_by_backtracking_linesearch': 'needs the loss; is among the wrappers',
    'scale_by_zoom_linesearch': 'needs the loss; lbfgs has it inside',
}


def make(name):
    arguments = dict.fromkeys(required(FACTORIES[name]).keys() & {'learning_rate'}, RATE)
    warns = contextlib.nullcontext()
    if name in WARNINGS:
        warns = pytest.warns(DeprecationWarning, match=WARNINGS[name])
    with warns:
        return leniently(FACTORIES[name](**arguments | ARGUMENTS.get(name, {})))


# Those that want more than a gradient, and of the others a few.
SHOWN = (*EXTRA, *PER_EXAMPLE, 'adamw', 'muon', 'schedule_free_sgd')


@pytest.mark.parametrize('name', slow_but(OPTIMIZERS, *SHOWN))
def test_optimizer(name, compat):
    compat('optimizers', name)
    setting = Setting(extra=EXTRA.get(name, ()))
    if name in PER_EXAMPLE:
        apart = [jax.tree.map(lambda leaf: leaf[:, None], batch) for batch in setting.batches]
        setting = setting._replace(batches=apart, per_example=True)
    run = train(optax.chain(cut(), make(name)), setting)
    check_equal(run, train_by_hand(make(name), setting))
    assert run.traces == 1
    pruned, spliced = count_changes(run)
    assert pruned > 0
    assert spliced > 0
    compat('optimizers', name, f'after the first step {pruned} pruned, {spliced} spliced')


def squared_distance(params, target):
    return sum(jnp.sum((layer['kernel'] - target) ** 2) for layer in params.values()) / 2


def test_building_blocks(compat):
    # One network with a layer for each block makes one program to compile. The heart of an
    # optimizer, like scale_by_adam, was tested with it.
    hearts = {f'scale_by_{name}' for name in OPTIMIZERS}
    names = [name for name in BLOCKS if name not in hearts | SKIPPED.keys()]
    compat('optimizers', 'building blocks', f'{len(names)}, each in a chain with sgd for one layer')
    random = np.random.default_rng(0)
    kernels = 0.7 * random.normal(size=(len(names), 3, 4)).astype(np.float32)
    setting = Setting(
        params={name: {'kernel': kernel} for name, kernel in zip(names, kernels, strict=True)},
        loss=squared_distance,
        batches=[random.normal(size=(3, 4)).astype(np.float32) for _ in range(STEPS)],
        bands=dict.fromkeys(names, (0.45, 0.55)),
        extra=('value',),
    )

    def blocks():
        parts = {
            name: optax.chain(FACTORIES[name](*BLOCK_ARGUMENTS.get(name, ())), optax.sgd(RATE))
            for name in names
        }
        return leniently(optax.partition(parts, {name: {'kernel': name} for name in names}))

    run = train(optax.chain(cut(setting.bands), blocks()), setting)
    check_equal(run, train_by_hand(blocks(), setting))
    assert run.traces == 1
    changed = [
        name
        for name in names
        if sum(count_changes(run._replace(masks=[masks[name] for masks in run.masks])))
    ]
    assert len(changed) > 0.8 * len(names)


def test_tables_name_what_there_is():
    assert {'sgd', 'adamw', 'lbfgs', 'nadam', 'polyak_sgd', 'dog', 'muon'} <= {*OPTIMIZERS}
    assert {'lookahead', 'partition', 'chain', 'inject_hyperparams', 'sam'} <= {*WRAPPERS}
    for table in (ARGUMENTS, EXTRA, PER_EXAMPLE, WARNINGS):
        assert {*table} <= {*OPTIMIZERS}
    assert {*BLOCK_ARGUMENTS, *SKIPPED} <= {*BLOCKS}
    assert not {*BLOCK_ARGUMENTS} & {*SKIPPED}
