"""Checkpoints with every file damaged in every way, one after the other, and what comes back."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from experiments.training.checkpoints import Checkpoints


def make_state(seed):
    key = jax.random.key(seed)
    weights = jax.random.normal(key, (40, 30))
    return {'params': weights, 'masks': weights > 0, 'key': key, 'count': jnp.int32(seed)}


def bits(state):
    keyless = {**state, 'key': jax.random.key_data(state['key'])}
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(keyless)]


def damages(content, random_):
    """The ways in which a file is damaged: bits flipped, cut, emptied and gone."""
    if content:
        for _ in range(3):
            at = random_.randrange(len(content))
            flipped = bytes([content[at] ^ 1 << random_.randrange(8)])
            yield content[:at] + flipped + content[at + 1 :]
        yield content[: len(content) // 2]
        yield b''
    yield None


def restore_damaged(folder):
    """Saves states 1 and 2, damages the second in all ways, and notes which one comes back.

    Raises AssertionError if neither does.
    """
    with Checkpoints(folder / 'whole') as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {'seed': step})
    newest, steps = folder / 'whole' / '2', []
    files = sorted(path.relative_to(newest) for path in newest.rglob('*') if path.is_file())
    for number, file in enumerate(files):
        for damage in damages((newest / file).read_bytes(), random.Random(number)):
            shutil.rmtree(folder / 'copy', ignore_errors=True)
            shutil.copytree(folder / 'whole', folder / 'copy')
            damaged = folder / 'copy' / '2' / file
            damaged.unlink() if damage is None else damaged.write_bytes(damage)
            with Checkpoints(folder / 'copy') as checkpoints:
                step, state = checkpoints.restore(make_state(0))
                assert bits(state) == bits(make_state(step)), file
                assert checkpoints.notes(step) == {'seed': step}
            steps.append(step)
    (folder / 'steps.json').write_text(json.dumps(steps))
