"""The public calls: check every argument, put the operands in their canonical form, attend.

B batch axes (any number, written *B); T, S query and key length; N, K query and key heads (N a multiple of K); H head
size of query and key; Hv head size of value.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_flash import custom_call, fp8
from jax_flash.arguments import (
    aligned,
    array,
    batch_integers,
    batch_lengths,
    flag,
    integer,
    number,
    positive,
    precision_or_none,
    query_key_value,
)
from jax_flash.spec import AttentionSpec, Fp8, Operands, score_dtype

Implementation = Literal["xla", "cuda"] | None
Window = int | tuple[int | None, int | None] | None


def flash_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: Window = None,
    q_offset: ArrayLike = 0,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    q_lengths: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: ArrayLike | None = None,
    broadcast_dropout: bool = False,
    return_lse: bool = False,
    deterministic: bool = False,
    precision: Fp8 | None = None,
    implementation: Implementation = None,
) -> Any:
    """Exact attention in O(T) memory: softmax(scale * q k^T + ...) v.

    Scores go through, in this order: scale, softcap, ALiBi, bias, masks (causal, window, segment ids, lengths, mask),
    softmax in float32 with the sink in its denominator, dropout. A query that sees no key gives 0 (and lse -inf).

    Args:
      query: [*B, T, N, H], float16, bfloat16, float32 or float64.
      key: [*B, S, K, H], query's dtype; N must be a multiple of K.
      value: [*B, S, K, Hv], query's dtype.
      scale: of the scores; None: 1 / sqrt(H).
      causal: query i, at key position i + q_offset, sees the keys up to its position.
      window: (left, right) keys seen around the position, None on a side for all; an int is both sides.
      q_offset: integer, or integers that broadcast to [*B]. 0 is top-left causal; decoding passes S - T.
      segment_ids: integers that broadcast to [*B, T] and [*B, S] (one array if T = S): attend within equal ids (as
        int32: of wider ones the lowest 32 bits count).
      q_lengths: integers that broadcast to [*B]: queries at or past it give 0.
      kv_lengths: integers that broadcast to [*B]: keys at or past it are not there, whatever they hold.
      mask: bool, broadcasts to [*B, N, T, S]: True where a query sees a key.
      bias: float, broadcasts to [*B, N, T, S], added to the scores; differentiable in its own shape.
      alibi_slopes: [N] or [*B, N]: adds -slope * abs(i + q_offset - j). Constants: they have no gradient.
      softcap: scores become softcap * tanh(scores / softcap).
      sinks: [N], a learned logit per head that takes its share of the softmax and gives nothing; differentiable.
      dropout_rate: of the probabilities, in [0, 1).
      dropout_rng: a key of jax.random, needed if dropout_rate > 0. The same key drops the same pairs on every path,
        sharding and tile size.
      broadcast_dropout: drop the same pairs in all batch entries and heads, as Flax does by default.
      return_lse: also return the log-sum-exp of the scores, [*B, N, T], float32 (float64 beside float64);
        differentiable.
      deterministic: gradients bit-identical from run to run.
      precision: `jax_flash.Fp8(...)`: the forward pass on 8 bits. Gradients are those of the dtype.
      implementation: None: the kernel where the program is compiled for a GPU that has one, else XLA. "cuda": the
        kernel, or an error that says why not. "xla": plain JAX, differentiable to any order and in forward mode.

    Returns:
      out [*B, T, N, Hv] in query's dtype, or (out, lse).
    """
    q, k, v = query_key_value(query, key, value)
    spec, operands = _canonical(
        q, k, v, scale=scale, causal=causal, window=window, q_offset=q_offset, segment_ids=segment_ids,
        q_lengths=q_lengths, kv_lengths=kv_lengths, mask=mask, bias=bias, alibi_slopes=alibi_slopes, softcap=softcap,
        sinks=sinks, dropout_rate=dropout_rate, dropout_rng=dropout_rng,
        broadcast_dropout=broadcast_dropout, deterministic=deterministic, precision=precision,
    )  # fmt: skip
    return_lse = flag("return_lse", return_lse)
    out, lse = _attend(spec, _path(implementation), return_lse, q, k, v, operands)
    return (out, lse) if return_lse else out


def quantized_attention(
    quantized: fp8.Quantized,
    *,
    value_size: int | None = None,
    dtype: Any = jnp.bfloat16,
    return_lse: bool = False,
    implementation: Implementation = None,
    **options: Any,
) -> Any:
    """`flash_attention` on query, key and value that are quantised already: `fp8.quantize`, `fp8.from_tensors`.

    Without gradients, and not partitioned over devices by itself (shard_map does it); vmap runs the kernel in a loop.

    Args:
      quantized: see `fp8.Quantized`.
      value_size: head size of the result, at most that of the quantised value (None: all of it).
      dtype: of the result, float16 or bfloat16.
      return_lse, implementation: as in `flash_attention`.
      options: `flash_attention`'s other arguments. The default scale is that of the padded head size: pass `scale` for
        head sizes other than 64, 128 and 256.

    Returns:
      out [*B, T, N, value_size], or (out, lse).
    """
    quantized = _quantized(quantized)
    size = quantized.key.shape[-1]
    value_size = size if value_size is None else integer("value_size", value_size)
    if not 1 <= value_size <= size:
        raise ValueError(f"value_size: expected 1 to {size}, got {value_size}")
    try:
        dtype = jnp.dtype(dtype)
        if dtype not in (jnp.float16, jnp.bfloat16):
            raise TypeError
    except TypeError as error:
        raise TypeError(f"dtype: expected float16 or bfloat16, got {dtype!r}") from error
    return_lse = flag("return_lse", return_lse)
    q, k = (jax.ShapeDtypeStruct(x.shape, dtype) for x in (quantized.query, quantized.key))
    v = jax.ShapeDtypeStruct((*k.shape[:-1], value_size), dtype)
    spec, operands = _canonical(q, k, v, precision=fp8.precision_of(quantized), **options)
    path = _path(implementation)
    if _empty(q, k):
        out, lse = _nothing(q, v)
    else:
        if path != "xla":
            spec, query, *_, operands = _for_kernels(spec, quantized.query, quantized.key, v, operands)
            quantized = quantized._replace(query=query)
        out, lse = custom_call.attend_quantized(spec, path, quantized, operands, dtype, value_size)
    return (out, lse) if return_lse else out


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementation = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention`, with its arguments and its meaning.

    One difference: a query that sees no key gives 0, where jax.nn gives the mean of the values.

    Args:
      query: [B, T, N, H] or [T, N, H].
      key: [B, S, K, H] or [S, K, H].
      value: [B, S, K, Hv] or [S, K, Hv].
      bias: broadcasts to [B, N, T, S]; added to the scores.
      mask: bool, broadcasts to [B, N, T, S]: True where a query sees a key.
      scale: of the scores; None: 1 / sqrt(H).
      is_causal: query i sees the keys up to i.
      query_seq_lengths: integers [B]: queries at or past it give 0.
      key_value_seq_lengths: integers [B]: keys at or past it are not seen.
      local_window_size: (left, right) keys seen around a query; an int is both sides.
      implementation: as in `flash_attention`.
      return_residual: also return the log-sum-exp, [B, T, N] or [T, N] in query's dtype, without gradient.

    Returns:
      out, in query's shape with Hv as its last axis, or (out, residual).
    """
    arrays = {name: array(name, x) for name, x in (("query", query), ("key", key), ("value", value))}
    for name, x in arrays.items():
        if x.ndim not in (3, 4):
            raise ValueError(f"{name}: expected 3 or 4 axes, got shape {x.shape}")
    q, k, v = query_key_value(*(x.reshape((1,) * (4 - x.ndim) + x.shape) for x in arrays.values()))
    if bias is not None:
        additive = array("bias", bias)
        exact = jnp.issubdtype(additive.dtype, jnp.integer) or additive.dtype == jnp.bool_
        bias = additive.astype(jnp.float32) if exact else additive
    lengths = {"query_seq_lengths": query_seq_lengths, "key_value_seq_lengths": key_value_seq_lengths}
    for name, x in lengths.items():
        if x is not None and np.shape(x) != q.shape[:1]:
            raise ValueError(f"{name}: expected shape [B] = {q.shape[:1]}, got {np.shape(x)}")
    q_lengths, kv_lengths = (None if x is None else array(name, x, jnp.integer) for name, x in lengths.items())
    spec, operands = _canonical(
        q, k, v, scale=scale, causal=flag("is_causal", is_causal), q_lengths=q_lengths, kv_lengths=kv_lengths,
        mask=mask, bias=bias, window=_window("local_window_size", local_window_size),
    )  # fmt: skip
    out, lse = _attend(spec, _path(implementation), False, q, k, v, operands)
    leading = arrays["query"].shape[:-1]
    out = out.reshape(*leading, out.shape[-1])
    if not flag("return_residual", return_residual):
        return out
    residual = jnp.moveaxis(lse, -2, -1).astype(out.dtype).reshape(leading)
    return out, jax.lax.stop_gradient(residual)


def explain(
    query: Any, key: Any, value: Any, *, implementation: Implementation = None, return_lse: bool = False, **options: Any
) -> None:
    """Prints how `flash_attention` with these arguments runs on this machine, or why not by the kernel.

    Arrays may be `jax.ShapeDtypeStruct`s: nothing is computed.
    """
    path = _path(implementation)
    flag("return_lse", return_lse)
    leaves, tree = jax.tree.flatten(((query, key, value), options))
    unknown = [isinstance(x, jax.ShapeDtypeStruct) for x in leaves]
    lines: list[str] = []

    def trace(arrays: list[Any]) -> None:
        rest = iter(arrays)
        arrays, options = jax.tree.unflatten(
            tree, [next(rest) if traced else x for traced, x in zip(unknown, leaves, strict=True)]
        )
        q, k, v = query_key_value(*arrays)
        spec, operands = _canonical(q, k, v, **options)
        spec, *call = _for_kernels(spec, q, k, v, operands)
        lines.extend(custom_call.describe(spec, path, *call))

    jax.eval_shape(trace, [x for traced, x in zip(unknown, leaves, strict=True) if traced])
    print("\n".join(lines))


# --- from the canonical form to the result ---------------------------------------------------------------------------


def _attend(spec: AttentionSpec, path: str, lse_cotangent: bool, q: Any, k: Any, v: Any, operands: Operands) -> Any:
    if _empty(q, k):
        return _nothing(q, v)
    value_size = v.shape[-1]
    if path != "xla":
        spec, q, k, v, operands = _for_kernels(spec, q, k, v, operands)
    out, lse = custom_call.attend(spec, path, lse_cotangent, q, k, v, operands)
    return out[..., :value_size], lse


def _empty(q: Any, k: Any) -> bool:
    return 0 in (*q.shape, *k.shape)


def _nothing(q: Any, v: Any) -> tuple[Any, Any]:
    """out and lse of queries that see no key."""
    out = jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    return out, jnp.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -jnp.inf, score_dtype(q.dtype))


def _for_kernels(spec: AttentionSpec, q: Any, k: Any, v: Any, operands: Operands) -> tuple[Any, ...]:
    """The same call as kernels take it: a scale that keeps the order of scores, head sizes that are multiples of 8."""
    if spec.scale < 0:
        spec, q = dataclasses.replace(spec, scale=-spec.scale), -q
    elif spec.scale == 0:  # times a hidden score, -inf, it would be NaN
        spec, q = dataclasses.replace(spec, scale=1.0), jnp.zeros_like(q)
    if operands.alibi_slopes is not None:
        operands = operands._replace(alibi_slopes=_constant_slopes(operands.alibi_slopes))
    if q.dtype.itemsize == 2:
        q, k, v = (_pad_heads(x) for x in (q, k, v))
    return spec, q, k, v, operands


def _pad_heads(x: Any) -> Any:
    missing = -x.shape[-1] % 8
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


_constant_slopes = custom_call.without_derivative(
    lambda slopes: slopes,
    "alibi_slopes: constants on the kernel path, without a gradient (implementation='xla' has it); "
    "jax.lax.stop_gradient says that none is wanted",
)


# --- from the arguments to the canonical form ------------------------------------------------------------------------


def _canonical(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: Any = None,
    causal: Any = False,
    window: Any = None,
    q_offset: Any = 0,
    segment_ids: Any = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    softcap: Any = None,
    sinks: Any = None,
    dropout_rate: Any = 0.0,
    dropout_rng: Any = None,
    broadcast_dropout: Any = False,
    deterministic: Any = False,
    precision: Any = None,
) -> tuple[AttentionSpec, Operands]:
    """`flash_attention`'s arguments beside query, key and value, checked: spec, operands with all batch axes."""
    batch, (t, n, head_size), s = q.shape[:-3], q.shape[-3:], k.shape[-3]
    dropout_rate = number("dropout_rate", dropout_rate)
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate: expected a number in [0, 1), got {dropout_rate}")
    left, right = _window("window", window)
    spec = AttentionSpec(
        scale=1 / math.sqrt(head_size) if scale is None else number("scale", scale),
        causal=flag("causal", causal),
        window_left=left,
        window_right=right,
        softcap=0.0 if softcap is None else positive("softcap", softcap),
        dropout_rate=dropout_rate,
        deterministic=flag("deterministic", deterministic),
        precision=precision_or_none("precision", precision),
    )
    q_ids, kv_ids = _segment_ids(segment_ids, batch, t, s)
    shared = flag("broadcast_dropout", broadcast_dropout)
    operands = Operands(
        q_offset=_offset(q_offset, batch),
        q_segment_ids=q_ids,
        kv_segment_ids=kv_ids,
        q_lengths=batch_lengths("q_lengths", q_lengths, batch, t),
        kv_lengths=batch_lengths("kv_lengths", kv_lengths, batch, s),
        mask=None
        if mask is None
        else aligned("mask", array("mask", mask, jnp.bool_), (*batch, n, t, s), "*B, N, T, S"),
        bias=_bias(bias, q.dtype, (*batch, n, t, s)),
        alibi_slopes=_per_head("alibi_slopes", alibi_slopes, q.dtype, (*batch, n), "*B, N"),
        sinks=_per_head("sinks", sinks, q.dtype, (n,), "N"),
        **(_dropout(dropout_rng, batch, n, shared) if dropout_rate > 0 else {}),
    )
    return spec, operands


_INT32 = jnp.iinfo(jnp.int32)


def _offset(q_offset: Any, batch: tuple[int, ...]) -> Any:
    if type(q_offset) is int and q_offset == 0:
        return None
    return batch_integers("q_offset", q_offset, batch, _INT32.min, _INT32.max)


def _segment_ids(segment_ids: Any, batch: tuple[int, ...], t: int, s: int) -> tuple[Any, Any]:
    if segment_ids is None:
        return None, None
    if isinstance(segment_ids, tuple):
        if len(segment_ids) != 2:
            raise ValueError(f"segment_ids: expected (query ids, key ids), got a tuple of {len(segment_ids)}")
        q_ids, kv_ids = segment_ids
    elif t == s:
        q_ids = kv_ids = segment_ids
    else:
        raise ValueError(f"segment_ids: expected a pair (query ids, key ids) as T = {t} is not S = {s}, got one array")
    q_ids, kv_ids = array("segment_ids", q_ids, jnp.integer), array("segment_ids", kv_ids, jnp.integer)
    return (
        aligned("segment_ids", q_ids, (*batch, t), "*B, T", whole=1).astype(jnp.int32),
        aligned("segment_ids", kv_ids, (*batch, s), "*B, S", whole=1).astype(jnp.int32),
    )


def _bias(bias: Any, dtype: Any, full: tuple[int, ...]) -> Any:
    if bias is None:
        return None
    x = aligned("bias", array("bias", bias, jnp.floating), full, "*B, N, T, S")
    return x if x.dtype in (dtype, jnp.float32) else x.astype(jnp.float32)


def _per_head(name: str, value: Any, dtype: Any, full: tuple[int, ...], axes: str) -> Any:
    if value is None:
        return None
    return aligned(name, array(name, value, jnp.floating), full, axes, whole=1).astype(score_dtype(dtype))


def _dropout(key: Any, batch: tuple[int, ...], heads: int, shared: bool) -> dict[str, Any]:
    """Seed and indices: operands, so that a shard of the arrays holds its own part; 0 if all share their bits."""
    if key is None:
        raise ValueError("dropout_rng: expected a key of jax.random as dropout_rate > 0, got None")
    key = array("dropout_rng", key)
    axes = 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1
    try:
        if key.ndim != axes:
            raise TypeError
        seed = jax.random.bits(key, (2,), jnp.uint32)
    except TypeError as error:
        wrong = f"{key.dtype} of shape {key.shape}"
        raise TypeError(f"dropout_rng: expected one key of jax.random, got {wrong}") from error
    index = jnp.zeros if shared else jnp.arange
    return {
        "dropout_seed": seed.reshape((1,) * len(batch) + (2,)),
        "dropout_batch": index(math.prod(batch), dtype=jnp.int32).reshape(batch),
        "dropout_head": index(heads, dtype=jnp.int32),
    }


def _window(name: str, window: Any) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    sides = tuple(window) if isinstance(window, (tuple, list)) else (window, window)
    if len(sides) != 2:
        raise ValueError(f"{name}: expected (left, right), got {window}")
    # No sequence is longer.
    left, right = (None if side is None else min(integer(name, side), _INT32.max) for side in sides)
    if min(left or 0, right or 0) < 0:
        raise ValueError(f"{name}: expected numbers of keys, at least 0, got {window}")
    return left, right


def _quantized(quantized: Any) -> fp8.Quantized:
    if not isinstance(quantized, fp8.Quantized):
        raise TypeError(f"quantized: expected a jax_flash.fp8.Quantized, got {type(quantized).__name__}")
    arrays = {name: array(f"quantized.{name}", x) for name, x in quantized._asdict().items()}
    q, k = arrays["query"], arrays["key"]
    wanted = jax.eval_shape(fp8.from_tensors, q, k, jax.ShapeDtypeStruct(k.shape, fp8.E4M3))._asdict()
    for name, x in arrays.items():
        if (x.shape, x.dtype) != (wanted[name].shape, wanted[name].dtype):
            expected = f"{wanted[name].dtype} of shape {wanted[name].shape} beside query {q.shape} and key {k.shape}"
            raise ValueError(f"quantized.{name}: expected {expected}, got {x.dtype} of shape {x.shape}")
    return fp8.Quantized(**arrays)


def _path(implementation: Any) -> str:
    paths = {None: "any", "cuda": "kernel", "xla": "xla"}
    if not isinstance(implementation, str | None) or implementation not in paths:
        raise ValueError(f"implementation: expected None, 'cuda' or 'xla', got {implementation!r}")
    return paths[implementation]
