"""Tests of search: found from near and from far, in few passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from density_layers import draw, kept_by, searches_and_passes

import dns_jax
from dns_jax._sharing import single_weights


@pytest.mark.parametrize(
    'number', [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 4))]
)
def test_a_search_from_anywhere_finds_what_bisection_finds(number):
    random = np.random.default_rng(number)
    layers, masks = draw(number)
    rule = dns_jax.global_density(lambda step: step, hysteresis=[0.0, 0.1, 0.3, 0.6][number])

    @jax.jit
    def both(density, away):
        anew = rule(layers, masks, density)
        near = jax.tree.map(lambda bound: bound * away, anew)  # units stay by what the last were
        return anew, rule.solve(single_weights(layers, masks), density, near, jnp.array(True))

    for _ in range(8):
        density = jnp.float32(random.uniform(0.01, 1))
        anew, again = both(density, jnp.float32(np.exp(random.uniform(-40, 40))))
        for layer in layers:
            for one, two in zip(
                kept_by(anew, layers, masks)[layer],
                kept_by(again, layers, masks)[layer],
                strict=True,
            ):
                np.testing.assert_array_equal(one, two)


def test_a_search_from_near_takes_few_passes(monkeypatch):
    passes = searches_and_passes(monkeypatch)
    layers, masks = draw(0, shapes={'a': [(300, 100)], 'b': [(100, 100)]})
    rule = dns_jax.layer_density(lambda density: density)

    @jax.jit
    def solve(density, away):
        near = jax.tree.map(lambda bound: bound * away, rule(layers, masks, density))
        return rule.solve(single_weights(layers, masks), density, near, jnp.array(False))

    for density in (0.02, 0.1, 0.5):
        for away in (0.97, 1.01):
            jax.block_until_ready(solve(jnp.float32(density), jnp.float32(away)))
    jax.effects_barrier()
    assert len(passes) == 6
    assert max(passes) <= 6
