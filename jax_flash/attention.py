"""The public calls: check every argument, put the operands in their canonical form, attend.

B batch axes (any number, written *B); T, S query and key length; N, K query and key heads (N a multiple of K); H head
size of query and key; Hv head size of value.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_flash import custom_call, fp8
from jax_flash.spec import AttentionSpec, Fp8, Operands

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
      segment_ids: integers that broadcast to [*B, T] and [*B, S] (one array if T = S): attend within equal ids.
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
      return_lse: also return the log-sum-exp of the scores, float32 [*B, N, T]; differentiable.
      deterministic: gradients bit-identical from run to run.
      precision: `jax_flash.Fp8(...)`: the forward pass on 8-bit floating point. Gradients are those of the dtype.
      implementation: None: the kernel where the program is compiled for a GPU that has one, else XLA. "cuda": the
        kernel, or an error that says why not. "xla": plain JAX, differentiable to any order and in forward mode.

    Returns:
      out [*B, T, N, Hv] in query's dtype, or (out, lse).
    """
    spec, q, k, v, operands = _canonical(
        query, key, value, scale=scale, causal=causal, window=window, q_offset=q_offset, segment_ids=segment_ids,
        q_lengths=q_lengths, kv_lengths=kv_lengths, mask=mask, bias=bias, alibi_slopes=alibi_slopes, softcap=softcap,
        sinks=sinks, dropout_rate=dropout_rate, dropout_rng=dropout_rng,
        broadcast_dropout=broadcast_dropout, deterministic=deterministic, precision=precision,
    )  # fmt: skip
    return_lse = _flag("return_lse", return_lse)
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

    Without gradients, and not partitioned over devices by itself (shard_map does it).

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
    *batch, s, heads, size = quantized.key.shape
    query = jax.ShapeDtypeStruct(quantized.query.shape, jnp.dtype(dtype))
    key = jax.ShapeDtypeStruct((*batch, s, heads, size), query.dtype)
    value = jax.ShapeDtypeStruct((*batch, s, heads, size if value_size is None else value_size), query.dtype)
    spec, _, _, _, operands = _canonical(query, key, value, precision=Fp8(), **options)
    out, lse = fp8.attend(spec, _path(implementation), quantized, operands, query.dtype, value.shape[-1])
    return (out, lse) if _flag("return_lse", return_lse) else out


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
    arrays = {name: _array(name, x) for name, x in (("query", query), ("key", key), ("value", value))}
    for name, x in arrays.items():
        if x.ndim not in (3, 4):
            raise ValueError(f"{name}: expected 3 or 4 axes, got shape {x.shape}")
    q, k, v = (x.reshape((1,) * (4 - x.ndim) + x.shape) for x in arrays.values())
    if bias is not None:
        additive = _array("bias", bias)
        bias = additive if jnp.issubdtype(additive.dtype, jnp.floating) else additive.astype(jnp.float32)
    lengths = {"query_seq_lengths": query_seq_lengths, "key_value_seq_lengths": key_value_seq_lengths}
    for name, x in lengths.items():
        if x is not None and np.shape(x) != q.shape[:1]:
            raise ValueError(f"{name}: expected shape [B] = {q.shape[:1]}, got {np.shape(x)}")
    q_lengths, kv_lengths = (None if x is None else _array(name, x, jnp.integer) for name, x in lengths.items())
    spec, q, k, v, operands = _canonical(
        q, k, v, scale=scale, causal=_flag("is_causal", is_causal), q_lengths=q_lengths, kv_lengths=kv_lengths,
        mask=mask, bias=bias, window=_window("local_window_size", local_window_size),
    )  # fmt: skip
    out, lse = _attend(spec, _path(implementation), False, q, k, v, operands)
    leading = arrays["query"].shape[:-1]
    out = out.reshape(*leading, out.shape[-1])
    if not _flag("return_residual", return_residual):
        return out
    residual = jnp.moveaxis(lse, -2, -1).astype(out.dtype).reshape(leading)
    return out, jax.lax.stop_gradient(residual)


def explain(*args: Any, implementation: Implementation = None, **kwargs: Any) -> None:
    """Prints how `flash_attention` with these arguments runs on this machine, or why not by the kernel.

    Arrays may be `jax.ShapeDtypeStruct`s: nothing is computed.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]
    lines: list[str] = []

    def trace(arrays: list[Any]) -> None:
        rest = iter(arrays)
        args, kwargs = jax.tree.unflatten(
            tree, [next(rest) if known else x for known, x in zip(is_array, leaves, strict=True)]
        )
        kwargs.pop("return_lse", None)
        spec, *arrays = _for_kernels(*_canonical(*args, **kwargs))
        lines.extend(custom_call.describe(spec, _path(implementation), *arrays))

    jax.eval_shape(trace, [x for known, x in zip(is_array, leaves, strict=True) if known])
    print("\n".join(lines))


# --- from the canonical form to the result ---------------------------------------------------------------------------


def _attend(spec: AttentionSpec, path: str, lse_cotangent: bool, q: Any, k: Any, v: Any, operands: Operands) -> Any:
    if 0 in (*q.shape, *k.shape):
        out = jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
        return out, jnp.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -jnp.inf, jnp.float32)
    value_size = v.shape[-1]
    if path != "xla":
        spec, q, k, v, operands = _for_kernels(spec, q, k, v, operands)
    out, lse = custom_call.attend(spec, path, lse_cotangent, q, k, v, operands)
    return out[..., :value_size], lse


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


@jax.custom_jvp
def _constant_slopes(slopes: Any) -> Any:
    return slopes


@_constant_slopes.defjvp
def _no_slope_gradient(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "alibi_slopes: constants on the kernel path, without a gradient (implementation='xla' has it); "
        "jax.lax.stop_gradient says that none is wanted"
    )


# --- from the arguments to the canonical form ------------------------------------------------------------------------


def _canonical(
    query: Any,
    key: Any,
    value: Any,
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
) -> tuple[AttentionSpec, Any, Any, Any, Operands]:
    """`flash_attention`'s arguments, checked: spec, query, key, value, operands with all batch axes."""
    q, k, v = _query_key_value(query, key, value)
    batch, (t, n, head_size), s = q.shape[:-3], q.shape[-3:], k.shape[-3]
    if not (precision is None or isinstance(precision, Fp8)):
        raise ValueError(f"precision: expected None or jax_flash.Fp8(...), got {precision!r}")
    dropout_rate = _number("dropout_rate", dropout_rate)
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate: expected a number in [0, 1), got {dropout_rate}")
    left, right = _window("window", window)
    spec = AttentionSpec(
        scale=1 / math.sqrt(head_size) if scale is None else _number("scale", scale),
        causal=_flag("causal", causal),
        window_left=left,
        window_right=right,
        softcap=0.0 if softcap is None else _positive("softcap", softcap),
        dropout_rate=dropout_rate,
        deterministic=_flag("deterministic", deterministic),
        precision=precision,
    )
    q_ids, kv_ids = _segment_ids(segment_ids, batch, t, s)
    dropout = _dropout(dropout_rng, batch, n, _flag("broadcast_dropout", broadcast_dropout)) if dropout_rate > 0 else {}
    operands = Operands(
        q_offset=_offset(q_offset, batch),
        q_segment_ids=q_ids,
        kv_segment_ids=kv_ids,
        q_lengths=_lengths("q_lengths", q_lengths, batch, t),
        kv_lengths=_lengths("kv_lengths", kv_lengths, batch, s),
        mask=None
        if mask is None
        else _aligned("mask", _array("mask", mask, jnp.bool_), (*batch, n, t, s), "*B, N, T, S"),
        bias=_bias(bias, q.dtype, (*batch, n, t, s)),
        alibi_slopes=_per_head("alibi_slopes", alibi_slopes, (*batch, n), "*B, N"),
        sinks=_per_head("sinks", sinks, (n,), "N"),
        **dropout,
    )
    return spec, q, k, v, operands


def _query_key_value(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    q, k, v = _array("query", query), _array("key", key), _array("value", value)
    if q.dtype not in _DTYPES:
        raise TypeError(f"query: expected one of the dtypes {', '.join(_DTYPES)}, got {q.dtype}")
    for name, x in (("key", k), ("value", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected query's dtype {q.dtype}, got {x.dtype}")
    if q.ndim < 3:
        raise ValueError(f"query: expected shape [*B, T, N, H], got {q.shape}")
    batch, (n, head_size) = q.shape[:-3], q.shape[-2:]
    if n < 1 or head_size < 1:
        raise ValueError(f"query: expected at least one head [*B, T, N, H] of size at least 1, got {q.shape}")
    if k.ndim != q.ndim or k.shape[:-3] != batch or k.shape[-1] != head_size:
        wanted = _show((*batch, "S", "K", head_size))
        raise ValueError(f"key: expected shape [*B, S, K, H] = {wanted} beside query {q.shape}, got {k.shape}")
    if k.shape[-2] < 1 or n % k.shape[-2]:
        raise ValueError(f"key: expected a number of heads that divides query's {n}, got {k.shape[-2]} in {k.shape}")
    if v.ndim != q.ndim or v.shape[:-1] != k.shape[:-1] or v.shape[-1] < 1:
        wanted = _show((*k.shape[:-1], "Hv"))
        raise ValueError(f"value: expected shape [*B, S, K, Hv] = {wanted} beside key {k.shape}, got {v.shape}")
    return q, k, v


_DTYPES = ("float16", "bfloat16", "float32", "float64")


def _show(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _array(name: str, value: Any, kind: Any = None) -> Any:
    try:
        x = value if isinstance(value, jax.ShapeDtypeStruct) else jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}") from error
    if kind is not None and not jnp.issubdtype(x.dtype, kind):
        wanted = {jnp.bool_: "bool", jnp.integer: "integers", jnp.floating: "floating point numbers"}[kind]
        raise TypeError(f"{name}: expected an array of {wanted}, got {x.dtype}")
    return x


def _aligned(name: str, x: Any, full: tuple[int, ...], axes: str, whole: int = 0) -> Any:
    """x with axes of size 1 in front; each axis must be full or of size 1, the last `whole` of them full."""
    padded = (1,) * (len(full) - x.ndim) + x.shape
    smallest = (1,) * (len(full) - whole) + full[len(full) - whole :]
    broadcasts = len(padded) == len(full) and all(
        got in sizes for got, *sizes in zip(padded, full, smallest, strict=True)
    )
    if x.ndim < whole or not broadcasts:
        raise ValueError(f"{name}: expected a shape that broadcasts to [{axes}] = {_show(full)}, got {_show(x.shape)}")
    return x.reshape(padded)


def _offset(q_offset: Any, batch: tuple[int, ...]) -> Any:
    if isinstance(q_offset, int) and q_offset == 0:
        return None
    return _aligned("q_offset", _array("q_offset", q_offset, jnp.integer), batch, "*B").astype(jnp.int32)


def _lengths(name: str, lengths: Any, batch: tuple[int, ...], most: int) -> Any:
    if lengths is None:
        return None
    return jnp.clip(_aligned(name, _array(name, lengths, jnp.integer), batch, "*B"), 0, most).astype(jnp.int32)


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
    q_ids, kv_ids = _array("segment_ids", q_ids, jnp.integer), _array("segment_ids", kv_ids, jnp.integer)
    return (
        _aligned("segment_ids", q_ids, (*batch, t), "*B, T", whole=1).astype(jnp.int32),
        _aligned("segment_ids", kv_ids, (*batch, s), "*B, S", whole=1).astype(jnp.int32),
    )


def _bias(bias: Any, dtype: Any, full: tuple[int, ...]) -> Any:
    if bias is None:
        return None
    x = _aligned("bias", _array("bias", bias, jnp.floating), full, "*B, N, T, S")
    return x if x.dtype in (dtype, jnp.float32) else x.astype(jnp.float32)


def _per_head(name: str, x: Any, full: tuple[int, ...], axes: str) -> Any:
    return None if x is None else _aligned(name, _array(name, x, jnp.floating), full, axes, whole=1).astype(jnp.float32)


def _dropout(key: Any, batch: tuple[int, ...], heads: int, shared: bool) -> dict[str, Any]:
    """Seed and indices: operands, so that a shard of the arrays holds its own part; 0 if all share their bits."""
    if key is None:
        raise ValueError("dropout_rng: expected a key of jax.random as dropout_rate > 0, got None")
    typed = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    key = key if typed else _array("dropout_rng", key)
    if not (typed and key.ndim == 0) and not (key.dtype == jnp.uint32 and key.ndim == 1):
        raise TypeError(f"dropout_rng: expected one key of jax.random, got {key.dtype} of shape {key.shape}")
    index = jnp.zeros if shared else jnp.arange
    return {
        "dropout_seed": jax.random.bits(key, (2,), jnp.uint32).reshape((1,) * len(batch) + (2,)),
        "dropout_batch": index(math.prod(batch), dtype=jnp.int32).reshape(batch),
        "dropout_head": index(heads, dtype=jnp.int32),
    }


def _window(name: str, window: Any) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    sides = window if isinstance(window, tuple) else (window, window)
    if len(sides) != 2:
        raise ValueError(f"{name}: expected (left, right), got a tuple of {len(sides)}")
    left, right = (None if side is None else _integer(name, side) for side in sides)
    if min(left or 0, right or 0) < 0:
        raise ValueError(f"{name}: expected numbers of keys, at least 0, got {window}")
    return left, right


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: expected an integer known at trace time, got {_kind(value)}") from error


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, (bool, np.bool_, str)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected a number known at trace time, got {_kind(value)}") from error
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


def _positive(name: str, value: Any) -> float:
    number = _number(name, value)
    if number <= 0:
        raise ValueError(f"{name}: expected a number above 0, or None, got {number}")
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {_kind(value)}")
    return bool(value)


def _kind(value: Any) -> str:
    return "a traced array" if isinstance(value, jax.core.Tracer) else repr(value)


def _path(implementation: Any) -> str:
    paths = {None: "any", "cuda": "kernel", "xla": "xla"}
    if not isinstance(implementation, str | None) or implementation not in paths:
        raise ValueError(f"implementation: expected None, 'cuda' or 'xla', got {implementation!r}")
    return paths[implementation]
