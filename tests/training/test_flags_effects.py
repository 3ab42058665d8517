"""Tests of what every flag of a run does to it."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import opened
import pytest
from run_flags import (
    BY_DENSITY,
    EFFECTIVE,
    EFFECTIVE_BY_DENSITY,
    EFFECTIVE_WITH,
    FIELDS,
    PLACES_AND_SWITCHES,
    TRIED_APART,
)

from experiments.training import side_by_side
from experiments.training.pruning import PRUNERS


def outcome(config):
    """Runs both phases; returns the records, the last state and which checkpoints there are."""
    opened_run = opened.open_run(config)
    # To compile the two loops takes longer than such runs: here their operations go one by one.
    with jax.disable_jit():
        references = side_by_side.train_references([opened_run], [])
        (final,) = side_by_side.finetune(
            [opened_run], side_by_side.train_surgery([opened_run], references, []), []
        )
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((final.params, final.masks))]
    checkpoints = sorted(
        str(path.relative_to(config.workdir)) for path in Path(config.workdir).glob('*/*/*')
    )
    return (Path(config.workdir) / 'metrics.jsonl').read_text(), leaves, checkpoints


@pytest.fixture(scope='module')
def plain(make_config):
    config = make_config(tensorboard=True)
    return config, outcome(config)


@pytest.fixture(scope='module')
def outcome_of(make_config):
    return functools.cache(lambda *fields: outcome(make_config(**dict(fields))))


def test_every_flag_is_tried():
    tried = [*EFFECTIVE, *EFFECTIVE_BY_DENSITY, *EFFECTIVE_WITH, *TRIED_APART, *PLACES_AND_SWITCHES]
    assert sorted(tried) == sorted(FIELDS)


@pytest.mark.parametrize(
    ('name', 'value', 'others'),
    [
        *((name, value, {}) for name, value in EFFECTIVE.items()),
        *((name, value, BY_DENSITY) for name, value in EFFECTIVE_BY_DENSITY.items()),
        *((name, *values) for name, values in EFFECTIVE_WITH.items()),
    ],
)
@pytest.mark.slow
def test_a_flag_has_an_effect(make_config, outcome_of, name, value, others):
    assert getattr(make_config(**others), name) != value
    assert outcome(make_config(**{**others, name: value})) != outcome_of(*others.items())


@pytest.mark.slow
def test_every_pruner_is_another(make_config):
    outcomes = {
        'han': outcome(make_config(pruner='han', c_rate='0.5', rounds=2, ramp_end='50%'))[0]
    }
    for name in PRUNERS:
        if name != 'han':
            rounds = {'rounds': 2} if name == 'iterative' else {}
            outcomes[name] = outcome(make_config(**BY_DENSITY, **rounds, pruner=name))[0]
            last = json.loads(outcomes[name].splitlines()[-1])
            assert sum(last['kept'].values()) == (784 * 8 + 8 + 90) // 4, name
    assert len(set(outcomes.values())) == len(PRUNERS)


@pytest.mark.slow
def test_what_a_cut_prunes_counts_as_pruned(make_config):
    config = make_config(**BY_DENSITY, cut=0.5, cut_at='3', count_returns=True)
    (summary,) = opened.do(config)
    returns = summary['returns']
    assert returns['pruned'] >= returns['returned'] >= returns['returned_kept']
    # 6,370 parameters, of which a quarter was kept and half of that cut.
    assert returns['pruned'] == pytest.approx(6_370 * 7 / 8, rel=0.02)


@pytest.mark.slow
def test_dropout_is_scaled_where_much_is_pruned(make_config):
    weights = {
        (rate, c_rate): outcome(make_config(dropout=0.5, pruned_dropout=rate, c_rate=c_rate))
        for rate in ('kept', 'scaled')
        for c_rate in ('-9', '1')
    }
    assert weights['scaled', '-9'] == weights['kept', '-9']
    assert weights['scaled', '1'] != weights['kept', '1']


def final_states(configs):
    opened_runs = opened.open_runs(*configs)
    with jax.disable_jit():
        references = side_by_side.train_references(opened_runs, [])
        return side_by_side.finetune(
            opened_runs, side_by_side.train_surgery(opened_runs, references, []), []
        )


@pytest.mark.slow
def test_side_by_side_each_run_drops_out_what_it_does_alone(make_config):
    seeds = [{**BY_DENSITY, 'dropout': 0.5, 'finetuning_steps': 3, 'seed': seed} for seed in (0, 1)]
    together = final_states([make_config(**fields) for fields in seeds])
    for state, fields in zip(together, seeds, strict=True):
        (alone,) = final_states([make_config(**fields)])
        for one, other in zip(*map(jax.tree.leaves, (state.params, alone.params)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_what_takes_no_part_may_be_too_much(make_config):
    config = make_config(density=0.001, prune_biases=False)
    with pytest.raises(ValueError, match=r'asks to keep 6 of 6370 parameters, of which 18 take no'):
        opened.open_run(config)


def test_the_data_set_is_that_of_the_flag(make_config):
    for name, train, validation in (('digits', 1_237, 200), ('fashion_mnist', 55_000, 5_000)):
        dataset = opened.open_run(make_config(dataset=name)).task.dataset
        assert dataset.name == name
        assert (len(dataset.train.labels), len(dataset.validation.labels)) == (train, validation)


def test_data_dir_and_manual_dir_are_looked_at(make_config, tmp_path):
    (tmp_path / 'file').write_text('text')
    with pytest.raises(OSError, match=r'data_dir=.*file'):
        opened.open_run(make_config(data_dir=str(tmp_path / 'file')))
    with pytest.raises(ValueError, match=r'manual_dir=.*missing'):
        opened.open_run(make_config(manual_dir=str(tmp_path / 'missing')))


def test_workdir_is_where_all_is_written(plain):
    folder = Path(plain[0].workdir)
    names = {path.name for path in folder.iterdir()}
    assert names == {'.lock', 'flags.json', 'metrics.jsonl', 'checkpoints', 'tensorboard'}
    (events,) = (folder / 'tensorboard').iterdir()
    assert b'surgery/kept/fc1' in events.read_bytes()


def test_reference_takes_the_place_of_dense_training(make_config, plain):
    config, (records, leaves, _) = plain
    again = make_config(reference=config.workdir)
    new_records, new_leaves, checkpoints = outcome(again)
    assert new_leaves == leaves
    assert records.endswith(new_records)
    assert not any(json.loads(line)['phase'] == 'reference' for line in new_records.splitlines())
    assert not any('reference' in path for path in checkpoints)


def test_resume_and_overwrite_do_what_they_say(plain):
    config, first = plain
    metrics = Path(config.workdir) / 'metrics.jsonl'
    written = metrics.stat().st_mtime_ns
    with pytest.raises(ValueError, match='already holds a run'):
        outcome(config)
    # Both phases are done, so that there is nothing left to train, and no record to write.
    assert outcome(dataclasses.replace(config, resume=True)) == first
    foreign, own = (Path(config.workdir) / name for name in ('thesis.txt', 'tensorboard/old'))
    for path in (foreign, own):
        path.touch()
    # A run repeats itself.
    assert outcome(dataclasses.replace(config, overwrite=True)) == first
    assert foreign.exists()
    assert not own.exists()
    assert metrics.stat().st_mtime_ns > written
    foreign.unlink()
