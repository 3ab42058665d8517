"""Tests of sizes: what is written of each network, on the digits."""

import csv
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dns_jax.files.codec import load_coded
from dns_jax.files.sparse import save_sparse
from experiments import sizes
from experiments.networks import models
from experiments.sizes import SizesConfig


def write_network(path, seed, density, ranks=None):
    """Writes a LeNet-300-100 of random weights; with ranks one of factors."""
    network = models.LeNet300(models.FrozenDict(ranks or {}))
    params = network.init(jax.random.key(seed), jnp.zeros((1, 28, 28, 1)))['params']
    random = np.random.default_rng(seed)
    masks = jax.tree.map(lambda leaf: random.random(leaf.shape) < density, params)
    metadata = {'network': 'lenet300', 'ranks': json.dumps(ranks or {})}
    save_sparse(path, params, masks, metadata)
    return masks


@pytest.fixture(scope='module')
def run(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp('sizes')
    masks = [write_network(folder / f'pruned-{seed}.safetensors', seed, 0.02) for seed in (0, 1)]
    for seed in (0, 1):
        write_network(folder / f'factors-{seed}.safetensors', seed, 1.0, {'fc1': 3, 'fc2': None})
    config = SizesConfig(
        workdir=str(folder / 'run'),
        seeds=2,
        coded=(
            f'pruned: --model={folder}/pruned-{{seed}}.safetensors --clusters=4',
            f'pruned: --model={folder}/pruned-{{seed}}.safetensors --clusters=16',
            f'factors: --model={folder}/factors-{{seed}}.safetensors --clusters=8',
        ),
        shared={'dataset': 'digits', 'data_dir': str(data_dir), 'finetuning_steps': 0},
    )
    return config, masks, sizes.compare(config)


def test_a_row_says_what_its_file_has(run):
    config, masks, rows = run
    assert [(row['method'], row['clusters'], row['seed']) for row in rows] == [
        *((method, clusters, seed) for method, clusters in (('pruned', '4'), ('pruned', '16'))
          for seed in (0, 1)),
        *(('factors', '8', seed) for seed in (0, 1)),
    ]  # fmt: skip
    for number, row in enumerate(rows):
        path = Path(config.workdir, f'{number}.dns')
        assert row['bytes'] == path.stat().st_size
        books = load_coded(path).codebooks.values()
        assert max(map(len, books)) <= int(row['clusters'])
        assert 0 <= row['test_error'] <= 100
    assert any(row['test_error'] != row['error_before'] for row in rows)
    for row, own in zip(rows[2:4], masks, strict=True):
        kernels = [layer['kernel'] for layer in own.values()]
        # 16 values of random weights seldom have one that is 0.
        assert row['multiply_adds'] == sum(int(kernel.sum()) for kernel in kernels)
    assert rows[0]['bytes'] < rows[2]['bytes'] < rows[4]['bytes'] < 4 * 266_610 / 5


def test_factors_cost_what_they_have(run):
    *_, rows = run
    whole = 784 * 3 + 3 * 300 + 300 * 100 + 100 * 10
    assert whole * 0.9 < rows[-1]['multiply_adds'] <= whole


def test_table_and_file_have_all_rows(run):
    config, _, rows = run
    with open(f'{config.workdir}/sizes.csv', newline='') as file:
        assert [int(row['bytes']) for row in csv.DictReader(file)] == [row['bytes'] for row in rows]
    table = Path(config.workdir, 'sizes.md').read_text()
    assert table.count('pruned') == 2
    low, high = sorted(row['bytes'] for row in rows[:2])
    assert f'({low:,} to {high:,})' in table
    assert Path(config.workdir, 'sizes.png').stat().st_size > 10_000


@pytest.mark.parametrize(
    ('coded', 'message'),
    [
        ((), 'must be given at least once'),
        (('a',), 'must be NAME: FLAGS'),
        (('a: --model=x.safetensors',), 'must have a --model with {seed}'),
        (('a: --model={seed} --format=onnx',), "Unknown command line flag 'format'"),
        (('a: --model={seed} --nonsense',), "Unknown command line flag 'nonsense'"),
        (('a: --model={seed} b',), r"but has \['b'\]"),
        (('a: --model={seed} --clusters=x',), '--clusters'),
        (('a: --model={seed}', 'a: --model=b{seed}'), r"twice: \[\('a', '16'\)\]"),
    ],
)
def test_bad_flags_are_refused(coded, message):
    with pytest.raises(ValueError, match=message):
        SizesConfig(coded=coded, shared={})


def test_one_seed_needs_no_place_for_it():
    SizesConfig(coded=('a: --model=x.safetensors',), seeds=1, shared={})
    with pytest.raises(ValueError, match='must have a --model'):
        SizesConfig(coded=('a: --clusters=3',), seeds=1, shared={})


def test_what_cannot_be_coded_is_told_before_the_work(tmp_path):
    flags = f'--model={tmp_path}/{{seed}}.safetensors'
    coded = (f'a: {flags}',)
    config = SizesConfig(workdir=f'{tmp_path}/run', coded=coded, seeds=1, shared={})
    with pytest.raises(OSError, match=r'0\.safetensors'):
        sizes.compare(config)
    save_sparse(
        tmp_path / '0.safetensors', {'w': np.ones(3, np.float32)}, {'w': np.ones((), bool)}, {}
    )
    with pytest.raises(ValueError, match=r'0\.safetensors names the network None'):
        sizes.compare(config)
    assert not Path(config.workdir).exists()
