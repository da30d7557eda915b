// Elements of a mask or a bias, [*B, N, T, S], for the pairs of an accumulator fragment.
#pragma once
#include "pieces/fragment.cuh"

namespace jf {

// One (batch entry, head) of such an array; strides count elements, 0 where the array broadcasts.
struct Plane {
  const char* data;
  long long q_stride, k_stride;
  int q_len, kv_len;  // nothing is read past these
};

template <int kBytes>
JF_DEVICE Plane plane_of(const Problem& p, const Dense& dense, int b, int head) {
  const long long first = dense.batch(b) * dense.batch_stride + head * dense.head_stride;
  return {static_cast<const char*>(dense.data) + first * kBytes, dense.q_stride, dense.k_stride, p.q_len, p.kv_len};
}

template <int kBytes>
struct Words;
template <>
struct Words<1> {
  using One = unsigned char;
  using Two = unsigned short;
  JF_DEVICE static Two join(One a, One b) { return a | b << 8; }
  JF_DEVICE static One part(Two x, int i) { return i ? x >> 8 : x & 0xff; }
};
template <>
struct Words<2> {
  using One = unsigned short;
  using Two = u32;
  JF_DEVICE static Two join(One a, One b) { return a | static_cast<u32>(b) << 16; }
  JF_DEVICE static One part(Two x, int i) { return i ? x >> 16 : x & 0xffff; }
};
template <>
struct Words<4> {
  using One = u32;
  using Two = uint2;
  JF_DEVICE static Two join(One a, One b) { return {a, b}; }
  JF_DEVICE static One part(Two x, int i) { return i ? x.y : x.x; }
};

// Calls visit(i, two) for the registers i and i + 1 of N, neighbours in a row, with what belongs to them: one load
// where the row lies so in memory, as most of the time of a dense array goes into addresses. Pairs outside the lengths
// get some element inside: the band hides them.
template <int kBytes, int N, bool kTransposed, class Visit>
JF_DEVICE void for_each_pair(const Plane& plane, const Fragment<kTransposed>& at, Visit visit) {
  using One = typename Words<kBytes>::One;
  using Two = typename Words<kBytes>::Two;
  const long long row_stride = kTransposed ? plane.k_stride : plane.q_stride,
                  column_stride = kTransposed ? plane.q_stride : plane.k_stride;
  const int rows = kTransposed ? plane.kv_len : plane.q_len, columns = kTransposed ? plane.q_len : plane.kv_len;
  const char* row[2];
#pragma unroll
  for (int r = 0; r < 2; r++) row[r] = plane.data + min(at.row[r], rows - 1) * row_stride * kBytes;
  const int columns_end = at.column - lane_id() % 4 * 2 + 2 * N;  // of the warp
  const bool aligned = (reinterpret_cast<u64>(plane.data) | row_stride * kBytes) % (2 * kBytes) == 0;
  if (!kTransposed && column_stride == 1 && columns_end <= columns && aligned) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const Two* first = reinterpret_cast<const Two*>(row[fragment_row(i)] + at.column * kBytes);
      visit(i, __ldg(first + fragment_column(i) / 2));
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const auto element = [&](int column) {
        return __ldg(reinterpret_cast<const One*>(row[fragment_row(i)]) + min(column, columns - 1) * column_stride);
      };
      visit(i, Words<kBytes>::join(element(at.column_of(i)), element(at.column_of(i) + 1)));
    }
  }
}

// The same, to be looked at later.
template <int kBytes, int N>
struct DenseTile {
  typename Words<kBytes>::Two words[N / 2];

  template <bool kTransposed>
  JF_DEVICE void load(const Plane& plane, const Fragment<kTransposed>& at) {
    for_each_pair<kBytes, N>(plane, at, [&](int i, typename Words<kBytes>::Two two) { words[i / 2] = two; });
  }
};

}  // namespace jf
