"""Exact attention with gradients written out by hand: NumPy, one T x S matrix, nothing shared with the library.

In float64 it is the truth. In float32 it is what plain attention makes of the same inputs, with its matrices kept in
`storage` (the dtype of the inputs). `spec` and `operands` are those of jax_flash.spec; arrays may have any dtype: query
[*B, T, N, H], key [*B, S, K, H], value [*B, S, K, Hv], every one with batch axes of full size or 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Results(NamedTuple):
    """Of one call: values, and gradients of sum(out * dout) + sum(lse * dlse)."""

    out: np.ndarray  # [*B, T, N, Hv]
    lse: np.ndarray  # [*B, N, T]
    dq: np.ndarray  # with all batch axes, as dk and dv
    dk: np.ndarray
    dv: np.ndarray
    dbias: np.ndarray | None  # in the bias's own shape
    dsinks: np.ndarray | None  # [N]


def attention(spec, q, k, v, operands, dout, dlse=None, dtype=np.float64, storage=None, tanh=np.tanh) -> Results:
    store = _rounding(dtype, storage or dtype)
    x = _evaluate(spec, q, k, v, operands, dtype, store, tanh)
    dout, dlse = _cotangents(x, operands, dout, dlse)
    dp = (dout @ _transpose(x.v)) * x.keep
    # The derivative by the logarithm of a row's sum of exponentials, with the scores held.
    through_sum = dlse - np.sum(dout * x.out, axis=-1, keepdims=True)
    ds = x.p * (dp + through_sum)
    return _results(spec.scale, operands, np.shape(k)[-2], x, store(ds), through_sum, dout)


def magnitudes(spec, q, k, v, operands, dout, dlse=None) -> Results:
    """What the results would be if no two terms could cancel: rounding errors are in proportion to it."""
    x = _evaluate(spec, q, k, v, operands, np.float64, np.asarray)
    dout, dlse = map(np.abs, _cotangents(x, operands, dout, dlse))
    x = x._replace(q=np.abs(x.q), k=np.abs(x.k), v=np.abs(x.v), lse=np.where(x.empty, 0, 1 + np.abs(x.lse)))
    x = x._replace(slope=2 - x.slope)  # 1 + tanh**2 for 1 - tanh**2
    dp = (dout @ _transpose(x.v)) * x.keep
    through_sum = dlse + np.sum(x.p * dp, axis=-1, keepdims=True)
    x = x._replace(out=(x.p * x.keep) @ x.v)
    return _results(abs(spec.scale), operands, np.shape(k)[-2], x, x.p * (dp + through_sum), through_sum, dout)


def rounding_spread(spec, q, k, v, operands, dout, dlse=None, *, eps: float) -> dict[str, np.ndarray]:
    """Standard deviation of dbias and dsinks where probabilities and outputs are rounded to `eps`.

    Both are sums over many rows of p * (dp - sum(dout * out)). The roundings of a row are independent of another's, so
    they add up in quadrature, and may be far larger than what is left of the terms where these cancel.
    """
    x = _evaluate(spec, q, k, v, operands, np.float64, np.asarray)
    dout, _ = _cotangents(x, operands, dout, dlse)
    dp = (dout @ _transpose(x.v)) * x.keep
    of_row = np.sum((dout * x.out) ** 2, axis=-1, keepdims=True) + np.sum((x.p * dp) ** 2, axis=-1, keepdims=True)
    of_row = of_row * eps**2 / 12  # variance of a rounding: eps ** 2 / 12 of what is rounded
    spreads = {}
    if operands.bias is not None:
        keys, others = [
            [i for i in axes if operands.bias.shape[i] == 1] for axes in ([x.p.ndim - 1], range(x.p.ndim - 1))
        ]
        variance = np.sum(x.p, axis=tuple(keys), keepdims=True) ** 2 * of_row  # a row's error is common to its keys
        spreads["dbias"] = np.sqrt(np.sum(variance, axis=tuple(others), keepdims=True))
    if operands.sinks is not None:
        variance = x.sink_share**2 * of_row
        spreads["dsinks"] = np.sqrt(np.sum(variance, axis=(*range(variance.ndim - 3), -2, -1)))
    return spreads


class _Evaluation(NamedTuple):
    """Everything about a call, as [*B, N, T, S] or, for q, k, v and out, [*B, N, length, size]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    p: np.ndarray  # softmax
    keep: np.ndarray | float  # dropout: what multiplies p
    slope: np.ndarray | float  # derivative of the scores by scale * q.k
    sink_share: np.ndarray | float  # of the softmax
    empty: np.ndarray  # rows that see no key
    lse: np.ndarray
    out: np.ndarray


def _results(scale, operands, kv_heads, x: _Evaluation, ds, through_sum, dout) -> Results:
    dqk = ds * x.slope * scale
    dbias = dsinks = None
    if operands.bias is not None:
        broadcast = [i for i, size in enumerate(operands.bias.shape) if size == 1]
        dbias = ds.sum(axis=tuple(broadcast), keepdims=True)
    if operands.sinks is not None:
        dsinks = np.sum(x.sink_share * through_sum, axis=(*range(ds.ndim - 3), -2, -1))
    return Results(
        _heads_inside(x.out),
        x.lse[..., 0],
        _heads_inside(dqk @ x.k),
        _sum_groups(_transpose(dqk) @ x.q, kv_heads),
        _sum_groups(_transpose(x.p * x.keep) @ dout, kv_heads),
        dbias,
        dsinks,
    )


def _cotangents(x: _Evaluation, operands, dout, dlse):
    dout = _heads_outside(_within(dout, operands.q_lengths, x.p.dtype))
    dlse = np.zeros_like(x.lse) if dlse is None else np.asarray(dlse, x.p.dtype)[..., None]
    return dout, np.where(x.empty, 0, dlse)  # an empty row's lse is a constant


def _rounding(dtype, storage):
    return lambda x: x.astype(storage).astype(dtype)


def _evaluate(spec, q, k, v, operands, dtype, store, tanh=np.tanh) -> _Evaluation:
    batch = np.broadcast_shapes(np.shape(q)[:-3], np.shape(k)[:-3], np.shape(v)[:-3])
    groups = np.shape(q)[-2] // np.shape(k)[-2]
    q = _heads_outside(_within(q, operands.q_lengths, dtype))
    k, v = (np.repeat(_heads_outside(_within(x, operands.kv_lengths, dtype)), groups, axis=-3) for x in (k, v))
    q, k, v = (np.broadcast_to(x, batch + x.shape[-3:]) for x in (q, k, v))

    s = q @ _transpose(k) * spec.scale
    slope = 1.0
    if spec.softcap:
        capped = np.asarray(tanh(s / spec.softcap))
        slope = 1 - capped**2
        s = spec.softcap * capped
    i, j = np.arange(s.shape[-2])[:, None], np.arange(s.shape[-1])
    at = i if operands.q_offset is None else i + _per_entry(operands.q_offset)
    if operands.alibi_slopes is not None:
        s = s - np.asarray(operands.alibi_slopes, dtype)[..., None, None] * np.abs(at - j).astype(dtype)
    if operands.bias is not None:
        s = s + np.asarray(operands.bias).astype(dtype)

    sees = _visible(spec, operands, at, i, j) & np.ones(s.shape, bool)
    empty = ~sees.any(axis=-1, keepdims=True)
    top = np.max(s, axis=-1, keepdims=True, where=sees, initial=-np.inf)
    sinks = None
    if operands.sinks is not None:
        sinks = np.asarray(operands.sinks, dtype)[:, None, None]
        top = np.maximum(top, sinks)
    top = np.where(empty, 0, top)
    e = np.exp(np.where(sees, s - top, -np.inf))
    total = e.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks - top)
    total = np.where(empty, 1, total)
    p = store(e / total)
    sink_share = 0.0 if sinks is None else np.where(empty, 0, np.exp(sinks - top) / total)
    lse = np.where(empty, -np.inf, top + np.log(total))
    keep = _keep(spec, operands, i, j).astype(dtype) if spec.dropout_rate else 1.0
    return _Evaluation(q, k, v, p, keep, slope, sink_share, empty, lse, store((p * keep) @ v))


def _visible(spec, operands, at, i, j):
    sees = np.array(True)
    if spec.causal:
        sees = sees & (j <= at)
    if spec.window_left is not None:
        sees = sees & (j >= at - spec.window_left)
    if spec.window_right is not None:
        sees = sees & (j <= at + spec.window_right)
    if operands.q_segment_ids is not None:
        q_ids, kv_ids = np.asarray(operands.q_segment_ids), np.asarray(operands.kv_segment_ids)
        sees = sees & (q_ids[..., None, :, None] == kv_ids[..., None, None, :])
    if operands.q_lengths is not None:
        sees = sees & (i < _per_entry(operands.q_lengths))
    if operands.kv_lengths is not None:
        sees = sees & (j < _per_entry(operands.kv_lengths))
    if operands.mask is not None:
        sees = sees & np.asarray(operands.mask)
    return sees


def _keep(spec, operands, i, j):
    """0, or what a kept probability is multiplied by: the contract's hash, in Python's own integers modulo 2**32."""
    bits32 = 0xFFFFFFFF

    def mix(x):
        x = x & bits32
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & bits32
        x = ((x ^ (x >> 15)) * 0x846CA68B) & bits32
        return x ^ (x >> 16)

    seed = np.asarray(operands.dropout_seed).astype(np.uint64)
    batch = np.asarray(operands.dropout_batch).astype(np.uint64)[..., None, None, None]
    head = np.asarray(operands.dropout_head).astype(np.uint64)[:, None, None]
    first, second = (seed[..., n][..., None, None, None] for n in (0, 1))
    i, j = i.astype(np.uint64), j.astype(np.uint64)
    row = mix(mix(mix(mix(first) + second) + batch * 0x9E3779B1 + head * 0x85EBCA77) + i)
    word = mix(row + j // 2 * 0x9E3779B1)
    bits = np.where(j % 2 == 1, word >> 16, word & 0xFFFF)
    threshold = max(1, int((1 - float(np.float32(spec.dropout_rate))) * 65536 + 0.5))
    return (bits < threshold) * (65536 / threshold)


def _within(x, lengths, dtype):
    """x [*B, L, heads, size] with zeros at and past the lengths [*B]."""
    x = np.asarray(x).astype(dtype)
    if lengths is None:
        return x
    inside = np.arange(x.shape[-3])[:, None, None] < np.asarray(lengths)[..., None, None, None]
    return np.where(inside, x, 0)


def _per_entry(x):
    """[*B] -> [*B, 1, 1, 1]"""
    return np.asarray(x)[..., None, None, None]


def _transpose(x):
    return np.swapaxes(x, -1, -2)


def _heads_outside(x):
    """[*B, L, N, H] -> [*B, N, L, H]"""
    return np.swapaxes(x, -2, -3)


_heads_inside = _heads_outside


def _sum_groups(x, kv_heads):
    """Gradient [*B, N, S, H] of repeated heads -> [*B, S, K, H]"""
    grouped = x.reshape(*x.shape[:-3], kv_heads, x.shape[-3] // kv_heads, *x.shape[-2:])
    return _heads_inside(grouped.sum(axis=-3))
