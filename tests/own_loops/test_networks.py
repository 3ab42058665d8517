"""Tests of own_loops.networks: a CNN and a GPT, and what they learn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_loops import TEXT, small, text

import dns_jax
from experiments.own_loops import networks as own_networks

__all__ = ['small', 'text']  # fixtures, which pytest finds here by name
pytestmark = pytest.mark.usefixtures('promotion')


def test_the_networks_are_as_large_as_they_say():
    kernels = 9 * (32 + 32 * 64 + 64 * 64) + 4 * 64 * 10
    in_blocks, in_output = 2 * 12 * 96**2, 96 * 65
    for make, in_kernels, parameters in (
        (lambda: own_networks.Cnn(nnx.Rngs(0)), kernels, kernels + 10 + 2 * 160),
        (lambda: own_networks.Gpt(65, nnx.Rngs(0)), in_blocks + in_output, 242_561),
    ):
        params = nnx.state(nnx.eval_shape(make), nnx.Param)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
        masks = jax.tree.leaves(jax.eval_shape(dns_jax.init_masks, params))
        assert sum(mask.size for mask in masks if mask.ndim) == in_kernels
    logits = nnx.eval_shape(lambda: own_networks.Cnn(nnx.Rngs(0))(jnp.ones((2, 8, 8, 1))))
    assert logits.shape == (2, 10)


def test_every_method_sees_the_same_batches():
    task = own_networks.digits()
    first, second = (list(task.batches((3, 1), 2)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    ((images, labels),) = task.batches((3, 0), 1)
    assert images.shape == (64, 8, 8, 1)
    assert images.dtype == np.float32
    assert labels.dtype == np.int32
    assert not np.array_equal(images, first[0][0])


def test_the_gpt_sees_no_later_character(small):
    network = nnx.jit(own_networks.Gpt(6, nnx.Rngs(0)))
    text = jnp.array([[0, 1, 2, 3, 4, 5, 0, 1]])
    other = text.at[0, 5].set(2)
    same = np.isclose(network(text), network(other)).all(axis=-1)[0]
    np.testing.assert_array_equal(same, [True] * 5 + [False] * 3)


def test_the_text_is_foretold_where_it_was_not_trained(text, small):
    task = own_networks.characters(text)
    alphabet = {character: number for number, character in enumerate(sorted(set(TEXT)))}
    tokens = np.array([alphabet[character] for character in TEXT])
    (texts,) = next(task.batches((0, 0), 1))
    joined = ' '.join(map(str, tokens[:3_600]))
    assert texts.shape == (32, 9)
    for row in np.asarray(texts):
        assert ' '.join(map(str, row)) in joined
    windows = np.array([tokens[at : at + 9] for at in range(3_600, 3_600 + 32 * 8, 8)])

    def same_again(texts):
        return 3 * jax.nn.one_hot(texts, 6)

    assert float(task.measure['validation'](same_again)) == pytest.approx(
        float(task.loss(same_again, windows)), rel=1e-5
    )


def test_a_short_text_is_refused(tmp_path):
    path = tmp_path / 'short.txt'
    path.write_text('too short')
    with pytest.raises(
        ValueError, match=r'--text=.*short.txt must have 20490 bytes or more, but has 9'
    ):
        own_networks.characters(path)
