"""What of cuda/ is compiled for the host too: the geometry of masks, against masks.py, and the order of first keys."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_flash import masks
from jax_flash.spec import AttentionSpec, Operands

ROOT = Path(__file__).parent.parent
LONGEST = 40

lengths = st.integers(0, LONGEST)
sides = st.one_of(st.none(), st.integers(0, LONGEST), st.just(2**31 - 1))
offsets = st.one_of(st.integers(-LONGEST, LONGEST), st.sampled_from([-(2**30), 2**30]))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("pieces") / "pieces.so"
    source = str(Path(__file__).with_name("pieces.cc"))
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT}/cuda", source, "-o", library], check=True
    )
    for causal in (False, True):  # JAX compiles what masks.py needs here, not in the time of an example
        visible_pairs(causal, 1, 1, 0, LONGEST, LONGEST)
    return ctypes.CDLL(str(library))


def numbers(*values):
    return (ctypes.c_int * len(values))(*values)


def band(causal, left, right, offset, q_end, kv_end):
    """As pieces/mask.cuh has it: which sides are bounded, and the numbers."""
    to_right = 0 if causal else right or 0
    return numbers(left is not None, causal or right is not None), numbers(offset, left or 0, to_right, q_end, kv_end)


def visible_pairs(causal, left, right, offset, q_end, kv_end):
    """masks.py's answer for the first LONGEST queries and keys: bool [queries, keys]"""
    query, key = np.arange(LONGEST, dtype=np.int32)[:, None], np.arange(LONGEST, dtype=np.int32)
    operands = Operands(q_offset=np.int32(offset), q_lengths=np.int32(q_end), kv_lengths=np.int32(kv_end))
    with np.errstate(over="ignore"):
        sees = masks.visible(AttentionSpec(1.0, causal, left, right), operands, query, key)
    return np.broadcast_to(sees, (LONGEST, LONGEST))


def extent(flags):
    """The smallest range that holds all true flags."""
    (true,) = np.nonzero(flags)
    return (true[0], true[-1] + 1) if true.size else None


@given(st.booleans(), sides, sides, offsets, lengths, lengths)
def test_visible(pieces, causal, left, right, offset, q_end, kv_end):
    got = np.zeros((LONGEST, LONGEST), bool)
    pieces.visible(
        *band(causal, left, right, offset, q_end, kv_end), LONGEST, LONGEST, got.ctypes.data_as(ctypes.c_void_p)
    )
    np.testing.assert_array_equal(got, visible_pairs(causal, left, right, offset, q_end, kv_end))


@given(
    st.booleans(), sides, sides, offsets, lengths, lengths,
    st.integers(0, LONGEST - 1), st.integers(1, 9), st.integers(0, LONGEST - 1), st.integers(1, 9),
)  # fmt: skip
def test_tiles(pieces, causal, left, right, offset, q_end, kv_end, q0, queries, k0, keys):
    arguments = causal, left, right, offset, q_end, kv_end
    got = numbers(*[-1] * 13)
    pieces.tile(*band(*arguments), q0, queries, k0, keys, got)
    pairs = list(zip(got[:12:2], got[1:12:2], strict=True))
    sees = visible_pairs(*arguments)

    def holds(range_, flags, width=1):
        wanted = extent(flags)
        if wanted is None:
            assert range_[1] <= range_[0]
        else:
            assert range_ == (wanted[0] // width, -(-wanted[1] // width))

    holds(pairs[0], sees[q0 : q0 + queries].any(axis=0))
    holds(pairs[1], sees[:, k0 : k0 + keys].any(axis=1))
    holds(pairs[2], sees[q0 : q0 + queries].any(axis=0), keys)
    holds(pairs[3], sees[:, k0 : k0 + keys].any(axis=1), queries)
    if q0 + queries <= q_end:  # rows past the end are for the caller to drop
        whole = [sees[q0 : q0 + queries, i : i + keys].all() for i in range(0, kv_end - keys + 1, keys)]
        assert [pairs[4][0] <= i < pairs[4][1] for i in range(len(whole))] == whole
    seen = sees[:, k0 : k0 + keys].all(axis=1) & (k0 + keys <= kv_end)
    whole = [seen[i : i + queries].all() for i in range(0, q_end - queries + 1, queries)]
    assert [pairs[5][0] <= i < pairs[5][1] for i in range(len(whole))] == whole
    assert pairs[5][1] <= len(whole) or pairs[5][0] >= pairs[5][1]
    inside = q0 + queries <= q_end and k0 + keys <= kv_end  # LONGEST ends the array, not the tile
    assert got[12] == (inside and sees[q0 : q0 + queries, k0 : k0 + keys].all())


@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_segment_bounds(pieces, q_ids, kv_ids):
    bounds = numbers(min(q_ids), max(q_ids), min(kv_ids), max(kv_ids))
    same = np.equal.outer(q_ids, kv_ids)
    if same.any():
        assert pieces.ids_meet(bounds)
    assert bool(pieces.ids_are_one(bounds) & 1) == same.all()


@given(st.data(), st.integers(1, 60), st.integers(1, 20), st.integers(2, 6))
def test_first_keys_come_before_the_others(pieces, data, pairs, section, key_tiles):
    ahead = data.draw(st.integers(1, -(-pairs // section)))
    lead = data.draw(st.integers(1, ahead))
    places = np.full((pairs * key_tiles, 2), -1, np.int32)
    pieces.places_after_first_keys(ahead, lead, pairs, section, key_tiles, places.ctypes.data_as(ctypes.c_void_p))
    work = {(pair, tile): work for work, (pair, tile) in enumerate(places.tolist())}
    assert work.keys() == {(pair, tile) for pair in range(pairs) for tile in range(key_tiles)}
    for pair in range(pairs):
        assert all(work[pair, 0] < work[pair, tile] for tile in range(1, key_tiles))
