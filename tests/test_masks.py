"""Masks: each predicate, and the tiles that may be skipped for it."""

from __future__ import annotations

import dataclasses

import cases
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flash import masks, xla
from jax_flash.masks import Tiling
from jax_flash.spec import AttentionSpec, Operands


def visible(spec: AttentionSpec, operands: Operands, t: int, s: int) -> np.ndarray:
    """[*B, K, G, T, S]"""
    query, key = np.arange(t, dtype=np.int32)[:, None], np.arange(s, dtype=np.int32)[None]
    sees = masks.visible(spec, operands, query, key)
    return np.broadcast_to(True if sees is None else sees, (*np.shape(sees)[:-2], t, s))


def picture(spec: AttentionSpec, t: int, s: int, **operands) -> list[str]:
    sees = visible(spec, Operands(**operands), t, s)
    return ["".join(".x"[int(x)] for x in row) for row in sees.reshape(t, s)]


def test_causal_starts_at_the_top_left():
    assert picture(AttentionSpec(1.0, causal=True), 3, 4) == ["x...", "xx..", "xxx."]


def test_offset_moves_the_queries_along_the_keys():
    assert picture(AttentionSpec(1.0, causal=True), 3, 4, q_offset=np.int32(1)) == ["xx..", "xxx.", "xxxx"]
    assert picture(AttentionSpec(1.0, causal=True), 3, 4, q_offset=np.int32(-1)) == ["....", "x...", "xx.."]


def test_window_counts_keys_on_either_side():
    assert picture(AttentionSpec(1.0, window_left=1), 3, 4) == ["xxxx", "xxxx", ".xxx"]
    assert picture(AttentionSpec(1.0, window_right=1), 3, 4) == ["xx..", "xxx.", "xxxx"]
    assert picture(AttentionSpec(1.0, window_left=0, window_right=0), 3, 4) == ["x...", ".x..", "..x."]
    huge = 2**40  # more than an index can hold
    assert picture(AttentionSpec(1.0, window_left=huge, window_right=huge), 2, 2) == ["xx", "xx"]


def test_segments_and_lengths():
    ids = {"q_segment_ids": np.array([[0], [0], [2]]), "kv_segment_ids": np.array([[0, 2, 2, 1]])}
    assert picture(AttentionSpec(1.0), 3, 4, **ids) == ["x...", "x...", ".xx."]
    assert picture(AttentionSpec(1.0), 3, 4, q_lengths=np.int32(2), kv_lengths=np.int32(3)) == ["xxx.", "xxx.", "...."]


@st.composite
def masked_case(draw) -> cases.Case:
    case = cases.any_case(lambda options: draw(st.sampled_from(options)), longest=20)
    lengths = st.sampled_from([0, 1, 9, 20])  # few shapes: compiling for them takes most of the time
    return dataclasses.replace(case, q_len=draw(lengths), kv_len=draw(lengths))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(masked_case(), st.sampled_from([1, 4, 7]), st.sampled_from([1, 5, 8]))
def test_skipped_tiles_hold_no_visible_pair(case, q_size, k_size):
    if 0 in (case.q_len, case.kv_len, *case.batch):
        return
    spec, *_, operands, _, _ = case.inputs()
    operands = xla._score_layout(operands, len(case.batch), (case.kv_heads, case.q_heads // case.kv_heads))
    q_tiles = Tiling(case.q_len, min(q_size, case.q_len))
    k_tiles = Tiling(case.kv_len, min(k_size, case.kv_len))
    sees = visible(spec, operands, case.q_len, case.kv_len).reshape(-1, case.q_len, case.kv_len).any(0)
    meets = masks.tiles_meet(spec, operands, q_tiles, k_tiles)
    meets = np.ones((q_tiles.count, k_tiles.count), bool) if meets is None else np.asarray(meets)
    ranges = [np.stack(masks.span(meets, axis)) for axis in (0, 1)]
    for i in range(q_tiles.count):
        for j in range(k_tiles.count):
            q_start, k_start = int(q_tiles.start(i)), int(k_tiles.start(j))
            if sees[q_start : q_start + q_tiles.size, k_start : k_start + k_tiles.size].any():
                assert meets[i, j]
            if meets[i, j]:
                assert ranges[0][0, j] <= i < ranges[0][1, j] and ranges[1][0, i] <= j < ranges[1][1, i]


@pytest.mark.parametrize(
    ("spec", "operands", "expected"),
    [
        (AttentionSpec(1.0, causal=True), {}, ["x....", "xx...", "xxx..", "xxxx."]),
        (AttentionSpec(1.0, causal=True, window_left=9), {}, ["x....", "xx...", ".xx..", "..xx."]),
        (AttentionSpec(1.0, window_right=10), {}, ["xx...", "xxx..", "xxxx.", "xxxxx"]),
        (AttentionSpec(1.0, causal=True), {"q_offset": np.array([[[[-10]]]])}, [".....", "x....", "xx...", "xxx.."]),
        (AttentionSpec(1.0), {"kv_lengths": np.array([[[[11]]]])}, ["xx...", "xx...", "xx...", "xx..."]),
        (AttentionSpec(1.0), {"q_lengths": np.array([[[[10]]]])}, ["xxxxx", ".....", ".....", "....."]),
    ],
)
def test_tiles_without_a_visible_pair_are_skipped(spec, operands, expected):
    meets = masks.tiles_meet(spec, Operands(**operands), Tiling(40, 10), Tiling(50, 10))
    assert ["".join(".x"[int(x)] for x in row) for row in meets] == expected


def test_packed_sequences_meet_only_themselves():
    ids = np.repeat(np.arange(5), 10)
    operands = Operands(q_segment_ids=ids.reshape(1, 1, 50, 1), kv_segment_ids=ids.reshape(1, 1, 1, 50))
    meets = masks.tiles_meet(AttentionSpec(1.0), operands, Tiling(50, 10), Tiling(50, 10))
    np.testing.assert_array_equal(meets, np.eye(5, dtype=bool))


def test_span_of_nothing_is_empty():
    meets = np.array([[False, False, False], [False, True, False], [True, False, True]])
    first, end = masks.span(meets, axis=1)
    assert list(zip(first.tolist(), end.tolist(), strict=True)) == [(0, 0), (1, 2), (0, 3)]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 1 - 1e-9])
def test_dropout_keeps_its_share_and_the_expected_value(rate):
    n = 400
    operands = Operands(
        dropout_seed=np.array([7, 11], np.uint32).reshape(1, 1, 1, 2),
        dropout_batch=np.zeros((1, 1, 1, 1), np.int32),
        dropout_head=np.zeros((1, 1, 1, 1), np.int32),
    )
    query, key = np.arange(n, dtype=np.int32)[:, None], np.arange(n, dtype=np.int32)[None]
    kept = np.asarray(
        jax.jit(masks.dropout_keeps, static_argnums=0)(AttentionSpec(1.0, dropout_rate=rate), operands, query, key)
    )
    threshold = masks.dropout_threshold(rate)
    share = threshold / 65536
    assert abs(share - (1 - rate)) <= 1 / 65536
    deviation = (share * (1 - share) / kept.size) ** 0.5
    assert abs(kept.mean() - share) < 4 * deviation
    for axis in (-1, -2):  # neighbours are independent
        both = np.take(kept, range(0, n, 2), axis) & np.take(kept, range(1, n, 2), axis)
        assert abs(both.mean() - share**2) < 6 * deviation


def test_dropout_bits_never_change():
    """Worked out from the formula once: every path, version and sharding must keep the same pairs."""
    spec = AttentionSpec(1.0, dropout_rate=0.5)
    query, key = np.arange(4, dtype=np.int32)[:, None], np.arange(5, dtype=np.int32)[None]
    seed = np.array([1, 2], np.uint32).reshape(1, 1, 1, 2)
    batch, head = np.full((1, 1, 1, 1), 3, np.int32), np.full((1, 1, 1, 1), 4, np.int32)
    operands = Operands(dropout_seed=seed, dropout_batch=batch, dropout_head=head)
    kept = masks.dropout_keeps(spec, operands, query, key)[0, 0]
    assert ["".join(".x"[int(x)] for x in row) for row in kept] == ["x....", "xxx.x", "..xxx", "...x."]
