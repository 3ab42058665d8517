"""What the tests of shrinking share: a comparison of outputs, and one case for each primitive."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dns_jax import apply_masks
from dns_jax.inference.shrink import shrink


def ones_like(tree):
    return jax.tree.map(lambda leaf: np.ones(np.shape(leaf), bool), tree)


def shapes(small):
    return {path: after for path, (_, after) in small.leaves.items()}


def check(apply, params, masks, *inputs, other_batch=True):
    """Shrinks, compares outputs, also of a larger batch, and gives the small network."""
    small = shrink(apply, params, masks, *inputs)
    masked = apply_masks(params, masks)
    batches = [inputs]
    if other_batch:
        batches.append(jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[::-1], leaf]), inputs))
    for batch in batches:
        wanted, given = jax.jit(apply)(masked, *batch), jax.jit(small.apply)(small.params, *batch)
        compare(given, wanted)
    return small


def compare(given, wanted):
    def compare_leaf(one, other):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)

    jax.tree.map(compare_leaf, given, wanted)


def follow(function, *lengths, constant=None, wanted=...):
    """Shrinks a function of arrays, some entries of which are constants, and some of its results.

    Args:
      function: gives one array.
      *lengths: the shape of each of its operands.
      constant: which entries of the first operand are constants, as an index; None if none is.
      wanted: which entries of the result are read, as an index.

    Returns:
      The shapes that are left of a factor of each operand, and of one of the result.
    """
    random = np.random.default_rng(0)
    inputs = [random.normal(size=shape).astype(np.float32) for shape in lengths]
    result = jax.eval_shape(function, *inputs)
    # Above 0, and none alike, so that a wrong entry is seen.
    params = {
        'scale': [random.uniform(0.5, 1, shape).astype(np.float32) for shape in lengths],
        'shift': [random.uniform(0.5, 1, shape).astype(np.float32) for shape in lengths],
        'after': random.uniform(1, 2, result.shape).astype(np.float32),
    }
    masks = ones_like(params)
    if constant is not None:
        masks['scale'][0][constant] = False
    masks['after'][...] = False
    masks['after'][wanted] = True

    def apply(params, *inputs):
        values = [
            each * scale + shift
            for each, scale, shift in zip(inputs, params['scale'], params['shift'], strict=True)
        ]
        return function(*values).astype(np.float32) * params['after']

    small = check(apply, params, masks, *inputs, other_batch=False)
    assert small.stayed == []
    return *(leaf.shape for leaf in small.params['scale']), small.params['after'].shape


def elementwise(x, y):
    """Calls every primitive that goes entry by entry, and adds up what they give."""
    whole, other = (abs(10 * each).astype(np.int32) for each in (x, y))
    small = 0.3 * jnp.tanh(x) + 0.4
    results = [
        *(f(x) for f in (jnp.abs, jnp.ceil, jnp.floor, lax.cbrt, jnp.cos, jnp.tan, jnp.sin)),
        *(f(x) for f in (lax.erf, lax.erfc, jnp.exp, jnp.exp2, jnp.expm1, jax.nn.sigmoid)),
        *(f(x) for f in (jnp.cosh, jnp.sinh, jnp.tanh, jnp.arctan, jnp.arcsinh, jnp.round)),
        *(f(x) for f in (lax.neg, jnp.sign, jnp.square, lax.stop_gradient)),
        *(f(abs(x)) for f in (jnp.log, jnp.log1p, jnp.sqrt, lax.rsqrt, lax.lgamma, lax.digamma)),
        *(f(small) for f in (lax.acos, lax.asin, lax.atanh, lax.erf_inv)),
        lax.acosh(1 + abs(x)) + x**3,
        lax.reduce_precision(x, 8, 23),
        checkpoint_name(x, 'x'),
        lax.real(lax.conj(lax.complex(x, y))) + lax.imag(lax.complex(x, y)),
        lax.clamp(0.1, x, 0.7),
        *(f(x, y) for f in (lax.add, lax.atan2, lax.div, lax.max, lax.min, lax.mul, lax.sub)),
        lax.nextafter(x, y) + lax.pow(abs(x), y) + lax.rem(x, abs(y) + 1),
        jnp.where(~((x > y) & (x < 1)) | jnp.isfinite(x), x, y),
        *(jnp.where(f(x, y), x, y) for f in (lax.eq, lax.ne, lax.ge, lax.le)),
        lax.bitwise_xor(whole, lax.population_count(other)),
        lax.shift_left(whole, jnp.full_like(whole, 2)),
        lax.shift_right_logical(whole, jnp.full_like(whole, 1)),
        lax.shift_right_arithmetic(other, jnp.full_like(whole, 1)),
    ]
    return sum(each.astype(np.float32) for each in results)


def convolve(x, kernel, **settings):
    settings = {'window_strides': (1, 1), 'padding': 'VALID', **settings}
    return lax.conv_general_dilated(
        x, kernel, dimension_numbers=('NHWC', 'HWIO', 'NHWC'), **settings
    )
