"""A GPT in Flax nnx with jax_flash: GPT-2's sizes, rotary positions, tied embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

import jax_flash
from jax_flash.flax import attention_fn
from jax_flash.flax.nnx import MultiHeadAttention


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int
    heads: int
    kv_heads: int
    width: int
    length: int  # of the training sequences
    vocabulary: int = 256  # bytes
    dtype: jnp.dtype = jnp.bfloat16  # of the computation; parameters are float32
    remat: bool = False  # keep of each block only its input, and of attention what saves a second forward kernel
    attention_fn: Callable = attention_fn


SIZES = {
    "tiny": Config(layers=2, heads=4, kv_heads=2, width=128, length=128),
    "small": Config(layers=6, heads=6, kv_heads=6, width=384, length=256),
    "gpt2": Config(layers=12, heads=12, kv_heads=12, width=768, length=1024, vocabulary=50304),
    "gpt2-medium": Config(layers=24, heads=16, kv_heads=16, width=1024, length=1024, vocabulary=50304),
}


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        width, dtype = config.width, config.dtype
        self.attention_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = MultiHeadAttention(
            config.heads,
            width,
            num_kv_heads=config.kv_heads,
            causal=True,
            rotary_base=1e4,
            attention_fn=config.attention_fn,
            decode=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x, segment_ids, decode: bool):
        x += self.attention(self.attention_norm(x), segment_ids=segment_ids, decode=decode)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class GPT(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(config.vocabulary, config.width, dtype=config.dtype, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, dtype=config.dtype, rngs=rngs)

    def __call__(self, tokens, segment_ids=None, decode: bool = False):
        """Logits [B, T, vocabulary] of the token after each of `tokens [B, T]`.

        segment_ids [B, T]: documents packed into one sequence do not see each other.
        decode: continue the sequences in the cache (`init_cache`), by any number of tokens.
        """

        def apply(block, x):
            return block(x, segment_ids, decode)

        if self.config.remat:
            apply = nnx.remat(apply, policy=jax.checkpoint_policies.save_only_these_names(*jax_flash.SAVE_NAMES))
        x = self.embed(tokens)
        for block in self.blocks:
            x = apply(block, x)
        return self.embed.attend(self.norm(x))

    def init_cache(self, batch: int, length: int):
        for block in self.blocks:
            block.attention.init_cache((batch, length, self.config.width))


def loss(model: GPT, tokens, segment_ids=None):
    """Mean cross-entropy of `tokens [B, T + 1]` after the first; a document's first token is not predicted."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    ids = None if segment_ids is None else segment_ids[:, :-1]
    logits = model(inputs, ids).astype(jnp.float32)
    # Comparisons instead of a gather: its derivative would be a scatter into an array of the size of the logits.
    right = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0.0).sum(axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - right
    return losses.mean() if ids is None else losses.mean(where=ids == segment_ids[:, 1:])
