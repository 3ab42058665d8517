"""Tests of devices.progress: bars on a terminal, a line now and then elsewhere."""

import time

import pytest
from absl import logging
from terminal import terminal
from tiny import Tiny

from experiments.config import command_line
from experiments.devices import hosts, progress
from experiments.networks import models
from experiments.sweeps import sweep
from experiments.sweeps.flags import FrontierConfig
from experiments.training import run
from experiments.training.flags import Config
from experiments.training.plan import make_plan

SHORT = {
    **{'network': 'tiny', 'dataset': 'digits', 'batch_size': 16, 'finetuning_steps': 0},
    **{'reference_steps': 20, 'surgery_steps': 20, 'refresh_every': 2},
    **{'record_every': 20, 'checkpoint_every': 20},
}


@pytest.fixture
def make(data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(models.NETWORKS, 'tiny', Tiny)

    def make(config_type, **fields):
        places = {'data_dir': str(data_dir), 'workdir': str(tmp_path / 'run')}
        return command_line.make(config_type, **SHORT, **fields, **places)

    return make


def test_a_run_shows_steps_loss_error_and_compression(make, monkeypatch, capsys):
    with terminal(monkeypatch) as seen:
        run.run(make(Config, compression=4.0))
    last = ''.join(seen).replace('\n', '\r').split('\r')
    for phase in ('reference', 'surgery'):
        (line, *_) = [line for line in reversed(last) if line.startswith(phase)]
        for part in ('20/20', 'steps/s', '<', 'loss=', 'validation_error=', ' %', 'compression='):
            assert part in line
    assert '\r' not in capsys.readouterr().out


def test_a_sweep_shows_which_runs_it_is_at(make, monkeypatch):
    config = make(FrontierConfig, compressions='4', seeds=3)
    plans = {run: make_plan(run) for _, run in config.named_runs()}
    monkeypatch.setattr(sweep, 'Task', lambda config: None)
    monkeypatch.setattr(sweep, 'run_together', lambda task, batch: [{}] * len(batch))
    with terminal(monkeypatch) as seen:
        sweep.run_all(plans, 2, lambda summaries: None)
    text = ''.join(seen)
    for part in ('0/3', '4-0, 4-1', '2/3', '4-2', '3/3'):
        assert part in text
        text = text.partition(part)[2]


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, moved by hand."""
    now = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    return now


def lines_of(capsys):
    return capsys.readouterr().err.splitlines()


def test_without_a_terminal_a_line_is_shown_every_half_minute(clock, capsys):
    with progress.bar(total=2_000, initial=500, desc='surgery', unit=' steps') as bar:
        for seconds, error in ((29, '4 %'), (31, '3 %'), (60, '2 %'), (62, '1 %')):
            clock[0] = seconds
            bar.update(500 if seconds > 60 else 250)
            bar.set_postfix({'loss': '0.1'}, error=error)
    assert lines_of(capsys) == [
        'surgery: 1,000 of 2,000 steps, loss=0.1, error=3 %',
        'surgery: 1,750 of 2,000 steps, loss=0.1, error=1 %',
    ]


def test_the_line_at_the_end_is_not_said_twice(clock, capsys):
    with progress.bar(total=2, desc='sweep', unit=' runs') as bar:
        for _ in range(2):
            clock[0] += 40
            bar.update()
            bar.set_postfix_str('9-0')
    assert lines_of(capsys) == ['sweep: 1 of 2 runs', 'sweep: 2 of 2 runs, 9-0']


def test_without_a_terminal_items_are_counted(clock, capsys):
    for number in progress.bar(range(4), 'timing', unit=' rounds'):
        clock[0] += 20 * number
    assert lines_of(capsys) == ['timing: 3 of 4 rounds', 'timing: 4 of 4 rounds']


@pytest.mark.parametrize(
    ('verbosity', 'is_first', 'is_shown'),
    [(-3, True, False), (-2, True, False), (-1, True, True), (1, True, True), (0, False, False)],
)
def test_who_sees_bars_and_lines(verbosity, is_first, is_shown, clock, monkeypatch, capsys):
    monkeypatch.setattr(hosts, 'is_first', lambda: is_first)
    before = logging.get_verbosity()
    logging.set_verbosity(verbosity)
    try:
        with terminal(monkeypatch) as seen, progress.bar(total=1, desc='work') as bar:
            bar.update()
            assert bar.n == is_shown
        with progress.bar(total=1, desc='work') as bar:
            clock[0] = 60
            bar.update()
    finally:
        logging.set_verbosity(before)
    assert bool(seen) == is_shown
    assert (lines_of(capsys) == ['work: 1 of 1']) == is_shown
