"""Tests of devices.progress: bars for who sits before a terminal, nothing for others."""

import contextlib
import dataclasses
import fcntl
import os
import pty
import struct
import sys
import termios
import threading

import pytest
from absl import logging
from tiny import Tiny

from experiments import frontier, search
from experiments.devices import hosts, progress
from experiments.networks import models
from experiments.sweeps.flags import FrontierConfig, SearchConfig
from experiments.training import run
from experiments.training.flags import Config

SHORT = {
    **{'network': 'tiny', 'dataset': 'digits', 'batch_size': 16, 'finetuning_steps': 0},
    **{'reference_steps': 20, 'surgery_steps': 20, 'refresh_every': 2},
    **{'record_every': 20, 'checkpoint_every': 20},
}


@pytest.fixture
def make(data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(models.NETWORKS, 'tiny', Tiny)

    def make(config_type, **fields):
        return config_type(**SHORT, **fields, data_dir=str(data_dir), workdir=str(tmp_path / 'run'))

    return make


@contextlib.contextmanager
def terminal(monkeypatch):
    """Makes standard error a terminal; what was written there is in the list afterwards."""
    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack('4H', 24, 200, 0, 0))
    seen = []

    def read():
        with contextlib.suppress(OSError):  # at its end
            while part := os.read(main, 4_096):
                seen.append(part.decode())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with os.fdopen(end, 'w') as stderr, monkeypatch.context() as patch:
            patch.setattr(sys, 'stderr', stderr)
            yield seen
    finally:
        reader.join()
        os.close(main)


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
    config = make(FrontierConfig, compressions='4', seeds=3, side_by_side=2)
    with terminal(monkeypatch) as seen:
        frontier.frontier(config)
    text = ''.join(seen)
    for part in ('0/3', '4-0, 4-1', '2/3', '4-2', '3/3'):
        assert part in text
        text = text.partition(part)[2]


def test_a_search_shows_its_trials(make, monkeypatch, capsys):
    pytest.importorskip('optuna')
    config = make(SearchConfig, space='compression', trials=1, tolerance=100.0)
    with terminal(monkeypatch) as seen:
        search.search(config)
    assert '0/1' in ''.join(seen)
    assert 'best=0, kept=' in ''.join(seen)
    assert capsys.readouterr().out.startswith('trial 0: kept ')


def test_without_a_terminal_nothing_is_shown(make, capsys):
    run.run(make(Config, compression=4.0))
    sweep = make(FrontierConfig, compressions='4', seeds=2)
    frontier.frontier(dataclasses.replace(sweep, workdir=f'{sweep.workdir}s'))
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize(
    ('verbosity', 'is_first', 'is_shown'),
    [(-3, True, False), (-2, True, False), (-1, True, True), (1, True, True), (0, False, False)],
)
def test_who_sees_bars(verbosity, is_first, is_shown, monkeypatch):
    monkeypatch.setattr(hosts, 'is_first', lambda: is_first)
    before = logging.get_verbosity()
    logging.set_verbosity(verbosity)
    try:
        with terminal(monkeypatch) as seen, progress.bar(total=1, desc='work') as bar:
            bar.update()
            assert bar.n == is_shown
    finally:
        logging.set_verbosity(before)
    assert bool(seen) == is_shown
