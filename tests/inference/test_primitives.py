"""Tests of inference._primitives: the table, and what goes entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
from shrinking import elementwise, follow

from dns_jax.inference._primitives import RULES
from dns_jax.inference._program import trace


def test_entries_go_one_by_one():
    rows = np.s_[1:, ::2]
    assert follow(elementwise, (3, 5), (3, 5), wanted=rows) == ((2, 3), (2, 3), (2, 3))
    # Where one operand is constant the other is not; where both are, nothing is left.
    assert follow(elementwise, (3, 5), (3, 5), constant=np.s_[:, 1]) == ((3, 4), (3, 5), (3, 5))
    assert follow(lambda x: elementwise(x, x), (3, 5), constant=np.s_[:, 1]) == ((3, 4), (3, 4))


def test_every_primitive_that_goes_entry_by_entry_was_asked():
    x = np.ones((2, 3), np.float32)
    seen = {each.primitive.name for each in trace(elementwise, x, [x]).equations}
    # `copy_p` and `add_any` are what derivatives and copies are made of.
    wanted = {name for name, rule in RULES.items() if rule.is_elementwise}
    assert wanted - seen <= {'add_any', 'copy', 'copy_p'}
    x = jnp.ones((2, 3))
    traced = trace(lambda x, y: jax.vjp(lambda x: x * y + jnp.copy(x), x)[1](y), x, [x])
    assert {'add_any', 'copy'} & {each.primitive.name for each in traced.equations}


def test_a_product_is_zero_where_one_factor_is():
    def gate(x, y):
        return jnp.minimum(x, 0) * y  # x is above 0 where it is constant

    assert follow(gate, (3, 5), (3, 5), constant=np.s_[:, :2]) == ((3, 3), (3, 3), (3, 3))


def test_a_choice_is_known_where_all_that_may_be_chosen_is():
    def choose(x, y):
        return jnp.where(y > 0, jnp.minimum(x, 0), np.float32(0))

    assert follow(choose, (3, 5), (3, 5), constant=np.s_[1]) == ((2, 5), (2, 5), (2, 5))
    # What may be chosen is known, but not which.
    assert follow(
        lambda x, y: jnp.where(y > 0.9, x, 2 * x), (3, 5), (3, 5), constant=np.s_[:, 2:]
    ) == ((3, 2), (3, 5), (3, 5))
    assert follow(
        lambda x, y: jnp.where(np.arange(5)[None] < 3, x, y), (3, 5), (3, 5), constant=np.s_[:, 2:]
    ) == ((3, 2), (3, 4), (3, 4))  # column 2 is that of x


def test_axes_of_length_one_are_spread():
    def scale(x, y):
        return jax.lax.mul(x, y)

    assert follow(scale, (1, 5), (3, 1), constant=np.s_[:, :1], wanted=np.s_[1:, 1:3]) == (
        (1, 2),
        (2, 1),
        (2, 2),
    )
