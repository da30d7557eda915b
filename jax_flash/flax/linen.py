"""`flax.linen.MultiHeadAttention` with fast attention: same fields, call, parameters and results, and more of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.module import merge_param

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


class _Partitioned(nn.LogicallyPartitioned):
    """Names of a kernel's axes, also while DenseGeneral has the kernel as a matrix: no constraint on that."""

    def unbox(self, apply_constraint: bool = True):
        return super().unbox(apply_constraint and self.value.ndim == len(self.names))


def _partitioned(init: nn.initializers.Initializer) -> nn.initializers.Initializer:
    def matrix(*args, **kwargs):
        kernel = init(*args, **kwargs)
        return _Partitioned(**vars(kernel)) if isinstance(kernel, nn.LogicallyPartitioned) else kernel

    return matrix


class MultiHeadAttention(nn.MultiHeadAttention):
    """Multi-head attention; parameters of `flax.linen.MultiHeadAttention` load unchanged.

    Beyond Flax's:

    Attributes:
      num_kv_heads: heads of key and value, a divisor of `num_heads`; default `num_heads`.
      causal: query i sees keys up to i. A decoding step is always causal.
      window: (left, right) keys seen around the query's position, None on a side: unbounded; an int: both sides.
      softcap: scores become `softcap * tanh(scores / softcap)`.
      use_sinks: a learned logit for each head in the denominator of the softmax (parameter `sinks [num_heads]`).
      rotary_base: rotate queries and keys by their positions (see `jax_flash.flax.rotary`).
      ragged_cache: each batch entry has its own number of cached positions: `cache_index` has shape `[*B]`.
      attention_precision: `jax_flash.Fp8`, of the attention alone; `precision` is that of the projections.
      qkv_axes, out_axes: logical names of the axes of query, key, value `[*B, T, N, H]` and of the output `[*B, T, F]`,
        for `nn.logical_axis_rules`. Parameters get theirs from `nn.with_logical_partitioning(kernel_init, ...)`.

    With `decode=True` a call takes any number of tokens: the prompt at once, then one by one. The cache has the length
    of the input of `init`, and is updated in place where the caller donates it to `jit`.
    """

    attention_fn: Callable = attention_fn
    num_kv_heads: int | None = None
    causal: bool = False
    window: int | tuple[int | None, int | None] | None = None
    softcap: float | None = None
    use_sinks: bool = False
    rotary_base: float | None = None
    ragged_cache: bool = False
    attention_precision: Fp8 | None = None
    qkv_axes: Sequence[str | None] | None = None
    out_axes: Sequence[str | None] | None = None

    @nn.compact
    def __call__(
        self,
        inputs_q,
        inputs_k=None,
        inputs_v=None,
        *,
        inputs_kv=None,
        mask=None,
        deterministic: bool | None = None,
        dropout_rng=None,
        sow_weights: bool = False,
        segment_ids=None,
        input_positions=None,
        lengths=None,
    ):
        """Attention of `inputs_q [*B, T, F]` to `inputs_k`, `inputs_v [*B, S, F]`, which default to `inputs_q`.

        As `flax.linen.MultiHeadAttention`, and:

        Args:
          segment_ids: `[*B, T]`, or a pair of that and `[*B, S]`: attend within equal ids.
          input_positions: `[T]` or `[*B, T]` for the rotary embedding, by default 0, 1, ..., counted from the cache's
            end when decoding.
          lengths: `[*B]`, how many of the T tokens of each batch entry are real, in self-attention: the others are not
            seen. Decoding with a ragged cache, the next call overwrites them.
        """
        if inputs_kv is not None:
            if inputs_k is not None or inputs_v is not None:
                raise ValueError("inputs_kv: cannot be combined with inputs_k or inputs_v")
            inputs_k = inputs_kv
        if inputs_k is None:
            if inputs_v is not None:
                raise ValueError("inputs_v: cannot be given without inputs_k")
            inputs_k = inputs_q
        if inputs_v is None:
            inputs_v = inputs_k

        qkv_features = self.qkv_features or inputs_q.shape[-1]
        num_kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if min(self.num_heads, num_kv_heads) < 1 or qkv_features % self.num_heads or self.num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must divide qkv_features {qkv_features} and be a multiple of"
                f" num_kv_heads {num_kv_heads}"
            )
        head_dim = qkv_features // self.num_heads
        dense = functools.partial(
            nn.DenseGeneral,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            use_bias=self.use_bias,
            precision=self.precision,
        )
        project = functools.partial(
            dense,
            kernel_init=_partitioned(self.kernel_init),
            bias_init=self.bias_init,
            dot_general=self.qkv_dot_general,
            dot_general_cls=self.qkv_dot_general_cls,
        )
        query = project((self.num_heads, head_dim), name="query")(inputs_q)
        key = project((num_kv_heads, head_dim), name="key")(inputs_k)
        value = project((num_kv_heads, head_dim), name="value")(inputs_v)
        if self.normalize_qk:
            norm = functools.partial(nn.LayerNorm, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
            query, key = norm(name="query_ln")(query), norm(name="key_ln")(key)
        query, key, value = (nn.with_logical_constraint(x, self.qkv_axes) for x in (query, key, value))

        decode_from, kv_lengths = None, lengths
        if self.decode:
            batch = key.shape[:-3]
            initialized = self.has_variable("cache", "cached_key")
            cached_key = self.variable("cache", "cached_key", jnp.zeros, key.shape, key.dtype)
            cached_value = self.variable("cache", "cached_value", jnp.zeros, value.shape, value.dtype)
            cache_index = self.variable(
                "cache", "cache_index", jnp.zeros, batch if self.ragged_cache else (), jnp.int32
            )
            decode_from = cache_index.value if initialized else None
        if self.rotary_base is not None:
            if input_positions is None and decode_from is not None:
                input_positions = cache_positions(decode_from, query.shape[-3])
            query, key = (rotary(x, input_positions, self.rotary_base) for x in (query, key))
        elif input_positions is not None:
            raise ValueError("input_positions: only rotary embedding uses positions, but the module has no rotary_base")
        if decode_from is not None:
            cache_index.value = kv_lengths = cached_tokens(decode_from, key.shape[-3], lengths)
            cached_key.value = key = extend_cache(cached_key.value, key, decode_from)
            cached_value.value = value = extend_cache(cached_value.value, value, decode_from)

        if self.dropout_rate > 0.0:
            deterministic = merge_param("deterministic", self.deterministic, deterministic)
            if not deterministic and dropout_rng is None:
                dropout_rng = self.make_rng("dropout")
        sinks = self.param("sinks", nn.initializers.zeros, (self.num_heads,), jnp.float32) if self.use_sinks else None
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
            force_fp32_for_softmax=self.force_fp32_for_softmax,
            is_causal=self.causal or decode_from is not None,
            **given(
                qk_attn_weights_einsum=self.qk_attn_weights_einsum_cls and self.qk_attn_weights_einsum_cls(),
                attn_weights_value_einsum=self.attn_weights_value_einsum_cls and self.attn_weights_value_einsum_cls(),
                q_offset=decode_from,
                q_lengths=lengths,
                kv_lengths=kv_lengths,
                window=self.window,
                segment_ids=segment_ids,
                softcap=self.softcap,
                sinks=sinks,
            ),
        )
        out = dense(
            self.out_features or inputs_q.shape[-1],
            axis=(-2, -1),
            kernel_init=_partitioned(self.out_kernel_init or self.kernel_init),
            bias_init=self.out_bias_init or self.bias_init,
            dot_general=self.out_dot_general,
            dot_general_cls=self.out_dot_general_cls,
            name="out",
        )(out)
        return nn.with_logical_constraint(out, self.out_axes)


class MultiHeadDotProductAttention(MultiHeadAttention):
    """`MultiHeadAttention` under the older name, by which Flax names the parameters of unnamed modules."""
