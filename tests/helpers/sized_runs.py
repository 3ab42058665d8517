"""Short runs of a small residual network and a small GPT, on data made up at once."""

import numpy as np

from experiments.data import resident, texts
from experiments.data.resident import Dataset, Split
from experiments.data.texts import Texts, TextSplit
from experiments.training.sized_flags import ShortConfig

ALPHABET = b'abcde'
SHORT = {
    'reference_steps': 4,
    'surgery_steps': 8,
    'finetuning_steps': 2,
    'record_every': 2,
    'checkpoint_every': 4,
    'optimizer': 'sgd',
    'learning_rate': 'cosine:0.2,2,0.1',
}
RESNET = {
    **SHORT,
    **{'network': 'resnet', 'dataset': 'cifar10', 'depth': 8, 'width': 0.125, 'batch_size': 6},
    **{'shift': 1, 'mirror': True, 'kernel_density': 0.3},
}
GPT = {
    **SHORT,
    **{'network': 'gpt', 'dataset': 'tiny_shakespeare', 'depth': 2, 'width': 8.0, 'heads': 2},
    **{'context': 6, 'batch_size': 4, 'kernel_density': 0.3},
}


def load_images(name, data_dir=None, manual_dir=None, train_on_all=False):
    """Random images of two classes, in place of `resident.load`."""
    del data_dir, manual_dir, train_on_all
    random = np.random.default_rng(0)

    def split(count):
        images = random.integers(0, 256, (count, 8, 8, 3), np.uint8)
        return Split(images, random.integers(0, 2, count, np.int32))

    return Dataset(name, split(24), split(10), split(14))


def load_text(name, context, data_dir=None, manual_dir=None, train_on_all=False):
    """A random text, in place of `texts.load`."""
    del data_dir, manual_dir, train_on_all
    tokens = np.random.default_rng(0).integers(0, len(ALPHABET), 400).astype(np.uint8)
    parts = (TextSplit(part, context) for part in np.split(tokens, (250, 330)))
    return Texts(name, *parts, ALPHABET)


def patch_loaders(patch):
    """Puts both in the place of what reads real data."""
    patch.setattr(resident, 'load', load_images)
    patch.setattr(texts, 'load', load_text)


def make_config(fields, folder, **own):
    """Makes the configuration of a short run."""
    return ShortConfig(**{**fields, 'workdir': str(folder), **own})
