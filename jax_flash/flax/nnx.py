"""`flax.nnx.MultiHeadAttention` with fast attention: same constructor, call, state and results, and more of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen, nnx
from flax.nnx.module import first_from

from jax_flash.flax.functional import (
    attention_fn,
    cache_positions,
    cached_tokens,
    chosen_precision,
    extend_cache,
    given,
    rotary,
)
from jax_flash.spec import Fp8


class MultiHeadAttention(nnx.MultiHeadAttention):
    """Multi-head attention; the state of a `flax.nnx.MultiHeadAttention` loads unchanged.

    Beyond the arguments of Flax's:

    Args:
      causal: query i sees keys up to i. A decoding step is always causal.
      window: (left, right) keys seen around the query's position, None on a side: unbounded; an int: both sides.
      softcap: scores become `softcap * tanh(scores / softcap)`.
      use_sinks: a learned logit for each head in the denominator of the softmax (`sinks [num_heads]`).
      rotary_base: rotate queries and keys by their positions (see `jax_flash.flax.rotary`).
      attention_precision: `jax_flash.Fp8`, of the attention alone; `precision` is that of the projections.
      qkv_axes, out_axes: logical names of the axes of query, key, value `[*B, T, N, H]` and of the output `[*B, T, F]`,
        for `flax.core.spmd.logical_axis_rules`. Parameters get theirs from `kernel_metadata={"out_sharding": ...}`.

    With `decode=True` a call takes any number of tokens: the prompt at once, then one by one. The cache that
    `init_cache` makes is updated in place where the caller donates it to `nnx.jit`.
    """

    def __init__(
        self,
        *args,
        attention_fn: Callable = attention_fn,
        causal: bool = False,
        window: int | tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        use_sinks: bool = False,
        rotary_base: float | None = None,
        attention_precision: Fp8 | None = None,
        qkv_axes: Sequence[str | None] | None = None,
        out_axes: Sequence[str | None] | None = None,
        **kwargs,
    ):
        super().__init__(*args, attention_fn=attention_fn, **kwargs)
        self.causal = causal
        self.window = window
        self.softcap = softcap
        self.sinks = nnx.data(nnx.Param(jnp.zeros(self.num_heads)) if use_sinks else None)
        self.rotary_base = rotary_base
        self.attention_precision = attention_precision
        self.qkv_axes = qkv_axes
        self.out_axes = out_axes

    def __call__(
        self,
        inputs_q,
        inputs_k=None,
        inputs_v=None,
        *,
        mask=None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool = False,
        out_sharding=None,
        qkv_sharding=None,
        input_positions=None,
        segment_ids=None,
        lengths=None,
    ):
        """Attention of `inputs_q [*B, T, F]` to `inputs_k`, `inputs_v [*B, S, F]`, which default to `inputs_q`.

        As `flax.nnx.MultiHeadAttention`, and:

        Args:
          input_positions: `[T]` or `[*B, T]` for the rotary embedding, by default 0, 1, ..., counted from the cache's
            end when decoding.
          segment_ids: `[*B, T]`, or a pair of that and `[*B, S]`: attend within equal ids.
          lengths: `[*B]`, how many of the T tokens of each batch entry are real, in self-attention: the others are not
            seen. Decoding with a ragged cache, the next call overwrites them.
        """
        if inputs_k is None:
            if inputs_v is not None:
                raise ValueError("inputs_v: cannot be given without inputs_k")
            inputs_k = inputs_q
        if inputs_v is None:
            inputs_v = inputs_k
        if inputs_q.shape[-1] != self.in_features:
            raise ValueError(f"inputs_q: {inputs_q.shape[-1]} features, but the module expects {self.in_features}")

        query = self.query(inputs_q, out_sharding=qkv_sharding)
        key = self.key(inputs_k, out_sharding=qkv_sharding)
        value = self.value(inputs_v, out_sharding=qkv_sharding)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        query, key, value = (linen.with_logical_constraint(x, self.qkv_axes) for x in (query, key, value))

        decode = first_from(decode, self.decode, error_msg="decode: given neither to the module nor to the call")
        decode_from, kv_lengths = None, lengths
        if decode:
            cached_key, cached_value, cache_index = self._cache()
            decode_from = cache_index[...]
        if self.rotary_base is not None:
            if input_positions is None and decode_from is not None:
                input_positions = cache_positions(decode_from, query.shape[-3])
            query, key = (rotary(x, input_positions, self.rotary_base) for x in (query, key))
        elif input_positions is not None:
            raise ValueError("input_positions: only rotary embedding uses positions, but the module has no rotary_base")
        if decode_from is not None:
            cache_index[...] = kv_lengths = cached_tokens(decode_from, key.shape[-3], lengths)
            cached_key[...] = key = extend_cache(cached_key[...], key, decode_from)
            cached_value[...] = value = extend_cache(cached_value[...], value, decode_from)

        dropout_rng = None
        if self.dropout_rate > 0.0:
            message = "deterministic: given neither to the module nor to the call"
            deterministic = first_from(deterministic, self.deterministic, error_msg=message)
            if not deterministic:
                stream = rngs if rngs is not None else self.rngs
                if stream is None:
                    raise ValueError("rngs: needed by dropout, the module has none (keep_rngs=False)")
                dropout_rng = (stream.dropout if isinstance(stream, nnx.Rngs) else stream)()
        out = self.attention_fn(
            query,
            key,
            value,
            mask=mask,
            broadcast_dropout=self.broadcast_dropout,
            dropout_rng=dropout_rng,
            dropout_rate=self.dropout_rate,
            deterministic=bool(deterministic),
            dtype=self.dtype,
            precision=chosen_precision(self.attention_precision, self.precision),
            module=self if sow_weights else None,
            is_causal=is_causal or self.causal or decode_from is not None,
            **given(
                q_offset=decode_from,
                q_lengths=lengths,
                kv_lengths=kv_lengths,
                window=self.window,
                segment_ids=segment_ids,
                softcap=self.softcap,
                sinks=None if self.sinks is None else self.sinks[...],
            ),
        )
        return linen.with_logical_constraint(self.out(out, out_sharding=out_sharding), self.out_axes)

    def _cache(self) -> tuple[Any, Any, Any]:
        if self.cache_index is None:
            raise ValueError("decode: there is no cache, call init_cache first")
        return self.cached_key, self.cached_value, self.cache_index

    def init_cache(self, input_shape, dtype=None, ragged: bool = False):
        """Make an empty cache for inputs `[*B, S, F]`, by default in the module's `dtype` (float32 if it has none).

        ragged: each batch entry has its own number of cached positions: `cache_index` has shape `[*B]`.
        """
        super().init_cache(input_shape, dtype or self.dtype or jnp.float32)
        if ragged:
            self.cache_index = nnx.Cache(jnp.zeros(input_shape[:-2], jnp.int32))
