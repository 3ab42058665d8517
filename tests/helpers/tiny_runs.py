"""Short runs of a tiny network, stopped, and what is left of them."""

import dataclasses
import itertools
import json
import time

import numpy as np
import opened

from experiments.data import resident
from experiments.training.phases import Stopped

FIELDS = {
    'dataset': 'digits',
    'reference_steps': 400,
    'surgery_steps': 600,
    'finetuning_steps': 200,
    'batch_size': 8,
    'record_every': 10,
    'checkpoint_every': 20,
    'c_rate': 'fc1:0.5',
    'stop': '400',
}


def write_random_images(folder, *names):
    """Writes the caches of data sets, of random images, so that there is no need for TFDS."""
    (folder / 'dns_jax_cache').mkdir()
    random = np.random.default_rng(0)
    for name in names:
        source, arrays = resident._SOURCES[name], {}
        for split, count in (('train', source.train), ('test', source.test)):
            arrays[f'{split}_labels'] = random.integers(0, 10, count, np.int32)
            arrays[f'{split}_images'] = random.integers(
                0, 256, (count, *source.image_shape), np.uint8
            )
        np.savez(folder / 'dns_jax_cache' / f'{name}-{source.version}.npz', **arrays)


def outcome(folder):
    """What a run computed: its records, and its network."""
    return (folder / 'metrics.jsonl').read_text(), (folder / 'pruned.safetensors').read_bytes()


def steps_of(folder, phase):
    names = [path.name for path in (folder / 'checkpoints' / phase).glob('*')]
    return sorted(int(name) for name in names if name.isdigit())  # others are being written


def wait_for_record(folder, is_alive, phase='reference', step=0):
    """Waits until a run has a record of a phase, at a step or later."""
    path, deadline = folder / 'metrics.jsonl', time.monotonic() + 240
    while is_alive() and time.monotonic() < deadline:
        lines = path.read_text().split('\n')[:-1] if path.exists() else []
        if any(one['phase'] == phase and one['step'] >= step for one in map(json.loads, lines)):
            return
        time.sleep(0.002)
    raise TimeoutError(f'no record of step {step} of {phase} in {folder}')


class EveryThird(list):
    """Signals that seem to have come every third time that they are looked at."""

    looked = 0

    def __bool__(self):
        self.looked += 1
        return self.looked % 3 == 0


def run_in_short_stretches(config, train_phase, *arguments, stopping):
    """Stops a phase again and again; returns how often."""
    for stretch in itertools.count():
        opened_run = opened.open_run(
            dataclasses.replace(config, resume=config.resume or stretch > 0)
        )
        try:
            train_phase([opened_run], *arguments, stopping)
        except Stopped:
            continue
        return stretch
