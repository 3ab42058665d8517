"""Tests of measurements.scale_programs: what a step counts and holds."""

import pytest

from experiments.measurements import scale_programs
from experiments.scale import ScaleConfig


@pytest.fixture(scope='module')
def plans():
    """A small fully connected network, its two steps compiled."""
    task = scale_programs.sized_task(5_000, 'float32', 4)
    return {kind: scale_programs.plan(task, kind) for kind in ('dense', 'surgery')}


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


def test_options_reach_the_compiler():
    task = scale_programs.sized_task(2_000, 'float32', 2)
    with pytest.raises(Exception, match='no_such_option'):
        scale_programs.plan(task, 'dense', ScaleConfig(xla_options='no_such_option=1').options())
