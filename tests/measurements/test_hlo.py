"""Tests of measurements.hlo: what is read from the text of a compiled program."""

import jax
import jax.numpy as jnp
import pytest

import dns_jax
from experiments.measurements import hlo


def compiled(function, *arguments):
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


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
