"""Small archives in the form of ImageNet's and CIFAR-10's, of images made up here."""

import gzip
import io
import tarfile

import numpy as np

from experiments.measurements.scale_input import make_photograph

CIFAR10_CLASSES = [f'class_{label}' for label in range(10)]


def encode(image, kind='JPEG', **options):
    """Returns an image's bytes; JPEGs of 500x375 pixels get some 80 KB, as ImageNet's have."""
    content = io.BytesIO()
    image.save(content, kind, **({'quality': 92} if kind == 'JPEG' else {}), **options)
    return content.getvalue()


def write_tar(file, members, mode='w'):
    """Writes a tar of (name, bytes) to a path or an open file."""
    target = {'fileobj': file} if hasattr(file, 'write') else {'name': file}
    with tarfile.open(**target, mode=mode, format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def pack(members):
    """Returns the bytes of a tar of (name, bytes)."""
    content = io.BytesIO()
    write_tar(content, members)
    return content.getvalue()


def write_imagenet(folder, train, validation):
    """Writes both archives of {synset: {file name: bytes}} and {file name: bytes}."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = ((f'{synset}.tar', pack(images.items())) for synset, images in train.items())
    write_tar(folder / 'ILSVRC2012_img_train.tar', classes)
    write_tar(folder / 'ILSVRC2012_img_val.tar', validation.items())


def make_imagenet_archives(folder, synsets, train_per_class, validation, size=(500, 375), seed=0):
    """Makes ImageNet's two archives with made-up JPEGs of a size (width, height).

    Returns:
      {synset: {file name: bytes}} of the training images, {file name: bytes} of the others.
    """
    random = np.random.default_rng(seed)
    train = {
        synset: {
            f'{synset}_{number}.JPEG': encode(make_photograph(random, size))
            for number in range(train_per_class)
        }
        for synset in synsets
    }
    others = {
        f'ILSVRC2012_val_{number:08d}.JPEG': encode(make_photograph(random, size))
        for number in range(1, validation + 1)
    }
    write_imagenet(folder, train, others)
    return train, others


def make_cifar10_archive(folder, train_per_batch, test, seed=0):
    """Makes cifar-10-binary.tar.gz with made-up images, so many in each of five training files.

    Returns:
      The file, {'train', 'test'} of images (count, 32, 32, 3) and labels (count,), uint8.
    """
    random = np.random.default_rng(seed)
    files = {f'data_batch_{number}.bin': train_per_batch for number in range(1, 6)}
    members = [('cifar-10-batches-bin/batches.meta.txt', '\n'.join(CIFAR10_CLASSES).encode())]
    parts = {'train': [], 'test': []}
    for name, count in {**files, 'test_batch.bin': test}.items():
        images = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
        labels = random.integers(0, 10, (count,), np.uint8)
        rows = np.concatenate(
            [labels[:, None], images.transpose(0, 3, 1, 2).reshape(count, -1)], axis=1
        )
        members.append((f'cifar-10-batches-bin/{name}', rows.tobytes()))
        parts['test' if name.startswith('test') else 'train'].append((images, labels))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'cifar-10-binary.tar.gz'
    write_tar(path, members, 'w:gz')
    return path, {
        split: tuple(np.concatenate(arrays) for arrays in zip(*both, strict=True))
        for split, both in parts.items()
    }


def photograph(width, height, seed=0):
    """Makes an image by a seed."""
    return make_photograph(np.random.default_rng(seed), (width, height))


def write_idx(path, array):
    """Writes uint8 values as a gzipped IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>i4').tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))
