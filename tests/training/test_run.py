"""Tests of training.run: whole runs on the digits, and runs that are stopped, killed or refused.

What a user sees is asked of real processes. They share a few runs, as each costs seconds.
"""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import opened
import pytest

from experiments.data import resident
from experiments.reports import run_report as report
from experiments.training import run, side_by_side
from experiments.training.divergence import Diverged
from experiments.training.flags import Config
from experiments.training.phases import Stopped

ROOT = Path(__file__).resolve().parents[2]
# Records come often, so that there is a good moment to interrupt the run; and the checkpoints
# more rarely, so that a killed run has records that no checkpoint backs.
FIELDS = {
    'reference_steps': 300,
    'surgery_steps': 300,
    'batch_size': 16,
    'record_every': 10,
    'checkpoint_every': 50,
    'finetuning_steps': 100,
    'c_rate': 'fc1:1,fc2:1,fc3:0.5',
    'stop': '250',
}
SUMMARY_KEYS = {
    *('network', 'dataset', 'seed', 'steps', 'reference_error', 'test_error', 'validation_error'),
    *('parameters', 'kept', 'compression', 'per_layer', 'seconds', 'commit', 'jax'),
}


@pytest.fixture(scope='module')
def start(data_dir):
    """Starts a run of LeNet-300-100 in a process of its own."""

    def start(workdir, *flags, **fields):
        fields = {**FIELDS, 'data_dir': data_dir, 'dataset': 'digits', **fields}
        command = [sys.executable, '-m', 'experiments.lenet300', f'--workdir={workdir}', *flags]
        command += [f'--{name}={value}' for name, value in fields.items()]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)

    return start


def finish(process):
    stdout, stderr = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def interrupt(process, workdir, phase, step, number):
    """Sends a signal once a record of the phase, at the step or later, is there."""
    path, deadline = workdir / 'metrics.jsonl', time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        lines = path.read_text().split('\n')[:-1] if path.exists() else ['{}']
        last = json.loads(lines[-1]) if lines else {}
        if last.get('phase') == phase and last['step'] >= step:
            break
        time.sleep(0.002)
    process.send_signal(number)
    return finish(process)


@pytest.fixture(scope='module')
def make_config(data_dir):
    def make(workdir, **fields):
        fields = {'dataset': 'digits', **FIELDS, **fields}
        fields = {'network': 'lenet300', 'data_dir': str(data_dir), **fields}
        return Config(workdir=str(workdir), **fields)

    return make


@pytest.fixture(scope='module')
def whole(start, tmp_path_factory):
    """An unbroken run: its folder, and what its process said."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    return folder, finish(start(folder))


@pytest.fixture(scope='module')
def whole_states(make_config, whole):
    return final_states(make_config, whole[0])


@pytest.fixture(scope='module')
def broken(start, tmp_path_factory):
    """The same run, asked to leave in its first phase, killed in its second, then left alone."""
    folder = tmp_path_factory.mktemp('broken') / 'run'
    stopped = interrupt(start(folder), folder, 'reference', 30, signal.SIGTERM)
    after_stop = last_record(folder)
    killed = interrupt(start(folder, '--resume'), folder, 'surgery', 70, signal.SIGKILL)
    after_kill = last_record(folder)
    # Of the line that is being written when the machine goes down, half may be on disk.
    with (folder / 'metrics.jsonl').open('a') as file:
        file.write('{"phase": "surg')
    return folder, (stopped, after_stop), (killed, after_kill), finish(start(folder, '--resume'))


def last_record(folder):
    return json.loads((folder / 'metrics.jsonl').read_text().splitlines()[-1])


def steps_of(folder, phase):
    return sorted(int(path.name) for path in (folder / 'checkpoints' / phase).glob('[0-9]*'))


def final_states(make_config, folder):
    """Reads the last checkpoints of all phases of a run that is done."""
    opened_run = opened.open_run(make_config(folder, resume=True))
    references = side_by_side.train_references([opened_run], [])
    states = side_by_side.train_surgery([opened_run], references, [])
    return *references, *side_by_side.finetune([opened_run], states, [])


def test_a_run_ends_well_and_says_its_result_on_stdout_alone(whole):
    folder, answer = whole
    assert answer.returncode == 0, answer.stderr
    *tables, last = answer.stdout.splitlines()
    summary = json.loads(last)
    assert summary == json.loads((folder / 'summary.json').read_text())
    assert '\n'.join(tables).startswith(report.format_table(summary))
    assert tables[-1] == f'Report: {folder / "report.html"}'
    assert len(answer.stdout.splitlines()) == len(report.format_table(summary).splitlines()) + 3
    # No progress bar where nobody watches.
    assert answer.stderr == ''


def test_the_summary_says_all_it_must(whole):
    summary = json.loads((whole[0] / 'summary.json').read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert (summary['network'], summary['dataset'], summary['seed']) == ('lenet300', 'digits', 0)
    assert (summary['steps'], summary['parameters']) == (300, 266_610)
    assert (summary['jax'], summary['commit'] != '') == (jax.__version__, True)
    assert summary['compression'] == pytest.approx(266_610 / summary['kept'])
    assert list(summary['per_layer']) == ['fc1', 'fc2', 'fc3']
    for name in ('parameters', 'kept', 'multiply_adds', 'kept_multiply_adds', 'bytes'):
        assert summary[name] == sum(layer[name] for layer in summary['per_layer'].values())
    flags = json.loads((whole[0] / 'flags.json').read_text())
    assert summary['flags'] == flags
    assert flags.items() >= FIELDS.items()


def test_a_run_learns_and_prunes(whole):
    summary = json.loads((whole[0] / 'summary.json').read_text())
    # Chance is 90 %; so short a training comes well below it.
    assert summary['reference_error'] < 30
    assert summary['test_error'] < 30
    assert summary['compression'] > 2


def test_the_errors_of_the_summary_are_those_of_the_networks(whole, whole_states, data_dir):
    reference, final = whole_states
    summary = json.loads((whole[0] / 'summary.json').read_text())
    digits = resident.load('digits', data_dir)
    pruned = jax.tree.map(
        lambda leaf, mask: np.asarray(leaf) * np.asarray(mask), final.params, final.masks
    )
    for params, prefix in ((reference, 'reference_'), (pruned, '')):
        for split, name in (
            (digits.test, f'{prefix}error' if prefix else 'test_error'),
            (digits.validation, f'{prefix}validation_error'),
        ):
            hidden = split.images.reshape(len(split.labels), -1) / np.float32(256)
            for layer in ('fc1', 'fc2', 'fc3'):
                hidden = np.maximum(hidden, 0) @ np.asarray(params[layer]['kernel'])
                hidden = hidden + np.asarray(params[layer]['bias'])
            wrong = 100 * np.mean(hidden.argmax(1) != split.labels)
            assert summary[name] == pytest.approx(wrong, abs=0.6)
    kept = sum(int(np.sum(mask)) for mask in jax.tree.leaves(final.masks))
    assert summary['kept'] == kept


def test_the_records_tell_every_change_of_the_masks(whole):
    records = [json.loads(line) for line in (whole[0] / 'metrics.jsonl').read_text().splitlines()]
    assert [(one['phase'], one['step']) for one in records] == [
        (phase, step)
        for phase, steps in (('reference', 300), ('surgery', 300), ('finetuning', 100))
        for step in range(10, steps + 10, 10)
    ]
    kept = {'fc1': 235_500, 'fc2': 30_100, 'fc3': 1_010}
    for record in records:
        for layer in record['pruned']:
            kept[layer] += record['spliced'][layer] - record['pruned'][layer]
        assert record['kept'] == kept
    last = records[-15:]  # five of surgery after its stop, ten of fine-tuning
    assert all(sum(one['pruned'].values()) + sum(one['spliced'].values()) == 0 for one in last)
    summary = json.loads((whole[0] / 'summary.json').read_text())
    assert kept == {layer: size['kept'] for layer, size in summary['per_layer'].items()}
    assert records[-1]['validation_error'] == summary['validation_error']


def test_the_report_and_its_pictures_are_there(whole):
    text = (whole[0] / 'report.html').read_text()
    assert re.findall(r'alt="([^";]+)', text)[:3] == [
        'Validation error and loss',
        'Connections kept in each layer',
        'Connections pruned and spliced per 1,000 steps',
    ]
    assert text.count('<img ') == 4


def test_the_newest_checkpoints_are_kept(whole):
    assert steps_of(whole[0], 'reference') == [250, 300]
    assert steps_of(whole[0], 'surgery') == [250, 300]
    assert steps_of(whole[0], 'finetuning') == [50, 100]


@pytest.mark.slow
def test_sigterm_saves_and_leaves(broken):
    folder, (answer, record), _, _ = broken
    assert answer.returncode == 1
    assert (record['phase'], record['step'] < 300) == ('reference', True)
    message = f'SIGTERM: saved reference at step {record["step"]} in {folder}; continue with'
    assert message in answer.stderr
    assert '--resume' in answer.stderr
    assert 'Traceback' not in answer.stderr
    assert answer.stdout == ''


@pytest.mark.slow
def test_sigkill_came_in_the_middle(broken):
    _, _, (answer, record), _ = broken
    assert answer.returncode == -signal.SIGKILL
    assert (record['phase'], record['step'] < 300) == ('surgery', True)


@pytest.mark.slow
def test_a_stopped_and_killed_run_ends_bit_for_bit_as_the_unbroken_one(
    make_config, whole, whole_states, broken
):
    assert broken[-1].returncode == 0, broken[-1].stderr
    assert (broken[0] / 'metrics.jsonl').read_bytes() == (whole[0] / 'metrics.jsonl').read_bytes()
    states = [whole_states, final_states(make_config, broken[0])]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    summaries = [json.loads(one.stdout.splitlines()[-1]) for one in (whole[1], broken[-1])]
    for summary in summaries:
        del summary['seconds'], summary['pruning_seconds'], summary['commit']
    assert summaries[0] == summaries[1]


@pytest.mark.slow
def test_a_signal_before_surgery_saves_its_first_records(make_config, whole, tmp_path):
    config = make_config(tmp_path / 'run', reference=str(whole[0]), overwrite=True)
    opened_run = opened.open_run(config)
    references = side_by_side.train_references([opened_run], [])
    # Else the loop would be compiled a second time for the state that it gives back.
    assert not any(leaf.committed for leaf in jax.tree.leaves(references))
    # Beside --overwrite, in a flagfile perhaps, --resume alone would be refused.
    message = r'SIGINT: saved surgery at step 10 in .*; continue with --resume --nooverwrite'
    stopped = pytest.raises(Stopped, match=message)
    with stopped, jax.disable_jit():  # faster than compiling for so few steps
        side_by_side.train_surgery([opened_run], references, [signal.SIGINT])
    assert steps_of(tmp_path / 'run', 'surgery') == [10]


def test_a_saved_reference_is_the_very_same_network(make_config, whole, tmp_path, capsys):
    fields = {'surgery_steps': 20, 'reference': str(whole[0]), 'stop': '', 'batch_size': 8}
    summary = run.run(make_config(tmp_path / 'run', **fields))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary
    saved = json.loads((whole[0] / 'summary.json').read_text())
    for name in ('reference_error', 'reference_validation_error'):
        assert summary[name] == saved[name]
    assert not (tmp_path / 'run' / 'checkpoints' / 'reference').exists()
    assert steps_of(whole[0], 'reference') == [250, 300]


@pytest.mark.parametrize(
    'kind',
    [
        'missing',
        'without checkpoints',
        'unfinished',
        'other network',
        'other images',
        'more images',
    ],
)
def test_a_reference_that_is_none_is_refused(make_config, whole, tmp_path, kind):
    reference, config = tmp_path / 'reference', {}
    error, message = FileNotFoundError, r'--reference=.*reference has no .*checkpoints/reference'
    if kind == 'without checkpoints':
        reference.mkdir()
    elif kind == 'unfinished':
        (reference / 'checkpoints' / 'reference').mkdir(parents=True)
        (reference / 'flags.json').write_bytes((whole[0] / 'flags.json').read_bytes())
        message = r'reference holds steps \[\]; wanted the checkpoint of step'
    elif kind == 'other network':
        config = {'network': 'lenet5', 'c_rate': '1'}
        message = "is of a run with network 'lenet300'; wanted 'lenet5'"
    elif kind == 'other images':
        shutil.copytree(whole[0], reference)
        flags = json.loads((reference / 'flags.json').read_text())
        (reference / 'flags.json').write_text(json.dumps({**flags, 'dataset': 'mnist'}))
        message = "is of a run with dataset 'mnist'; wanted 'digits'"
    elif kind == 'more images':
        config = {'train_on_all': True}
        message = 'is of a run with train_on_all False; wanted True'
    if kind in ('other network', 'other images', 'more images'):
        error = ValueError
        reference = reference if reference.exists() else whole[0]
    wanted = make_config(tmp_path / 'run', reference=str(reference), **config)
    with pytest.raises(error, match=message):
        run.run(wanted)
    # What is misspelt leaves no run behind that would be in the way of the next attempt.
    assert not (tmp_path / 'run').exists()


def test_a_workdir_with_another_run_is_refused(make_config, whole):
    before = {path: path.stat().st_mtime_ns for path in whole[0].rglob('*')}
    with pytest.raises(ValueError, match='already holds a run; continue it with --resume'):
        run.run(make_config(whole[0]))
    with pytest.raises(ValueError, match='holds a run with other flags: seed was 0, is 1'):
        run.run(make_config(whole[0], resume=True, seed=1))
    assert {path: path.stat().st_mtime_ns for path in whole[0].rglob('*')} == before


def test_a_loss_that_is_not_finite_ends_the_run(start, whole, tmp_path):
    short = {
        'surgery_steps': 8,
        'record_every': 4,
        'checkpoint_every': 4,
        'learning_rate': 'fixed:1e30',
    }
    answer = finish(start(tmp_path / 'run', reference=whole[0], **short))
    assert answer.returncode == 1
    assert re.fullmatch(
        r'Diverged: (the loss|a weight of [fc123, ]+) is not finite at step [1-4] of the surgery '
        r'phase; the densities are fc1 [\d.]+%, fc2 [\d.]+%, fc3 [\d.]+%; the last good checkpoint '
        rf'is none of this phase in {tmp_path}/run/checkpoints/surgery\n',
        answer.stderr,
    )
    assert answer.stdout == ''
    assert steps_of(tmp_path / 'run', 'surgery') == []


def test_the_reference_may_break_too(make_config, tmp_path):
    config = make_config(tmp_path / 'run', reference_learning_rate='fixed:1e30')
    with pytest.raises(Diverged, match=r'at step \d of the reference phase'):
        run.run(config)
    assert steps_of(tmp_path / 'run', 'reference') == []


def test_weights_that_break_after_the_last_loss_are_not_saved(make_config, whole, tmp_path):
    """The loss of a chunk's last step is that of the weights before it."""
    every_step = {'surgery_steps': 2, 'record_every': 1, 'checkpoint_every': 1, 'stop': ''}
    rates = {'learning_rate': 'fixed:1e38', 'bias_scale': 1e9, 'reference': str(whole[0])}
    opened_run = opened.open_run(make_config(tmp_path / 'run', **every_step, **rates))
    references = side_by_side.train_references([opened_run], [])
    broken = pytest.raises(Diverged, match=r'a weight of .*fc\d is not finite at step 1 of the sur')
    with broken, jax.disable_jit():  # faster than compiling for so few steps
        side_by_side.train_surgery([opened_run], references, [])
    assert steps_of(tmp_path / 'run', 'surgery') == []


def test_the_last_good_checkpoint_is_good(make_config, whole, tmp_path):
    """The rate is such that the weights break some chunks after the first checkpoint."""
    short = {'surgery_steps': 200, 'record_every': 2, 'checkpoint_every': 2}
    rate = {'learning_rate': 'fixed:30', 'reference': str(whole[0]), 'stop': ''}
    opened_run = opened.open_run(make_config(tmp_path / 'run', **short, **rate))
    with pytest.raises(Diverged) as caught:
        side_by_side.train_surgery(
            [opened_run], side_by_side.train_references([opened_run], []), []
        )
    step = int(re.search(r'not finite at step (\d+)', str(caught.value))[1])
    good = int(re.search(r'last good checkpoint is that of step (\d+)', str(caught.value))[1])
    assert good == steps_of(tmp_path / 'run', 'surgery')[-1]
    assert 0 < good < step <= good + 2
    # It is where --resume goes on: at steps that are done already, so that it just reads it.
    config = make_config(tmp_path / 'other', **{**short, 'surgery_steps': good}, **rate)
    resumed = opened.open_run(config)
    shutil.copytree(tmp_path / 'run' / 'checkpoints', tmp_path / 'other' / 'checkpoints')
    again = dataclasses.replace(config, resume=True)
    resumed.plan = dataclasses.replace(resumed.plan, config=again)
    (state,) = side_by_side.train_surgery([resumed], [resumed.initial], [])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))
    assert last_record(tmp_path / 'run')['step'] == good
