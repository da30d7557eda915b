// Which (query, key) pair an accumulator register holds.
//
// mma.sync m16n8 and wgmma m64nN give a thread the same elements per warp: register i of a tile lies at row lane / 4 (+
// 8 if i & 2), column 2 * (lane % 4) + 8 * (i / 4) + (i & 1). The rows are queries for S = Q K^T and keys for S^T = K
// Q^T.
#pragma once
#include "pieces/math.cuh"

namespace jf {

constexpr JF_HOST_DEVICE int fragment_row(int i) { return (i >> 1) & 1; }  // which of the thread's two rows
constexpr JF_HOST_DEVICE int fragment_column(int i) {
  return (i >> 2) * 8 + (i & 1);
}  // columns past the thread's first

JF_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % 32; }

// The same value, of which the compiler does not know that all lanes have it: an FMA reads one number from a uniform
// register, and each further one would be copied first.
JF_DEVICE float per_lane(float x) {
  return __int_as_float(__float_as_int(x) + static_cast<int>(threadIdx.y));  // 0: blocks have one row
}

template <bool kTransposed>
struct Fragment {
  int row[2];  // index of the thread's two rows
  int column;  // index of the thread's first column

  JF_DEVICE int column_of(int i) const { return column + fragment_column(i); }
  JF_DEVICE int query(int i) const { return kTransposed ? column_of(i) : row[fragment_row(i)]; }
  JF_DEVICE int key(int i) const { return kTransposed ? row[fragment_row(i)] : column_of(i); }
};

// The fragment of the warp whose 16 rows begin at `row0` in a tile whose columns begin at `column0`.
template <bool kTransposed>
JF_DEVICE Fragment<kTransposed> warp_fragment(int row0, int column0) {
  const int row = row0 + lane_id() / 4;
  return {{row, row + 8}, column0 + 2 * (lane_id() % 4)};
}

// Over the four lanes that share a row.
JF_DEVICE float row_maximum(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
JF_DEVICE float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace jf
