from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from saved_checkpoints import assert_identical, like, save_steps

import dns_jax
from experiments.training.checkpoints import Checkpoints

NAMES = ('', 'a', 'a/b', 'a.b', 'é %2F..')


class Thresholds(NamedTuple):
    low: jax.Array
    high: jax.Array


def initial_state(implementation):
    params = {
        'kernel': jax.random.normal(jax.random.key(1), (30, 20)),
        'bias': jnp.asarray([0.1, -0.0, jnp.nan, jnp.inf], jnp.bfloat16),
    }
    rule = dns_jax.Rule(dns_jax.mean_std(0.3), dns_jax.update_probability())
    surgery = dns_jax.surgery(rule, jax.random.key(7, impl=implementation))
    return {
        'params': params,
        'opt_state': optax.chain(surgery, optax.sgd(0.1, 0.9)).init(params),
        'keys': jax.random.split(jax.random.key(3, impl=implementation), (2, 3)),
        'names': {name: Thresholds(jnp.float32(1), jnp.float32(len(name))) for name in NAMES},
        'a': {'b': jnp.float32(1)},
        'a.b': jnp.float32(2),
        'nothing': None,
    }


@pytest.mark.parametrize('implementation', ['threefry2x32', 'rbg', 'unsafe_rbg'])
@pytest.mark.parametrize('abstract', [False, True])
def test_everything_comes_back_bit_for_bit(tmp_path, implementation, abstract):
    state = initial_state(implementation)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state)
    wanted = jax.eval_shape(lambda: state) if abstract else jax.tree.map(jnp.zeros_like, state)
    with Checkpoints(tmp_path) as checkpoints:
        step, restored = checkpoints.restore(wanted)
    assert step == 5
    assert_identical(restored, state)


def test_a_tree_with_its_leaves_in_another_order_restores_by_path(tmp_path):
    class Reordered(NamedTuple):
        high: jax.Array
        low: jax.Array

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, Thresholds(low=jnp.float32(1), high=jnp.float32(2)))
        _, restored = checkpoints.restore(Reordered(jnp.float32(0), jnp.float32(0)))
    assert (restored.low, restored.high) == (1, 2)


def test_a_bare_array_and_the_sharding_asked_for(tmp_path):
    mesh = jax.make_mesh((1,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, jnp.arange(4))
        _, restored = checkpoints.restore(jax.ShapeDtypeStruct((4,), jnp.int32, sharding=sharding))
    assert restored.sharding == sharding
    np.testing.assert_array_equal(restored, np.arange(4))


def test_a_state_donated_right_after_save_is_saved_as_it_was(tmp_path):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda leaf: -leaf, state), donate_argnums=0)
    state = [jax.random.normal(jax.random.key(index), (300_000,)) for index in range(4)]
    expected = [np.array(leaf) for leaf in state]
    state = overwrite(overwrite(state))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
        _, restored = checkpoints.restore(state)
    for one, other in zip(restored, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('keep', [1, 3])
def test_only_the_newest_are_kept(tmp_path, keep):
    save_steps(tmp_path, range(10, 60, 10), keep)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [10, 20, 30, 40, 50][-keep:]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 50
        assert checkpoints.restore(like())[0] == 50
        if keep > 1:
            assert checkpoints.restore(like(), step=40)[1]['w'][0, 0] == 40


def test_the_latest_step_is_that_of_a_checkpoint_on_disk(tmp_path):
    with Checkpoints(tmp_path) as writer, Checkpoints(tmp_path) as reader:
        for step in (1, 2):
            writer.save(step, jax.random.normal(jax.random.key(step), (2_000_000,)))
            assert writer.latest_step() == step
            assert (tmp_path / str(step)).is_dir()
            assert reader.latest_step() == step


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    with Checkpoints(str(tmp_path / 'run' / 'phase')) as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(FileNotFoundError, match=r'phase holds steps \[\]; wanted a checkpoint'):
            checkpoints.restore(like())
        checkpoints.save(0, {'w': jnp.zeros((50, 40))})
        assert checkpoints.latest_step() == 0
        with pytest.raises(FileNotFoundError, match=r'holds steps \[0\]; wanted the .* step 3'):
            checkpoints.restore(like(), step=3)


def test_a_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / 'file').write_text('text')
    with pytest.raises(NotADirectoryError, match=r'file is a file; wanted a folder of checkpoints'):
        Checkpoints(tmp_path / 'file')


def test_keep_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'keep is 0; wanted at least 1'):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize(
    ('state', 'error', 'message'),
    [
        ({}, ValueError, r'state to save at step 1 has no leaves'),
        ({'w': np.float32(1)}, TypeError, r"state\['w'\] is a float32; wanted a jax.Array"),
        ({'w': np.ones(2)}, TypeError, r"state\['w'\] is a ndarray; wanted a jax.Array"),
        ({'w': 1}, TypeError, r"state\['w'\] is a int; wanted a jax.Array"),
        ({'w': jnp.ones((0, 3))}, ValueError, r"state\['w'\] is float32\[0, 3\]; .* no empty"),
    ],
)
def test_states_that_cannot_be_saved(tmp_path, state, error, message):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(error, match=message):
            checkpoints.save(1, state)
        assert checkpoints.latest_step() is None


@pytest.mark.parametrize('step', [1, 2])
def test_a_step_that_is_not_the_newest_is_refused(tmp_path, step):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, jnp.ones(3))
        with pytest.raises(ValueError, match=rf'step is {step}; .* already holds step 2'):
            checkpoints.save(step, jnp.zeros(3))
        np.testing.assert_array_equal(checkpoints.restore(jnp.ones(3))[1], np.ones(3))


@pytest.mark.parametrize(
    ('wanted', 'message'),
    [
        ({'a': jnp.ones((2, 3))}, r"like\['k'\] is missing but was saved as key<fry>\[\]"),
        (
            {'a': jnp.ones((2, 3)), 'k': jax.random.key(0), 'b': jnp.ones(1)},
            r"like\['b'\] is float32\[1\] but was saved as nothing",
        ),
        (
            {'a': jnp.ones((3, 2)), 'k': jax.random.key(0)},
            r"like\['a'\] is float32\[3, 2\] but was saved as float32\[2, 3\]",
        ),
        (
            {'a': jnp.ones((2, 3), jnp.bfloat16), 'k': jax.random.key(0)},
            r"like\['a'\] is bfloat16\[2, 3\] but was saved as float32\[2, 3\]",
        ),
        (
            {'a': jnp.ones((2, 3)), 'k': jax.random.key(0, impl='rbg')},
            r"like\['k'\] is key<rbg>\[\] but was saved as key<fry>\[\]",
        ),
        (
            {'a': jnp.ones((2, 3)), 'k': jax.random.PRNGKey(0)},
            r"like\['k'\] is uint32\[2\] but was saved as key<fry>\[\]",
        ),
        ((jnp.ones((2, 3)), jax.random.key(0)), r'step 4 differs .* in 4 leaves'),
    ],
)
def test_a_state_unlike_the_saved_one_is_refused(tmp_path, wanted, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, {'a': jnp.ones((2, 3)), 'k': jax.random.key(0)})
        with pytest.raises(ValueError, match=message) as caught:
            checkpoints.restore(wanted)
        assert str(tmp_path) in str(caught.value)
        assert checkpoints.latest_step() == 4
