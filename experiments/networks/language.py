"""A causal language model of characters, in flax.linen, with its layers in a scan.

Owns its layers and sizes; what is pruned in it is no concern of its.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

STACKED = {'blocks': 0}
"""Which arrays of `Gpt` hold those of all blocks: the argument `stacked` of `dns_jax.surgery`."""

_SPREAD = 0.02  # of the weights, to begin with


class Gpt(nn.Module):
    """A small GPT-2, without dropout: 421,632 parameters.

    The blocks are run by a scan: an array under `blocks` holds those of all blocks along axis 0.
    Unrolled, each has its own, as `dns_jax.unstack` gives them: for what cannot follow a scan.

    Reference:
      Radford, Wu, Child, Luan, Amodei and Sutskever, Language models are unsupervised multitask
      learners, 2019, section 2.3.
    """

    characters: int = 65  # of the alphabet
    depth: int = 2  # blocks
    width: int = 128
    heads: int = 4
    context: int = 64  # the most characters of a text
    tied: bool = False  # the output has the weights of the token embedding
    dtype: Any = jnp.float32  # to compute in; parameters and logits are float32
    unrolled: bool = False  # each block is written down by itself

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps texts to the logits of what follows each character, given those up to it.

        Args:
          tokens: (batch, length) integers below the number of characters.

        Returns:
          (batch, length, characters) float32.

        Raises:
          ValueError: if a size is below 1, the width is no multiple of the heads, or the texts are
            no integers of two axes or longer than the context.
        """
        self._check(tokens)
        table = {'dtype': self.dtype, 'embedding_init': nn.initializers.normal(_SPREAD)}
        embed = nn.Embed(self.characters, self.width, name='tokens', **table)
        positions = nn.Embed(self.context, self.width, name='positions', **table)
        hidden = embed(tokens) + positions(jnp.arange(tokens.shape[1]))[None]
        # What is added up over the 2 · depth layers that write to `hidden` keeps its size.
        options = self.heads, _SPREAD / math.sqrt(2 * self.depth), self.dtype
        if self.unrolled:
            hidden = _Unrolled(self.depth, *options, name='blocks')(hidden)
        else:
            blocks = nn.scan(
                Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=self.depth
            )
            hidden, _ = blocks(*options, name='blocks')(hidden, None)
        hidden = nn.LayerNorm(dtype=self.dtype, name='norm')(hidden)
        if self.tied:
            logits = embed.attend(hidden)
        else:
            logits = _dense('output', self.characters, self.dtype, use_bias=False)(hidden)
        return logits.astype(jnp.float32)

    def _check(self, tokens: jax.Array) -> None:
        for name in ('characters', 'depth', 'width', 'heads', 'context'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
        if self.width % self.heads:
            raise ValueError(f'width={self.width} must be a multiple of heads={self.heads}')
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f'tokens of shape {tokens.shape} and dtype {tokens.dtype} must be integers, '
                '(batch, length)'
            )
        if tokens.shape[1] > self.context:
            raise ValueError(
                f'tokens of shape {tokens.shape} must have no more than context={self.context} '
                'characters in a text'
            )


class Block(nn.Module):
    """Causal attention and two dense layers, each behind a norm and beside a shortcut."""

    heads: int
    spread: float  # of the weights that write to what runs through all blocks
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps (batch, length, width) to as much, with the nothing that a scan stacks."""
        width = hidden.shape[-1]
        by_head = (*hidden.shape[:2], 3, self.heads, width // self.heads)
        normed = nn.LayerNorm(dtype=self.dtype, name='norm1')(hidden)
        mixed = _dense('attend', 3 * width, self.dtype)(normed).reshape(by_head)
        query, key, value = jnp.moveaxis(mixed, 2, 0)
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        project = _dense('project', width, self.dtype, self.spread)
        hidden = hidden + project(seen.reshape(hidden.shape))
        normed = nn.LayerNorm(dtype=self.dtype, name='norm2')(hidden)
        raised = nn.gelu(_dense('up', 4 * width, self.dtype)(normed))
        return hidden + _dense('down', width, self.dtype, self.spread)(raised), None


class _Unrolled(nn.Module):
    depth: int
    heads: int
    spread: float
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        for number in range(self.depth):
            block = Block(self.heads, self.spread, self.dtype, name=str(number))
            hidden, _ = block(hidden, None)
        return hidden


def _dense(
    name: str, units: int, dtype: Any, spread: float = _SPREAD, use_bias: bool = True
) -> nn.Dense:
    initial = nn.initializers.normal(spread)
    return nn.Dense(units, use_bias=use_bias, kernel_init=initial, dtype=dtype, name=name)
