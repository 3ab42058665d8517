"""The measurement at scale: what it counts, what it reads from programs, what it writes."""

import json

import jax
import jax.numpy as jnp
import pytest

import dns_jax
from experiments import scale
from experiments.measurements import hlo, scale_input, scale_programs, scale_report
from experiments.scale import ScaleConfig

SMALL = {'width': 0.02, 'batch_size': 2, 'rounds': 2, 'sizes': '0.002,0.004', 'images': 0}


@pytest.fixture(scope='module')
def plans():
    """A small fully connected network, its two steps compiled."""
    task = scale_programs.sized_task(5_000, 'float32', 4)
    return {kind: scale_programs.plan(task, kind) for kind in ('dense', 'surgery')}


def compiled(function, *arguments):
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


@pytest.mark.parametrize('weights', [5_000, 300_000, 1e9])
def test_sizes_are_about_those_wanted(weights):
    task = scale_programs.sized_task(weights, 'float32', 4)
    assert scale_programs.count_weights(task) == pytest.approx(weights, rel=0.1)


def test_alexnet_is_counted():
    task = scale_programs.image_task('alexnet', 1.0, 'float32', 8)
    assert scale_programs.count_weights(task) == 60_965_224
    counts = scale_programs.count_flop(task)
    assert counts['multiply_adds'] == 724_406_816
    assert counts['flop'] == 2 * 8 * (3 * 724_406_816 - 105_415_200)


def test_memory_of_a_small_step(plans):
    dense, surgery = (scale_programs.describe_memory(planned) for planned in plans.values())
    weights = scale_programs.count_weights(plans['dense'].task)
    assert dense['masks'] == dense['masked_weights'] == 0
    assert surgery['masks'] == weights
    # Thresholds and counts beside the masks are few.
    assert 0 <= surgery['arguments'] - dense['arguments'] - weights < 200
    kernels = 784 * 6 + 6 * 6 + 6 * 10
    assert 4 * kernels <= surgery['masked_weights'] <= 4 * weights
    assert 0 < surgery['masked_weights_at_once'] <= surgery['masked_weights']
    assert surgery['masks_as_floats'] == 0
    planned = surgery['arguments'] + surgery['outputs'] - surgery['aliased']
    assert surgery['planned'] == planned + surgery['temporaries']


def test_no_mask_of_a_convolution_is_held_as_floats():
    task = scale_programs.image_task('alexnet', 0.02, 'float32', 1)
    memory = scale_programs.describe_memory(scale_programs.plan(task, 'surgery'))
    assert memory['masks_as_floats'] == 0
    assert memory['masked_weights'] > 3 * memory['masks']  # kernels have most of them


def test_masks_held_as_floats_are_found():
    weights, mask = jnp.ones((60, 70)), jnp.ones((60, 70), bool)
    inputs = jnp.ones((5, 60))
    held = compiled(lambda mask, inputs: (mask.astype(jnp.float32), inputs), mask, inputs)
    assert hlo.masks_as_floats(held, [mask.shape])
    assert not hlo.masks_as_floats(held, [(3, 3)])
    read = compiled(lambda mask, inputs: inputs @ mask.astype(jnp.float32), mask, inputs)
    assert hlo.masks_as_floats(read, [mask.shape])
    fused = compiled(lambda weights, mask: weights * mask.astype(jnp.float32), weights, mask)
    assert not hlo.masks_as_floats(fused, [mask.shape])


def test_masked_weights_are_found_and_die():
    weights, masks = [jnp.ones((64, 64))] * 2, [jnp.ones((64, 64), bool)] * 2

    def apply(weights, masks, inputs):
        for kernel in dns_jax.apply_masks(weights, masks):
            inputs = jnp.tanh(inputs @ kernel)
        return inputs

    program = compiled(apply, weights, masks, jnp.ones((2, 64)))
    masked = hlo.masked_weights(program, [(64, 64)])
    assert [line.arrays for line in masked] == [(hlo.Array('f32', (64, 64)),)] * 2
    names = {line.name for line in masked}
    assert hlo.most_at_once(program, names) in (64 * 64 * 4, 2 * 64 * 64 * 4)
    assert hlo.most_at_once(program, set()) == 0


def test_bytes_at_once_follow_the_order_of_running():
    text = """
ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %a = f32[4]{0} negate(%p)
  %b = f32[2,2]{1,0} bitcast(%a)
  %c = f32[4]{0} negate(%p)
  %d = f32[2,2]{1,0} negate(%b)
  %copy.1 = f32[4]{0} copy(%p)
  %e = f32[4]{0} negate(%c)
  ROOT %t = (f32[4]{0}, f32[2,2]{1,0}) tuple(%e, %d)
}
"""
    program = hlo.parse(text)
    assert hlo.most_at_once(program, {'a', 'c'}) == 32  # a lives on as b
    assert hlo.most_at_once(program, {'a', 'e'}) == 16
    assert hlo.copied_parameters(program) == {'f32': 16}


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match='has no ENTRY'):
        hlo.parse('module')


@pytest.mark.slow
def test_scale_measures_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(scale._MACHINES, True, scale.Machine(2, 1.1, side=32, floats=1_000))
    task = scale_programs.sized_task(3_000, 'float32', 2)  # AlexNet takes a minute to compile
    monkeypatch.setattr(scale_programs, 'image_task', lambda *fields: task)
    monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1')
    output = tmp_path / 'new' / 'scale'
    config = ScaleConfig(**SMALL, planned_sizes='0.01', output=str(output))
    result = scale.measure(config)
    assert json.loads(output.with_suffix('.json').read_text()) == result
    assert output.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
    page = output.with_suffix('.md').read_text()
    assert capsys.readouterr().out == page + '\n'
    step = result['step']
    assert min(step['ms'].values()) > 0
    assert step['ms'].keys() == step['memory'].keys() == {'dense', 'surgery', 'density'}
    assert ['ms' in row for row in result['sizes']] == [True, True, False]
    assert result['sizes'][-1]['memory']['surgery']['masks'] == result['sizes'][-1]['weights']
    assert f'takes {step["ratio"]:.3f}× as long' in page
    assert '![Time of a step against weights](scale.png)' in page
    assert '`GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m experiments.scale' in page
    assert '--width=0.02 --batch_size=2 --rounds=2 --sizes=0.002,0.004' in page
    assert '## Input' not in page


def test_input_is_measured(monkeypatch):
    monkeypatch.setattr(scale_input, '_SIZE', (40, 30))
    monkeypatch.setattr(scale_input, '_BATCH', 2)
    result = scale_input.measure_input(64, 23, (0,))
    (row,) = result['rows']
    assert row['images_per_s'] == row['cores'] * row['images_per_core_s'] > 0
    assert 200 < result['bytes_per_image'] < 5_000
    step = {'batch_size': 2, 'ms': {'dense': 1e6}}
    text = '\n'.join(scale_report._input({'input': result, 'step': step}))
    assert 'so decoding keeps up with it' in text
    assert '64 JPEGs' in text


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'width': 0.0}, '--width=0.0 must be above 0'),
        ({'sizes': '3,x'}, '--sizes=3,x must be numbers with commas'),
        ({'planned_sizes': '-1'}, '--planned_sizes=-1 must be numbers of 0.001 or more'),
        ({'images': 3}, '--images=3 must be 0 or at least 64'),
        ({'xla_options': 'fast'}, '--xla_options=fast must be NAME=VALUE'),
    ],
)
def test_bad_flags(fields, message):
    with pytest.raises(ValueError, match=message):
        ScaleConfig(**fields)


def test_options_reach_the_compiler():
    task = scale_programs.sized_task(2_000, 'float32', 2)
    with pytest.raises(Exception, match='no_such_option'):
        scale_programs.plan(task, 'dense', ScaleConfig(xla_options='no_such_option=1').options())
