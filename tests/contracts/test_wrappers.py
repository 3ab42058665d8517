"""Tests that surgery works with what wraps optimizers in optax, inside of it and before it.

A case trains a network with surgery in its place, and by hand with nothing there. Where a wrapper
allows only one place, a test shows what happens in the other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import (
    BANDS,
    STEPS,
    Run,
    Setting,
    check_equal,
    count_changes,
    cut,
    get_masks,
    leniently,
    noise,
    start,
    strictly,
    train,
    train_by_hand,
)
from factories import FACTORIES, WRAPPERS
from situations import slow_but

from dns_jax import apply_masks

Transformation = optax.GradientTransformation
BAD_STEPS = {4, 5, 11}
FIRST = {'fc1': True, 'fc2': False}
FIRST_BAND = {'fc1': BANDS['fc1']}


def sgd(rate=0.1):
    return optax.sgd(rate)


def before(surgery, rate=0.1):
    return optax.chain(surgery, sgd(rate))


def some_bad():
    """Batches of which a few give a gradient of NaN."""
    return [
        jax.tree.map(lambda leaf: leaf * np.float32(np.nan), batch) if count in BAD_STEPS else batch
        for count, batch in enumerate(noise())
    ]


def gather_masks(state):
    """The masks of all parts of the network, and True for weights that have none."""
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), start())
    for _, part in optax.tree.get_all_with_path(state, 'masks'):
        masks |= {
            layer: leaves
            for layer, leaves in part.items()
            if not isinstance(leaves, optax.MaskedNode)
        }
    return masks


def unravel_masks(state):
    """The masks of the network from the one vector that there is in `flatten`."""
    _, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(lambda leaf: leaf != 0, start()))
    return unravel(get_masks(state))


def raise_rate(count, state):
    return optax.tree.set(state, learning_rate=jnp.float32(0.3)) if count == 10 else state


def rate_was_raised(run):
    return float(optax.tree.get(run.state, 'learning_rate')) == np.float32(0.3)


def inject(factory, **arguments):
    return optax.inject_hyperparams(factory)(**arguments)


def inject_statefully(factory, **arguments):
    with pytest.warns(DeprecationWarning, match='inject_stateful_hyperparams is deprecated'):
        return optax.inject_stateful_hyperparams(factory)(**arguments)


def every_third(step):
    return step % 3 == 2


def every_three(optimizer):
    return optax.MultiSteps(optimizer, 3).gradient_transformation()


def sharpen(optimizer, opaque):
    """SAM; if not opaque, every other step takes the gradient at weights that are disturbed."""
    adversary = optax.chain(optax.contrib.normalize(), sgd(0.05))
    return optax.contrib.sam(optimizer, adversary, opaque_mode=opaque)


def plateau():
    return optax.contrib.reduce_on_plateau(factor=0.5, patience=4)


def monitor():
    measure = optax.measure_with_ema(optax.tree.norm, decay=0.5)
    return optax.monitor({'norm': optax.tree.norm, 'mean': measure})


def evaluated(run, state):
    """The averaged weights, with the masks of those that were trained."""
    return apply_masks(optax.contrib.schedule_free_eval_params(state, run.params), run.masks[-1])


class Case(NamedTuple):
    """A wrapper in use, and what is special about it."""

    make: Callable[[Transformation], Transformation]  # of surgery, or of nothing by hand
    setting: Setting = Setting()
    holds: Callable[[Run], bool] = lambda run: True
    final: Callable[[Run], Any] = lambda run: run.params  # the network to keep


LOOKAHEAD = Setting(
    params=optax.LookaheadParams.init_synced(start()), weights_of=lambda params: params.fast
)
LABELS = {'fc1': 'a', 'fc2': 'b'}
THIRDS = Setting(due=lambda count, layer: every_third(count))
LINE_SEARCH = Setting(extra=('value', 'grad', 'value_fn'))

CASES = {
    'MultiSteps: inside, masks change with the weights': Case(
        lambda surgery: every_three(before(surgery, 0.2)),
        THIRDS,
        lambda run: int(run.state.inner_opt_state[0].count) == STEPS // 3,
    ),
    'MultiSteps: before': Case(lambda surgery: optax.chain(surgery, every_three(sgd(0.2)))),
    'apply_if_finite: inside': Case(
        lambda surgery: optax.apply_if_finite(before(surgery), 5),
        Setting(batches=some_bad(), due=lambda count, layer: count not in BAD_STEPS),
        lambda run: int(optax.tree.get(run.state, 'count')) == STEPS - len(BAD_STEPS),
    ),
    'apply_if_finite: before': Case(
        lambda surgery: optax.chain(surgery, optax.apply_if_finite(sgd(), 5)),
        Setting(batches=some_bad()),
        lambda run: int(optax.tree.get(run.state, 'count')) == STEPS,
    ),
    'chain: after the optimizer': Case(lambda surgery: optax.chain(sgd(), optax.chain(surgery))),
    'conditionally_mask: inside': Case(
        lambda surgery: optax.conditionally_mask(before(surgery), every_third), THIRDS
    ),
    'conditionally_transform: inside, at every third step': Case(
        lambda surgery: before(optax.conditionally_transform(surgery, every_third)), THIRDS
    ),
    'flatten: inside, one layer in all': Case(
        lambda surgery: optax.flatten(before(surgery)),
        Setting(bands=dict.fromkeys(('', 'fc1', 'fc2'), (0.4, 0.5)), masks_of=unravel_masks),
    ),
    'flatten: before': Case(lambda surgery: optax.chain(surgery, optax.flatten(sgd()))),
    'freeze: before, frozen weights are pruned': Case(
        lambda surgery: optax.chain(before(surgery), optax.freeze({'fc1': False, 'fc2': True})),
        holds=lambda run: not run.masks[-1]['fc2']['kernel'].all(),
    ),
    'inject_hyperparams: inside': Case(
        lambda surgery: inject(
            lambda learning_rate: before(surgery, learning_rate), learning_rate=0.1
        ),
        Setting(between=raise_rate),
        rate_was_raised,
    ),
    'inject_hyperparams: before': Case(
        lambda surgery: optax.chain(surgery, inject(optax.sgd, learning_rate=0.1)),
        Setting(between=raise_rate),
        rate_was_raised,
    ),
    'inject_stateful_hyperparams: before': Case(
        lambda surgery: optax.chain(
            surgery,
            inject_statefully(optax.sgd, learning_rate=optax.linear_schedule(0.3, 0.1, STEPS)),
        )
    ),
    'lookahead: inside': Case(lambda surgery: optax.lookahead(before(surgery), 3, 0.5), LOOKAHEAD),
    'lookahead: before, masks of fast weights and of slow; the one place with reset_state': Case(
        lambda surgery: optax.chain(surgery, optax.lookahead(sgd(), 3, 0.5, reset_state=True)),
        LOOKAHEAD._replace(masks_of=lambda state: get_masks(state).fast),
    ),
    'masked: inside, masks of a part': Case(
        lambda surgery: before(optax.masked(surgery, FIRST)),
        Setting(bands=FIRST_BAND, masks_of=gather_masks),
    ),
    'mechanize: inside': Case(
        lambda surgery: optax.contrib.mechanize(before(surgery, 1.0), s_init=0.1)
    ),
    'mechanize: before': Case(
        lambda surgery: optax.chain(surgery, optax.contrib.mechanize(sgd(1.0), s_init=0.1))
    ),
    'monitor: before': Case(
        lambda surgery: optax.chain(before(surgery), monitor()),
        holds=lambda run: float(optax.tree.get(run.state, 'norm')) > 0,
    ),
    'multi_transform: inside one of two': Case(
        lambda surgery: optax.multi_transform({'a': before(surgery), 'b': optax.adam(0.1)}, LABELS),
        Setting(bands=FIRST_BAND, masks_of=gather_masks),
    ),
    'named_chain: before': Case(
        lambda surgery: optax.named_chain(('surgery', surgery), ('sgd', sgd())),
        holds=lambda run: 'masks' in run.state['surgery']._fields,
    ),
    'partition: inside both, masks in two places': Case(
        lambda surgery: optax.partition({'a': before(surgery), 'b': before(surgery, 0.2)}, LABELS),
        Setting(masks_of=gather_masks),
    ),
    'partition: before': Case(
        lambda surgery: optax.chain(
            surgery, optax.partition({'a': sgd(), 'b': optax.adam(0.1)}, LABELS)
        )
    ),
    'reduce_on_plateau: before': Case(
        lambda surgery: optax.chain(before(surgery, 0.2), plateau()),
        Setting(extra=('value',)),
        lambda run: float(optax.tree.get(run.state, 'scale')) <= 0.5,
    ),
    'sam: inside, opaque': Case(
        lambda surgery: sharpen(before(surgery), opaque=True), Setting(extra=('grad_fn',))
    ),
    'sam: before, the one place if not opaque': Case(
        lambda surgery: optax.chain(surgery, sharpen(sgd(), opaque=False))
    ),
    'scale_by_backtracking_linesearch: before': Case(
        lambda surgery: optax.chain(before(surgery), optax.scale_by_backtracking_linesearch(5)),
        LINE_SEARCH,
    ),
    'schedule_free: inside': Case(
        lambda surgery: optax.contrib.schedule_free(before(surgery, 0.3), 0.3),
        final=lambda run: evaluated(run, run.state),
    ),
    'schedule_free: before': Case(
        lambda surgery: optax.chain(surgery, optax.contrib.schedule_free(sgd(0.3), 0.3)),
        final=lambda run: evaluated(run, run.state[1]),
    ),
    'selective_transform: inside, masks of a part': Case(
        lambda surgery: optax.selective_transform(
            before(surgery), freeze_mask={'fc1': False, 'fc2': True}
        ),
        Setting(bands=FIRST_BAND, masks_of=gather_masks),
    ),
    'split_real_and_imaginary: inside': Case(
        lambda surgery: optax.contrib.split_real_and_imaginary(before(surgery))
    ),
    'with_extra_args_support: inside': Case(
        lambda surgery: before(optax.with_extra_args_support(surgery))
    ),
}


# Before a wrapper surgery stands as it does before an optimizer, and of those that hold it some do
# the same as others.
SHOWN = [
    name
    for name in CASES
    if (': before' not in name or name.startswith(('lookahead', 'reduce_on_plateau')))
    and name.split(':')[0]
    not in ('conditionally_transform', 'mechanize', 'multi_transform', 'selective_transform')
]


@pytest.mark.parametrize('name', slow_but(CASES, *SHOWN))
def test_wrapper(name, compat):
    compat('wrappers', *name.split(', ', 1))
    case = CASES[name]
    run = train(leniently(case.make(strictly(cut(case.setting.bands)))), case.setting)
    by_hand = train_by_hand(leniently(case.make(optax.identity())), case.setting)
    check_equal(run, by_hand)
    chex.assert_trees_all_close(case.final(run), case.final(by_hand), rtol=1e-5, atol=1e-6)
    # One, but for a monitor, whose state has no measurements at first.
    assert run.traces == by_hand.traces == (2 if name.startswith('monitor') else 1)
    assert min(count_changes(run)) > 0
    assert case.holds(run)


@pytest.mark.parametrize(
    ('make', 'params'),
    [
        (
            lambda surgery: optax.lookahead(before(surgery), 3, 0.5, reset_state=True),
            LOOKAHEAD.params,
        ),
        (lambda surgery: sharpen(before(surgery), opaque=False), start()),
    ],
    ids=['lookahead that resets', 'sam that is not opaque'],
)
def test_wrappers_that_do_sums_with_states_cannot_hold_surgery(make, params):
    # They multiply both of two states to choose one. No key can be multiplied: better an error
    # than masks that are numbers. Before them surgery works, as the cases show.
    optimizer = leniently(make(cut()))
    state = optimizer.init(params)
    with pytest.raises(TypeError, match='key<fry>'):
        jax.eval_shape(optimizer.update, start(), state, params)


def test_split_real_and_imaginary_gives_each_part_a_mask(compat):
    compat('wrappers', 'split_real_and_imaginary: complex weights', 'a mask for each part')
    real, imaginary = np.array([0.1, 1.0, 2.0, 0.2]), np.array([0.1, 0.2, 3.0, 4.0])
    params = {'kernel': jnp.asarray(real + 1j * imaginary, jnp.complex64)}
    surgery = cut({'kernel': (0.5, 0.6)})
    optimizer = leniently(optax.contrib.split_real_and_imaginary(before(strictly(surgery))))
    updates, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    masks = get_masks(state)['kernel']
    np.testing.assert_array_equal(masks.real, real >= 0.5)
    np.testing.assert_array_equal(masks.imaginary, imaginary >= 0.5)
    np.testing.assert_allclose(updates['kernel'], -0.1 * (real + 1j * imaginary), rtol=1e-6)
    with pytest.raises(TypeError, match='complex64'):
        surgery.init(params)


def test_every_wrapper_is_in_a_case():
    names = {name.split(':')[0] for name in CASES}
    assert {*WRAPPERS} <= names
    assert names <= FACTORIES.keys() | {'MultiSteps'}
