"""Short runs of a tiny network, stopped, and what is left of them."""

import dataclasses
import itertools

import opened

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


def outcome(folder):
    """What a run computed: its records, and its network."""
    return (folder / 'metrics.jsonl').read_text(), (folder / 'pruned.safetensors').read_bytes()


def steps_of(folder, phase):
    names = [path.name for path in (folder / 'checkpoints' / phase).glob('*')]
    return sorted(int(name) for name in names if name.isdigit())  # others are being written


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
