"""What says how much a connection matters: the numbers that h_k compares with its thresholds.

An importance maps a key, the weights and the gradient of a step to a tree like the weights, of
which only magnitudes count (`dns_jax.typing.Importance`). Functions are importances, or make one of
what was gathered by `dns_jax.calibration`. Owns no thresholds and no masks.
"""

import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from dns_jax._core.checks import abridge
from dns_jax.calibration import Inputs
from dns_jax.layers import map_leaves, named_leaves
from dns_jax.schedules import check_finite
from dns_jax.typing import Importance, Params


def magnitude(key: jax.Array, params: Params, gradients: optax.Updates) -> Params:
    """The weight itself, so that `|w|` counts.

    Args:
      key: not used.
      params: dense weights W.
      gradients: not used.

    Returns:
      `params`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> magnitude(jax.random.key(0), jnp.array([3.0, -2.0]), jnp.array([0.0, 1.0]))
      Array([ 3., -2.], dtype=float32)

    Reference:
      Guo et al. 2016, section 3.3.
    """
    del key, gradients
    return params


def untied(key: jax.Array, params: Params, gradients: optax.Updates) -> Params:
    """The magnitude, with equals told apart by position: the first count more.

    Densities keep all weights that tie for the last place. Weights of 8 or 11 bits tie often, and
    so do zeros. Here bfloat16 and float16 get distinct numbers in the bits that a float32 has
    beyond theirs, for 65,536 and 8,192 weights that follow each other, and zeros get numbers of no
    more than 2e-37, distinct for some 8 million weights. So a density keeps its number, or nearly.
    The order of unequal weights stays, but for those below 2e-37. Weights of float32 that are equal
    and not zero still tie, as no number lies between them and the next.

    Args:
      key: not used.
      params: dense weights W.
      gradients: not used.

    Returns:
      A tree like `params`, float32.

    Raises:
      TypeError: if weights are wider than a float32.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> first, second, third = untied(jax.random.key(0), jnp.ones(3, jnp.bfloat16), None)
      >>> bool(first > second) and bool(second > third)
      True
    """
    del key, gradients

    leaves, structure = jax.tree.flatten(params)
    starts = itertools.accumulate((leaf.size for leaf in leaves), initial=0)
    whole = float(max(sum(leaf.size for leaf in leaves), 1))

    def tell_apart(leaf, start):
        free = 23 - jnp.finfo(leaf.dtype).nmant  # bits of a float32 beyond those of the leaf
        if free < 0:
            raise TypeError(f'untied takes weights that a float32 can hold, not {leaf.dtype}')
        position = _positions(leaf)
        magnitude = jnp.abs(leaf).astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
        bits |= 2**free - 1 - (position + start % 2**free) % 2**free
        # An infinity with other bits is a NaN.
        finite = jnp.isfinite(leaf)
        apart = jnp.where(finite, jax.lax.bitcast_convert_type(bits, jnp.float32), magnitude)
        share = (position.astype(jnp.float32) + float(start)) / whole
        return jnp.where(leaf == 0, 1e-37 * (2 - share), apart)

    pairs = zip(leaves, starts, strict=False)
    return jax.tree.unflatten(structure, [tell_apart(leaf, start) for leaf, start in pairs])


def taylor(key: jax.Array, params: Params, gradients: optax.Updates) -> Params:
    r"""By how much the loss would change, to first order, were a weight set to zero.

    .. math::
      \left| w \, \frac{\partial L}{\partial w} \right|

    The gradient is that of one batch: noisy, where the batch is small.

    Args:
      key: not used.
      params: dense weights W.
      gradients: at W⊙T, a tree like `params`; the transformation that asks for it must stand
        before the optimizer in its chain.

    Returns:
      A tree like `params`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> taylor(jax.random.key(0), jnp.array([3.0, -2.0]), jnp.array([0.5, 1.0]))
      Array([ 1.5, -2. ], dtype=float32)

    Reference:
      Molchanov et al. 2017, Pruning convolutional neural networks for resource efficient
      inference, equation (7), for single weights.
    """
    del key
    return jax.tree.map(lambda weights, gradient: weights * gradient, params, gradients)


def gradient(key: jax.Array, params: Params, gradients: optax.Updates) -> Params:
    """The gradient: how fast the loss would fall, were a connection to grow from zero.

    A gradient of exactly zero, as behind a unit that is dead, counts as a random number of no more
    than 1e-30, so that such connections do not tie.

    Args:
      key: a typed PRNG key, another at every step.
      params: dense weights W, of which the shapes alone count.
      gradients: at W⊙T, a tree like `params`; the transformation that asks for it must stand
        before the optimizer in its chain.

    Returns:
      A tree like `params`, float32.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> gradient(jax.random.key(0), jnp.array([3.0, -2.0]), jnp.array([0.5, -1.0]))
      Array([ 0.5, -1. ], dtype=float32)

    Reference:
      Evci et al. 2020, Rigging the lottery: making all tickets winners.
    """
    return jax.tree.map(
        lambda slope, number: jnp.where(slope == 0, 1e-30 * number, slope.astype(jnp.float32)),
        gradients,
        chance(key, params, gradients),
    )


def chance(key: jax.Array, params: Params, gradients: optax.Updates) -> Params:
    """Uniform random numbers in (0, 1], the least that any other importance must beat.

    Args:
      key: a typed PRNG key, another at every step.
      params: dense weights W, of which the shapes alone count.
      gradients: not used.

    Returns:
      A tree like `params`, float32.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> float(chance(jax.random.key(0), jnp.array([3.0, -2.0]), jnp.zeros(2)).max()) <= 1
      True
    """
    del gradients
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    numbers = [
        1.0
        - jax.random.uniform(
            own, jnp.shape(leaf), jnp.float32, out_sharding=_explicit_sharding(leaf)
        )
        for own, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, numbers)


def wanda(inputs: Mapping[str, Inputs]) -> Importance:
    r"""The weight times the norm of its input, over the batches that were gathered.

    .. math::
      |w_{ij}| \cdot \lVert x_j \rVert_2

    Args:
      inputs: of the kernels, from `dns_jax.calibration.gather_inputs`; of stacked layers, gathered
        with the same `stacked` as here.

    Returns:
      An importance. Leaves without inputs keep their magnitude. When it is called, it raises a
      ValueError if a leaf is not there.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from dns_jax.calibration import gather_inputs
      >>> params = {'kernel': jnp.array([[1.0, -2.0], [3.0, 1.0]])}
      >>> inputs = gather_inputs(
      ...     lambda params, x: x @ params['kernel'], params, [jnp.array([[3.0, 1.0], [4.0, 0.0]])]
      ... )
      >>> wanda(inputs)(jax.random.key(0), params, params)['kernel']
      Array([[  5., -10.],
             [  3.,   1.]], dtype=float32)

    Reference:
      Sun et al. 2023, A simple and effective pruning approach for large language models, equation
      (1). The authors compare the weights of one output; here, those of a layer.
    """
    return _scale({path: each.spread(jnp.sqrt(each.squares)) for path, each in inputs.items()})


def obs(inputs: Mapping[str, Inputs], damping: float = 0.01) -> Importance:
    r"""By how much a layer's output would change, were a weight removed and others made up for it.

    .. math::
      \sqrt{\frac{w_j^2}{[H^{-1}]_{jj}}}, \quad
      H = \frac{1}{n} X^\top X + \lambda\,\mathrm{mean}(\mathrm{diag}(X^\top X / n))\,I

    This is the root of twice the saliency of optimal brain surgeon, for half the mean squared error
    of a layer's output. The other weights are not updated: training does that.

    Args:
      inputs: as for `wanda`, with their products; concrete.
      damping: λ, above 0.

    Returns:
      An importance, as of `wanda`. Weights whose layer saw zeros alone count as zero.

    Raises:
      ValueError: if `damping` is out of range, or so small that H is singular in float32; if inputs
        were gathered without products.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from dns_jax.calibration import gather_inputs
      >>> params = {'kernel': jnp.array([[1.0], [-3.0]])}
      >>> inputs = gather_inputs(
      ...     lambda params, x: x @ params['kernel'], params, [jnp.array([[2.0, 0.0], [0.0, 2.0]])]
      ... )
      >>> importance = obs(inputs, damping=1.0)  # H is 4 I
      >>> importance(jax.random.key(0), params, params)['kernel']
      Array([[ 2.],
             [-6.]], dtype=float32)

    Reference:
      Hassibi and Stork 1993, Second order derivatives for network pruning: optimal brain surgeon;
      Frantar and Alistarh 2023, SparseGPT, for layers one by one.
    """
    check_finite('damping', damping, 0)
    if not damping:
        raise ValueError(f'damping must be above 0, but is {damping!r}')
    scales = {}
    for path, each in inputs.items():
        if each.grams is None:
            raise ValueError(f'inputs[{path!r}] have no products: gather_inputs(..., grams=True)')
        roots = _inverse_diagonal(each.grams, each.counts, damping)
        if not jnp.isfinite(roots).all():
            raise ValueError(f'damping must be larger for inputs[{path!r}], but is {damping!r}')
        scales[path] = each.spread(roots)
    return _scale(scales)


@jax.jit
def _inverse_diagonal(grams: jax.Array, counts: jax.Array, damping: float) -> jax.Array:
    """Finds one over the root of the diagonal of H⁻¹, for each group."""
    hessians = grams / counts[:, None, None]
    means = jnp.trace(hessians, axis1=1, axis2=2)[:, None] / grams.shape[1]
    identity = jnp.broadcast_to(jnp.eye(grams.shape[1], dtype=jnp.float32), grams.shape)
    unit = jnp.where(means > 0, means, 1)  # so that nothing leaves the range of a float32
    scaled = hessians / unit[:, :, None] + jnp.float32(damping) * identity
    factors = jnp.linalg.cholesky(scaled)
    inverse = jax.lax.linalg.triangular_solve(factors, identity, left_side=True, lower=True)
    return jnp.sqrt(means / jnp.sum(inverse**2, 1))


def _scale(scales: Mapping[str, jax.Array]) -> Importance:
    """Makes an importance of what each weight is multiplied with."""

    def scaled(key, params, gradients):
        del key, gradients
        if lacking := scales.keys() - {path for path, _ in named_leaves(params)}:
            raise ValueError(
                f'inputs must be of leaves of params, but {abridge(sorted(lacking))} are not'
            )
        return map_leaves(
            lambda path, leaf: leaf.astype(jnp.float32) * scales[path] if path in scales else leaf,
            params,
        )

    return scaled


def _positions(leaf: jax.Array) -> jax.Array:
    """Numbers the entries of an array, as it is sharded."""
    position = jnp.zeros_like(leaf, jnp.int32)
    for axis, length in enumerate(leaf.shape):
        along = jax.lax.broadcasted_iota(
            jnp.int32, leaf.shape, axis, out_sharding=_explicit_sharding(leaf)
        )
        position = position * length + along
    return position


def _explicit_sharding(leaf: jax.typing.ArrayLike) -> jax.NamedSharding | None:
    """Finds how numbers must lie to be combined with an array on a mesh with explicit axes."""
    sharding = jax.typeof(leaf).sharding
    return sharding if any(sharding.spec) else None
