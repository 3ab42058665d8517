"""Surgery said in one line: how small a network is to get, and in how many steps.

The long form, in which each part is chosen, is `surgery` with a `Rule`.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dns_jax._core import counts
from dns_jax._core.checks import check_density, check_step
from dns_jax._core.counts import Count
from dns_jax._following import DensityRule
from dns_jax._sharing import share_by_units
from dns_jax._trees import unpack_masks
from dns_jax.importance import magnitude, untied
from dns_jax.layers import is_kernel, named_leaves, parent_path
from dns_jax.schedules import check_finite, update_probability
from dns_jax.structures import SINGLE_WEIGHTS, Structure
from dns_jax.transformation import Surgery, surgery
from dns_jax.typing import Importance, LayerOf, Masks, Params, Rule, TakesPart

# Shares of the steps: the ramp's, and that in which masks change. Where they change to the last,
# what is kept has no time to settle: a small GPT ends 0.06 nats worse (experiments/NOTES.md).
_RAMP, _CHANGING = 0.5, 0.6
# A wide band lets what came back by Adam's even steps settle at a smaller weight.
_HYSTERESIS = 0.5
# Under soft thresholds what returns is small already, so more may return, and for longer.
_SOFT_CHANGING, _SOFT_HYSTERESIS = 0.8, 0.1


def prune_to(
    *,
    steps: int,
    compression: float | None = None,
    density: float | None = None,
    start: int = 0,
    key: jax.Array | None = None,
    takes_part: TakesPart = is_kernel,
    layer_of: LayerOf = parent_path,
    importance: Importance = magnitude,
    masks: Masks | None = None,
    stacked: Mapping[str, int] | None = None,
    structure: Structure | Mapping[str, Structure] = SINGLE_WEIGHTS,
    soft: bool = False,
) -> Surgery:
    r"""Makes a network as small as asked for, while any optimizer trains it.

    Put it into `slow_pruned` with the optimizer, or into an `optax.chain`. The connections kept
    fall along a cubic ramp for half of `steps`; for another tenth, or three where it is `soft`,
    surgery repairs what it did, and ends at exactly the number asked for; in the rest, and ever
    after, the masks stay as they are while training goes on.

    .. math::
      \text{kept}(i) = K + (n - K)\left(1 - \min\left(\tfrac{i - \text{start}}{0.5 \cdot
      \text{steps}}, 1\right)\right)^3

    with n the connections that take part, or those that `masks` keep, and K those to be kept.
    Layers share K as by `global_density(hysteresis=0.5)`, or 0.1 where it is `soft`; until they
    stay, masks are updated at every step.

    Args:
      steps: steps of surgery, at least 1. The more the better: half of what the network was
        trained for, or as many.
      compression: all parameters / kept parameters, at least 1, as `measure_sizes` has it. Either
        this or `density`.
      density: kept / all of the connections that take part, in (0, 1].
      start: the first step of surgery.
      key: a typed PRNG key, for an importance that draws random numbers.
      takes_part: which leaves take part, by default kernels: biases, norms and embeddings stay
        dense, and count in `compression`.
      layer_of: as for `surgery`.
      importance: as for `surgery`.
      masks: as for `surgery`.
      stacked: as for `surgery`; needed where layers are scanned or vmapped.
      structure: what is pruned and spliced together, as in a `Rule`. By groups the number in the
        end is that asked for or more, by less than one group, and at least a group of each layer.
        By N of M it is at most what these keep.
      soft: whether your loss is taken at the weights of `soft_threshold`, not at W⊙T, which this
        does not do by itself. The band is then narrower, `hysteresis=0.1`, and masks change for 0.8
        of `steps`. Thresholds must be in the unit of weights: so `importance` is the magnitude, or
        `untied`, and `structure` single weights.

    Returns:
      A transformation as of `surgery`.

    Raises:
      ValueError: if not one of `compression` and `density` is given, a number is out of range,
        `soft` does not go with the others, or the network cannot get that small with what takes
        part (from `init`).

    Example:
      >>> import jax, optax
      >>> from dns_jax import get_masks, measure_sizes, slow_pruned
      >>> params = {'fc': {'kernel': jax.random.normal(jax.random.key(0), (20, 10))}}
      >>> optimizer = slow_pruned(prune_to(compression=10, steps=5), optax.sgd(0.1))
      >>> state = optimizer.init(params)
      >>> for _ in range(5):
      ...     _, state = optimizer.update(params, state, params)
      >>> measure_sizes(params, get_masks(state)).total.compression
      10.0

    Reference:
      Guo et al. 2016, Algorithm 1; Zhu and Gupta 2017, To prune, or not to prune, for the ramp.
    """
    if (compression is None) == (density is None):
        raise ValueError(
            'exactly one of compression and density must be given, but they are '
            f'{compression!r} and {density!r}'
        )
    if compression is not None:
        check_finite('compression', compression, 1)
    if density is not None:
        check_density('density', density)
    check_step('steps', steps, 1)
    check_step('start', start)
    check_step('start + steps', start + steps, 1)
    if soft:
        _check_soft(importance, structure)
    given = None if masks is None else _count_given(unpack_masks(masks))
    hysteresis, share = (_SOFT_HYSTERESIS, _SOFT_CHANGING) if soft else (_HYSTERESIS, _CHANGING)
    ramp_steps, changing = int(_RAMP * (steps - 1)), int(share * (steps - 1)) + 1
    sigma = update_probability(power=0, start=start, stop=start + changing)

    def make(params: Params) -> Surgery:
        parameters = sum(math.prod(jnp.shape(leaf)) for _, leaf in named_leaves(params))

        def wanted(step, sizes):
            final = _final_number(sizes, parameters, compression, density)
            return _ramp(step, start, ramp_steps, given, final, sum(sizes.values()))

        rule = Rule(
            DensityRule(share_by_units(wanted), hysteresis, changes=True), sigma, None, structure
        )
        return surgery(
            rule,
            jax.random.key(0) if key is None else key,
            takes_part=takes_part,
            layer_of=layer_of,
            importance=importance,
            masks=masks,
            stacked=stacked,
        )

    # What is wanted depends on the size of the network, which params alone tell.
    return Surgery(
        lambda params: make(params).init(params),
        lambda updates, state, params=None, **extra: make(params).update(updates, state, params),
    )


def _check_soft(importance: Importance, structure: Structure | Mapping[str, Structure]) -> None:
    """Refuses thresholds that are no weights, by which no weight can be smaller."""
    if importance not in (magnitude, untied):
        raise ValueError(
            f'importance must be the magnitude, or untied, under soft=True, but is {importance!r}'
        )
    structures = structure.values() if isinstance(structure, Mapping) else [structure]
    if any(each != SINGLE_WEIGHTS for each in structures):
        raise ValueError(f'structure must be of single weights under soft=True, but is {structure}')


def _ramp(step, start: int, steps: int, first: int | None, final: int, whole: int) -> Count:
    """Says how many connections are kept at a step, from the first number, or all, to the final."""
    done = jnp.clip(_float32(step - start) / max(steps, 1), 0.0, 1.0)
    falling = float((whole if first is None else first) - final) * (1.0 - done) ** 3
    share = counts.from_share((float(final) + falling) / float(whole), whole)
    at_end = functools.partial(jnp.where, step >= start + steps)
    return jax.tree.map(at_end, counts.from_int(final), share)


def _count_given(masks: Masks) -> int:
    """Counts the connections that masks keep of what takes part."""
    with_axes = [mask for _, mask in named_leaves(masks) if jnp.ndim(mask)]
    return counts.to_int(counts.count_all(with_axes))


def _final_number(
    sizes: Mapping[str, int], parameters: int, compression: float | None, density: float | None
) -> int:
    """Says how many connections are kept in the end, and refuses fewer than the layers need."""
    all_of_them = sum(sizes.values())
    others = parameters - all_of_them
    if density is not None:
        asked, final = f'density={density}', round(density * all_of_them)
    else:
        asked = f'compression={compression}'
        final = math.floor(parameters / (compression or 1)) - others
    if final < len(sizes):
        raise ValueError(
            f'{asked} would keep {final} of the {all_of_them} connections that take part, fewer '
            f'than the {len(sizes)} layers need; {others} other parameters stay dense'
        )
    return final


def _float32(step) -> jax.Array:
    return jnp.asarray(step, jnp.float32)
