"""Tests of training.run: whole runs on the digits, and runs that are stopped, killed or refused.

What a user sees is asked of real processes. They share a few runs, as each costs seconds.
"""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import opened
import pytest
from tiny_runs import outcome, steps_of, wait_for_record

from dns_jax.files.sparse import load_sparse
from experiments.data import resident
from experiments.reports import run_report as report
from experiments.training import run, side_by_side
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


def test_a_run_ends_well_and_says_its_result_on_stdout_alone(whole):
    folder, answer = whole
    assert answer.returncode == 0, answer.stderr
    *tables, last = answer.stdout.splitlines()
    summary = json.loads(last)
    assert summary == json.loads((folder / 'summary.json').read_text())
    assert '\n'.join(tables).startswith(report.format_table(summary))
    assert tables[-1] == f'Report: {folder / "report.html"}'
    assert len(answer.stdout.splitlines()) == len(report.format_table(summary).splitlines()) + 3
    # No progress bar where nobody watches; on a busy machine a line every half minute.
    assert not re.sub(r'(?m)^\w+: \d+ of \d+ steps, .*\n', '', answer.stderr)


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


def test_the_errors_of_the_summary_are_those_of_the_networks(whole, data_dir):
    summary = json.loads((whole[0] / 'summary.json').read_text())
    pruned = load_sparse(whole[0] / 'pruned.safetensors')
    digits = resident.load('digits', data_dir)
    for split, name in ((digits.test, 'test_error'), (digits.validation, 'validation_error')):
        hidden = split.images.reshape(len(split.labels), -1) / np.float32(256)
        for leaves in pruned.params.values():
            hidden = np.maximum(hidden, 0) @ leaves['kernel'] + leaves['bias']
        wrong = 100 * np.mean(hidden.argmax(1) != split.labels)
        assert summary[name] == pytest.approx(wrong, abs=0.6)
    assert summary['kept'] == sum(np.sum(mask) for mask in jax.tree.leaves(pruned.masks))
    # The reference on as many images: of each split there is another number.
    for split, name in ((digits.test, 'error'), (digits.validation, 'validation_error')):
        count = summary[f'reference_{name}'] / 100 * len(split.labels)
        assert count == pytest.approx(round(count), abs=1e-3)


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
    (dense,) = (one for one in records if (one['phase'], one['step']) == ('reference', 300))
    assert dense['validation_error'] == summary['reference_validation_error']


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
def test_sigterm_saves_and_leaves_and_the_run_goes_on(start, whole, tmp_path):
    folder = tmp_path / 'run'
    process = start(folder)
    wait_for_record(folder, lambda: process.poll() is None, 'reference', 30)
    process.send_signal(signal.SIGTERM)
    answer = finish(process)
    assert answer.returncode == 1
    last = json.loads((folder / 'metrics.jsonl').read_text().splitlines()[-1])
    assert (last['phase'], last['step'] < 300) == ('reference', True)
    message = f'SIGTERM: saved reference at step {last["step"]} in {folder}; continue with'
    assert message in answer.stderr
    assert '--resume' in answer.stderr
    assert 'Traceback' not in answer.stderr
    assert answer.stdout == ''
    again = finish(start(folder, '--resume'))
    assert again.returncode == 0, again.stderr
    assert outcome(folder) == outcome(whole[0])
    summaries = [json.loads(one.stdout.splitlines()[-1]) for one in (whole[1], again)]
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


def test_a_workdir_with_another_run_is_refused(make_config, whole):
    before = {path: path.stat().st_mtime_ns for path in whole[0].rglob('*')}
    with pytest.raises(ValueError, match='already holds a run; continue it with --resume'):
        run.run(make_config(whole[0]))
    with pytest.raises(ValueError, match='holds a run with other flags: seed was 0, is 1'):
        run.run(make_config(whole[0], resume=True, seed=1))
    assert {path: path.stat().st_mtime_ns for path in whole[0].rglob('*')} == before
