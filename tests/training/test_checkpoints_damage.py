"""Tests of training.checkpoints: damage and kills lose the newest at most, and a change shows."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging
from saved_checkpoints import assert_identical, like, save_steps

from experiments.training.checkpoints import Checkpoints, _checksums

ROOT = pathlib.Path(__file__).parents[2]


def largest_file(directory):
    return max((path for path in directory.rglob('*') if path.is_file()), key=os.path.getsize)


def cut(directory):
    path = largest_file(directory / 'leaves' / 'ocdbt.process_0')
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(directory):
    for path in directory.rglob('*'):
        if path.is_file():
            path.unlink()


def save_noise(directory, steps):
    with Checkpoints(directory) as checkpoints:
        for step in steps:
            checkpoints.save(step, {'w': jax.random.normal(jax.random.key(step), (50, 40))})


# What else may be damaged, `test_faults` tries, file by file.
@pytest.mark.parametrize('damage', [cut, empty])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, damage, monkeypatch):
    warnings = []
    monkeypatch.setattr(
        absl_logging, 'warning', lambda message, *values: warnings.append(message % values)
    )
    save_noise(tmp_path, [1, 2])
    damage(tmp_path / '2')
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(OSError, match=r'cannot read any .* of steps \[2\]'):
            checkpoints.restore(like(), step=2)
        assert checkpoints.latest_step() == 2
        warnings.clear()
        step, state = checkpoints.restore(like())
        assert step == 1
        assert_identical(state, {'w': jax.random.normal(jax.random.key(1), (50, 40))})
        checkpoints.save(2, state)
        assert checkpoints.restore(like())[0] == 2
    assert any(f'{tmp_path}: the checkpoint of step 2 cannot be read' in one for one in warnings)
    assert len(list(tmp_path.glob('damaged-2-*'))) == 1


def test_where_every_checkpoint_is_damaged_nothing_is_touched(tmp_path):
    save_noise(tmp_path, [1, 2])
    cut(tmp_path / '1')
    cut(tmp_path / '2')
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(OSError, match=r'cannot read any .* of steps \[2, 1\]') as caught:
            checkpoints.restore(like())
        assert str(tmp_path) in str(caught.value)
        assert checkpoints.latest_step() == 2


CHILD = """
import sys
import jax
from experiments.training.checkpoints import Checkpoints

checkpoints = Checkpoints(sys.argv[1])
state = {'w': jax.random.normal(jax.random.key(1), (8_000_000,))}
checkpoints.save(1, {'w': state['w'][:5]})
assert checkpoints.latest_step() == 1
checkpoints.save(2, state)
checkpoints.close()
"""


def test_a_process_killed_in_the_middle_of_a_save_loses_only_that_save(tmp_path):
    child = subprocess.Popen([sys.executable, '-c', CHILD, str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob('2.*')) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert list(tmp_path.glob('2.*'))
    assert not (tmp_path / '2').exists()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        state = {'w': jnp.ones(5)}
        step, restored = checkpoints.restore(state)
        expected = jax.random.normal(jax.random.key(1), (8_000_000,))[:5]
        assert step == 1
        assert_identical(restored, {'w': expected})
        checkpoints.save(2, restored)
        assert checkpoints.latest_step() == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ['1', '2']


def test_leaving_waits_until_the_save_is_on_disk(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, jnp.arange(4_000_000.0))
    assert (tmp_path / '3').is_dir()


def test_an_error_in_the_background_is_raised_and_costs_no_checkpoint(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_steps(tmp_path, [1], keep=1)
    checkpoints = Checkpoints(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'rename', fail)
        patch.setattr(os, 'replace', fail)
        checkpoints.save(2, {'w': jnp.zeros((50, 40))})
        with pytest.raises(OSError, match='No space left on device'):
            checkpoints.close()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(like())[0] == 1


def checksum(array):
    return int(_checksums([jnp.asarray(array)])[0])


NOISE = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)


@pytest.mark.parametrize(
    'change',
    [
        lambda noise: noise.at[1::2].multiply(-1.0),
        lambda noise: noise.at[0, 0].multiply(-1.0).at[7, 3].multiply(-1.0),
        lambda noise: noise.at[jnp.array([0, 256])].set(noise[jnp.array([256, 0])]),
        lambda noise: noise[::-1],
        lambda noise: -noise,
        lambda noise: noise.at[5, 2].set(jnp.nextafter(noise[5, 2], 9.0)),
        lambda noise: noise.astype(jnp.bfloat16),
    ],
)
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bool'])
def test_a_change_shows_in_the_checksum(change, dtype):
    noise = jnp.asarray(NOISE)
    as_dtype = (lambda array: array > 0.5) if dtype == 'bool' else (lambda a: a.astype(dtype))
    before, after = as_dtype(noise), as_dtype(change(noise))
    assert (checksum(before) != checksum(after)) == bool((before != after).any())


def test_the_checksum_of_ones_and_minus_ones_that_change_places():
    ones = np.ones(8, np.float32)
    for place in range(1, 8):
        one, other = ones.copy(), ones.copy()
        one[0], other[place] = -1.0, -1.0
        assert checksum(one) != checksum(other)


def test_the_checksum_does_not_depend_on_where_an_array_lies(mesh):
    rows = jax.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
    assert checksum(jax.device_put(NOISE[:296], rows)) == checksum(NOISE[:296])
