"""Deep Compression: weights of a layer share a few values, and the file is entropy-coded.

Owns the file format. A coded file holds a pruned network in about one byte a kept weight; it is
the four bytes `DNS` and the version, the CRC-32 of all that follows, and

  - a header of numbers (LEB128) and texts (a number of bytes, then UTF-8): the metadata; each
    layer with its codebook (bfloat16) and its leaves with their shapes and counts of kept weights;
  - one stream of a range coder, which holds where the kept weights are, leaf by leaf, then which
    value of the codebook each has, layer by layer.

How a mask becomes symbols is said in `dns_jax.entropy`. The positions of the zoo's LeNets take
1,4xx and 1,3xx bytes so; plain gaps took 1,800 and 1,830, bits with probabilities
from the counts of rows and columns 1,545 and 1,490, the rest of the grid as trees of empty
blocks, or bit by bit in the context of those before, no less than gaps.

What a file decodes to is encoded again and must give the same file: so there is one file for a
network, and no damage goes unseen.

Reference:
  Han, Mao and Dally 2016, Deep Compression (ICLR).
"""

import math
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dns_jax.entropy import Decoder, Encoder, Reader, decode_mask, encode_mask, number, text
from dns_jax.files import write_whole
from dns_jax.layers import leaf_path, match_patterns, parent
from dns_jax.masks import check_parallel
from dns_jax.sparse import nest_leaves
from dns_jax.typing import Masks, Params

_MAGIC = b'DNS\x01'
_MAX_PATH = 1_000  # characters: a layer's name counts for each of its leaves
_MAX_AXES = 64  # NumPy's
_MAX_SIZE = 2**31  # of a leaf: sums of its gaps fit int64
_MAX_CLUSTERS = 2**16  # bfloat16 has no more values


class SharedNetwork(NamedTuple):
    """A pruned network whose weights share the values of a few codebooks."""

    codebooks: dict[str, np.ndarray]  # {layer: its values}, shape=(clusters,), dtype=np.float32
    assignments: Params  # int32 arrays, shaped as the leaves: places in the codebook of the layer
    masks: Masks  # parallel to the assignments, boolean; one of shape () keeps the whole leaf
    metadata: dict[str, str]  # free strings


class _Leaf(NamedTuple):
    path: str
    assignment: np.ndarray  # dtype=np.int32
    mask: np.ndarray  # dtype=bool, of the same shape


class _Form(NamedTuple):
    """What the header says of a leaf."""

    path: str
    shape: tuple[int, ...]
    kept: int


def share_weights(
    params: Params,
    masks: Masks,
    clusters: int | Mapping[str, int],
    metadata: Mapping[str, str] | None = None,
) -> SharedNetwork:
    """Clusters the kept weights of each layer by k-means and rounds the centroids.

    The centroids start evenly spaced between the smallest and the largest weight of the layer.
    They are rounded as `round_codebooks` does, and only then does each weight choose the
    nearest.

    Args:
      params: dense weights, concrete arrays of float32 or a narrower floating-point type,
        finite where they are kept.
      masks: the parallel masks. A leaf with a mask of shape `()` is kept whole.
      clusters: how many values a layer may have, for all layers or by patterns as in
        `dns_jax.layers.match_patterns`. A layer with fewer distinct weights gets fewer, one
        without kept weights none.
      metadata: free strings, such as the name of the network.

    Returns:
      The network, in the structure of `params`.

    Raises:
      ValueError: if the trees do not match, a kept weight is not finite, a layer has no number
        of clusters, or that is not in 1 to 65,536.
      TypeError: if a mask is not boolean or a leaf not of a type that float32 can hold.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {'fc1': {'kernel': jnp.array([[3.0, -2.0], [1.0, 5.0]])}}
      >>> masks = {'fc1': {'kernel': jnp.array([[True, True], [False, True]])}}
      >>> network = share_weights(params, masks, clusters=2)
      >>> network.codebooks['fc1'], network.assignments['fc1']['kernel']
      (array([-2.,  4.], dtype=float32), array([[1, 0],
             [0, 1]], dtype=int32))

    Reference:
      Han, Mao and Dally 2016, section 3.
    """
    check_parallel(params, masks)
    values: dict[str, list[np.ndarray]] = {}
    for (key_path, leaf), mask in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(masks), strict=True
    ):
        path = leaf_path(key_path)
        values.setdefault(parent(path), []).append(_kept(path, np.asarray(leaf), np.asarray(mask)))
    codebooks = {
        layer: _codebook(np.concatenate(values[layer]), amount)
        for layer, amount in _clusters_by_layer(clusters, sorted(values)).items()
    }

    def assign(key_path, leaf, mask):
        assignment = np.zeros(np.shape(leaf), np.int32)
        full = np.broadcast_to(np.asarray(mask), assignment.shape) | (np.ndim(mask) == 0)
        book = codebooks[parent(leaf_path(key_path))].astype(np.float64)
        borders = (book[1:] + book[:-1]) / 2
        assignment[full] = np.searchsorted(borders, np.asarray(leaf)[full].astype(np.float64))
        return assignment

    return SharedNetwork(
        codebooks,
        jax.tree.map_with_path(assign, params, masks),
        jax.tree.map(np.asarray, masks),
        dict(metadata or {}),
    )


def round_codebooks(codebooks: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Rounds codebooks to values that a coded file holds: those of bfloat16.

    Args:
      codebooks: `{layer: its values}`, finite.

    Returns:
      The same in float32, each at the nearest value that bfloat16 has.

    Raises:
      ValueError: if a value is not finite.

    Example:
      >>> round_codebooks({'fc1': [0.1, 1.0]})
      {'fc1': array([0.10009766, 1.        ], dtype=float32)}
    """
    rounded = {}
    largest = np.float32(jnp.finfo(jnp.bfloat16).max)
    for layer, values in codebooks.items():
        book = np.asarray(values, np.float32)
        if not np.isfinite(book).all():
            raise ValueError(f'codebooks[{layer!r}] has a value that is not finite')
        rounded[layer] = book.clip(-largest, largest).astype(jnp.bfloat16).astype(np.float32)
    return rounded


def expand(codebooks: Mapping[str, Any], assignments: Params, masks: Masks) -> Params:
    """Writes out the weights that a network with codebooks computes with.

    Differentiable in the codebooks: the gradient of a centroid is the sum of those of its
    weights, so that an optimizer may tune the centroids through it.

    Args:
      codebooks: `{layer: its values}`, arrays of one axis.
      assignments: the parallel places in the codebooks.
      masks: the parallel masks.

    Returns:
      A tree like `assignments` of arrays of the type of the codebooks, 0 where pruned.

    Raises:
      ValueError: if the trees do not match, or a layer has no codebook.
      TypeError: if a mask is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> expand({'': jnp.array([-2.0, 4.0])}, jnp.array([1, 0, 0]), jnp.array([True, True, False]))
      Array([ 4., -2.,  0.], dtype=float32)
    """
    check_parallel(assignments, masks)

    def expand_leaf(key_path, assignment, mask):
        layer = parent(leaf_path(key_path))
        if layer not in codebooks:
            raise ValueError(f'codebooks must have the layer {layer!r}; it has {list(codebooks)}')
        book = jnp.asarray(codebooks[layer])
        if not book.size:
            return jnp.zeros(assignment.shape, book.dtype)
        weights = book[jnp.asarray(assignment)]
        return jnp.where(mask, weights, 0) if jnp.ndim(mask) else weights

    return jax.tree.map_with_path(expand_leaf, assignments, masks)


def save_coded(path: str | os.PathLike[str], network: SharedNetwork) -> None:
    """Writes a network with codebooks to an entropy-coded file, whole or not at all.

    Args:
      path: the file, in a folder that exists; one that is there is replaced.
      network: from `share_weights`, perhaps with other codebooks, if from `round_codebooks`.

    Raises:
      ValueError: if the trees do not match or are empty, the path of a leaf is that of another,
        lies within it or has over 1,000 characters, a leaf has over 2**31 elements, a layer no
        codebook, a codebook no layer or a value that the file cannot hold, or a kept weight no
        place in it.
      TypeError: if a mask is not boolean, an assignment not an integer, a codebook not float32,
        or the metadata not strings alone.
      OSError: if the file cannot be written; what was there before is then as it was.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> params = {'fc1': {'kernel': jnp.array([[3.0, -2.0], [1.0, 5.0]])}}
      >>> masks = {'fc1': {'kernel': jnp.array([[True, True], [False, True]])}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_coded(f'{folder}/tiny.dns', share_weights(params, masks, clusters=2))
      ...     expand(*load_coded(f'{folder}/tiny.dns')[:3])['fc1']['kernel']
      Array([[ 4., -2.],
             [ 0.,  4.]], dtype=float32)
    """
    write_whole(Path(path), _encode(network))


def load_coded(path: str | os.PathLike[str], max_parameters: int = 2**30) -> SharedNetwork:
    """Reads an entropy-coded file, and checks all of it.

    Meant for files from anywhere: until the dense arrays are made, memory is taken in proportion
    to the size of the file.

    Args:
      path: the file.
      max_parameters: how many parameters, kept or not, the network may have at most, an empty
        axis counted as one of length 1.

    Returns:
      The network, its trees nested dicts as `dns_jax.sparse.load_sparse` makes them, masks of
      the shapes of their leaves, assignments 0 where pruned.

    Raises:
      ValueError: if the file is damaged, is not such a file, or the network is larger than
        `max_parameters`.
      OSError: if the file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        network = _decode(data, max_parameters)
        if _encode(network) != data:
            raise ValueError('it is not what its network is encoded as')
    except ValueError as error:
        raise ValueError(f'cannot load {os.fspath(path)!r}: {error}') from error
    return network


def _kept(path: str, weights: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if not jnp.issubdtype(weights.dtype, jnp.floating) or weights.dtype.itemsize > 4:
        raise TypeError(f'params[{path!r}] must be floats that fit float32, not {weights.dtype}')
    values = (weights[mask] if mask.ndim else weights.ravel()).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f'params[{path!r}] has a kept weight that is not finite')
    return values


def _clusters_by_layer(clusters: int | Mapping[str, int], layers: list[str]) -> dict[str, int]:
    table = clusters if isinstance(clusters, Mapping) else {'*': clusters}
    amounts = {layer: amount for layer, (_, amount) in match_patterns(table, layers).items()}
    wrong = [layer for layer in layers if not 1 <= amounts.get(layer, 0) <= _MAX_CLUSTERS]
    if wrong:
        raise ValueError(
            f'clusters={clusters!r}: wanted 1 to {_MAX_CLUSTERS} for the layers {wrong}'
        )
    return amounts


def _codebook(values: np.ndarray, clusters: int) -> np.ndarray:
    """The centroids of the values, rounded, ascending, each once."""
    # Only here, so that a file can be read where there is no scikit-learn.
    from sklearn.cluster import KMeans

    centroids = np.unique(values)
    if len(centroids) > clusters:
        start = np.linspace(values.min(), values.max(), clusters)[:, None]
        means = KMeans(clusters, init=start, n_init=1, tol=0)  # pyright: ignore[reportArgumentType]
        centroids = means.fit(values[:, None]).cluster_centers_[:, 0]
    return np.unique(round_codebooks({'': centroids})[''])


def _encode(network: SharedNetwork) -> bytes:
    layers = _checked_layers(network)
    coder = Encoder()
    fed: np.ndarray = np.zeros(0, bool)
    for leaf in (leaf for leaves in layers.values() for leaf in leaves):
        fed = encode_mask(coder, leaf.mask, fed)
    for layer, leaves in layers.items():
        kept = [leaf.assignment[leaf.mask] for leaf in leaves]
        coder.symbols(np.concatenate(kept), len(network.codebooks[layer]))

    header = [number(len(network.metadata))]
    for key, value in sorted(network.metadata.items()):
        header += [text(key), text(value)]
    header.append(number(len(layers)))
    for layer, leaves in layers.items():
        book = network.codebooks[layer].astype(jnp.bfloat16).view('<u2')
        header += [text(layer), number(len(book)), book.tobytes(), number(len(leaves))]
        for leaf in leaves:
            numbers = (leaf.mask.ndim, *leaf.mask.shape, int(leaf.mask.sum()))
            header += [text(leaf.path.removeprefix(layer)), *map(number, numbers)]
    content = b''.join(header) + coder.getvalue()
    return _MAGIC + struct.pack('<I', zlib.crc32(content)) + content


def _checked_layers(network: SharedNetwork) -> dict[str, list[_Leaf]]:
    """The leaves by layer, in the order of the file: layers by name, leaves by path."""
    check_parallel(network.assignments, network.masks)
    for key, value in network.metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f'metadata must map strings to strings, but has {key!r}: {value!r}')
    leaves = []
    for (key_path, leaf), mask in zip(
        jax.tree.leaves_with_path(network.assignments), jax.tree.leaves(network.masks), strict=True
    ):
        mask = np.asarray(mask) if jnp.ndim(mask) else np.ones(jnp.shape(leaf), bool)
        leaves.append(_Leaf(leaf_path(key_path), np.asarray(leaf), mask))
    leaves.sort(key=lambda leaf: leaf.path)
    nest_leaves((leaf.path, leaf) for leaf in leaves)  # what cannot be nested cannot be loaded
    layers: dict[str, list[_Leaf]] = {}
    for leaf in leaves:
        layers.setdefault(parent(leaf.path), []).append(leaf)

    if set(layers) != set(network.codebooks):
        raise ValueError(
            f'codebooks must be of the layers {sorted(layers)}, not {sorted(network.codebooks)}'
        )
    for layer, book in network.codebooks.items():
        if book.dtype != np.float32:
            raise TypeError(f'codebooks[{layer!r}] must be float32, but is {book.dtype}')
        if book.ndim != 1 or len(book) > _MAX_CLUSTERS:
            raise ValueError(f'codebooks[{layer!r}] must have one axis of at most {_MAX_CLUSTERS}')
        if (round_codebooks({layer: book})[layer] != book).any():
            raise ValueError(f'codebooks[{layer!r}] must be what round_codebooks gives')
        for leaf in layers[layer]:
            _check_leaf(leaf, len(book))
    return dict(sorted(layers.items()))


def _check_leaf(leaf: _Leaf, clusters: int) -> None:
    if not np.issubdtype(leaf.assignment.dtype, np.integer):
        raise TypeError(f'assignments[{leaf.path!r}] must be integers, not {leaf.assignment.dtype}')
    if leaf.mask.size > _MAX_SIZE:
        raise ValueError(f'assignments[{leaf.path!r}] has {leaf.mask.size} elements, over 2**31')
    if len(leaf.path) > _MAX_PATH:
        raise ValueError(f'the path {leaf.path[:80]!r}... has over {_MAX_PATH} characters')
    places = leaf.assignment[leaf.mask]
    if places.size and not 0 <= places.min() <= places.max() < clusters:
        raise ValueError(
            f'assignments[{leaf.path!r}] must lie from 0 to {clusters - 1}, but has '
            f'{places.min()} to {places.max()}'
        )


def _decode(data: bytes, max_parameters: int) -> SharedNetwork:
    if data[:4] != _MAGIC:
        raise ValueError(f'it must begin with {_MAGIC!r}, but begins with {data[:4]!r}')
    if data[4:8] != struct.pack('<I', zlib.crc32(data[8:])):
        raise ValueError('its content does not have the checksum that it says')
    reader = Reader(data[8:])
    metadata = {reader.text(): reader.text() for _ in range(reader.number())}
    codebooks, layers = {}, {}
    for _ in range(reader.number()):
        layer = reader.text()
        clusters = reader.number()
        if clusters > _MAX_CLUSTERS:
            raise ValueError(f'the layer {layer!r} has {clusters} clusters, over {_MAX_CLUSTERS}')
        book = np.frombuffer(reader.take(2 * clusters), '<u2')
        codebooks[layer] = book.astype(np.uint16).view(jnp.bfloat16).astype(np.float32)
        layers[layer] = [_read_form(reader, layer) for _ in range(reader.number())]
    forms = [form for layer in layers.values() for form in layer]
    parameters = sum(math.prod(max(axis, 1) for axis in form.shape) for form in forms)
    if parameters > max_parameters:
        raise ValueError(f'it has {parameters} parameters; max_parameters is {max_parameters}')

    decoder = Decoder(reader.rest())
    masks, assignments = {}, {}
    fed = np.zeros(0, bool)
    for form in forms:
        masks[form.path], fed = decode_mask(decoder, form.shape, form.kept, fed)
    for layer, forms in layers.items():
        places = decoder.symbols(sum(form.kept for form in forms), len(codebooks[layer]))
        ends = np.cumsum([form.kept for form in forms])
        for form, part in zip(forms, np.split(places, ends[:-1]), strict=True):
            assignments[form.path] = np.zeros(form.shape, np.int32)
            assignments[form.path][masks[form.path]] = part
    return SharedNetwork(
        codebooks, nest_leaves(assignments.items()), nest_leaves(masks.items()), metadata
    )


def _read_form(reader: Reader, layer: str) -> _Form:
    path = layer + reader.text()
    if len(path) > _MAX_PATH:
        raise ValueError(f'the path {path[:80]!r}... has over {_MAX_PATH} characters')
    axes = reader.number()
    if axes > _MAX_AXES:
        raise ValueError(f'{path!r} has {axes} axes, over {_MAX_AXES}')
    shape = tuple(reader.number() for _ in range(axes))
    kept, size = reader.number(), math.prod(shape)
    if kept > size or size > _MAX_SIZE:
        raise ValueError(f'{path!r} has {kept} kept weights of {size}; 2**31 are the most')
    if not shape and not kept:
        raise ValueError(f'{path!r} is a scalar that is not kept; scalars take no part in surgery')
    return _Form(path, shape, kept)
