"""Networks of Flax NNX with their own optimizers."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from situations import array

import dns_jax
from dns_jax import apply_masks, get_masks, measure_sizes, prune_to

COMPAT_TABLE = 'field'


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.masks = nnx.Linear(4, 3, rngs=rngs)  # a subtree that is called so

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.conv(x))))
        return self.masks(x.mean((1, 2)))


@pytest.fixture
def defaults_of_jax():
    with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
        yield


def masked_loss(model, masks, x):
    """The loss at W⊙T and the gradient there, BatchNorm and Dropout within."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params):
        inner = nnx.merge(graph, params, rest, copy=True)
        loss = jnp.mean(jnp.square(inner(x) - 1.0))
        return loss, nnx.state(inner, nnx.Not(nnx.Param))

    (loss, rest), grads = dns_jax.masked_value_and_grad(loss_fn, has_aux=True)(params, masks)
    nnx.update(model, rest)
    return loss, grads


@pytest.mark.parametrize(
    ('which', 'jitted'),
    [
        ('Optimizer', True),
        pytest.param('Optimizer', False, marks=pytest.mark.slow),
        pytest.param('ModelAndOptimizer', True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures('defaults_of_jax')
def test_the_optimizers_of_nnx(which, jitted):
    model = Net(nnx.Rngs(0))
    transform = optax.chain(prune_to(density=0.25, steps=4), optax.adam(1e-2))
    if which == 'Optimizer':
        optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    else:
        optimizer = nnx.ModelAndOptimizer(model, transform, wrt=nnx.Param)

    def step(model, optimizer, x):
        loss, grads = masked_loss(model, get_masks(optimizer.opt_state), x)
        if which == 'Optimizer':
            optimizer.update(model, grads)
        else:
            optimizer.update(grads)
        return loss

    if jitted:
        step = nnx.jit(step)
    x = array(5, 8, 8, 1)
    for _ in range(6 if jitted else 2):
        step(model, optimizer, x)
    masks = get_masks(optimizer.opt_state)
    params = nnx.state(model, nnx.Param)
    small = apply_masks(params, masks)
    sizes = measure_sizes(params, masks).layers
    if jitted:
        kernels = sizes['conv'].multiply_adds + sizes['masks'].multiply_adds
        kept = sizes['conv'].kept_multiply_adds + sizes['masks'].kept_multiply_adds
        assert (kernels, kept) == (36 + 12, 12)
        assert (
            sum(
                int((leaf != 0).sum())
                for leaf in (small['conv']['kernel'][...], small['masks']['kernel'][...])
            )
            <= 12
        )
    nnx.update(model, small)
    model(x)
