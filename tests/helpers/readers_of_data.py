"""The readers of images and their archives for the fuzz tests: each with valid inputs."""

import gzip
import io
import struct
import tarfile
import zipfile

import archives as made
import numpy as np
import tensorflow_datasets as tfds
from reader import Reader, check_array, write_new

from experiments.data import archives, builders, crops, resident
from experiments.data.streams import StreamedSplit

_SOURCE = resident._Source('1.0.0', train=4, test=2, validation=1)
_MAGIC = b'\x93NUMPY'  # of an array in a cache
_HUGE = 2**40  # bytes


def idx_files(folder):
    path = folder / 'images.gz'

    def read(content):
        write_new(path, content)
        check_array(archives.read_idx(path))

    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5), np.uint8)
    seeds = (
        b'\0\0\x08\3' + struct.pack('>3i', *images.shape) + images.tobytes(),
        b'\0\0\x08\1' + struct.pack('>i', 7) + bytes(range(7)),
    )
    attacks = (
        gzip.compress(b'\0\0\x08\1' + struct.pack('>i', 2**31 - 1)),
        gzip.compress(seeds[1]) + 400 * gzip.compress(bytes(2**20)),
    )
    # An array may be as large as MNIST's, however small it is packed.
    fixed = 2 * archives._MOST_BYTES + 2**20
    return Reader(tuple(map(gzip.compress, seeds)), read, fixed=fixed, attacks=attacks)


def idx_contents(folder):
    """What is packed into an IDX file."""
    inner = idx_files(folder)
    seeds = tuple(map(gzip.decompress, inner.seeds))
    return inner._replace(
        seeds=seeds, read=lambda content: inner.read(gzip.compress(content, 1)), attacks=()
    )


def write_tar(members, form):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode='w', format=form) as archive:
        for name, inner in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(inner)
            archive.addfile(member, io.BytesIO(inner))
    whole = content.getvalue().rstrip(b'\0')
    return whole + bytes(-len(whole) % 512 + 1_024)  # without the padding to 10 KiB


def seal_tar(content):
    """Makes the checksums of all headers right, so that damage to them is read."""
    sealed = bytearray(content)
    for start in range(0, len(content) - 511, 512):
        if sealed[start + 257 : start + 262] == b'ustar':
            sealed[start + 148 : start + 156] = b' ' * 8
            sealed[start + 148 : start + 155] = b'%06o\0' % sum(sealed[start : start + 512])
    return bytes(sealed)


def tar_attacks(name):
    """Headers that make the standard library read what is not there, or again and again."""
    attacks = []
    for kind, size in (
        (tarfile.REGTYPE, -1_024),
        (tarfile.REGTYPE, _HUGE),
        (tarfile.GNUTYPE_LONGNAME, _HUGE),
        (tarfile.XHDTYPE, _HUGE),
    ):
        member = tarfile.TarInfo(name)
        member.size, member.type = size, kind
        attacks.append(bytes(member.tobuf(tarfile.GNU_FORMAT)) + bytes(1_024))
    # A file that says that most of it are holes.
    holes = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    holes[156:157] = tarfile.GNUTYPE_SPARSE
    holes[386:410] = holes[483:495] + bytes(12)
    holes[483:495] = b'77777777777\0'
    member = tarfile.TarInfo(name)
    member.pax_headers = {'size': '-1536'}  # back to where it began
    return (*attacks, seal_tar(bytes(holes)), bytes(member.tobuf(tarfile.PAX_FORMAT)) + bytes(512))


def cifar10_files(folder):
    path, _ = made.make_cifar10_archive(folder, train_per_batch=1, test=1)
    builder = tfds.builder_cls('cifar10')
    files = builder._cifar_info.fget(builder)

    def read(content):
        write_new(path, content)
        names, *splits = archives.read_cifar10(path, files)
        assert len(names) == 10
        for rows in splits:
            check_array(rows)
            assert rows[:, 0].max(initial=0) < 10

    attacks = tuple(map(gzip.compress, tar_attacks('test_batch.bin')))
    return Reader((path.read_bytes(),), read, fixed=2 * archives._MOST_BYTES, attacks=attacks)


def cifar10_contents(folder):
    """What is packed into the archive of CIFAR-10, its checksums made right."""
    inner = cifar10_files(folder)
    seeds = tuple(map(gzip.decompress, inner.seeds))

    def read(content):
        inner.read(gzip.compress(seal_tar(content), 1))

    return inner._replace(seeds=seeds, read=read, attacks=())


def imagenet_training(folder):
    """A tar of tars, the checksums in it made right."""
    path = folder / 'train.tar'

    def read(content):
        write_new(path, seal_tar(content))
        assert all(isinstance(name, str) for name in archives.list_files(path))
        for _, image, class_name in archives.iterate_classes(path):
            assert len(image) <= len(content)
            assert isinstance(class_name, str)

    images = {'a.JPEG': b'some', 'b': b''}
    one = write_tar(images, tarfile.USTAR_FORMAT)
    long = {'l' * 120 + '.tar': one}
    seeds = (
        write_tar({'n1.tar': one, 'n2.tar': one}, tarfile.USTAR_FORMAT),
        write_tar(long, tarfile.GNU_FORMAT),
        write_tar(long, tarfile.PAX_FORMAT),
    )
    within = (write_tar({'n1.tar': attack}, tarfile.USTAR_FORMAT) for attack in tar_attacks('a'))
    return Reader(seeds, read, attacks=(*tar_attacks('n1.tar'), *within))


def imagenet_validation(folder):
    path = folder / 'validation.tar'

    def read(content):
        write_new(path, content)
        labels = dict.fromkeys(archives.list_files(path), 'n1')
        for _, image, _ in archives.iterate_images(path, labels):
            assert len(image) <= len(content)

    seed = write_tar({'a.JPEG': b'an image', 'b.JPEG': b''}, tarfile.USTAR_FORMAT)
    return Reader((seed,), read, attacks=tar_attacks('a.JPEG'))


def encoded():
    """One image in the forms that Pillow may read here."""
    image = made.photograph(20, 16)
    return (
        *(made.encode(image, form) for form in ('BMP', 'GIF', 'JPEG', 'PNG')),
        made.encode(image, progressive=True),
        made.encode(image.convert('CMYK')),
        made.encode(image.convert('1'), 'PNG'),
    )


def image_attacks():
    """An image that is a program for another program, and one that is too large."""
    program = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{} loop\n'
    bitmap = bytearray(made.encode(made.photograph(4, 4), 'BMP'))
    bitmap[18:26] = struct.pack('<ii', 9_500, 9_500)
    return program, bytes(bitmap)


def images(folder):
    """As a network sees them, by each way to crop, to train and to evaluate."""
    del folder

    def read(content):
        source = [{'image': content, 'label': 1, 'file_name': b'a'}]
        for crop in crops.CROPS:
            split = StreamedSplit(source, 'images', 2, 8, crop)
            for generator in (None, np.random.default_rng(0)):
                pixels, labels = split._read(1, np.arange(1), [generator])
                assert pixels.shape == (1, 8, 8, 3)
                assert labels == [1]

    return Reader(encoded(), read, attacks=image_attacks())


def images_to_store(folder):
    """As they come from ImageNet's archives: all become JPEGs."""
    del folder

    def read(content):
        assert builders._as_plain_jpeg(content, 'a.JPEG').startswith(b'\xff\xd8')

    return Reader(encoded(), read, attacks=image_attacks())


def caches(folder):
    cache = folder / 'tiny.npz'

    def read(content):
        write_new(cache, content)
        arrays = resident._read_cache(cache, _SOURCE)
        for split, count in (('train', _SOURCE.train), ('test', _SOURCE.test)):
            assert arrays[f'{split}_images'].shape == (count, 28, 28, 1)
            assert {*arrays[f'{split}_labels'].tolist()} <= set(range(10))

    arrays = {}
    for split, count in (('train', _SOURCE.train), ('test', _SOURCE.test)):
        arrays[f'{split}_images'] = np.zeros((count, 28, 28, 1), np.uint8)
        arrays[f'{split}_labels'] = np.arange(count, dtype=np.int32)
    resident._write_cache(cache, arrays)
    packed = io.BytesIO()
    np.savez_compressed(packed, **{**arrays, 'train_images': np.zeros(2**26, np.uint8)})
    return Reader((cache.read_bytes(),), read, attacks=(packed.getvalue(),))


def cached_arrays(folder):
    """The arrays of a cache, one after the other; the checksums around them are made right."""
    inner = caches(folder)
    (seed,) = inner.seeds
    with zipfile.ZipFile(io.BytesIO(seed)) as archive:
        names = archive.namelist()
        seed = b''.join(map(archive.read, names))

    def read(content):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, 'w') as archive:
            for name, array in zip(names, content.split(_MAGIC)[1:], strict=False):
                archive.writestr(name, _MAGIC + array)
        inner.read(packed.getvalue())

    shape = b"'shape': (4,"
    assert shape in seed
    attacks = (
        seed.replace(shape + b' 28, 28, 1), ', b"'shape': (4, 28, 28, %d), " % _HUGE),
        seed.replace(b'<i4', b'<f4', 1),
        seed.replace(b'|u1', b'|O ', 1),
    )
    return inner._replace(seeds=(seed,), read=read, attacks=attacks)


class Few(builders.Digits, skip_registration=True):
    """Two images in the place of the digits."""

    name = 'digits'

    def _split_generators(self, dl_manager):
        del dl_manager
        pixels = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
        return {'train': self._generate_examples(pixels, np.arange(2))}


def prepared(file):
    """Makes the reader of a file in a prepared folder."""

    def make(folder):
        Few(data_dir=folder).download_and_prepare(file_format='array_record')
        (path,) = (folder / 'digits' / '1.0.0').glob(file)

        def read(content):
            write_new(path, content)
            builder = builders.prepare('digits', folder)
            with builders.naming_folder(builder.data_path):
                arrays = resident._decode(builder, 'train', 2, (28, 28, 1))
            assert arrays['train_images'].shape == (2, 28, 28, 1)

        return Reader((path.read_bytes(),), read)

    return make


READERS = {
    'IDX files': idx_files,
    'IDX files, unpacked': idx_contents,
    "CIFAR-10's archive": cifar10_files,
    "CIFAR-10's archive, unpacked": cifar10_contents,
    "ImageNet's training archive": imagenet_training,
    "ImageNet's validation archive": imagenet_validation,
    'images': images,
    'images to store': images_to_store,
    'caches of data sets': caches,
    'caches of right checksums': cached_arrays,
    'dataset_info.json': prepared('dataset_info.json'),
    'features.json': prepared('features.json'),
    'array_record files': prepared('*.array_record*'),
}
