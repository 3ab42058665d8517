"""Tests of training.sized_flags: what makes a network, what is refused, and the short form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from searches import parse

import dns_jax
from experiments.data import resident, texts
from experiments.networks import models
from experiments.sweeps.flags import CompareConfig
from experiments.training import run
from experiments.training.flags import Config
from experiments.training.plan import make_plan
from experiments.training.sized_flags import ShortConfig, SizedConfig

RESNET = {'network': 'resnet', 'dataset': 'cifar10', 'kernel_density': 0.5}
GPT = {'network': 'gpt', 'dataset': 'tiny_shakespeare', 'kernel_density': 0.5}


@pytest.mark.parametrize(
    ('fields', 'options'),
    [
        (RESNET, {}),
        ({**RESNET, 'depth': 8, 'width': 0.25}, {'depth': 8, 'width': 0.25}),
        (GPT, {}),
        (
            {**GPT, 'depth': 3, 'width': 48.0, 'heads': 3, 'context': 9, 'tied': True},
            {'depth': 3, 'width': 48, 'heads': 3, 'context': 9, 'tied': True},
        ),
    ],
)
def test_a_network_is_made_with_what_is_given(fields, options):
    found = SizedConfig(**fields).network_options
    assert found == options
    assert [type(value) for value in found.values()] == [type(value) for value in options.values()]
    network = models.NETWORKS[fields['network']]
    assert network(**found) == network(**options)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({**RESNET, 'heads': 2}, '--heads=2 has no meaning .*--network=resnet'),
        ({**RESNET, 'context': 8}, '--context=8 has no meaning .*--network=resnet'),
        ({**RESNET, 'tied': True}, '--tied=True has no meaning .*--network=resnet'),
        ({**GPT, 'shift': 4}, '--shift=4 has no meaning .*--network=gpt'),
        ({**GPT, 'mirror': True}, '--mirror=True has no meaning .*--network=gpt'),
        ({**GPT, 'fresh_statistics': True}, '--fresh_statistics=True has no meaning .*=gpt'),
        ({**RESNET, 'average': 0.5, 'finetuning_steps': 1}, '--average=0.5 .*--network=resnet'),
        ({**RESNET, 'dropout': 0.5}, '--dropout=0.5 is not for --network=resnet'),
        ({**GPT, 'dropout': 0.5}, '--dropout=0.5 is not for --network=gpt'),
        ({**GPT, 'quantiser': 'signs'}, '--quantiser=signs rounds layer by layer'),
        ({**RESNET, 'width': 0.0}, '--width=0.0 must be above 0'),
        ({**GPT, 'width': -8.0}, '--width=-8.0 must be above 0'),
        ({**GPT, 'width': 8.5}, '--width=8.5 must be a whole number for --network=gpt'),
        ({**RESNET, 'width': np.inf}, '--width must be finite'),
        ({**GPT, 'width': np.nan}, '--width'),
        ({**GPT, 'kernel_density': 0.0}, r'--kernel_density=0.0 must be in \(0, 1\]'),
    ],
)
def test_what_a_network_has_no_use_for_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SizedConfig(**fields)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({**RESNET, 'depth': 9}, 'depth=9 must be 6n'),
        ({**GPT, 'width': 10.0}, 'width=10 must be a multiple of heads=4'),
        ({**GPT, 'stay_dense': 'nothing'}, "--stay_dense: pattern 'nothing' is the first match"),
        (
            {**GPT, 'kernel_density': None, 'layer_density': 'blocks/2/*:0.5'},
            "--layer_density: pattern 'blocks/2/.' is the first match of no layer",
        ),
        (
            {**RESNET, 'dataset': 'mnist'},
            "--dataset: name='mnist': its images are 28x28x1, wanted 32x32x3, as those of cifar10",
        ),
        (
            {**RESNET, 'dataset': 'tiny_shakespeare'},
            '--dataset=tiny_shakespeare holds a text, but --network=resnet takes images',
        ),
        (
            {**GPT, 'dataset': 'cifar10'},
            '--dataset=cifar10 holds images, but --network=gpt takes a text',
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_data_are_opened(
    fields, message, monkeypatch, tmp_path
):
    def fail(*arguments):
        pytest.fail('data were opened')

    monkeypatch.setattr(resident, 'load', fail)
    monkeypatch.setattr(texts, 'load', fail)
    with pytest.raises(ValueError, match=message):
        run.run(SizedConfig(**fields, workdir=str(tmp_path / 'run')))
    assert not (tmp_path / 'run').exists()


def test_a_lenet_takes_no_images_in_colour():
    with pytest.raises(ValueError, match=r"--dataset: name='cifar10': .*, wanted 28x28x1"):
        make_plan(Config('lenet5', dataset='cifar10', compression=9.0))


@pytest.mark.parametrize('soft', [False, True])
def test_the_short_form_does_what_prune_to_does(soft):
    """Surgery by its defaults keeps what the library's short form keeps, step by step."""
    steps = 20
    random = np.random.default_rng(0)
    params = {
        name: {
            'kernel': random.normal(size=(9, units)).astype(np.float32),
            'bias': random.normal(size=units).astype(np.float32),
        }
        for name, units in (('fc1', 12), ('fc2', 5))
    }
    # Of a network whose layers are not stacked.
    # Shares of the steps, which it takes of one step less.
    changing = 8 if soft else 6
    ends = {'ramp_end': f'{(steps - 1) // 2}', 'stop': f'{changing * (steps - 1) // 10 + 1}'}
    fields = {**RESNET, 'kernel_density': 0.1, 'surgery_steps': steps, **ends}
    if soft:
        flagfile = 'experiments/flagfiles/networks_gpt.flags'
        runs = parse(f'--flagfile={flagfile}', config_type=CompareConfig).named_runs()
        own = dict(runs)['soft surgery']
        assert (own.ramp, own.ramp_end, own.stop) == ('poly:3', '50%', '80%')
        assert (own.soft_threshold, own.pruned_rate) == (True, 0.3)
        fields |= {'soft_threshold': True, 'hysteresis': own.hysteresis}
    plan = make_plan(ShortConfig(**fields))
    assert plan.finetuning.steps == 0
    short = dns_jax.prune_to(steps=steps, density=0.1, soft=soft)
    pruners = plan.surgery.make_pruner(params), short
    courses = []
    for pruner in pruners:
        state, update, masks = pruner.init(params), jax.jit(pruner.update), []
        for step in range(steps):
            moved = jax.tree.map(lambda leaf, by=step: leaf * (1 + jnp.sin(leaf * by)), params)
            _, state = update(params, state, moved)
            masks.append(jax.tree.map(np.asarray, dns_jax.get_masks(state)))
        courses.append(masks)
    for one, other in zip(*courses, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    kernels = [leaves['kernel'] for leaves in courses[0][-1].values()]
    assert sum(kernel.sum() for kernel in kernels) == round(0.1 * 9 * 17)


@pytest.mark.parametrize('pruner', ['surgery', 'gradual', 'ac_dc'])
def test_pruned_weights_learn_slower_in_surgery_alone(pruner):
    plan = make_plan(ShortConfig(**RESNET, pruner=pruner, refresh_every=1))
    params = {'fc': {'kernel': jnp.array([[1.0, 2.0, 3.0, 4.0]])}}
    masks = {'fc': {'kernel': jnp.array([[False, False, True, True]])}}
    chained = plan.surgery.chain(dns_jax.freeze(masks), optax.sgd(1.0))
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = chained.update(ones, chained.init(params), params)
    # AC/DC takes pruned weights to zero.
    pruned = {'surgery': [-0.3, -0.3], 'gradual': [-1.0, -1.0], 'ac_dc': [-1.0, -2.0]}[pruner]
    assert updates['fc']['kernel'].tolist()[0] == pytest.approx([*pruned, -1.0, -1.0])


@pytest.mark.parametrize('own', [{'prune_biases': True}, {'prune_embeddings': True}])
def test_structures_are_of_all_that_takes_part(own):
    """Norms have no kernel, and embeddings are none."""
    config = SizedConfig(**GPT | {'prune_biases': False} | own, structure='units')
    assert make_plan(config).pruning.structures['blocks/1/attend'] == dns_jax.Units(-1)
