"""Every pruner by groups does what it does by single weights, on one number for each group."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from situations import slow_but

from dns_jax import Blocks, NofM, Rule, Units, get_masks, importance, prune_to, pruners, surgery
from dns_jax.typing import Thresholds

KEY = jax.random.key(0)
SHAPES = {'fc1': (12, 16), 'conv': (2, 3, 4, 8)}
STEPS = 14
BAND = Thresholds(0.9, 1.0)
PRUNERS = {
    # Numbers for groups deviate less than weights do.
    'Han': lambda structure: pruners.han(
        0.5 if isinstance(structure, NofM) else 4.0, [0, 4, 9], KEY, structure=structure
    ),
    'one cut': lambda **options: pruners.one_shot(0.25, 3, KEY, **options),
    'iterative': lambda **options: pruners.iterative(0.25, [2, 7], KEY, **options),
    'gradual': lambda **options: pruners.gradual(0.25, 1, 10, 3, KEY, **options),
    'straight-through': lambda **options: pruners.straight_through(0.25, KEY, **options),
    'AC/DC': lambda **options: pruners.ac_dc(0.25, 2, 12, 3, KEY, **options),
    'RigL': lambda **options: pruners.regrow(
        0.25, 3, 12, KEY, initial=importance.magnitude, **options
    ),
    'prune_to': lambda **options: prune_to(density=0.25, steps=STEPS, **options),
    'without splicing': lambda structure: surgery(
        Rule(lambda weights, masks, step: dict.fromkeys(weights, BAND), structure=structure),
        KEY,
        splicing=False,
    ),
}
# Those whose number of groups at every step is not rounded from one of weights.
ALIKE = [name for name in PRUNERS if name not in ('gradual', 'prune_to')]
each_pruner = pytest.mark.parametrize('pruner', slow_but(PRUNERS, 'RigL'))


def weights_at(step):
    """Weights of which some groups grow while others shrink."""
    random = np.random.default_rng(3)
    waves = {name: random.normal(size=(3, *shape)) for name, shape in SHAPES.items()}
    return {
        name: {'kernel': first + np.sin(step / 2) * second + np.cos(step / 3) * third}
        for name, (first, second, third) in waves.items()
    }


def cut(leaf, structure):
    """The members of each group, along the last axis."""
    *before, rows, columns = leaf.shape
    if isinstance(structure, Units):
        return np.moveaxis(leaf.reshape(-1, columns), 0, -1)[None]
    high, wide = structure.shape
    blocks = leaf.reshape(*before, rows // high, high, columns // wide, wide)
    return np.swapaxes(blocks, -3, -2).reshape(*blocks.shape[:-3], columns // wide, high * wide)


def condense(tree, structure):
    """One number for each group, its root mean square."""
    return jax.tree.map(lambda leaf: np.sqrt(np.mean(cut(leaf, structure) ** 2, -1)), tree)


def masks_of(pruner, shrink):
    """The masks after every step."""
    params = [
        jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), shrink(weights_at(step)))
        for step in range(2 * STEPS)
    ]
    state, update = pruner.init(params[0]), jax.jit(pruner.update)
    course = []
    for own, gradient in zip(params[:STEPS], params[STEPS:], strict=True):
        state = update(gradient, state, own)[1]
        course.append(jax.device_get(get_masks(state)))
    return course


@pytest.mark.parametrize('structure', [Units(), Blocks((4, 2))], ids=['units', 'blocks'])
@each_pruner
def test_groups_are_pruned_as_single_weights_of_their_size(pruner, structure):
    by_groups = masks_of(PRUNERS[pruner](structure=structure), lambda tree: tree)
    one_by_one = masks_of(
        PRUNERS[pruner](structure=Blocks((1, 1))), lambda tree: condense(tree, structure)
    )
    kept = [sum(map(math.prod, SHAPES.values()))]
    for own, wanted in zip(by_groups, one_by_one, strict=True):
        for name in SHAPES:
            members = cut(own[name]['kernel'], structure)
            assert (members == members[..., :1]).all()
            if pruner in ALIKE:
                np.testing.assert_array_equal(members[..., 0], wanted[name]['kernel'])
        kept.append(sum(own[name]['kernel'].sum() for name in SHAPES))
    if pruner in ('Han', 'without splicing'):
        assert 0 < kept[-1] < kept[0]
    else:
        assert kept[-1] == kept[0] / 4


@each_pruner
def test_n_of_m_holds_in_every_pruner(pruner):
    structure = NofM(2, 4)
    course = masks_of(PRUNERS[pruner](structure=structure), lambda tree: tree)
    full = 0
    for masks in course:
        for name, shape in SHAPES.items():
            *before, rows, columns = shape
            fours = masks[name]['kernel'].reshape(*before, rows // 4, 4, columns).sum(-2)
            pruned = masks[name]['kernel'].mean() < 1
            assert not pruned or fours.max() <= 2
            full += fours.max() == 2
    assert full
