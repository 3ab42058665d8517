"""Tests of training that breaks down: it is named, foreseen, and gone back from."""

import dataclasses
import json
import re
import signal

import opened
import pytest
from tiny_runs import FIELDS, EveryThird, outcome, run_in_short_stretches, steps_of

from experiments.training import divergence, side_by_side
from experiments.training.phases import Stopped

pytestmark = pytest.mark.usefixtures('tiny')
# Decay turns the sign of all weights at every step, and makes them larger, twice too often.
TOO_FAST = FIELDS | {'reference_steps': 20, 'surgery_steps': 60, 'finetuning_steps': 0}
TOO_FAST |= {'record_every': 20, 'weight_decay': 500.0, 'learning_rate': 'fixed:0.01', 'stop': '10'}


# A threshold above all weights.
EMPTYING = TOO_FAST | {'weight_decay': 0.0, 'c_rate': 'fc1:50,fc2:0', 'surgery_steps': 40}


def test_a_loss_that_is_not_finite_is_named(make_config, tmp_path, compat):
    compat('faults', 'a loss that is not finite', 'named with step and densities; last state kept')
    with pytest.raises(divergence.Diverged) as caught:
        opened.do(make_config(tmp_path / 'run', **TOO_FAST))
    message = str(caught.value)
    found = re.match(
        r'the loss is not finite at step (\d+) of the surgery phase; the densities are fc1 99.99%, '
        r'fc2 100.00%; the last good checkpoint is that of step 20 in ',
        message,
    )
    assert 20 < int(found[1]) <= 40
    # Nothing is saved or told of what came after.
    assert steps_of(tmp_path / 'run', 'surgery') == [20]
    last = json.loads((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[-1])
    assert (last['phase'], last['step']) == ('surgery', 20)


def test_weights_that_break_after_the_last_loss_are_not_saved(make_config, tmp_path):
    """The loss of a chunk's last step is that of the weights before it."""
    every_step = {'reference_steps': 2, 'record_every': 1, 'checkpoint_every': 1}
    rates = {'reference_learning_rate': 'fixed:1e38', 'bias_scale': 1e9}
    with pytest.raises(
        divergence.Diverged, match=r'a weight of fc1, fc2 is not finite at step 1 of the reference'
    ):
        opened.do(make_config(tmp_path / 'run', **every_step, **rates))
    assert steps_of(tmp_path / 'run', 'reference') == []


def test_a_layer_that_surgery_empties_is_named_and_foreseen(
    make_config, tmp_path, warnings, compat
):
    compat('faults', 'a layer all pruned', 'foreseen; named with density and step')
    with pytest.raises(
        divergence.Diverged,
        match=r'surgery has left nothing of fc1 at step 1 of the surgery phase; the densities are '
        r'fc1 0.00%, fc2 \d+.\d+%; the last good checkpoint is none of this phase',
    ):
        opened.do(make_config(tmp_path / 'run', **EMPTYING))
    (warning,) = warnings
    assert warning.startswith('the threshold of fc1, ')


@pytest.mark.parametrize('fields', [TOO_FAST, EMPTYING])
def test_a_run_that_rolls_back_comes_to_its_end(make_config, tmp_path, warnings, fields, compat):
    emptied = fields is EMPTYING
    cause = 'a layer all pruned' if emptied else 'a loss that is not finite'
    what = 'comes to its end' if emptied else 'comes to its end, stopped or not'
    compat('faults', f'{cause}, --on_divergence=rollback', what)
    fields = fields | {'on_divergence': 'rollback'}
    (summary,) = opened.do(make_config(tmp_path / 'whole', **fields))
    assert 1 <= summary['setbacks']['surgery'] <= divergence.MOST_SETBACKS
    told = [one for one in warnings if 'going on from step' in one]
    assert 1 <= len(told) <= divergence.MOST_SETBACKS
    assert ('masks as they are there' in told[-1]) == emptied
    # With masks that stay as they were before the first step, nothing is pruned.
    assert (summary['kept'] == summary['parameters']) == emptied
    if emptied:
        return
    # Stopped after three calls, which may all have gone back, a run forgets no setback.
    config = make_config(tmp_path / 'run', reference=str(tmp_path / 'whole'), **fields)
    opened_run = opened.open_run(config)
    dense = side_by_side.train_references([opened_run], [])
    task = opened_run.task
    config = dataclasses.replace(config, resume=True)
    signals = EveryThird([signal.SIGTERM])
    assert run_in_short_stretches(config, side_by_side.train_surgery, dense, stopping=signals)
    (again,) = opened.do(config)
    records, network = outcome(tmp_path / 'whole')
    surgery = [line for line in records.splitlines(keepends=True) if '"surgery"' in line]
    assert outcome(tmp_path / 'run') == (''.join(surgery), network)
    # The saved reference is the very same network.
    for name in ('reference_error', 'reference_validation_error'):
        assert again[name] == summary[name]
    assert again['reference_error'] == task.measure(*dense, task.dataset.test)
    assert steps_of(tmp_path / 'run', 'reference') == []


def test_a_signal_saves_runs_that_wait_for_one_behind(make_config, tmp_path, monkeypatch, warnings):
    """Of two side by side the first goes back at its third step; then a signal comes."""
    fields = {'record_every': 1, 'checkpoint_every': 10, 'on_divergence': 'rollback'}
    configs = [make_config(tmp_path / f'{seed}', seed=seed, **fields) for seed in (0, 1)]
    stopping, looks = [], []

    def find_breakdown(chunk, kept, params):
        looks.append(chunk)
        if len(looks) == 7:
            stopping.append(signal.SIGTERM)
        return divergence.Breakdown(1, 'played', False) if len(looks) == 5 else None

    monkeypatch.setattr(divergence, 'find_breakdown', find_breakdown)
    with pytest.raises(Stopped):
        side_by_side.train_references(opened.open_runs(*configs), stopping)
    assert max(steps_of(tmp_path / '0', 'reference')) == 1
    assert max(steps_of(tmp_path / '1', 'reference')) == 3


def test_a_run_goes_back_only_so_often(make_config, tmp_path, warnings):
    fields = TOO_FAST | {'weight_decay': 1e30, 'on_divergence': 'rollback'}
    with pytest.raises(divergence.Diverged, match='; the run had gone back 3 times'):
        opened.do(make_config(tmp_path / 'run', **fields))
    assert len(warnings) == 3
    assert all('going on from step 0 with half the learning rate' in one for one in warnings)
