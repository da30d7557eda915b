"""Which pairs (query, key) an attention call lets meet: every mask as a predicate, and what it implies for tiles.

All arrays here have the *score layout* [*B, K, G, T, S] (batch axes, key heads, query heads per key head, queries,
keys), with size 1 on every axis that an operand does not have. Query i stands at key position `i + q_offset`.
"""

from __future__ import annotations

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash.spec import AttentionSpec, Operands

_FAR = 2**30  # no sequence is longer, and the sum of two such numbers is an int32


def causal(position, key):
    """A query sees the keys up to its own position."""
    return key <= position


def within_left(position, key, left: int):
    """A query sees at most `left` keys before its position. (`position - left` could overflow.)"""
    return position - key <= left


def within_right(position, key, right: int):
    """A query sees at most `right` keys after its position."""
    return key - position <= right


def position(operands: Operands, query):
    """Key position at which each query stands."""
    return query if operands.q_offset is None else query + jnp.clip(operands.q_offset, -_FAR, _FAR)


def visible(spec: AttentionSpec, operands: Operands, query, key):
    """Whether each query index may see each key index: bool, broadcastable to the scores; None: every pair is visible.

    `operands` hold the rows of exactly these queries and keys.
    """
    at = position(operands, query)
    parts = []
    if spec.causal:
        parts.append(causal(at, key))
    if spec.window_left is not None:
        parts.append(within_left(at, key, spec.window_left))
    if spec.window_right is not None:
        parts.append(within_right(at, key, spec.window_right))
    if operands.q_segment_ids is not None:
        parts.append(operands.q_segment_ids == operands.kv_segment_ids)
    if operands.q_lengths is not None:
        parts.append(query < operands.q_lengths)
    if operands.kv_lengths is not None:
        parts.append(key < operands.kv_lengths)
    if operands.mask is not None:
        parts.append(operands.mask)
    return functools.reduce(operator.and_, parts) if parts else None


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A sequence cut into tiles of one size; the last one starts early enough to end with the sequence."""

    length: int
    size: int

    @property
    def count(self) -> int:
        return -(-self.length // self.size)

    @property
    def overlaps(self) -> bool:
        """Whether the last tile holds rows of the tile before it."""
        return self.length % self.size != 0

    def start(self, tile):
        return jnp.minimum(tile * self.size, self.length - self.size)

    def fresh(self, tile, index):
        """Whether these indices of a tile are not in the tile before it."""
        return index >= tile * self.size

    def cut(self, x, tile, axis: int):
        """The part of x that belongs to a tile; x itself if it broadcasts along the axis."""
        if x.shape[axis] == 1 or self.count == 1:
            return x
        return jax.lax.dynamic_slice_in_dim(x, self.start(tile), self.size, axis)

    def add(self, x, tile, part, axis: int):
        """x with `part` added in the place of a tile."""
        return jax.lax.dynamic_update_slice_in_dim(x, self.cut(x, tile, axis) + part, self.start(tile), axis)

    def join(self, parts):
        """[tiles, ..., size, H] -> [..., length, H]"""
        x = jnp.moveaxis(parts, 0, -3)
        x = x.reshape(*x.shape[:-3], self.count * self.size, x.shape[-1])
        if not self.overlaps:
            return x
        last = (self.count - 1) * self.size
        return jnp.concatenate([x[..., :last, :], x[..., last - self.length :, :]], axis=-2)


def tiles_meet(spec: AttentionSpec, operands: Operands, q_tiles: Tiling, k_tiles: Tiling) -> jax.Array | None:
    """bool [query tiles, key tiles]: whether some pair of the two tiles may be visible in some batch entry.

    Looks at positions, lengths and the range of segment ids, not at `mask`. None: every two tiles meet.
    """
    rank = max((array.ndim for array in operands.present().values()), default=4)
    axes = tuple(range(rank - 2))
    first_query = jnp.expand_dims(q_tiles.start(jnp.arange(q_tiles.count, dtype=jnp.int32)), (*axes, rank - 1))
    first_key = jnp.expand_dims(k_tiles.start(jnp.arange(k_tiles.count, dtype=jnp.int32)), (*axes, rank - 2))
    last_query = first_query + (q_tiles.size - 1)
    last_key = first_key + (k_tiles.size - 1)
    # A predicate of positions holds somewhere in a pair of tiles if it holds at the corner that suits it best.
    first, last = position(operands, first_query), position(operands, last_query)
    parts = []
    if spec.causal:
        parts.append(causal(last, first_key))
    if spec.window_left is not None:
        parts.append(within_left(first, last_key, spec.window_left))
    if spec.window_right is not None:
        parts.append(within_right(last, first_key, spec.window_right))
    if operands.q_segment_ids is not None:
        q_least, q_most = _extremes(operands.q_segment_ids, q_tiles, axis=-2)
        k_least, k_most = _extremes(operands.kv_segment_ids, k_tiles, axis=-1)
        parts.append((q_least <= k_most) & (k_least <= q_most))
    if operands.q_lengths is not None:
        parts.append(first_query < operands.q_lengths)
    if operands.kv_lengths is not None:
        parts.append(first_key < operands.kv_lengths)
    if not parts:
        return None
    meet = jnp.any(functools.reduce(operator.and_, parts), axis=axes)
    return jnp.broadcast_to(meet, (q_tiles.count, k_tiles.count))


def span(meets: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """First true index along `axis` and the index after the last one (0, 0 if none is true)."""
    count = meets.shape[axis]
    some = jnp.any(meets, axis)
    first = jnp.argmax(meets, axis).astype(jnp.int32)
    end = count - jnp.argmax(jnp.flip(meets, axis), axis).astype(jnp.int32)
    return jnp.where(some, first, 0), jnp.where(some, end, 0)


def _extremes(ids, tiles: Tiling, axis: int):
    """Least and greatest id of each tile."""
    first = tiles.start(jnp.arange(tiles.count, dtype=jnp.int32))
    inside = first[:, None] + jnp.arange(tiles.size, dtype=jnp.int32)[None]
    axis %= ids.ndim
    blocks = jnp.take(ids, inside, axis)
    return jnp.min(blocks, axis + 1), jnp.max(blocks, axis + 1)


def dropout_threshold(rate: float) -> int:
    """A pair is kept if its 16 random bits are below this. The rate counts in float32, as kernels receive it."""
    return max(1, int(np.floor((1.0 - float(np.float32(rate))) * 65536 + 0.5)))


def dropout_keeps(spec: AttentionSpec, operands: Operands, query, key):
    """Whether dropout keeps each pair: a hash of (seed, batch, head, query, key), all in uint32 arithmetic."""

    def unsigned(x):
        return x.astype(jnp.uint32)

    seed = operands.dropout_seed  # the two words in the place of the keys' axis
    stream = _mix(_mix(unsigned(seed[..., :1])) + unsigned(seed[..., 1:]))
    entry = unsigned(operands.dropout_batch) * np.uint32(0x9E3779B1) + unsigned(operands.dropout_head) * np.uint32(
        0x85EBCA77
    )
    row = _mix(_mix(stream + entry) + unsigned(query))
    key = unsigned(key)
    word = _mix(row + (key >> 1) * np.uint32(0x9E3779B1))
    bits = jnp.where(key & 1 == 1, word >> 16, word & 0xFFFF)
    return bits < dropout_threshold(spec.dropout_rate)


def _mix(x):
    """A bijection of uint32 that scatters its bits."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
