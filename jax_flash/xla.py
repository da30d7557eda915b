"""Attention in plain JAX, tile by tile: O(T) memory, every feature, any device.

    s = softcap(scale * q.k) + ALiBi + bias,    p = exp(s - lse) where visible,    out = dropout(p) v

`forward` walks the key tiles of each query tile with an online softmax. `backward` recomputes each tile of
probabilities from the lse and walks the query tiles of each key tile. `attention` is `forward` with a tangent that JAX
differentiates to any order: that of plain sums over the key tiles, where the lse is known. All of them skip the tiles
without a visible pair.

Inside, arrays have the score layout of masks.py: queries [*B, K, G, T, H], keys and values [*B, K, S, H], operands
[*B, K, G, T, S] with size 1 where they broadcast.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import masks
from jax_flash.masks import Tiling
from jax_flash.spec import AttentionSpec, Operands, score_dtype


def forward(spec: AttentionSpec, q, k, v, operands: Operands):
    """out [*B, T, N, Hv] in q's dtype and lse [*B, N, T], for q [*B, T, N, H], k [*B, S, K, H], v [*B, S, K, Hv]."""
    call = _Call(spec, q, k, v, operands)
    if call.empty:
        shape = (*call.batch, *call.heads, call.q.shape[-2])
        return call.results(call.full((*shape, call.v.shape[-1]), 0), call.full(shape, -jnp.inf))

    def query_tile(_, xs):
        i, bounds = xs

        def step(j, state):
            return _online_softmax(call.tile(i, j), call.keys(call.v, j), *state)

        state = (call.row_tile(1, jnp.finfo(call.dtype).min), call.row_tile(1, 0), call.row_tile(call.v.shape[-1], 0))
        top, total, weighted = _fori_loop(step, state, bounds, call.k_tiles.count)
        return None, _normalise(top, total, weighted, call.operands.sinks)

    _, tiles = jax.lax.scan(query_tile, None, call.each_query_tile())
    return call.results(*(call.q_tiles.join(x) for x in tiles))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attention(spec: AttentionSpec, q, k, v, operands: Operands):
    """`forward`, differentiable by JAX in every mode and to any order."""
    return forward(spec, q, k, v, operands)


@attention.defjvp
def _attention_tangent(spec: AttentionSpec, primals, tangents):
    """With the lse held, W = sum p v and Z = sum p have the derivatives of plain sums:

        d lse = dZ / Z,    d out = d(W / Z) = (dW - out dZ) / Z

    Z is 1 but for the rounding of the lse and of the scores, which are computed again: dividing by it takes both out.
    In reverse mode each tile does what `backward` does. Higher orders differentiate the lse and out as well.
    """
    out, lse = attention(spec, *primals)
    call = _Call(spec, *primals)
    if call.empty:
        return (out, lse), (jnp.zeros_like(out), jnp.zeros_like(lse))
    rows = call.rows(lse)
    (_, total), sums = jax.jvp(lambda *arrays: _sums(_Call(spec, *arrays), rows), primals, tangents)
    seen = total > 0  # not so where rounding of huge scores has lost a row
    dweighted, dtotal = (jnp.where(seen, x / jnp.where(seen, total, 1), 0) for x in sums)
    dout = dweighted - _split_heads(out, call.heads).astype(call.dtype) * dtotal
    return (out, lse), call.results(dout, dtotal)


def _sums(call: _Call, rows: _Rows):
    """sum(dropout(p) v) [*B, K, G, T, Hv] and sum(p) [*B, K, G, T, 1], with p = exp(s - lse)."""

    def query_tile(_, xs):
        i, bounds = xs
        lse = call.queries(rows.lse, i)

        def step(j, sums):
            weighted, total = sums
            tile = call.tile(i, j)
            p = _exp(tile.scores - lse, tile.visible)
            kept = p if tile.keep is None else p * tile.keep
            weighted += _product("...gts,...sh->...gth", kept, call.keys(call.v, j))
            return weighted, total + jnp.sum(p, axis=-1, keepdims=True)

        sums = call.row_tile(call.v.shape[-1], 0), call.row_tile(1, 0)
        return None, _checkpointed_loop(step, sums, bounds, call.k_tiles.count)

    _, tiles = jax.lax.scan(jax.checkpoint(query_tile), None, call.each_query_tile())
    weighted, total = (call.q_tiles.join(x) for x in tiles)
    if call.operands.sinks is not None:
        total += _exp(call.operands.sinks.astype(call.dtype) - rows.lse, rows.seen)
    return weighted, total


def backward(spec: AttentionSpec, q, k, v, operands: Operands, out, lse, dout, dlse):
    """dq, dk, dv, each with all batch axes, from the results of `forward` and their cotangents (dlse None: zero)."""
    call = _Call(spec, q, k, v, operands)
    dq = call.full((*call.batch, *call.heads, *call.q.shape[-2:]), 0)
    if call.empty:
        dk, dv = (call.full((*call.batch, *x.shape[-3:]), 0, x.dtype) for x in (k, v))
        return _merge_heads(dq).astype(q.dtype), dk, dv
    rows = _gradient_rows(call, out, lse, dout, dlse)

    def key_tile(dq, xs):
        j, bounds = xs
        k_tile, v_tile = call.keys(call.k, j), call.keys(call.v, j)

        def step(i, gradients):
            dq, dk, dv = gradients
            row = rows.tile(call, i)
            tile = call.tile(i, j)
            p, ds = _tile_gradient(tile, v_tile, row)
            ds = ds * tile.slope
            dq = call.q_tiles.add(dq, i, _product("...gts,...sh->...gth", ds, k_tile), axis=-2)
            dk += _product("...gth,...gts->...hs", call.queries(call.q, i), ds)
            dv += _product("...gth,...gts->...hs", row.dout, p)
            return dq, dk, dv

        # Transposed, so that no product has to transpose p or ds.
        dk, dv = (call.full((*call.batch, call.heads[0], x.shape[-1], call.k_tiles.size), 0) for x in (k_tile, v_tile))
        dq, dk, dv = _fori_loop(step, (dq, dk, dv), bounds, call.q_tiles.count)
        dk, dv = jnp.swapaxes(dk * spec.scale, -1, -2), jnp.swapaxes(dv, -1, -2)
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, tiles = jax.lax.scan(key_tile, dq, call.each_key_tile())
    dk, dv = (jnp.swapaxes(call.k_tiles.join(x), -2, -3) for x in tiles)
    return _merge_heads(dq * spec.scale).astype(q.dtype), dk, dv


def bias_gradient(spec: AttentionSpec, q, k, v, operands: Operands, out, lse, dout, dlse):
    """Gradient of the bias in its own shape and dtype: that of the scores, summed over the bias's broadcast axes."""
    call = _Call(spec, q, k, v, operands)
    bias = call.operands.bias
    adds_once = bias.shape[-2:] == (call.q_tiles.length, call.k_tiles.length)  # then no wider accumulator is needed
    dbias = call.full(bias.shape, 0, bias.dtype if adds_once else call.dtype)
    if not call.empty:
        rows = _gradient_rows(call, out, lse, dout, dlse)

        def key_tile(dbias, xs):
            j, bounds = xs
            v_tile = call.keys(call.v, j)

            def step(i, dbias):
                _, ds = _tile_gradient(call.tile(i, j), v_tile, rows.tile(call, i))
                return _add_pairs(call, dbias, i, j, ds)

            return _fori_loop(step, dbias, bounds, call.q_tiles.count), None

        dbias, _ = jax.lax.scan(key_tile, dbias, call.each_key_tile())
    return dbias.reshape(operands.bias.shape).astype(bias.dtype)


class _Tile(NamedTuple):
    """The pairs of a query tile and a key tile, before the softmax."""

    scores: jax.Array  # [*B, K, G, t, s]
    visible: jax.Array | None  # None: all
    slope: jax.Array | float  # derivative of the scores by scale * q.k
    keep: jax.Array | None  # dropout: what multiplies each probability


class _Rows(NamedTuple):
    """[*B, K, G, T, 1]"""

    lse: jax.Array  # 0 for the rows that see no key
    seen: jax.Array  # whether a row sees a key


class _Call:
    """A call's arrays in the score layout, without what lies past the lengths, and their tiles."""

    def __init__(self, spec: AttentionSpec, q, k, v, operands: Operands):
        t, n = q.shape[-3:-1]
        s, kv_heads = k.shape[-3:-1]
        self.spec = spec
        self.varying = frozenset().union(*(_varying_axes(x) for x in (q, k, v, *operands.present().values())))
        self.dtype = score_dtype(q.dtype)
        self.heads = (kv_heads, n // kv_heads)
        self.batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
        self.empty = not (t and s)
        self.operands = _score_layout(operands, len(self.batch), self.heads)
        self.q = self.rows_within_length(_split_heads(q, self.heads))
        self.k, self.v = (self._keys_within_length(jnp.swapaxes(x, -2, -3)) for x in (k, v))
        self.q_tiles, self.k_tiles = _tilings(math.prod(self.batch) * n, t, s)

    def full(self, shape, value, dtype=None):
        """A constant that may start a loop inside shard_map, where it becomes an array that varies over mesh axes."""
        constant = jnp.full(shape, value, dtype or self.dtype)
        return jax.lax.pcast(constant, tuple(self.varying), to="varying") if self.varying else constant

    def rows_within_length(self, x):
        """x [*B, K, G, T, ...] with zeros for the queries past their length, whatever they hold."""
        if self.operands.q_lengths is None:
            return x
        return jnp.where(_index(x.shape[-2], -2, x.ndim) < self.operands.q_lengths, x, 0)

    def _keys_within_length(self, x):
        """x [*B, K, S, H] with zeros for the keys past their length, whatever they hold."""
        if self.operands.kv_lengths is None:
            return x
        return jnp.where(_index(x.shape[-2], -2, x.ndim) < jnp.squeeze(self.operands.kv_lengths, -3), x, 0)

    def row_tile(self, size, value):
        """A constant for each query of a tile."""
        return self.full((*self.batch, *self.heads, self.q_tiles.size, size), value)

    def results(self, out, lse):
        """out [*B, K, G, T, Hv] and lse [*B, K, G, T, ...] as they are returned."""
        lse = lse.reshape(*self.batch, math.prod(self.heads), out.shape[-2])
        return _merge_heads(out).astype(self.q.dtype), lse

    def rows(self, lse) -> _Rows:
        lse = lse.reshape(*self.batch, *self.heads, lse.shape[-1], 1)
        seen = ~(lse < jnp.finfo(lse.dtype).min)  # a constant -inf would stop jax_debug_infs
        return _Rows(jnp.where(seen, lse, 0), seen)

    def queries(self, x, i):
        return self.q_tiles.cut(x, i, axis=-2)

    def keys(self, x, j):
        return self.k_tiles.cut(x, j, axis=-2)

    def pairs(self, x, i, j):
        return self.k_tiles.cut(self.queries(x, i), j, axis=-1)

    def query(self, i):
        """Query numbers of a tile."""
        return self.q_tiles.start(i) + _index(self.q_tiles.size, -2, self.q.ndim)

    def each_query_tile(self):
        """Query tile numbers, and for each the range of key tiles that it meets (None: all)."""
        return self._each(self.q_tiles, axis=1)

    def each_key_tile(self):
        """Key tile numbers, and for each the range of query tiles that it meets (None: all)."""
        return self._each(self.k_tiles, axis=0)

    def _each(self, tiles: Tiling, axis: int):
        meets = masks.tiles_meet(self.spec, self.operands, self.q_tiles, self.k_tiles)
        return jnp.arange(tiles.count, dtype=jnp.int32), None if meets is None else masks.span(meets, axis)

    def tile(self, i, j) -> _Tile:
        spec, whole = self.spec, self.operands
        operands = whole._replace(
            q_segment_ids=None if whole.q_segment_ids is None else self.queries(whole.q_segment_ids, i),
            kv_segment_ids=None if whole.kv_segment_ids is None else self.k_tiles.cut(whole.kv_segment_ids, j, axis=-1),
            mask=None if whole.mask is None else self.pairs(whole.mask, i, j),
            bias=None if whole.bias is None else self.pairs(whole.bias, i, j),
        )
        query = self.query(i)
        key = self.k_tiles.start(j) + _index(self.k_tiles.size, -1, self.q.ndim)

        s = spec.scale * _product("...gth,...sh->...gts", self.queries(self.q, i), self.keys(self.k, j))
        slope: jax.Array | float = 1.0
        if spec.softcap:
            s = jnp.tanh(s / spec.softcap)
            slope = 1 - s * s
            s = spec.softcap * s
        if operands.alibi_slopes is not None:
            distance = jnp.abs(masks.position(operands, query) - key)
            s -= operands.alibi_slopes.astype(s.dtype) * distance.astype(s.dtype)
        if operands.bias is not None:
            s += operands.bias.astype(s.dtype)

        visible = masks.visible(spec, operands, query, key)
        if self.k_tiles.overlaps:
            fresh = self.k_tiles.fresh(j, key)
            visible = fresh if visible is None else visible & fresh
        keep = None
        if spec.dropout_rate:
            kept = masks.dropout_keeps(spec, operands, query, key)
            keep = jnp.where(kept, 65536 / masks.dropout_threshold(spec.dropout_rate), 0).astype(s.dtype)
        return _Tile(s, visible, slope, keep)


def _online_softmax(tile: _Tile, v, top, total, weighted):
    """Take a tile into the running maximum of the scores, sum of exp(s - maximum) and sum of exp(s - maximum) v."""
    s = tile.scores
    seen = s if tile.visible is None else jnp.where(tile.visible, s, jnp.finfo(s.dtype).min)
    new_top = jnp.maximum(top, jnp.max(seen, axis=-1, keepdims=True))
    # XLA may round huge scores for their maximum, and not in the difference from it: that of the maximum itself is set
    # to zero (NaN if it is inf).
    p = _exp(jnp.where(s >= new_top, new_top - new_top, s - new_top), tile.visible)
    shrink = jnp.exp(top - new_top)
    total = total * shrink + jnp.sum(p, axis=-1, keepdims=True)
    p = p if tile.keep is None else p * tile.keep
    return new_top, total, weighted * shrink + _product("...gts,...sh->...gth", p, v)


def _normalise(top, total, weighted, sinks):
    """Output and lse of query rows from what `_online_softmax` gathered; 0 and -inf for rows that saw no key."""
    empty = total == 0
    if sinks is not None:
        sinks = sinks.astype(total.dtype)
        new_top = jnp.maximum(top, sinks)
        shrink = jnp.exp(top - new_top)
        top, total, weighted = new_top, total * shrink + jnp.exp(sinks - new_top), weighted * shrink
    total = jnp.where(empty, 1, total)
    lse = top + jnp.log(total) + jnp.log((~empty).astype(total.dtype))  # jax_debug_infs would report a constant -inf
    return jnp.where(empty, 0, weighted / total), lse


class _GradientRows(NamedTuple):
    """What the backward pass knows of each query."""

    lse: jax.Array  # [*B, K, G, T, 1], finite
    dout: jax.Array  # [*B, K, G, T, Hv]
    delta: jax.Array  # [*B, K, G, T, 1]: dout.out - dlse

    def tile(self, call: _Call, i) -> _GradientRows:
        """Rows of a query tile, such that those which an earlier tile has too count once."""
        lse, dout, delta = (call.queries(x, i) for x in self)
        if call.q_tiles.overlaps:
            fresh = call.q_tiles.fresh(i, call.query(i))
            dout, delta = (jnp.where(fresh, x, 0) for x in (dout, delta))
        return _GradientRows(lse, dout, delta)


def _gradient_rows(call: _Call, out, lse, dout, dlse) -> _GradientRows:
    rows = call.rows(lse)
    out, dout = (jnp.where(rows.seen, _split_heads(x, call.heads), 0) for x in (out, dout))
    delta = jnp.sum(out.astype(call.dtype) * dout.astype(call.dtype), axis=-1, keepdims=True)
    if dlse is not None:
        delta -= jnp.where(rows.seen, dlse.reshape(delta.shape), 0)
    return _GradientRows(rows.lse, dout, delta)


def _tile_gradient(tile: _Tile, v, row: _GradientRows):
    """Probabilities after dropout, and the gradient of the scores."""
    p = _exp(tile.scores - row.lse, tile.visible)
    dp = _product("...gth,...sh->...gts", row.dout, v)
    if tile.keep is not None:
        return p * tile.keep, p * (dp * tile.keep - row.delta)
    return p, p * (dp - row.delta)


def _exp(x, visible):
    """exp(x) for x that are at most 0, but for the rounding of huge scores; 0 where not visible."""
    x = jnp.minimum(x, 1)
    return jnp.exp(x if visible is None else jnp.where(visible, x, jnp.finfo(x.dtype).min))


def _add_pairs(call: _Call, dbias, i, j, ds):
    """dbias + ds summed over the axes that dbias broadcasts, in the place of tiles i and j."""
    old = call.pairs(dbias, i, j)
    axes = tuple(axis for axis, size in enumerate(old.shape) if size == 1 and ds.shape[axis] > 1)
    new = old + jnp.sum(ds, axes, keepdims=True).astype(dbias.dtype)
    zero = np.int32(0)
    row = call.q_tiles.start(i) if dbias.shape[-2] > 1 else zero
    column = call.k_tiles.start(j) if dbias.shape[-1] > 1 else zero
    return jax.lax.dynamic_update_slice(dbias, new, [zero] * (dbias.ndim - 2) + [row, column])


def _fori_loop(step, state, bounds, count):
    first, end = bounds or (np.int32(0), np.int32(count))
    return jax.lax.fori_loop(first, end, step, state)


def _checkpointed_loop(step, state, bounds, count):
    """`_fori_loop` in a form that reverse mode can take, with one state per step as its memory."""

    def body(state, j):
        if bounds is None:
            return step(j, state), None
        first, end = bounds
        return jax.lax.cond((first <= j) & (j < end), step, lambda _, state: state, j, state), None

    return jax.lax.scan(jax.checkpoint(body), state, jnp.arange(count, dtype=jnp.int32))[0]


def _tilings(heads: int, t: int, s: int) -> tuple[Tiling, Tiling]:
    """Tiles for this many (batch entry, head) pairs, such that a step stays in the cache of a CPU."""
    scores = 2**19  # alive at once
    most = next((size for size in (512, 256) if heads * size**2 <= scores), 128)
    q_size = _even_size(t, most)
    k_size = _even_size(s, max(most, scores // max(1, heads * q_size)))  # few queries: more keys
    return Tiling(t, q_size), Tiling(s, k_size)


def _even_size(length: int, most: int) -> int:
    """Size of as few tiles as possible, of one size, that overlap as little as possible."""
    return -(-length // max(1, -(-length // most)))


def _product(subscripts: str, a, b):
    """einsum, accumulated in float32 or better."""
    dtype = a.dtype if a.dtype == b.dtype else score_dtype(a.dtype, b.dtype)
    return jnp.einsum(
        subscripts,
        a.astype(dtype),
        b.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=score_dtype(dtype),
    )


def _score_layout(operands: Operands, batch_axes: int, heads: tuple[int, int]) -> Operands:
    def grow(x, *axes):
        return None if x is None else jnp.expand_dims(x, axes)

    def split(x, axis, *new_axes):
        if x is None:
            return None
        head_axes = (1, 1) if x.shape[axis] == 1 else heads
        return jnp.expand_dims(x.reshape(*x.shape[:axis], *head_axes, *x.shape[axis + 1 :]), new_axes)

    after = (-4, -3, -2, -1)
    before = tuple(range(batch_axes))
    return Operands(
        q_offset=grow(operands.q_offset, *after),
        q_segment_ids=grow(operands.q_segment_ids, -4, -3, -1),
        kv_segment_ids=grow(operands.kv_segment_ids, -4, -3, -2),
        q_lengths=grow(operands.q_lengths, *after),
        kv_lengths=grow(operands.kv_lengths, *after),
        mask=split(operands.mask, batch_axes),
        bias=split(operands.bias, batch_axes),
        alibi_slopes=split(operands.alibi_slopes, batch_axes, -2, -1),
        sinks=split(operands.sinks, 0, *before, -2, -1),
        dropout_seed=grow(operands.dropout_seed, -4, -3, -2),
        dropout_batch=grow(operands.dropout_batch, *after),
        dropout_head=split(operands.dropout_head, 0, *before, -2, -1),
    )


def _split_heads(x, heads: tuple[int, int]):
    """[*B, T, N, H] -> [*B, K, G, T, H]"""
    return jnp.moveaxis(x.reshape(*x.shape[:-2], *heads, x.shape[-1]), -4, -2)


def _merge_heads(x):
    """[*B, K, G, T, H] -> [*B, T, N, H]"""
    x = jnp.moveaxis(x, -2, -4)
    return x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])


def _index(size: int, axis: int, rank: int):
    """0, 1, ... along one axis of an array of this rank."""
    return jax.lax.broadcasted_iota(jnp.int32, [size if i == rank + axis else 1 for i in range(rank)], rank + axis)


def _varying_axes(x) -> frozenset[str]:
    """Mesh axes of an enclosing shard_map over which x is known to vary."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)
