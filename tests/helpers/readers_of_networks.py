"""The readers of networks, for the fuzz tests: each with valid inputs."""

import json
import math
import struct
import zlib

import jax
import jax.numpy as jnp
import networks
import numpy as np
import wire
from reader import Reader, check_array, to_text, write_new

from dns_jax._trees import check_parallel
from dns_jax.files._entropy import Decoder, Encoder, decode_mask, encode_mask
from dns_jax.files._header import Reader as HeaderReader
from dns_jax.files._header import encode_number, encode_text
from dns_jax.files.caffe import read_caffemodel, to_linen
from dns_jax.files.caffe_writer import from_linen, write_caffemodel
from dns_jax.files.codec import load_coded, save_coded
from dns_jax.files.sharing import share_weights
from dns_jax.files.sparse import load_sparse, save_sparse
from dns_jax.inference.chain import (
    Dense,
    Flatten,
    Relu,
    chain_from_json,
    chain_to_json,
    trace_shapes,
)
from dns_jax.inference.runners import recorded_kinds
from experiments.artefacts.loading import load_model
from experiments.measurements import hlo

MOST = 10**5  # parameters that a network is allowed to have
CHAIN = (Flatten(), Dense('a'), Relu(), Dense('b'))


def small_network():
    """Returns params and masks, of a chain of two layers."""
    random = np.random.default_rng(0)
    parts = {
        name: networks.random_weights(random, shape, 0.3)
        for name, shape in {'a': (12, 10), 'b': (10, 4)}.items()
    }
    return tuple({name: part[which] for name, part in parts.items()} for which in range(2))


def partly_whole():
    """Returns params and masks, of which some take no part."""
    params = {'a': np.float32([[1, 2, 3]]), 'b': np.ones((0, 2), np.float32), 't': np.float32(2)}
    return params, {'a': np.array(True), 'b': np.array(True), 't': np.array(True)}


def check_network(params, masks):
    check_parallel(params, masks)
    for leaf in jax.tree.leaves((params, masks)):
        check_array(np.asarray(leaf), MOST)


def sparse_files(folder):
    path = folder / 'net.safetensors'

    def read(data):
        write_new(path, data)
        network = load_sparse(path, MOST)
        check_network(network.params, network.masks)

    save_sparse(path, *small_network(), {'network': 'tiny'})
    several = path.read_bytes()
    save_sparse(path, np.float32([1, 2, 3]), np.array([True, False, True]))
    one = path.read_bytes()
    save_sparse(path, *partly_whole())
    return Reader((several, one, path.read_bytes()), read, fixed=12 * MOST + 2**20)


def sparse_headers(folder):
    """The header and the tensors with a zero between; the length before them is made right."""
    inner = sparse_files(folder)

    def part(data):
        end = 8 + int.from_bytes(data[:8], 'little')
        return data[8:end].rstrip() + b'\0' + data[end:]

    def read(data):
        header, _, tensors = data.partition(b'\0')
        inner.read(len(header).to_bytes(8, 'little') + header + tensors)

    attacks = (
        *(sparse_parts(shape) for shape in (f'[{2**40}]', '[-1]', '[[1]]', 'null', '[1e9]')),
        sparse_parts('[2]', [5], [1]),
        sparse_parts('[2]', [1, 0], [1, 1]),
        sparse_parts('[2]', [0], [math.inf]),
        sparse_parts('[2]', [0, 1], [1]),
        sparse_parts('[2]', None, [1]),
        sparse_parts('[1]', None, [math.nan]),
    )
    return inner._replace(seeds=tuple(map(part, inner.seeds)), read=read, attacks=attacks)


def sparse_parts(shape, indices=(), values=()):
    """Returns the header of a sparse file of one leaf, a zero, and its tensors.

    Where there are no indices it is a leaf that takes no part.
    """
    tensors = np.array(indices or (), '<u4').tobytes(), np.array(values, '<f4').tobytes()
    begin, end = len(tensors[0]), len(tensors[0] + tensors[1])
    header = {
        '__metadata__': {'a:shape': shape},
        'a:values': {'dtype': 'F32', 'shape': [len(values)], 'data_offsets': [begin, end]},
    }
    if indices is not None:
        header['a:indices'] = {'dtype': 'U32', 'shape': [len(indices)], 'data_offsets': [0, begin]}
    return json.dumps(header).encode() + b'\0' + b''.join(tensors)


def coded_files(folder):
    path = folder / 'net.dns'

    def read(data):
        write_new(path, data)
        network = load_coded(path, MOST)
        check_network(network.assignments, network.masks)
        for book in network.codebooks.values():
            check_array(book)

    save_coded(path, share_weights(*small_network(), 4, {'network': 'tiny'}))
    several = path.read_bytes()
    save_coded(path, share_weights(np.float32([1, 2, 3]), np.array([True, False, True]), 2))
    one = path.read_bytes()
    save_coded(path, share_weights(*partly_whole(), 2))
    seeds = several, one, path.read_bytes()
    return Reader(seeds, read, fixed=12 * MOST + 6 * 2**20, factor=400)


def coded_contents(folder):
    """What follows the checksum, which is made right."""
    inner = coded_files(folder)

    def read(data):
        inner.read(b'DNS\x01' + struct.pack('<I', zlib.crc32(data)) + data)

    # One leaf of 2**30 weights, none of them kept.
    head = b'\0\1' + encode_text('w') + b'\1' + encode_text('') + b'\0\1'
    attack = head + b''.join(map(encode_number, (0, 1, 2**30, 0)))
    return inner._replace(
        seeds=tuple(seed[8:] for seed in inner.seeds), read=read, attacks=(attack,)
    )


def coded_masks(folder):
    """Both axes and the count of a mask, a byte each, and the stream of a range coder."""
    del folder

    def read(data):
        rows, columns, kept = (*data[:3], 1, 1, 1)[:3]
        decoder = Decoder(data[3:])
        mask, fed = decode_mask(
            decoder, (rows, columns), min(kept, rows * columns), np.ones(2, bool)
        )
        assert mask.shape == (rows, columns)
        assert len(fed) in (2, columns)

    mask = np.random.default_rng(0).random((20, 12)) < 0.3
    encoder = Encoder()
    encode_mask(encoder, mask, np.ones(2, bool))
    seed = bytes([20, 12, int(mask.sum())]) + encoder.getvalue()
    return Reader((seed,), read)


def headers(folder):
    del folder

    def read(data):
        reader = HeaderReader(data)
        assert 0 <= reader.number() < 2**63
        assert isinstance(reader.text(), str)
        assert reader.take(2) + reader.rest() in data

    return Reader(
        (
            encode_number(300) + encode_text('σ fc1') + b'\1\2rest',
            encode_number(0) + encode_text('') + b'ab',
        ),
        read,
    )


def caffe_models(folder):
    path = folder / 'net.caffemodel'

    def read(data):
        write_new(path, data)
        network = to_linen(read_caffemodel(path))
        check_parallel(network.params, network.masks)
        for leaf in jax.tree.leaves(network):
            check_array(leaf)
            assert leaf.size

    write_caffemodel(path, from_linen(*small_network()), 'tiny')
    convolution = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    old = wire.old_layer('conv1', 4, wire.old_blob(convolution), wire.old_blob(np.ones(2)))
    both = old + wire.layer('ip', 'InnerProduct', wire.blob(np.ones((3, 8))), wire.blob(np.ones(3)))
    published = wire.layer(
        'conv1',
        'CConvolution',
        *map(wire.blob, (convolution, convolution[:, 0, 0, 0])),
        unknown=wire.message(106, _1=2, _5=1),
    ) + wire.layer(
        'ip',
        'CInnerProduct',
        *map(wire.blob, (np.eye(8, 3), np.eye(8, 3) > 0)),
        unknown=wire.message(117, _1=3, _2=0, _5=-3, _6=1),
    )
    return Reader((path.read_bytes(), both, published), read)


def caffe_blobs(folder):
    """A blob in a layer, all lengths around it made right."""
    inner = caffe_models(folder)

    def read(data):
        inner.read(wire.layer('ip', 'InnerProduct', data))

    seeds = wire.blob(np.ones((3, 8))), wire.old_blob(np.ones(5))
    return inner._replace(seeds=seeds, read=read, attacks=(wire.shape(2**62, 2**62),))


def chains(folder):
    del folder
    params, _ = small_network()

    def read(data):
        chain = chain_from_json(to_text(data))
        assert chain_from_json(chain_to_json(chain)) == chain
        shapes = trace_shapes(chain, params, (2, 3, 2))
        assert all(length > 0 for shape in shapes for length in shape)

    params['c'] = {'kernel': np.ones((2, 2, 2, 3), np.float32), 'bias': np.ones(3, np.float32)}
    convolution = '{"kind": "Convolution", "name": "c", "padding": "SAME"}'
    seeds = (
        chain_to_json(CHAIN),
        f'[{convolution}, {{"kind": "MaxPool", "size": 2}}]',
        '[{"kind": "Select", "indices": [0, 1]}]',
    )
    attack = b'[{"kind": "Select", "indices": [0, 1%s]}]' % (b'0' * 30)
    return Reader(tuple(seed.encode() for seed in seeds), read, attacks=(attack,))


def kinds(folder):
    del folder

    def read(data):
        found = recorded_kinds(to_text(data), CHAIN)
        assert set(found.values()) <= {'dense', 'sparse', 'native'}

    return Reader((b'{"a": "sparse", "b": "native"}', b'{"a": "dense", "b": "dense"}'), read)


def metadata_of_models(folder):
    """The chain, the shape of an input and the name of a network, with zeros between."""
    path = folder / 'net.safetensors'
    names = 'chain', 'input_shape', 'network'

    def read(data):
        values = data.decode(errors='replace').split('\0')
        entries = {name: value for name, value in zip(names, values, strict=False) if value}
        save_sparse(path, *small_network(), entries)
        model = load_model(str(path))
        assert len(trace_shapes(model.chain, model.params, model.input_shape)) > len(model.chain)
        check_network(model.params, model.masks)

    chain = chain_to_json(CHAIN).encode()
    return Reader((chain + b'\0[2, 3, 2]\0other', chain + b'\0[12]'), read)


def made_layers(folder):
    del folder

    def read(data):
        # So few characters cannot name a layer that takes long to make.
        model = load_model('fc:' + to_text(data)[:9])
        check_array(model.params['fc']['kernel'])

    return Reader((b'20x10:0.3', b'800x5:1'), read, fixed=40 * 10**6)


def programs(folder):
    del folder

    def read(data):
        program = hlo.parse(to_text(data))
        assert all(
            array.bytes >= 0
            for one in program.held()
            for line in one.values()
            for array in line.arrays
        )

    def compute(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.where(y > 1, y, 2 * y), x)

    compiled = jax.jit(compute).lower(jnp.ones((3, 2))).compile()
    return Reader((compiled.as_text().encode(),), read)


READERS = {
    'sparse files': sparse_files,
    'sparse files of a right length': sparse_headers,
    'coded files': coded_files,
    'coded files of a right checksum': coded_contents,
    'coded masks': coded_masks,
    'headers of coded files': headers,
    'Caffe models': caffe_models,
    'Caffe blobs of right lengths': caffe_blobs,
    'chains': chains,
    'kinds of layers': kinds,
    'metadata of models': metadata_of_models,
    'names of made layers': made_layers,
    'texts of programs': programs,
}
