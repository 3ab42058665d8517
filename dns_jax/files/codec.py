"""The coded artefact of a pruned network with shared weights: a byte or so for a kept weight.

Owns the file format, the third stage of Deep Compression. A file is the four bytes `DNS` and the
version, the CRC-32 of all that follows, and

  - a header of numbers (LEB128) and texts (a number of bytes, then UTF-8): the metadata; the
    names of leaves, such as `/kernel`; each layer with its codebook (bfloat16) and its leaves,
    which are the place of their name, the number of their axes and these, and a count of kept
    weights; a leaf that takes no part in surgery has 128 more for its number of axes, and no count;
  - one stream of a range coder, which holds where the kept weights are, leaf by leaf, then which
    value of the codebook each has, layer by layer.

How masks become symbols is said in `_entropy`, and what other ways took in results/size.md.

What a file decodes to is encoded again and must give the same file: so there is one file for a
network, and no damage goes unseen.

Reference:
  Han, Mao and Dally 2016, Deep Compression (ICLR).
"""

import math
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dns_jax._trees import check_parallel, nest_leaves
from dns_jax.files._contents import check_metadata
from dns_jax.files._entropy import Decoder, Encoder, decode_mask, encode_mask
from dns_jax.files._header import Reader, encode_number, encode_text
from dns_jax.files.sharing import MAX_CLUSTERS, SharedNetwork, round_codebooks
from dns_jax.files.writing import write_whole
from dns_jax.layers import named_leaves, parent_path

SUFFIX = '.dns'
"""How the name of a coded file ends."""

_MAGIC = b'DNS\x01'
_MAX_PATH = 1_000  # characters: a layer's name counts for each of its leaves
_MAX_CHARACTERS = 2**20  # of all paths: a file says layers and names once, and combines them
_MAX_AXES = 64  # NumPy's
_NO_PART = 128  # added to the number of axes
_MAX_SIZE = 2**31  # of a leaf: sums of its gaps fit int64


class _Leaf(NamedTuple):
    path: str
    assignment: np.ndarray  # dtype=np.int32
    mask: np.ndarray  # dtype=bool, of the same shape
    takes_part: bool  # a scalar never does, and that goes without saying


class _Form(NamedTuple):
    """What the header says of a leaf."""

    path: str
    shape: tuple[int, ...]
    kept: int
    takes_part: bool


def save_coded(path: str | os.PathLike[str], network: SharedNetwork) -> None:
    """Writes a network with codebooks to an entropy-coded file, whole or not at all.

    Args:
      path: the file, in a folder that exists; one that is there is replaced.
      network: from `share_weights`, perhaps with other codebooks, if from `round_codebooks`.

    Raises:
      ValueError: if the trees do not match or are empty, the path of a leaf is that of another,
        lies within it or has over 1,000 characters, all paths have over 2**20, a leaf has over
        2**31 elements, a layer no codebook, a codebook no layer or a value that the file
        cannot hold, or a kept weight no place in it.
      TypeError: if a mask is not boolean, an assignment not an integer, a codebook not float32,
        or the metadata not strings alone.
      OSError: if the file cannot be written; what was there before is then as it was.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from dns_jax.files.sharing import expand, share_weights
      >>> params = {'fc1': {'kernel': jnp.array([[3.0, -2.0], [1.0, 5.0]])}}
      >>> masks = {'fc1': {'kernel': jnp.array([[True, True], [False, True]])}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_coded(f'{folder}/tiny.dns', share_weights(params, masks, clusters=2))
      ...     expand(*load_coded(f'{folder}/tiny.dns')[:3])['fc1']['kernel']
      Array([[ 4., -2.],
             [ 0.,  4.]], dtype=float32)

    Reference:
      Han, Mao and Dally 2016, section 4, where the code is Huffman's.
    """
    write_whole(Path(path), _encode(network))


def load_coded(path: str | os.PathLike[str], max_parameters: int = 2**28) -> SharedNetwork:
    """Reads an entropy-coded file, and checks all of it.

    Meant for files from anywhere. At its peak memory takes up to 12 bytes a parameter, where 5
    are those of the network that is returned, and a few hundred for each byte of the file: a
    leaf has no fewer than three bytes there, but is several Python objects here. A network may
    have many parameters in a file of a few bytes, so it is `max_parameters` that limits memory.

    Args:
      path: the file.
      max_parameters: how many parameters, kept or not, the network may have at most, an empty
        axis counted as one of length 1.

    Returns:
      The network, its trees nested dicts as `sparse.load_sparse` makes them, assignments 0
      where pruned. The mask of a leaf that took no part has shape `()`; older files, where it has
      a count too, give it one of True.

    Raises:
      ValueError: if the file is damaged, is not such a file, or the network is larger than
        `max_parameters`.
      OSError: if the file cannot be read.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from dns_jax.files.sharing import share_weights
      >>> network = share_weights(np.float32([3, 0, -2]), np.array([True, False, True]), clusters=2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_coded(f'{folder}/tiny.dns', network)
      ...     loaded = load_coded(f'{folder}/tiny.dns')
      >>> loaded.assignments, loaded.masks
      (array([1, 0, 0], dtype=int32), array([ True, False,  True]))
    """
    data = Path(path).read_bytes()
    try:
        network = _decode(data, max_parameters)
        if _encode(network) != data:
            raise ValueError('it is not what its network is encoded as')
    except ValueError as error:
        raise ValueError(f'cannot load {os.fspath(path)!r}: {error}') from error
    return network


def _encode(network: SharedNetwork) -> bytes:
    layers = _checked_layers(network)
    coder = Encoder()
    live_units: np.ndarray = np.zeros(0, bool)
    for leaf in (leaf for leaves in layers.values() for leaf in leaves):
        live_units = encode_mask(coder, leaf.mask, live_units)
    for layer, leaves in layers.items():
        kept = [leaf.assignment[leaf.mask].astype(np.uint16) for leaf in leaves]
        coder.symbols(np.concatenate(kept), len(network.codebooks[layer]))

    header = [encode_number(len(network.metadata))]
    for key, value in sorted(network.metadata.items()):
        header += [encode_text(key), encode_text(value)]
    names = {leaf.path.removeprefix(layer) for layer in layers for leaf in layers[layer]}
    places = {name: place for place, name in enumerate(sorted(names))}
    header += [encode_number(len(places)), *map(encode_text, places), encode_number(len(layers))]
    for layer, leaves in layers.items():
        book = network.codebooks[layer].astype(jnp.bfloat16).view('<u2')
        header += [
            encode_text(layer),
            encode_number(len(book)),
            book.tobytes(),
            encode_number(len(leaves)),
        ]
        for leaf in leaves:
            place = places[leaf.path.removeprefix(layer)]
            axes = leaf.mask.ndim + (0 if leaf.takes_part else _NO_PART)
            count = [int(leaf.mask.sum())] if leaf.takes_part else []
            header += map(encode_number, (place, axes, *leaf.mask.shape, *count))
    content = b''.join(header) + coder.getvalue()
    return _MAGIC + struct.pack('<I', zlib.crc32(content)) + content


def _checked_layers(network: SharedNetwork) -> dict[str, list[_Leaf]]:
    """The leaves by layer, in the order of the file: layers by name, leaves by path."""
    masks = check_parallel(network.assignments, network.masks)
    check_metadata(network.metadata)
    leaves = []
    named = named_leaves(network.assignments)
    for (path, leaf), mask in zip(named, jax.tree.leaves(masks), strict=True):
        takes_part = jnp.ndim(mask) == jnp.ndim(leaf)
        mask = np.asarray(mask) if jnp.ndim(mask) else np.ones(jnp.shape(leaf), bool)
        leaves.append(_Leaf(path, np.asarray(leaf), mask, takes_part))
    if sum(len(leaf.path) for leaf in leaves) > _MAX_CHARACTERS:
        raise ValueError(f'the paths of the leaves have over {_MAX_CHARACTERS} characters')
    leaves.sort(key=lambda leaf: leaf.path)
    nest_leaves((leaf.path, leaf) for leaf in leaves)  # what cannot be nested cannot be loaded
    layers: dict[str, list[_Leaf]] = {}
    for leaf in leaves:
        layers.setdefault(parent_path(leaf.path), []).append(leaf)

    if set(layers) != set(network.codebooks):
        raise ValueError(
            f'codebooks must be of the layers {sorted(layers)}, not {sorted(network.codebooks)}'
        )
    for layer, book in network.codebooks.items():
        if book.dtype != np.float32:
            raise TypeError(f'codebooks[{layer!r}] must be float32, but is {book.dtype}')
        if book.ndim != 1 or len(book) > MAX_CLUSTERS:
            raise ValueError(f'codebooks[{layer!r}] must have one axis of at most {MAX_CLUSTERS}')
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
    metadata, codebooks, layers = _read_header(reader)
    forms = [form for layer in layers.values() for form in layer]
    parameters = sum(math.prod(max(axis, 1) for axis in form.shape) for form in forms)
    if parameters > max_parameters:
        raise ValueError(f'it has {parameters} parameters; max_parameters is {max_parameters}')

    decoder = Decoder(reader.rest())
    masks, assignments = {}, {}
    live_units = np.zeros(0, bool)
    for form in forms:
        masks[form.path], live_units = decode_mask(decoder, form.shape, form.kept, live_units)
    for layer, forms in layers.items():
        places = decoder.symbols(sum(form.kept for form in forms), len(codebooks[layer]))
        ends = np.cumsum([form.kept for form in forms])
        for form, part in zip(forms, np.split(places, ends[:-1]), strict=True):
            assignments[form.path] = np.zeros(form.shape, np.int32)
            assignments[form.path][masks[form.path]] = part
            if not form.takes_part:
                masks[form.path] = np.ones((), bool)
    return SharedNetwork(
        codebooks, nest_leaves(assignments.items()), nest_leaves(masks.items()), metadata
    )


def _read_header(
    reader: Reader,
) -> tuple[dict[str, str], dict[str, np.ndarray], dict[str, list[_Form]]]:
    """The metadata, and the codebooks and leaves by layer.

    What paths would make large is refused at once: few bytes say many paths.
    """
    metadata = {reader.text(): reader.text() for _ in range(reader.number())}
    names = [reader.text() for _ in range(reader.number())]
    codebooks, layers = {}, {}
    paths: set[str] = set()
    characters = 0
    for _ in range(reader.number()):
        layer = reader.text()
        clusters = reader.number()
        if clusters > MAX_CLUSTERS:
            raise ValueError(f'the layer {layer!r} has {clusters} clusters, over {MAX_CLUSTERS}')
        book = np.frombuffer(reader.take(2 * clusters), '<u2')
        codebooks[layer] = book.astype(np.uint16).view(jnp.bfloat16).astype(np.float32)
        layers[layer] = []
        for _ in range(reader.number()):
            form = _read_form(reader, layer, names)
            if form.path in paths:
                raise ValueError(f'it has the leaf {form.path[:80]!r} twice')
            paths.add(form.path)
            characters += len(form.path)
            if characters > _MAX_CHARACTERS:
                raise ValueError(f'the paths of its leaves have over {_MAX_CHARACTERS} characters')
            layers[layer].append(form)
    return metadata, codebooks, layers


def _read_form(reader: Reader, layer: str, names: list[str]) -> _Form:
    name = reader.number()
    if name >= len(names):
        raise ValueError(f'it has {len(names)} names of leaves, but wants that at {name}')
    path = layer + names[name]
    if len(path) > _MAX_PATH:
        raise ValueError(f'the path {path[:80]!r}... has over {_MAX_PATH} characters')
    if parent_path(path) != layer:
        raise ValueError(f'it has the leaf {path[:80]!r} in another layer than its own')
    axes = reader.number()
    takes_part = axes < _NO_PART
    axes -= 0 if takes_part else _NO_PART
    if axes > _MAX_AXES:
        raise ValueError(f'{path!r} has {axes} axes, over {_MAX_AXES}')
    shape = tuple(reader.number() for _ in range(axes))
    size = math.prod(shape)
    kept = reader.number() if takes_part else size
    if kept > size or size > _MAX_SIZE:
        raise ValueError(f'{path!r} has {kept} kept weights of {size}; 2**31 are the most')
    if not shape and not kept:
        raise ValueError(f'{path!r} is a scalar that is not kept; scalars take no part in surgery')
    return _Form(path, shape, kept, takes_part)
