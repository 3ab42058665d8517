"""Tests of runs under soft thresholds, and of those whose surgery begins from scratch."""

import dataclasses

import jax
import numpy as np
import opened
import optax
import pytest
from run_flags import BY_DENSITY

from dns_jax.files.sparse import load_sparse
from dns_jax.layers import named_leaves, parent_path
from experiments.training import side_by_side
from experiments.training.checkpoints import Checkpoints

SOFT = BY_DENSITY | {'soft_threshold': True, 'prune_biases': False}


def softened(state):
    """What the network computes with, by NumPy, of a state of surgery."""
    surgery = optax.tree.get(state.opt_state, 'SurgeryState')
    masks = dict(named_leaves(surgery.masks))
    found = {}
    for path, leaf in named_leaves(state.params):
        leaf = np.asarray(leaf)
        if np.ndim(masks[path]):
            low = max(float(surgery.thresholds[parent_path(path)].low), 0.0)
            leaf = np.sign(leaf) * np.maximum(np.abs(leaf) - low, 0) * np.asarray(masks[path])
        found[path] = leaf
    return found


def last_of_surgery(run):
    """The state of the last checkpoint of surgery, which holds the dense weights."""
    like = run.start(run.plan.surgery.make_optimizer(run.task.shapes), run.initial)
    with Checkpoints(run.folder / 'checkpoints' / 'surgery') as checkpoints:
        return checkpoints.restore(like)[1]


@pytest.mark.parametrize('finetuning_steps', [0, 2])
def test_what_the_network_computed_with_is_kept_and_trained_on(make_config, finetuning_steps):
    run = opened.open_run(make_config(**SOFT, finetuning_steps=finetuning_steps))
    operated = side_by_side.train_surgery([run], side_by_side.train_references([run], []), [])
    expected = softened(last_of_surgery(run))
    assert any((leaf != 0).any() for leaf in expected.values())
    for path, leaf in named_leaves(operated[0].params):
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-6, atol=1e-7)
    before = jax.tree.map(np.array, operated[0].params)
    (final,) = side_by_side.finetune([run], operated, [])
    same = jax.tree.map(np.array_equal, before, jax.tree.map(np.asarray, final.params))
    assert all(jax.tree.leaves(same)) == (finetuning_steps == 0)


def test_a_resumed_run_softens_once(make_config):
    config = make_config(**SOFT, finetuning_steps=0)
    (summary,) = opened.do(config)
    first = load_sparse(f'{config.workdir}/pruned.safetensors').params
    (again,) = opened.do(dataclasses.replace(config, resume=True))
    jax.tree.map(
        np.testing.assert_array_equal,
        first,
        load_sparse(f'{config.workdir}/pruned.safetensors').params,
    )
    assert again['test_error'] == summary['test_error']


def test_surgery_from_scratch_begins_with_the_first_weights(make_config):
    config = make_config(**BY_DENSITY, reference_steps=0)
    run = opened.open_run(config)
    (dense,) = side_by_side.train_references([run], [])
    jax.tree.map(np.testing.assert_array_equal, dense.params, run.initial.params)
    side_by_side.train_surgery([run], [dense], [])
    # Another run may start from there.
    other = opened.open_run(make_config(**BY_DENSITY, reference_steps=0, reference=config.workdir))
    jax.tree.map(np.testing.assert_array_equal, other.reference.params, run.initial.params)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'importance': 'taylor'}, '--importance=taylor'),
        ({'structure': 'fc1:units'}, '--structure=fc1:units'),
        ({'quantiser': 'signs'}, '--quantiser=signs'),
    ],
)
def test_thresholds_of_anything_but_weights_are_refused(make_config, fields, message):
    with pytest.raises(ValueError, match=f'{message} has no meaning .*--soft_threshold'):
        make_config(**SOFT, **fields)


def test_masks_that_stay_after_a_setback_keep_their_thresholds(make_config):
    config = make_config(**SOFT)
    run = opened.open_run(config)
    optimizer = run.plan.surgery.make_optimizer(run.task.shapes, (True,))
    state = run.start(optimizer, run.initial)
    gradients = jax.tree.map(np.ones_like, run.initial.params)
    _, new = jax.jit(optimizer.update)(gradients, state.opt_state, state.params)
    before, after = (optax.tree.get(each, 'SurgeryState') for each in (state.opt_state, new))
    jax.tree.map(np.testing.assert_array_equal, before.thresholds, after.thresholds)
    jax.tree.map(np.testing.assert_array_equal, before.masks, after.masks)
