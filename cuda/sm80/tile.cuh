// Tiles of 16-bit elements in shared memory: rows of kColumns, 16-byte chunks permuted within the row by XOR, so that
// both the copies (along a row) and ldmatrix (down eight rows) touch all 32 banks.
#pragma once
#include "pieces/fragment.cuh"
#include "sm80/ptx.cuh"

namespace jf {

template <int kColumns>
struct Tile {
  static_assert(kColumns % 32 == 0, "chunks come in groups of four");
  static constexpr int kRowBytes = 2 * kColumns;
  static constexpr int kChunks = kColumns / 8;
  static constexpr bool kWide = kChunks % 8 == 0;  // rows are whole 128-byte lines
  static constexpr int kMask = kWide ? 7 : 3;      // bits of the chunk index that are permuted
  static constexpr int kLanes = kMask + 1;         // lanes that copy one row side by side

  JF_DEVICE static u32 offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (kWide ? row & 7 : (row >> 1) & 3)) << 4);
  }
  // From the address of chunk 0 or 1 of a row to the chunk `chunks` further on; chunks is even and known at compile
  // time.
  JF_DEVICE static u32 advance(u32 address, int chunks) {
    return (address ^ ((chunks & kMask) << 4)) + ((chunks & ~kMask) << 4);
  }
  // What a lane gives ldmatrix for 16 rows x 2 chunks: matrices in the order (rows 0-7, 8-15) of chunk 0, then of
  // chunk 1. This is the A operand [row, k]; transposed, the B operand of two column blocks with k along the rows.
  JF_DEVICE static u32 lane_offset(int row0) { return offset(row0 + lane_id() % 16, lane_id() / 16); }
  // Chunks 0 and 1 of rows 0-7, then of rows 8-15: the B operand of two column blocks whose columns are the rows here;
  // transposed, the A operand with k along the rows.
  JF_DEVICE static u32 lane_offset_columns(int row0) {
    return offset(row0 + lane_id() % 8 + lane_id() / 16 * 8, lane_id() / 8 % 2);
  }
};

// Copies a tile of kRows rows: row r from row_pointer(r), for r < valid; the others, and columns from kUsed on, become
// zeros.
template <int kRows, int kColumns, int kUsed, int kThreads, class RowPointer>
JF_DEVICE void load_tile(u32 shared, int valid, RowPointer row_pointer) {
  using T = Tile<kColumns>;
  constexpr int kStep = kThreads / T::kLanes;  // rows copied at a time
  static_assert(kStep % 8 == 0, "all rows of a thread have the same permutation");
  const int lane_row = static_cast<int>(threadIdx.x) / T::kLanes,
            lane_chunk = static_cast<int>(threadIdx.x) % T::kLanes;
  const u32 target = shared + T::offset(lane_row, lane_chunk);
#pragma unroll
  for (int r = 0; r < kRows; r += kStep) {
    if (kRows % kStep != 0 && r + lane_row >= kRows) break;
    const bool in = r + lane_row < valid;
    const char* source = static_cast<const char*>(row_pointer(in ? r + lane_row : 0));
#pragma unroll
    for (int c = 0; c < T::kChunks; c += T::kLanes) {
      const bool used = kUsed == kColumns || (c + lane_chunk) * 8 < kUsed;
      copy_async(target + r * T::kRowBytes + c * 16, source + (used ? (c + lane_chunk) * 16 : 0), in && used);
    }
  }
}

// Rows of one (batch entry, head) in a [batch, length, heads, size] array of 16-bit elements.
struct HeadRows {
  const char* data;
  long long row_bytes;
  JF_DEVICE const char* operator()(int row) const { return data + row * row_bytes; }
};
JF_DEVICE HeadRows head_rows(const void* data, int batch, int length, int heads, int head, int size) {
  return {static_cast<const char*>(data) + 2 * ((static_cast<long long>(batch) * length * heads + head) * size),
          2LL * heads * size};
}

}  // namespace jf
