"""The networks of `experiments.own_loop`, with their data: as a user has them before pruning.

Nothing here knows of masks. Both are Flax NNX; one has batch statistics beside its weights, the
other embeddings, norms and biases that stay dense.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

_WIDTHS = (32, 64, 64)  # channels of the convolutions: 58,474 parameters, 99 % of them in kernels
_VALIDATION, _TEST = 300, 300  # images of scikit-learn's 1,797; the others are for training
_IMAGES = 64  # per step

_CONTEXT = 64  # characters
_WIDTH, _HEADS, _BLOCKS = 96, 4, 2
_TEXTS = 32  # per step
_WARM_UP = 100  # steps


class Task(NamedTuple):
    """A network to train, on what, and how."""

    unit: str  #: of the measurements
    #: makes the network of a seed.
    make: Callable[[int], nnx.Module]
    #: gives the batches of some steps, from numbers that seed them.
    batches: Callable[[Sequence[int], int], Iterator[tuple[jax.typing.ArrayLike, ...]]]
    #: the loss of a network on a batch, a scalar.
    loss: Callable[..., jax.Array]
    #: makes the optimizer of some steps.
    optimizer: Callable[[int], optax.GradientTransformation]
    #: by the name of a split, the measurement of a network on all of it.
    measure: Mapping[str, Callable[[Any], jax.Array]]


class Cnn(nnx.Module):
    """Three convolutions, each under BatchNorm, and a dense head."""

    def __init__(self, rngs: nnx.Rngs):
        """Makes its weights."""
        channels = list(zip((1, *_WIDTHS), _WIDTHS, strict=False))
        self.convs = nnx.List(
            [nnx.Conv(*pair, (3, 3), use_bias=False, rngs=rngs) for pair in channels]
        )
        self.norms = nnx.List([nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for width in _WIDTHS])
        self.head = nnx.Linear(4 * _WIDTHS[-1], 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Computes logits, (batch, 10), of images, (batch, 8, 8, 1)."""
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            images = nnx.relu(norm(conv(images)))
            if number:  # 8×8 to 4×4 to 2×2
                images = nnx.max_pool(images, (2, 2), (2, 2))
        return self.head(images.reshape(len(images), -1))


class Block(nnx.Module):
    """Causal attention and two dense layers, each behind a norm and beside a shortcut."""

    def __init__(self, rngs: nnx.Rngs):
        """Makes its weights."""
        self.norm1, self.norm2 = (nnx.LayerNorm(_WIDTH, rngs=rngs) for _ in range(2))
        self.attend = nnx.Linear(_WIDTH, 3 * _WIDTH, rngs=rngs)
        self.project = nnx.Linear(_WIDTH, _WIDTH, rngs=rngs)
        self.up = nnx.Linear(_WIDTH, 4 * _WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * _WIDTH, _WIDTH, rngs=rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Computes (batch, characters, width) of as much."""
        by_head = (*hidden.shape[:2], 3, _HEADS, _WIDTH // _HEADS)
        query, key, value = jnp.moveaxis(self.attend(self.norm1(hidden)).reshape(by_head), 2, 0)
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.project(seen.reshape(hidden.shape))
        return hidden + self.down(nnx.gelu(self.up(self.norm2(hidden))))


class Gpt(nnx.Module):
    """A language model of characters."""

    def __init__(self, characters: int, rngs: nnx.Rngs):
        """Makes its weights."""
        self.tokens = nnx.Embed(characters, _WIDTH, rngs=rngs)
        self.positions = nnx.Embed(_CONTEXT, _WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(_BLOCKS)])
        self.norm = nnx.LayerNorm(_WIDTH, rngs=rngs)
        self.output = nnx.Linear(_WIDTH, characters, rngs=rngs)

    def __call__(self, texts: jax.Array) -> jax.Array:
        """Computes the logits of what follows each character of texts, (batch, characters)."""
        hidden = self.tokens(texts) + self.positions(jnp.arange(texts.shape[1]))[None]
        for block in self.blocks:
            hidden = block(hidden)
        return self.output(self.norm(hidden))


def digits() -> Task:
    """Makes the task of telling scikit-learn's digits apart, measured by accuracy in percent."""
    from sklearn.datasets import load_digits  # takes a second, for which other tasks need not wait

    found: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = found.images[order, :, :, None].astype(np.float32) / 16
    labels = found.target[order].astype(np.int32)
    training = len(order) - _VALIDATION - _TEST

    def batches(seed, steps):
        random = np.random.default_rng(seed)
        for _ in range(steps):
            chosen = random.integers(0, training, _IMAGES)
            yield images[chosen], labels[chosen]

    def loss(network, images, labels):
        logits = network(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def accuracy(network, part):
        right = jnp.argmax(network(images[part]), axis=1) == labels[part]
        return 100 * jnp.mean(right, dtype=jnp.float32)

    validation, test = slice(training, -_TEST), slice(-_TEST, None)
    return Task(
        unit='%',
        make=lambda seed: Cnn(nnx.Rngs(seed)),
        batches=batches,
        loss=loss,
        optimizer=lambda steps: optax.adamw(3e-3),
        measure={
            'validation': lambda network: accuracy(network, validation),
            'test': lambda network: accuracy(network, test),
        },
    )


def characters(path: Path) -> Task:
    """Makes the task of foretelling the next character of a text, measured by the loss in nats.

    Args:
      path: of the text; its last tenth is for validation.

    Returns:
      The task. There is no test split: nothing is chosen by the validation loss.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is too short to train on.
    """
    text = np.frombuffer(path.read_bytes(), np.uint8)
    least = 10 * (_TEXTS * _CONTEXT + 1)  # of which the last tenth is one batch
    if len(text) < least:
        raise ValueError(f'--text={path} must have {least} bytes or more, but has {len(text)}')
    alphabet, tokens = np.unique(text, return_inverse=True)
    tokens = tokens.astype(np.int32)
    start = len(tokens) * 9 // 10
    window = np.arange(_CONTEXT + 1)  # a text, and the character after it
    places = np.arange(start, len(tokens) - _CONTEXT, _CONTEXT)
    places = places[: len(places) // _TEXTS * _TEXTS].reshape(-1, _TEXTS, 1)
    validation = tokens[places + window]

    def batches(seed, steps):
        random = np.random.default_rng(seed)
        for _ in range(steps):
            places = random.integers(0, start - _CONTEXT, _TEXTS)
            yield (tokens[places[:, None] + window],)

    def loss(network, texts):
        logits = network(texts[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, texts[:, 1:]).mean()

    def validation_loss(network):
        # One batch after the other: the logits of all at once would take much memory.
        return jnp.mean(jax.lax.map(lambda texts: loss(network, texts), validation))

    return Task(
        unit='nats',
        make=lambda seed: Gpt(len(alphabet), nnx.Rngs(seed)),
        batches=batches,
        loss=loss,
        optimizer=_clipped_adamw,
        measure={'validation': validation_loss},
    )


def _clipped_adamw(steps: int) -> optax.GradientTransformation:
    """AdamW behind a clipped gradient; its rate warms up, then falls to a tenth."""
    steps = max(steps, 2)  # a schedule of no step is refused, even if none is taken
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(_WARM_UP, steps // 2), steps, 2e-4)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1))
