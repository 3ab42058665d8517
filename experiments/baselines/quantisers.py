"""The contract of quantisers: what a network computes with for its weights, and how it learns then.

It is that of `dns_jax.apply_masks` and `dns_jax.masked_value_and_grad`, with a quantised W in place
of W, so that surgery and any quantiser compose.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dns_jax
from dns_jax.layers import map_leaves, named_leaves

_Masks = Any  # parallel to the params


def straight_through(gradients: dns_jax.Params, params: dns_jax.Params) -> dns_jax.Params:
    """Gives dense weights the gradient at what stands for them, as it is.

    Args:
      gradients: at the quantised weights.
      params: dense weights W.

    Returns:
      The gradients.

    Reference:
      Bengio et al. 2013, Estimating or propagating gradients through stochastic neurons.
    """
    del params
    return gradients


class Quantiser(NamedTuple):
    """What a network computes with in place of its dense weights, and how they learn."""

    #: of W, the masks T and a key: what the network computes with in a training step
    quantise: Callable[[dns_jax.Params, _Masks, jax.Array], dns_jax.Params]
    #: of W and T: the network to keep
    finish: Callable[[dns_jax.Params, _Masks], dns_jax.Params]
    #: of the gradient at what the network computed with, and W: the gradient for W
    pull_back: Callable[[dns_jax.Params, dns_jax.Params], dns_jax.Params] = straight_through
    #: what holds W within bounds, but for rounding, to stand last in the chain of the optimizer
    constrain: optax.GradientTransformation = optax.identity()


def map_kernels(
    function: Callable[[int, jax.Array, jax.Array], jax.Array],
    params: dns_jax.Params,
    masks: _Masks,
) -> dns_jax.Params:
    """Quantises the kernels of a network; other leaves are only masked.

    Args:
      function: of the number of the leaf, its dense weights, and its mask, which has their shape.
      params: dense weights W.
      masks: the parallel masks T.

    Returns:
      A tree like `params`, 0 where the mask is False.

    Raises:
      As `dns_jax.apply_masks` does.

    Example:
      >>> params = {'fc': {'kernel': jnp.array([[0.5, -3.0]]), 'bias': jnp.array([0.1, 0.2])}}
      >>> masks = {'fc': {'kernel': jnp.array([[True, False]]), 'bias': jnp.array(True)}}
      >>> quantised = map_kernels(lambda number, weights, mask: jnp.sign(weights), params, masks)
      >>> quantised['fc']['kernel']
      Array([[1., 0.]], dtype=float32)
    """
    paths = {path: number for number, (path, _) in enumerate(named_leaves(params))}
    mask_of = dict(named_leaves(masks))

    def quantise(path, leaf):
        if path not in mask_of or not dns_jax.is_kernel(path, leaf):
            return leaf
        return function(paths[path], leaf, jnp.broadcast_to(mask_of[path], leaf.shape))

    return dns_jax.apply_masks(map_leaves(quantise, params), masks)


def quantised(
    value_and_grad: Callable[..., tuple[Any, Any]], quantiser: Quantiser
) -> Callable[..., tuple[Any, Any]]:
    r"""Makes a function for the loss at Q(W, T) and the gradient that W is to learn by.

    .. math::
      \mathrm{pull\_back}\left(\frac{\partial L(Q)}{\partial Q}, W\right)
      \quad \text{at } Q = \mathrm{quantise}(W, T)

    Args:
      value_and_grad: of weights, masks and others, as `dns_jax.masked_value_and_grad` makes it.
      quantiser: Q and its way back.

    Returns:
      The same with one more argument, `key`, for quantisers that throw coins.

    Example:
      >>> quantiser = Quantiser(lambda w, masks, key: jnp.sign(w), dns_jax.apply_masks)
      >>> loss = lambda weights, x: jnp.sum(weights * x)
      >>> value_and_grad = quantised(dns_jax.masked_value_and_grad(loss), quantiser)
      >>> weights, all_kept, x = jnp.array([0.2, -5.0]), jnp.array(True), jnp.array([2.0, 3.0])
      >>> value_and_grad(weights, all_kept, x, key=jax.random.key(0))
      (Array(-1., dtype=float32), Array([2., 3.], dtype=float32))

    Reference:
      Courbariaux et al. 2015, BinaryConnect, algorithm 1, for steps of this form.
    """

    def at_quantised(params, masks, *args, key, **kwargs):
        value, gradients = value_and_grad(
            quantiser.quantise(params, masks, key), masks, *args, **kwargs
        )
        return value, quantiser.pull_back(gradients, params)

    return at_quantised
