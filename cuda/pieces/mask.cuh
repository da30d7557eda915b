// Geometry of masks: which pairs (query, key) of one batch entry are visible, and which tiles hold any.
//
//   Band      causality, window, offset and lengths: key j is visible to query i iff i + left <= j <= i + right, i <
//   q_end and
//             j < kv_end. Plain C++, compiled for the host too and tested there against jax_flash/masks.py.
//   Segments  ranges of segment ids per tile (support/segments.cuh) and the comparison of ids inside a tile.
//   hide_*    write -inf over the scores of invisible pairs of an accumulator fragment.
#pragma once
#include "spec.h"

namespace jf {

constexpr int kFar = (1 << 30) - 1;  // no sequence is longer; a shift of this size is unbounded

constexpr JF_HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
constexpr JF_HOST_DEVICE int larger(int a, int b) { return a < b ? b : a; }
constexpr JF_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Indices begin <= i < end; empty if end <= begin.
struct Range {
  int begin, end;
  constexpr JF_HOST_DEVICE int size() const { return larger(end - begin, 0); }
  constexpr JF_HOST_DEVICE bool contains(int i) const {
    return static_cast<unsigned>(i - begin) < static_cast<unsigned>(end - begin);  // one comparison; needs begin <= end
  }
};

constexpr JF_HOST_DEVICE Range meet(Range a, Range b) {
  const int begin = larger(a.begin, b.begin);
  return {begin, larger(begin, smaller(a.end, b.end))};
}

// The tiles of `width` that hold any index of the range.
constexpr JF_HOST_DEVICE Range tiles_of(Range r, int width) {
  return r.size() == 0 ? Range{0, 0} : Range{r.begin / width, (r.end - 1) / width + 1};
}

// kLeft, kRight: whether that side is bounded at all.
template <bool kLeft, bool kRight>
struct Band {
  int left, right;  // at most kFar in size
  int q_end, kv_end;

  // Keys visible to any of the queries [q0, q0 + count): the smallest range that holds them.
  constexpr JF_HOST_DEVICE Range keys_of(int q0, int count = 1) const {
    const int q1 = smaller(q0 + count, q_end);
    if (q0 >= q1) return {0, 0};
    return meet({0, kv_end}, {kLeft ? q0 + left : 0, kRight ? q1 + right : kv_end});
  }
  // Queries that see any of the keys [k0, k0 + count).
  constexpr JF_HOST_DEVICE Range queries_of(int k0, int count = 1) const {
    const int k1 = smaller(k0 + count, kv_end);
    if (k0 >= k1) return {0, 0};
    return meet({0, q_end}, {kRight ? k0 - right : 0, kLeft ? k1 - left : q_end});
  }
  constexpr JF_HOST_DEVICE bool visible(int q, int k) const { return q < q_end && keys_of(q).contains(k); }
  // Every pair of the tile is visible: it needs no masking.
  constexpr JF_HOST_DEVICE bool interior(int q0, int queries, int k0, int keys) const {
    return q0 + queries <= q_end && k0 + keys <= kv_end && (!kLeft || q0 + queries - 1 + left <= k0) &&
           (!kRight || k0 + keys - 1 <= q0 + right);
  }
  // The tiles of `width` keys all of whose pairs with the queries [q0, q0 + queries) are visible (as far as q_end lets
  // them).
  constexpr JF_HOST_DEVICE Range interior_tiles(int q0, int queries, int width) const {
    const int begin = kLeft ? larger(q0 + queries - 1 + left, 0) : 0,
              end = kRight ? smaller(q0 + 1 + right, kv_end) : kv_end;
    return {(begin + width - 1) / width, larger(end, 0) / width};
  }
  // Likewise the tiles of `width` queries, for the keys [k0, k0 + keys).
  constexpr JF_HOST_DEVICE Range interior_query_tiles(int k0, int keys, int width) const {
    if (k0 + keys > kv_end) return {0, 0};
    const int begin = kRight ? larger(k0 + keys - 1 - right, 0) : 0,
              end = kLeft ? smaller(k0 + 1 - left, q_end) : q_end;
    return meet({ceil_div(begin, width), kFar}, {0, larger(end, 0) / width});
  }
};

constexpr JF_HOST_DEVICE int bounded_shift(long long shift) {
  return static_cast<int>(shift < -kFar ? -kFar : (shift > kFar ? kFar : shift));
}

// Bounds of the band of a batch entry whose query i stands at key position i + offset. `right` is 0 for causal
// attention.
template <bool kLeft, bool kRight>
constexpr JF_HOST_DEVICE Band<kLeft, kRight> make_band(int offset, int left, int right, int q_end, int kv_end) {
  return {bounded_shift(static_cast<long long>(offset) - left), bounded_shift(static_cast<long long>(offset) + right),
          q_end, kv_end};
}

// Least and largest id of a tile. A tile without any (all of it past the length) meets nothing.
struct IdBounds {
  int low, high;
  constexpr JF_HOST_DEVICE bool meets(IdBounds other) const { return low <= other.high && other.low <= high; }
  constexpr JF_HOST_DEVICE bool same_single_id(IdBounds other) const {
    return low == high && other.low == low && other.high == low;
  }
};

}  // namespace jf

#ifdef __CUDACC__
#include "pieces/dense.cuh"

namespace jf {

// The same value in every lane, said so that the compiler keeps it, and what follows from it, in uniform registers.
JF_DEVICE int uniform(int x) { return __shfl_sync(~0u, x, 0); }
JF_DEVICE Range uniform(Range r) { return {uniform(r.begin), uniform(r.end)}; }

using CallBand = Band<kSpec.window_left, kSpec.causal || kSpec.window_right>;

JF_DEVICE int q_offset_of(const Features& f, int b) { return kSpec.q_offset ? *row_of<int>(f.q_offset, b) : 0; }

JF_DEVICE CallBand band_of(const Problem& p, const Features& f, int b) {
  int q_end = p.q_len, kv_end = p.kv_len;
  if constexpr (kSpec.q_lengths) q_end = min(q_end, max(*row_of<int>(f.q_lengths, b), 0));
  if constexpr (kSpec.kv_lengths) kv_end = min(kv_end, max(*row_of<int>(f.kv_lengths, b), 0));
  const int right = !kSpec.window_right ? 0 : (kSpec.causal ? min(p.window_right, 0) : p.window_right);
  return make_band < kSpec.window_left,
         kSpec.causal || kSpec.window_right > (q_offset_of(f, b), p.window_left, right, q_end, kv_end);
}

template <bool kTransposed, int N>
JF_DEVICE void hide_outside_band(float (&s)[N], const Fragment<kTransposed>& at, const CallBand& band) {
  Range visible[2];
#pragma unroll
  for (int r = 0; r < 2; r++) visible[r] = kTransposed ? band.queries_of(at.row[r]) : band.keys_of(at.row[r]);
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (!visible[fragment_row(i)].contains(at.column_of(i))) s[i] = -infinity();
  }
}

// The ids of one batch entry, and where ids end: none is read at or past that.
struct Segments {
  const int* q_ids;
  const int* kv_ids;
  int q_end, kv_end;
};

JF_DEVICE Segments segments_of(const Problem& p, const Features& f, const CallBand& band, int b) {
  return {row_of<int>(f.q_segment_ids, b, p.q_len), row_of<int>(f.kv_segment_ids, b, p.kv_len), band.q_end,
          band.kv_end};
}

template <bool kTransposed, int N, class IdsOfPair>
JF_DEVICE void hide_unequal(float (&s)[N], const Fragment<kTransposed>& at, const int (&row_id)[2], IdsOfPair ids) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const int2 pair = ids(at.column_of(i));
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (pair.x != row_id[r]) s[i + 2 * r] = -infinity();
      if (pair.y != row_id[r]) s[i + 2 * r + 1] = -infinity();
    }
  }
}

// Pairs past the ends stay as they are: the band hides them. kInPairs: reads two ids at a time where they lie so, which
// takes fewer registers for many columns and more for few.
template <bool kInPairs = true, bool kTransposed, int N>
JF_DEVICE void hide_other_segments(float (&s)[N], const Fragment<kTransposed>& at, const Segments& segments) {
  const int* row_ids = kTransposed ? segments.kv_ids : segments.q_ids;
  const int* column_ids = kTransposed ? segments.q_ids : segments.kv_ids;
  const int rows = kTransposed ? segments.kv_end : segments.q_end,
            columns = kTransposed ? segments.q_end : segments.kv_end;
  int id[2];
#pragma unroll
  for (int r = 0; r < 2; r++) id[r] = __ldg(row_ids + min(at.row[r], rows - 1));
  if (kInPairs && (reinterpret_cast<u64>(column_ids) | 4 * columns) % 8 == 0) {
    hide_unequal(s, at, id, [&](int column) {
      return __ldg(reinterpret_cast<const int2*>(column_ids + min(column, columns - 2)));
    });
  } else {
    hide_unequal(s, at, id, [&](int column) {
      return int2{__ldg(column_ids + min(column, columns - 1)), __ldg(column_ids + min(column + 1, columns - 1))};
    });
  }
}

// Masks hold 0 or 1: two of them hide registers i and i + 1.
template <int N>
JF_DEVICE void hide_masked(float (&s)[N], int i, unsigned short two) {
#pragma unroll
  for (int c = 0; c < 2; c++) {
    if (!Words<1>::part(two, c)) s[i + c] = -infinity();
  }
}

template <bool kTransposed, int N>
JF_DEVICE void hide_masked(float (&s)[N], const Fragment<kTransposed>& at, const Problem& p, const Features& f, int b,
                           int head) {
  for_each_pair<1, N>(plane_of<1>(p, f.mask, b, head), at, [&](int i, unsigned short two) { hide_masked(s, i, two); });
}

}  // namespace jf
#endif
