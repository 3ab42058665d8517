"""What comes into kernels: sums over the inputs of matrix products and convolutions.

Found on the program that JAX traces, so the network may be written in any library. The importances
`wanda` and `obs` are made of them. Owns no importance.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from dns_jax._core.checks import abridge
from dns_jax._trees import nest_leaves
from dns_jax.layers import is_kernel, named_leaves
from dns_jax.stacking import slice_paths, unstack
from dns_jax.typing import Params, TakesPart

# Those that only put numbers into other places, or into another type.
_MOVES = {'reshape', 'transpose', 'squeeze', 'broadcast_in_dim', 'slice', 'split', 'rev'}
_KEEPS = {'convert_element_type', 'reduce_precision', 'stop_gradient', 'copy'}
_CALLS = {'jit', 'pjit', 'closed_call', 'core_call', 'remat', 'remat2', 'checkpoint'}
_CALLS |= {'custom_jvp_call', 'custom_vjp_call', 'custom_vjp_call_jaxpr'}


class Inputs(NamedTuple):
    """What came into one kernel, whose inputs form groups that share no output.

    There is one group, but for grouped convolutions, batched products and layers used by parts.
    """

    squares: jax.Array  #: shape=(groups, features), dtype=jnp.float32: the sums of x²
    #: shape=(groups, features, features), dtype=jnp.float32: sums of x xᵀ; None if not wanted
    grams: jax.Array | None
    counts: jax.Array  #: shape=(groups,), dtype=jnp.float32: samples; in convolutions, patches
    #: which of all features a weight is multiplied with: dtype int32, broadcasts against the kernel
    feature: np.ndarray

    def spread(self, numbers: jax.Array) -> jax.Array:
        """Gives each weight the number of its feature.

        Args:
          numbers: shape (groups, features).

        Returns:
          An array that broadcasts against the kernel.
        """
        return numbers.ravel()[self.feature]


def gather_inputs(
    apply: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    takes_part: TakesPart = is_kernel,
    stacked: Mapping[str, int] | None = None,
    grams: bool = True,
) -> dict[str, Inputs]:
    r"""Sums the squares and the products of what is multiplied with each kernel, over some batches.

    .. math::
      \sum_n x_{nj}^2 \quad \text{and} \quad X^\top X = \sum_n x_n x_n^\top

    with x_n the input features of a sample: for a convolution, of a patch. A kernel is followed
    through reshapes, transposes, broadcasts, slices and casts to the `dot_general` or
    `conv_general_dilated` that it is an operand of, also within `jit`, `remat`, functions with
    derivatives of their own, and scans over layers, which are unrolled for this. If it is used
    several times, the sums are over all uses.

    Args:
      apply: the network, a function of params and a batch. What it returns does not count.
      params: the weights; of a pruned network, W⊙T (`dns_jax.apply_masks`).
      batches: what `apply` takes, a few; each new shape is compiled anew.
      takes_part: which leaves are kernels.
      stacked: as for `surgery`; the slices of a stacked kernel have inputs of their own.
      grams: whether to keep the products, which `dns_jax.importance.obs` needs. They have the
        square of as many numbers as there are features.

    Returns:
      ``{path of a kernel: its inputs}``, for a stacked one by the path of each slice.

    Raises:
      ValueError: if there are no batches, or a kernel is in no product, is used in another way, or
        twice with different axes or parts as input.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {'fc': {'kernel': jnp.ones((2, 3))}}
      >>> apply = lambda params, x: jnp.dot(x, params['fc']['kernel'])
      >>> inputs = gather_inputs(apply, params, [jnp.array([[3.0, 1.0], [4.0, 0.0]])])
      >>> inputs['fc/kernel'].squares, inputs['fc/kernel'].grams
      (Array([[25.,  1.]], dtype=float32), Array([[[25.,  3.],
              [ 3.,  1.]]], dtype=float32))

    Reference:
      Sun et al. 2023, A simple and effective pruning approach for large language models (Wanda);
      Frantar and Alistarh 2023, SparseGPT, for layers one by one.
    """
    named = dict(named_leaves(params))
    apart = dict(named_leaves(unstack(stacked, params)[0])) if stacked else named
    kernels = {
        path
        for path, leaf in named.items()
        if any(takes_part(name, apart[name]) for name in slice_paths(stacked or {}, path, leaf))
    }
    features: dict[str, np.ndarray] = {}  # filled as the program is traced

    @jax.jit
    def gather(params, batch):
        program = jax.make_jaxpr(apply)(params, batch)
        uses = _Uses(grams)
        arguments = [
            _Kernel(path, leaf, np.arange(leaf.size, dtype=np.int32).reshape(leaf.shape))
            if path in kernels
            else leaf
            for path, leaf in named_leaves(params)
        ]
        _run(program.jaxpr, program.consts, [*arguments, *jax.tree.leaves(batch)], uses)
        if unused := kernels - uses.found.keys():
            raise ValueError(
                f'{abridge(sorted(unused))} are in no matrix product and no convolution of apply; '
                'takes_part can leave them out'
            )
        merged = {path: _merge(path, named[path].size, found) for path, found in uses.found.items()}
        for path, (feature, _) in merged.items():
            features[path] = feature.reshape(named[path].shape)
        return {path: sums for path, (_, sums) in merged.items()}

    total = None
    for batch in batches:
        sums = gather(params, batch)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise ValueError('batches must hold at least one batch, but are empty')
    return _by_slice(total, features, params, stacked)


class _Kernel(NamedTuple):
    """A kernel on its way to a product, or a part of it."""

    path: str
    value: jax.Array
    at: np.ndarray  # of each number, its place in the kernel


class _Sums(NamedTuple):
    squares: jax.Array
    grams: jax.Array | None
    counts: jax.Array


class _Uses:
    """Collects what is multiplied with each kernel: places of its weights by feature, and sums."""

    def __init__(self, grams: bool):
        self.grams = grams
        self.found: dict[str, list[tuple[np.ndarray, _Sums]]] = {}

    def add(self, kernel: _Kernel, at: np.ndarray, inputs: jax.Array):
        """Takes places of shape (groups, features, outputs), inputs (groups, features, samples)."""
        if len(at) > 1 and (at == at[:1]).all():  # a kernel that was broadcast to a batch
            at, inputs = at[:1], jnp.moveaxis(inputs, 0, 1).reshape(1, inputs.shape[1], -1)
        inputs = inputs.astype(jnp.float32)
        grams = None
        if self.grams:
            grams = jnp.einsum('gkn,gln->gkl', inputs, inputs, precision=lax.Precision.HIGHEST)
        counts = jnp.full(len(inputs), inputs.shape[2], jnp.float32)
        sums = _Sums(jnp.sum(inputs**2, 2), grams, counts)
        self.found.setdefault(kernel.path, []).append((at, sums))


def _run(jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], uses: _Uses) -> list[Any]:
    """Evaluates a program, some of whose values are kernels."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        if any(isinstance(operand, _Kernel) for operand in operands):
            results = _use(equation, operands, uses)
        else:
            results = _bind(equation, operands)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bind(equation, operands) -> Sequence[Any]:
    bound = equation.primitive.get_bind_params(equation.params)
    functions, options = bound if isinstance(bound, tuple) else ((), bound)  # by JAX's version
    results = equation.primitive.bind(*functions, *operands, **options)
    return results if equation.primitive.multiple_results else [results]


def _use(equation, operands, uses: _Uses) -> Sequence[Any]:
    """Evaluates an equation that has a kernel among its operands."""
    name = equation.primitive.name
    kernels = [operand for operand in operands if isinstance(operand, _Kernel)]
    if name in _CALLS:
        inner = equation.params.get('jaxpr', equation.params.get('call_jaxpr'))
        closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
        return _run(closed.jaxpr, closed.consts, operands, uses)
    if name == 'scan':
        return _unroll(equation.params, operands, uses)
    plain = [operand.value if isinstance(operand, _Kernel) else operand for operand in operands]
    results = _bind(equation, plain)
    if name in _MOVES | _KEEPS:
        (kernel,) = kernels
        places = [kernel.at] * len(results)
        if name in _MOVES:
            with jax.ensure_compile_time_eval():
                places = map(np.asarray, _bind(equation, [jnp.asarray(kernel.at, jnp.int32)]))
        return [_Kernel(kernel.path, *both) for both in zip(results, places, strict=True)]
    is_product = name == 'dot_general' and len(kernels) == 1
    is_convolution = name == 'conv_general_dilated' and not isinstance(operands[0], _Kernel)
    if is_product:
        _add_product(equation.params, operands, uses)
    elif is_convolution and equation.params['batch_group_count'] == 1:
        _add_convolution(equation.params, operands, uses)
    else:
        raise ValueError(
            f'{kernels[0].path!r} is an operand of {name}, and so not known to be multiplied with '
            'inputs as it is; takes_part can leave it out'
        )
    return results


def _unroll(options, operands, uses: _Uses) -> list[Any]:
    """Evaluates a scan step by step, so that each has a slice of the kernels."""
    fixed, carried = options['num_consts'], options['num_carry']
    body, length = options['jaxpr'], options['length']
    consts, carry, over = (
        operands[:fixed],
        operands[fixed : fixed + carried],
        operands[fixed + carried :],
    )
    rows: list[Any] = [None] * length
    for step in reversed(range(length)) if options['reverse'] else range(length):
        slices = [
            _Kernel(each.path, each.value[step], each.at[step])
            if isinstance(each, _Kernel)
            else each[step]
            for each in over
        ]
        results = _run(body.jaxpr, body.consts, [*consts, *carry, *slices], uses)
        carry, rows[step] = results[:carried], results[carried:]
    for kernel in jax.tree.leaves(rows, is_leaf=lambda each: isinstance(each, _Kernel)):
        if isinstance(kernel, _Kernel):
            raise ValueError(f'{kernel.path!r} is returned by a scan; takes_part can leave it out')
    return [*carry, *(jnp.stack(column) for column in zip(*rows, strict=True))]


def _add_product(options, operands, uses: _Uses):
    """Adds the inputs of a `dot_general`, with the axes in the order batch, contracted, others."""
    contracted, batched = options['dimension_numbers']
    sides = []
    for operand, over, batch in zip(operands, contracted, batched, strict=True):
        array = operand.at if isinstance(operand, _Kernel) else operand
        rest = [axis for axis in range(array.ndim) if axis not in (*over, *batch)]
        shape = [math.prod(array.shape[axis] for axis in axes) for axes in (batch, over, rest)]
        sides.append(array.transpose(*batch, *over, *rest).reshape(shape))
    kernel, inputs = operands, sides
    if isinstance(operands[1], _Kernel):
        kernel, inputs = operands[::-1], sides[::-1]
    uses.add(kernel[0], inputs[0], inputs[1])


def _add_convolution(options, operands, uses: _Uses):
    """Adds the patches of a convolution: its channels first, as its kernel has them here."""
    inputs, kernel = operands
    numbers, groups = options['dimension_numbers'], options['feature_group_count']
    at = kernel.at.transpose(numbers.rhs_spec)  # outputs, inputs, space
    patches = lax.conv_general_dilated_patches(
        inputs.transpose(numbers.lhs_spec).astype(jnp.float32),
        at.shape[2:],
        options['window_strides'],
        options['padding'],
        options['lhs_dilation'],
        options['rhs_dilation'],
        precision=lax.Precision.HIGHEST,
    )
    features = math.prod(at.shape[1:])
    patches = patches.reshape(len(patches), groups, features, -1)
    patches = patches.transpose(1, 2, 0, 3).reshape(groups, features, -1)
    uses.add(kernel, at.reshape(groups, -1, features).swapaxes(1, 2), patches)


def _merge(
    path: str, size: int, found: Sequence[tuple[np.ndarray, _Sums]]
) -> tuple[np.ndarray, _Sums]:
    """Adds the sums of uses that are alike, and puts those of different parts side by side.

    Returns the feature of each weight too, flat.
    """
    merged: list[tuple[np.ndarray, _Sums]] = []
    for at, sums in found:
        for number, (before, others) in enumerate(merged):
            if at.shape == before.shape and (at == before).all():
                merged[number] = before, jax.tree.map(jnp.add, others, sums)
                break
        else:
            merged.append((at, sums))
    feature, first = np.full(size, -1, np.int32), 0
    for at, _ in merged:
        groups, width, _ = at.shape
        own = first + np.arange(groups * width, dtype=np.int32).reshape(groups, width, 1)
        taken = (feature[at] >= 0).any()
        feature[at] = own
        if taken or (feature[at] != own).any() or width != merged[0][0].shape[1]:
            raise ValueError(
                f'{path!r} is used in several products, along different axes or with different '
                'parts; takes_part can leave it out'
            )
        first += groups * width
    if (feature < 0).any():
        raise ValueError(
            f'{path!r} has weights that are in no product; takes_part can leave it out'
        )
    return feature, jax.tree.map(lambda *sums: jnp.concatenate(sums), *(s for _, s in merged))


def _by_slice(sums: Mapping[str, _Sums], features, params, stacked) -> dict[str, Inputs]:
    """Gives each kernel, or each slice of a stacked one, the groups that are its own."""
    named = named_leaves(params)
    owners = {name: path for path, leaf in named for name in slice_paths(stacked or {}, path, leaf)}
    if stacked:
        placed = nest_leaves((path, features.get(path, np.int32(0))) for path, _ in named)
        features = dict(named_leaves(unstack(stacked, params, placed)[1]))
    inputs = {}
    for name, feature in features.items():
        if owners[name] not in sums:
            continue
        own_sums = sums[owners[name]]
        groups, within = np.divmod(feature, own_sums.squares.shape[1])
        own, groups = np.unique(groups, return_inverse=True)
        feature = groups.reshape(feature.shape) * own_sums.squares.shape[1] + within
        for axis in range(feature.ndim):  # along the outputs it is the same
            first = feature.take([0], axis)
            feature = first if (feature == first).all() else feature
        own_sums = jax.tree.map(lambda array, own=own: array[own], own_sums)
        index = feature.astype(np.int32)
        inputs[name] = Inputs(own_sums.squares, own_sums.grams, own_sums.counts, index)
    return inputs
