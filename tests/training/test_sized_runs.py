"""Tests of whole runs of networks whose size is chosen: what they write, and how they go on."""

import functools
import json
import signal

import jax
import numpy as np
import opened
import pytest
import sized_runs
from situations import slow_but
from sized_runs import ALPHABET, GPT, RESNET, make_config
from tiny_runs import outcome

import dns_jax
from dns_jax.files.sparse import load_sparse
from experiments.networks import models
from experiments.training import run, side_by_side
from experiments.training.checkpoints import Checkpoints
from experiments.training.phases import Stopped
from experiments.training.plan import make_plan

FIELDS = {'resnet': RESNET, 'gpt': GPT}
KERNELS = ('attend', 'down', 'project', 'up')
BIASES = 24 + 8 + 8 + 32  # of one block


@pytest.fixture(scope='module', autouse=True)
def data():
    with pytest.MonkeyPatch.context() as patch:
        sized_runs.patch_loaders(patch)
        yield


@pytest.fixture(scope='module')
def summary_of(tmp_path_factory):
    """Does a run, once for each choice of flags; gives its folder and summary."""

    @functools.cache
    def do(network, *fields):
        folder = tmp_path_factory.mktemp('sized') / 'run'
        config = make_config(FIELDS[network], folder, **dict(fields))
        return folder, run.run(config)

    return do


def network_of(file):
    """The network that a file names, and what it computes with."""
    network = models.NETWORKS[file.metadata['network']](**json.loads(file.metadata['options']))
    variables = jax.tree.map(np.asarray, file.params)
    return network, variables if 'params' in variables else {'params': variables}


def test_a_residual_network_is_written_with_its_statistics(summary_of):
    folder, summary = summary_of('resnet')
    file = load_sparse(folder / 'pruned.safetensors')
    network, variables = network_of(file)
    assert (network.depth, network.width) == (8, 0.125)
    assert sorted(variables) == ['batch_stats', 'params']
    assert float(file.metadata['input_scale']) == 1 / 64
    test = sized_runs.load_images('cifar10').test
    colours = np.array([float(each) for each in file.metadata['input_mean'].split(',')])
    images = ((test.images - colours) / 64).astype(np.float32)
    given = np.asarray(network.apply(variables, images))
    wrong = 100 * np.mean(given.argmax(1) != test.labels)
    assert summary['test_error'] == pytest.approx(wrong, abs=1e-4)
    assert summary['unit'] == '%'
    # Of norms and the bias of the last layer all is kept.
    kernels = {layer for layer in summary['per_layer'] if 'norm' not in layer}
    sizes = [leaf.size for leaf in jax.tree.leaves(variables['params']) if leaf.ndim > 1]
    others = summary['parameters'] - sum(sizes)
    assert len(kernels) == len(sizes) == 8
    assert summary['kept'] == round(0.3 * sum(sizes)) + others
    masks = file.masks['params']
    assert sum(int(leaf.sum()) for leaf in jax.tree.leaves(masks) if leaf.ndim) == round(
        0.3 * sum(sizes)
    )


def test_a_gpt_is_written_and_measured_in_bits(summary_of):
    folder, summary = summary_of('gpt')
    file = load_sparse(folder / 'pruned.safetensors')
    network, variables = network_of(file)
    assert (network.characters, network.heads) == (len(ALPHABET), 2)
    test = sized_runs.load_text('some', 6).test
    bits = []
    for tokens, labels in test.batches():
        given = np.asarray(network.apply(variables, tokens), np.float64)
        logs = np.log2(np.exp(given) / np.exp(given).sum(-1, keepdims=True))
        bits += [logs[row, at, label] for (row, at), label in np.ndenumerate(labels) if label >= 0]
    assert len(bits) == len(test.tokens) - 1
    assert summary['test_error'] == pytest.approx(-np.mean(bits), rel=1e-4)
    assert summary['unit'] == 'bits/character'
    text = f'{summary["reference_error"]:.3f} bits/character → {summary["test_error"]:.3f} bits/ch'
    page = (folder / 'report.html').read_text()
    assert text in page
    assert f'{summary["validation_error"]:.3f} bits/character' in page


def test_each_block_is_a_layer_of_its_own(summary_of):
    _, summary = summary_of('gpt')
    sizes = summary['per_layer']
    blocks = {f'blocks/{number}/{name}' for number in (0, 1) for name in KERNELS}
    assert blocks <= set(sizes)
    assert not any(layer.startswith('blocks/attend') for layer in sizes)
    # One threshold for all would not give blocks of equal size equal shares.
    assert sizes['blocks/0/up']['parameters'] == sizes['blocks/1/up']['parameters'] == 9 * 32
    kernels = sum(sizes[layer]['parameters'] for layer in blocks) - 2 * BIASES + 5 * 8
    others = summary['parameters'] - kernels
    assert summary['kept'] == round(0.3 * kernels) + others


def sizes_by_surgery(**fields):
    """What surgery alone keeps in each layer of a GPT, and its masks."""
    plan = make_plan(make_config(GPT, 'nowhere', **fields))
    network = models.NETWORKS['gpt'](**plan.config.network_options)
    params = network.init(jax.random.key(0), np.zeros((1, 6), np.int32))['params']
    pruner = plan.surgery.make_pruner(params)
    state = pruner.init(params)
    with jax.disable_jit():  # faster than compiling for so few steps
        for _ in range(plan.surgery.steps):
            _, state = pruner.update(params, state, params)
    masks = dns_jax.get_masks(state)
    apart = dns_jax.unstack(plan.pruning.stacked, params, masks)
    return dns_jax.measure_sizes(*apart).layers, masks


def kept_kernels(sizes, number):
    """How many weights of the kernels of a block are kept, and how many there are."""
    part = [sizes[f'blocks/{number}/{name}'] for name in KERNELS]
    return (
        sum(size.kept for size in part) - BIASES,
        sum(size.parameters for size in part) - BIASES,
    )


def test_blocks_have_densities_of_their_own_and_layers_stay_dense():
    densities = {'kernel_density': None, 'layer_density': 'blocks/0/*:0.1,blocks/1/*:0.4'}
    sizes, masks = sizes_by_surgery(**densities, stay_dense='output')
    for number, density in ((0, 0.1), (1, 0.4)):
        for name in KERNELS:
            size, biases = sizes[f'blocks/{number}/{name}'], {'attend': 24, 'up': 32}.get(name, 8)
            assert size.kept == round(density * (size.parameters - biases)) + biases
    assert sizes['output'].density == 1
    assert masks['output']['kernel'].ndim == 0
    up = masks['blocks']['up']['kernel']
    assert [int(block.sum()) for block in up] == [round(0.1 * 256), round(0.4 * 256)]


def test_what_stays_dense_takes_no_share():
    sizes, _ = sizes_by_surgery(stay_dense='output,blocks/0/*')
    assert sizes['output'].density == 1
    kept, kernels = kept_kernels(sizes, 0)
    assert kept == kernels
    kept, kernels = kept_kernels(sizes, 1)
    assert kept == round(0.3 * kernels)


def test_embeddings_take_part_where_they_are_asked_to():
    plain, pruned = (sizes_by_surgery(prune_embeddings=asked)[0] for asked in (False, True))
    for name in ('tokens', 'positions'):
        assert plain[name].density == 1
        assert pruned[name].density < 1
    kernels = 2 * kept_kernels(plain, 0)[1] + plain['output'].parameters
    embeddings = plain['tokens'].parameters + plain['positions'].parameters
    others = sum(size.parameters for size in plain.values()) - kernels - embeddings
    for sizes, kept in (
        (plain, embeddings + round(0.3 * kernels)),
        (pruned, round(0.3 * (kernels + embeddings))),
    ):
        assert sum(size.kept for size in sizes.values()) == kept + others


def test_a_tied_gpt_has_no_output():
    assert 'output' not in sizes_by_surgery(tied=True)[0]


def test_fresh_statistics_change_the_network_that_is_kept_alone(summary_of):
    plain, fresh = (
        load_sparse(summary_of('resnet', *fields)[0] / 'pruned.safetensors').params
        for fields in ((), (('fresh_statistics', True),))
    )
    jax.tree.map(np.testing.assert_array_equal, plain['params'], fresh['params'])
    one, other = (tree['batch_stats']['norm1']['mean'] for tree in (plain, fresh))
    assert not np.allclose(one, other, atol=1e-4)
    # Of all training images, which are one batch, changed as in training by coins of their own.
    augmentation = make_plan(make_config(RESNET, 'run')).finetuning.make_augmentation()
    key = jax.random.fold_in(jax.random.key(augmentation.number), 0)
    images = sized_runs.load_images('cifar10').train.images
    images = np.asarray(augmentation.change(key, images))
    scaled = (images - np.array(models.INPUTS['resnet'].mean)) / 64
    padded = np.pad(scaled, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    given = np.einsum('byxcij,ijcf->byxf', windows, fresh['params']['conv1']['kernel'])
    wanted = {'mean': given.mean((0, 1, 2)), 'var': given.var((0, 1, 2))}
    for name, value in wanted.items():
        found = fresh['batch_stats']['norm1'][name]
        np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('network', slow_but(FIELDS, 'resnet'))
def test_a_run_that_is_stopped_in_every_phase_repeats_itself(network, summary_of, tmp_path):
    fields = FIELDS[network]
    folder = tmp_path / 'run'
    begun = opened.open_run(make_config(fields, folder))
    with pytest.raises(Stopped):
        side_by_side.train_references([begun], [signal.SIGTERM])
    begun = opened.open_run(make_config(fields, folder, resume=True))
    dense = side_by_side.train_references([begun], [])
    with pytest.raises(Stopped):
        side_by_side.train_surgery([begun], dense, [signal.SIGTERM])
    opened.do(make_config(fields, folder, resume=True))
    assert outcome(folder) == outcome(summary_of(network)[0])


def test_a_reference_brings_its_statistics_along(summary_of, tmp_path):
    folder, summary = summary_of('resnet')
    config = make_config(RESNET, tmp_path / 'run', reference=str(folder))
    begun = opened.open_run(config)
    ((_, statistics),) = side_by_side.train_references([begun], [])
    plain = opened.open_run(make_config(RESNET, tmp_path / 'other'))
    like = plain.start(plain.plan.reference.make_optimizer(plain.task.shapes), plain.initial)
    with Checkpoints(folder / 'checkpoints' / 'reference') as checkpoints:
        _, state = checkpoints.restore(like, 4)
    jax.tree.map(np.testing.assert_array_equal, statistics, state.statistics)
    initial = plain.initial.statistics['batch_stats']['norm1']['mean']
    assert not np.allclose(statistics['batch_stats']['norm1']['mean'], initial)
    again = run.run(make_config(RESNET, tmp_path / 'again', reference=str(folder)))
    for name in ('reference_error', 'test_error', 'validation_error', 'kept'):
        assert again[name] == summary[name]
    assert outcome(tmp_path / 'again')[1] == outcome(folder)[1]


@pytest.mark.parametrize('field', [{'heads': 4}, {'width': 16.0}, {'depth': 1}, {'tied': True}])
def test_a_reference_of_another_size_is_refused(field, summary_of, tmp_path):
    folder, _ = summary_of('gpt')
    ((name, value),) = field.items()
    config = make_config(GPT, tmp_path / 'run', reference=str(folder), **field)
    with pytest.raises(ValueError, match=f'is of a run with {name} .*; wanted {value}'):
        run.run(config)


@pytest.mark.parametrize('network', FIELDS)
def test_what_is_recorded_is_measured_of_the_pruned_network(network, summary_of):
    folder, summary = summary_of(network)
    records = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    assert records[-1]['validation_error'] == summary['validation_error']
    assert records[-1]['kept'] == {
        layer: size['kept'] for layer, size in summary['per_layer'].items()
    }
