"""Many devices: which there are, what of the state and of a batch lies where.

Every array of a run is placed by a `jax.sharding.NamedSharding` over one mesh with the axes `data`
and `model`, and jit does the rest: batches are split over `data`, fully connected layers, their
masks and all else that is shaped like them over `model`; whatever remains is on every device.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import dns_jax
from dns_jax.layers import map_leaves, named_leaves, parent_path

AXES = ('data', 'model')


def parse_mesh(text: str) -> dict[str, int]:
    """Reads the sizes of a mesh, such as `data:4,model:2`.

    Args:
      text: `AXIS:SIZE` entries with commas between, each axis once at most.

    Returns:
      `{axis: size}` for both axes, 1 where the text names it not. Empty for an empty text.

    Raises:
      ValueError: if the text has another form.
    """
    sizes: dict[str, int] = {}
    for entry in filter(None, text.split(',')):
        axis, _, digits = entry.partition(':')
        if axis not in AXES or axis in sizes or not digits.isdecimal() or not int(digits):
            raise ValueError(
                f'--mesh={text} must be data:SIZE, model:SIZE or both with a comma between, sizes '
                f'of 1 or more; {entry!r} is not'
            )
        sizes[axis] = int(digits)
    return {axis: sizes.get(axis, 1) for axis in AXES} if sizes else {}


def make_mesh(text: str, batch_size: int, accumulate: int = 1) -> Mesh:
    """Makes the mesh of a run.

    Args:
      text: for `parse_mesh`; where it is empty, all devices share the batch.
      batch_size: images per step, on all devices together.
      accumulate: parts that a batch is taken in, one after the other.

    Returns:
      A mesh with the axes `data` and `model`, of the first devices there are.

    Raises:
      ValueError: if the devices or the batch cannot be shared out so.
    """
    devices = jax.devices()
    sizes = parse_mesh(text) or {'data': len(devices), 'model': 1}
    named = f'--mesh={text or "data:" + str(len(devices))}'
    wanted = math.prod(sizes.values())
    if len(devices) % wanted:
        raise ValueError(
            f'{named} wants {wanted} devices, which does not divide the {len(devices)}'
        )
    if jax.process_count() > 1 and wanted != len(devices):
        raise ValueError(
            f'{named} wants {wanted} devices; {jax.process_count()} processes must use all their '
            f'{len(devices)}'
        )
    if batch_size % (accumulate * sizes['data']):
        raise ValueError(
            f'{named} and --accumulate={accumulate} part a batch in {accumulate * sizes["data"]}, '
            f'which does not divide --batch_size={batch_size}'
        )
    return jax.make_mesh(
        tuple(sizes[axis] for axis in AXES), AXES, (AxisType.Auto,) * 2, devices=devices[:wanted]
    )


def shardings(mesh: Mesh, params: dns_jax.Params, tree: Any) -> Any:
    """Says where every leaf of a tree lies.

    A fully connected layer whose outputs can be shared out evenly is split by outputs over
    `model`. A leaf of the tree follows the weights that its path ends with, if it has their shape:
    so do masks, and what an optimizer remembers of each weight.

    Args:
      mesh: from `make_mesh`.
      params: the weights, or their shapes; kernels of two axes are those of such layers.
      tree: any tree of arrays or shapes.
    """
    parts = mesh.shape['model']
    split = {
        layer
        for layer, leaves in dns_jax.group_by_layer(params, takes_part=dns_jax.is_kernel).items()
        if all(leaf.ndim == 2 and not leaf.shape[-1] % parts for leaf in leaves)
    }
    specs: dict[str, tuple[tuple[int, ...], PartitionSpec]] = {}
    for path, leaf in named_leaves(params):
        is_split = parent_path(path) in split
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), 'model') if is_split else PartitionSpec()
        specs[path] = leaf.shape, spec

    def sharding(path, leaf):
        parts = path.split('/')
        for start in range(len(parts)):
            known = specs.get('/'.join(parts[start:]))
            if known and known[0] == leaf.shape:
                return NamedSharding(mesh, known[1])
        return NamedSharding(mesh, PartitionSpec())

    return map_leaves(sharding, tree)


def own_rows(mesh: Mesh, batch_size: int) -> slice:
    """Says which rows of a batch this process must have at hand.

    Args:
      mesh: from `make_mesh`.
      batch_size: images per step, on all devices together.

    Returns:
      The shortest range with all rows of this process's devices.
    """
    places = _over_data(mesh).addressable_devices_indices_map((batch_size,)).values()
    bounds = [place[0].indices(batch_size) for place in places if place]
    return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def place_batch(
    mesh: Mesh, batch: tuple[np.ndarray, ...], batch_size: int
) -> tuple[jax.Array, ...]:
    """Spreads a batch over the mesh.

    Args:
      mesh: from `make_mesh`.
      batch: arrays, their first axes being the rows of `own_rows`.
      batch_size: images per step, on all devices together.

    Returns:
      Arrays of `batch_size` rows, split over `data`.
    """
    rows, sharding = own_rows(mesh, batch_size), _over_data(mesh)

    def place(own: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return own[start - rows.start : stop - rows.start]

        return jax.make_array_from_callback((batch_size, *own.shape[1:]), sharding, part)

    return tuple(map(place, batch))


def to_host(tree: Any) -> Any:
    """Copies arrays into the memory of every process, wherever their parts lie.

    Args:
      tree: of arrays; every process must ask for the same ones.
    """
    arrays = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    spread = [array for array in arrays if not array.is_fully_addressable]
    if spread:
        sharding: Any = spread[0].sharding
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        tree = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
    return jax.device_get(tree)


def _over_data(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec('data'))
