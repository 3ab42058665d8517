"""Tests of training.plan: what flags become, and what is refused before data are opened."""

import contextlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_flags import TARGETS, parse

import dns_jax
from experiments import lenet5
from experiments.data import resident
from experiments.networks import models
from experiments.training import phases, run
from experiments.training.flags import Config
from experiments.training.image_flags import ImageConfig
from experiments.training.plan import make_plan, read_pruning
from experiments.training.pruning import PRUNERS, make_pruner, make_rules


def rules(config, params):
    """The rules of surgery on a network of these weights."""
    return make_rules(read_pruning(config, list(params)), params)


def masks_of_steps(config, params):
    """The masks after each step of pruning, while the weights move."""
    pruner = make_pruner(read_pruning(config, list(params)), params)
    state, update, masks = pruner.init(params), jax.jit(pruner.update), []
    for step in range(config.surgery_steps):
        moved = jax.tree.map(lambda leaf, step=step: leaf * (1 + np.sin(leaf * step)), params)
        _, state = update(params, state, moved)
        masks.append(jax.tree.map(np.asarray, dns_jax.get_masks(state)))
    return masks


def random_layers(**shapes):
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        name: {'kernel': draw(*shape), 'bias': draw(shape[1])} for name, shape in shapes.items()
    }


@pytest.mark.parametrize('name', ['c_rate', 'layer_density', 'start', 'stop'])
@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('conv1:1', "pattern 'conv1' is the first match of no layer"),
        ('*:1,fc1:2', "pattern 'fc1' is the first match of no layer"),
        ('fc1:x', 'is not PATTERN:NUMBER'),
        ('fc1:1,fc1:2', 'stands twice'),
    ],
)
def test_tables_that_do_not_fit_the_network_name_their_flag(name, text, message):
    params = {layer: {'kernel': jnp.ones((2, 2))} for layer in ('fc1', 'fc2')}
    others = {} if name in TARGETS else {'c_rate': '1'}
    with pytest.raises(ValueError, match=rf'^--{name}: .*{re.escape(message)}'):
        rules(Config('tiny', **{name: text}, **others), params)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'cut': 0.5, 'cut_at': '200%'}, '--cut_at=200% must be one of the 16000 steps'),
        ({'cut': 0.5, 'cut_at': '-1'}, '--cut_at=-1 must be one of the 16000 steps'),
        ({'c_rate': 'nan'}, 'c_rate must be finite in float32'),
        ({'hysteresis': 2.0}, 'hysteresis must be in [0, 1)'),
        ({'weight_decay': np.nan}, '--weight_decay must be finite in float32, but is nan'),
        ({'weight_decay': 1e39}, '--weight_decay must be finite in float32, but is 1e'),
        ({'update_gamma': -1.0}, 'gamma must be finite in float32 and at least 0'),
        ({'update_power': -1.0}, 'power must be finite in float32 and at least 0'),
        ({'start': '-1'}, 'start must be a whole number from 0'),
        ({'start': '5', 'stop': '4'}, 'stop must be a whole number from 5'),
        ({'layer_density': '0'}, '--layer_density: a density must be in (0, 1], but is 0.0'),
        ({'layer_density': '1.5'}, '--layer_density: a density must be in (0, 1], but is 1.5'),
        (
            {'density': 0.5, 'ramp_start': '50%', 'ramp_end': '40%'},
            '--ramp_end=40% must come after --ramp_start=50%',
        ),
        ({'density': 0.5, 'ramp_start': '-1'}, '--ramp_end=80% must come after --ramp_start=-1'),
        ({'density': 0.5, 'ramp_end': '0%'}, '--ramp_end=0% must come after --ramp_start=0%'),
        ({'density': 0.5, 'ramp_end': 'inf%'}, "--ramp_end: 'inf%' must be a step or a share"),
        (
            {'density': 0.5, 'ramp_start': '50%', 'stop': '50%'},
            'the masks of * are updated at the steps from 0 to 7999',
        ),
        ({'density': 0.5, 'start': '95%', 'stop': '95%'}, 'at the steps from 15200 to 15199'),
        ({'density': 0.5, 'ramp': 'poly'}, "--ramp must be log or poly:POWER, but is 'poly'"),
        ({'density': 0.5, 'ramp': 'poly:x'}, "--ramp must be log or poly:POWER, but is 'poly:x'"),
        ({'density': 0.5, 'ramp': 'log:2'}, "--ramp must be log or poly:POWER, but is 'log:2'"),
        ({'density': 0.5, 'ramp': 'poly:0'}, 'power must be finite in float32 and above 0'),
        ({'density': 0.5, 'ramp_end': 'soon'}, "--ramp_end: 'soon' must be a step or a share"),
        ({'density': 0.5, 'ramp_end': 'x%'}, "--ramp_end: 'x%' must be a step or a share"),
    ],
)
def test_numbers_out_of_range(fields, message):
    params = {'fc1': {'kernel': jnp.ones((2, 2))}}
    others = {} if fields.keys() & set(TARGETS) else {'c_rate': '1'}
    with pytest.raises(ValueError, match=re.escape(message)):
        rules(Config('tiny', **fields, **others), params)


def test_a_layer_without_c_rate_stays_dense():
    params = {layer: {'kernel': jnp.ones((2, 2))} for layer in ('fc1', 'fc2')}
    assert list(rules(Config('tiny', c_rate='fc2:1'), params)) == ['fc2']


@pytest.mark.parametrize(
    ('stop', 'last'), [('100%', 99), ('95', 94), ('200', 99), ('3000000000', 99), ('', 99)]
)
def test_there_is_a_last_update(stop, last):
    params = {'fc1': {'kernel': jnp.ones((2, 2))}}
    for what in ({'density': 0.5}, {'layer_density': '0.5'}, {'c_rate': '1'}):
        config = Config('tiny', **what, surgery_steps=100, stop=stop, update_power=0.5)
        (rule,) = rules(config, params).values()
        assert max(step for step in range(201) if rule.update_probability(step) > 0) == last


@pytest.mark.parametrize(
    ('fields', 'last'),
    [
        ({}, 90),
        ({'stop': '95'}, 90),
        ({'stop': '91'}, 90),
        ({'stop': ''}, 90),
        ({'ramp_end': '91'}, 99),
        ({'start': '93'}, 99),
        ({'refresh_every': 0}, 99),
    ],
)
def test_masks_stay_from_the_last_refresh_on_if_the_density_is_reached_by_then(fields, last):
    params = {'fc1': {'kernel': jnp.ones((2, 2))}}
    fields = {'refresh_every': 10, **fields}
    (rule,) = rules(Config('tiny', density=0.5, surgery_steps=100, **fields), params).values()
    assert max(step for step in range(100) if rule.update_probability(step) > 0) == last


@pytest.mark.parametrize(
    'fields',
    [
        {'refresh_every': 500},
        {'refresh_every': 7},
        {'refresh_every': 0},
        {'ramp_end': '100%'},
        {'ramp_end': '200%', 'stop': '13'},
        {'stop': '50%', 'update_power': 2.0, 'update_gamma': 9.0},
        {'start': '9', 'ramp_end': '5'},
        *(
            {'pruner': name, 'ramp_end': '100%'}
            for name in ('iterative', 'gradual', 'straight_through')
        ),
        *(
            {'pruner': name, 'ramp_end': '100%', 'refresh_every': 3}
            for name in ('set', 'rigl', 'ac_dc')
        ),
    ],
)
def test_the_density_is_reached_whatever_fits_the_steps(fields):
    params = {'fc1': {'kernel': random_layers(fc1=(10, 20))['fc1']['kernel']}}
    for what in ({'density': 0.1}, {'layer_density': '0.1'}):
        masks = masks_of_steps(Config('tiny', **what, surgery_steps=20, **fields), params)
        assert masks[-1]['fc1']['kernel'].sum() == 20


@pytest.mark.parametrize('prune_biases', [True, False])
@pytest.mark.parametrize('what', [{'compression': 4.0}, {'density': 0.25}])
def test_a_density_is_of_all_parameters(what, prune_biases):
    config = Config('tiny', surgery_steps=5, refresh_every=1, prune_biases=prune_biases, **what)
    params = random_layers(fc1=(10, 20), fc2=(20, 3))
    masks = masks_of_steps(config, params)[-1]
    # Biases that take no part are kept, and are as many fewer of the others.
    assert dns_jax.measure_sizes(params, masks).total.kept == (10 * 20 + 20 + 20 * 3 + 3) // 4
    assert masks['fc1']['bias'].ndim == prune_biases


@pytest.mark.parametrize('prune_biases', [True, False])
def test_a_kernel_density_is_of_all_that_takes_part(prune_biases):
    fields = {'surgery_steps': 5, 'refresh_every': 1, 'prune_biases': prune_biases}
    params = random_layers(fc1=(10, 20), fc2=(20, 3))
    for stay_dense, part in (('', 260 + 23 * prune_biases), ('fc2', 200 + 20 * prune_biases)):
        config = Config('tiny', kernel_density=0.1, stay_dense=stay_dense, **fields)
        masks = masks_of_steps(config, params)[-1]
        kept = dns_jax.measure_sizes(params, masks).total.kept
        assert kept == 283 - part + round(0.1 * part)


def test_a_layer_that_stays_dense_is_in_no_table():
    params = {layer: {'kernel': jnp.ones((2, 2))} for layer in ('conv1', 'conv2', 'fc1')}
    assert list(rules(Config('tiny', c_rate='1', stay_dense='conv*'), params)) == ['fc1']
    for fields in ({'c_rate': 'fc1:1'}, {'c_rate': '*:1', 'start': 'fc1:2'}):
        with pytest.raises(ValueError, match="pattern 'fc1' is the first match of no layer"):
            rules(Config('tiny', **fields, stay_dense='fc1'), params)


def test_layers_have_densities_ramps_starts_and_stops_of_their_own():
    """One layer after the other, as the paper has convolutions first."""
    config = Config(
        'tiny',
        surgery_steps=40,
        refresh_every=5,
        layer_density='fc1:0.1,fc2:0.5',
        ramp_start='fc1:0,fc2:20',
        ramp_end='fc1:10,fc2:30',
        start='fc1:1,fc2:20',
        stop='fc1:20,fc2:40',
    )
    steps = masks_of_steps(config, random_layers(fc1=(9, 20), fc2=(20, 3)))
    kept = [
        tuple(sum(leaf.sum() for leaf in masks[layer].values()) for layer in ('fc1', 'fc2'))
        for masks in steps
    ]
    assert kept[0] == (200, 63)
    assert 20 < kept[8][0] < 200  # the first is pruned on its way
    assert kept[19] == (20, 63)
    assert 31 < kept[28][1] < 63
    assert kept[39] == (20, 32)
    for masks in steps[20:]:
        jax.tree.map(np.testing.assert_array_equal, masks['fc1'], steps[19]['fc1'])


def test_update_gamma_needs_a_power():
    for power in (0.0, 2.0):
        config = Config('tiny', c_rate='1', update_gamma=0.5, update_power=power)
        (rule,) = rules(config, random_layers(fc1=(2, 2))).values()
        assert rule.update_probability(6) == pytest.approx(4.0**-power)


@pytest.mark.parametrize(
    'text',
    [
        *('', 'inv', 'inv:0.1', 'poly:0.1,x', 'fixed:0.1,0.2', 'fixed:1e39', 'warp:9'),
        *('step:1,0.1', 'step:1,0.1,0.5', 'step:1,0.1,inf', 'step:1,1e39,5'),
    ],
)
def test_malformed_learning_rates_are_refused(text):
    with pytest.raises(ValueError, match=f'--learning_rate: {text!r} must'):
        make_plan(Config(network='lenet5', c_rate='1', learning_rate=text))


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--ramp=foo', "--ramp must be log or poly:POWER, but is 'foo'"),
        ('--learning_rate=warp:9', "--learning_rate: 'warp:9' must begin with one of"),
        ('--finetuning_learning_rate=x', "--finetuning_learning_rate: 'x' must begin with one of"),
        ('--ramp_end=soon', "--ramp_end: 'soon' must be a step or a share"),
        ('--reference_weight_decay=-1', '--reference_weight_decay=-1.0 must be at least 0'),
        ('--momentum=1.5', 'momentum must be in [0, 1)'),
        ('--finetuning_weight_decay=-1', '--finetuning_weight_decay=-1.0 must be at least 0'),
        ('--compression=1e9', '--compression or --density asks to keep 0 of 431080'),
    ],
)
def test_a_bad_flag_is_refused_before_data_are_opened(flag, message, monkeypatch, tmp_path):
    def fail(*arguments):
        pytest.fail('data were opened')

    monkeypatch.setattr(resident, 'load', fail)
    monkeypatch.setattr(models.LeNet5, 'init', fail)
    with pytest.raises(ValueError, match=re.escape(message)):
        run.run(
            parse(
                f'--workdir={tmp_path / "run"}', '--compression=9', flag, defaults=lenet5.DEFAULTS
            )
        )
    assert not (tmp_path / 'run').exists()


def test_phases_are_those_of_the_flags():
    config = Config(
        'lenet5',
        compression=9.0,
        reference_steps=3,
        surgery_steps=4,
        finetuning_steps=0,
        learning_rate='poly:0.5,1',
        dropout=0.5,
        pruned_dropout='dropped',
        pruner='rigl',
    )
    plan = make_plan(config)
    phases = plan.reference, plan.surgery, plan.finetuning
    assert [(phase.name, phase.steps) for phase in phases] == [
        *(('reference', 3), ('surgery', 4), ('finetuning', 0)),
    ]
    assert [phase.dropout for phase in phases] == [0.5, 0.0, 0.0]
    weights, moved = {'kernel': jnp.ones((1, 1))}, []
    for phase in phases:
        state = phase.solver.init(weights)
        moved.append(float(phase.solver.update(weights, state, weights)[0]['kernel'][0, 0]))
    # The rate times the gradient and the decay.
    assert moved == pytest.approx([-0.01 * 1.0005, -0.5 * 1.0005, -0.05])
    assert {phase.chain for phase in phases} == {PRUNERS['rigl'].chain}


def test_an_average_is_of_fine_tuning_alone():
    plan = make_plan(Config('lenet5', compression=9.0, average=0.5))
    assert [phase.average for phase in (plan.reference, plan.surgery)] == [0, 0]
    assert plan.finetuning.average == 0.5


ROOMS = 8  # at most, between the entry script and the first step


def test_a_configuration_visits_few_rooms(make_config, monkeypatch):
    """Whatever file has a configuration in its hands, in a variable or an argument."""
    rooms = set()

    def look(frame, event, _):
        name = frame.f_code.co_filename
        values = frame.f_locals.values() if '/experiments/' in name else ()
        if event == 'return' and any(isinstance(value, Config) for value in values):
            rooms.add(Path(name).stem)

    class FirstStep(Exception):
        """The way is over."""

    def stop(*arguments, **options):
        raise FirstStep

    config = make_config(reference_steps=1, surgery_steps=2, finetuning_steps=0)
    monkeypatch.setattr(phases, 'make_step', stop)
    sys.setprofile(look)
    try:
        with contextlib.suppress(FirstStep):
            run.run(config)
    finally:
        sys.setprofile(None)
    assert {'run', 'plan', 'task'} <= rooms
    assert len(rooms | {'lenet5', 'command_line'}) <= ROOMS, rooms


def test_few_classes_are_not_refused_for_those_of_imagenet():
    config = ImageConfig('alexnet', compression=250.0, width=0.05, prune_biases=False)
    assert make_plan(config).pruning.compression == 250.0


@pytest.mark.parametrize(
    ('structure', 'message'),
    [
        ('conv1:2of4', "--structure: NofM.* must divide axis -2 of 'conv1/kernel'"),
        (
            'fc1:3by4',
            "--structure: 'fc1:3by4' in 'fc1:3by4' is not PATTERN:STRUCTURE, as units, inputs",
        ),
        ('fc9:units', '--structure: pattern .fc9. is the first match of no layer'),
    ],
)
def test_a_structure_that_does_not_fit_is_refused_by_its_flag(structure, message):
    with pytest.raises(ValueError, match=message):
        make_plan(Config(network='lenet5', compression=10.0, structure=structure))


def test_a_cut_of_single_weights_does_not_go_with_structures():
    with pytest.raises(ValueError, match='--cut prunes single weights'):
        make_plan(Config(network='lenet5', compression=10.0, structure='fc1:units', cut=0.2))
