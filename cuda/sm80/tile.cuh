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
  // What a lane gives ldmatrix for the four matrices of a 16 x 16 block at row `row0`, chunk 0: rows 0-7 and 8-15 of
  // the left chunk, then of the right one ...
  JF_DEVICE static u32 lanes_by_column(int row0) { return offset(row0 + lane_id() % 16, lane_id() / 16); }
  // ... or the left and the right chunk of rows 0-7, then of rows 8-15.
  JF_DEVICE static u32 lanes_by_row(int row0) {
    return offset(row0 + lane_id() % 8 + lane_id() / 16 * 8, lane_id() / 8 % 2);
  }
};

// Copies a tile of kRows rows: row r from source(r), for r < valid; the others, and columns from kUsed on, become
// zeros. A thread asks for its rows in ascending order, kThreads / T::kLanes apart, and for invalid ones too.
template <class T, int kRows, int kUsed, int kThreads, class Source>
JF_DEVICE void copy_tile(u32 shared, int valid, Source source) {
  constexpr int kStep = kThreads / T::kLanes;  // rows copied at a time
  static_assert(kStep % 8 == 0, "all rows of a thread have the same permutation");
  const int row = static_cast<int>(threadIdx.x) / T::kLanes, chunk = static_cast<int>(threadIdx.x) % T::kLanes;
  const u32 target = shared + T::offset(row, chunk);
#pragma unroll
  for (int r = 0; r < kRows; r += kStep) {
    if (kRows % kStep != 0 && r + row >= kRows) break;
    const char* from = source(r + row) + 16 * chunk;
#pragma unroll
    for (int c = 0; c < T::kChunks; c += T::kLanes) {
      const bool used = 8 * (c + T::kLanes) <= kUsed || 8 * (c + chunk) < kUsed;
      copy_async(target + r * T::kRowBytes + 16 * c, from + 16 * c, r + row < valid && used);
    }
  }
}

// Rows of one (batch entry, head) in a [batch, length, heads, size] array of 16-bit elements.
struct HeadRows {
  const char* data;
  long long row_bytes;
  JF_DEVICE const char* operator()(int row) const { return data + row * row_bytes; }
  // The same rows of the head that stands `heads` after this one.
  JF_DEVICE HeadRows of_head(int heads, int size) const { return {data + 2 * heads * size, row_bytes}; }
};
JF_DEVICE HeadRows head_rows(const void* data, int batch, int length, int heads, int head, int size) {
  return {static_cast<const char*>(data) + 2 * ((static_cast<long long>(batch) * length * heads + head) * size),
          2LL * heads * size};
}

// Copies rows [first, first + kRows) of an array, of which those from `end` on do not exist.
template <class T, int kRows, int kUsed, int kThreads>
JF_DEVICE void load_tile(u32 shared, const HeadRows& rows, int first, int end) {
  const char* next = rows(first + static_cast<int>(threadIdx.x) / T::kLanes);
  copy_tile<T, kRows, kUsed, kThreads>(shared, end - first, [&](int) {
    const char* row = next;
    next += kThreads / T::kLanes * rows.row_bytes;
    return row;
  });
}

// Operands of mma from a tile in shared memory, as 16 x 16 blocks: block (i, k) is the i-th of this warp along the rows
// of A (the columns of B), the k-th along the summed axis. A warp's blocks are kStride apart, beginning at block
// `first`. kAlongRows: the summed axis runs down the rows of the tile (it is stored as the transpose of A, as B
// itself); else along its columns.
template <class T, bool kAlongRows, int kStride, bool kIsA>
struct Operand {
  u32 address;

  JF_DEVICE Operand(u32 tile, int first) {
    const u32 lanes = kIsA == kAlongRows ? T::lanes_by_row(0) : T::lanes_by_column(0);
    address = kAlongRows ? T::advance(tile + lanes, 2 * first) : tile + lanes + first * 16 * T::kRowBytes;
  }
  JF_DEVICE void load(u32 (&r)[4], int i, int k) const {
    const int row_block = kAlongRows ? k : i * kStride, column_block = kAlongRows ? i * kStride : k;
    const u32 block = T::advance(address, 2 * column_block) + row_block * 16 * T::kRowBytes;
    if constexpr (kAlongRows) {
      load_matrix_transposed(r, block);
    } else {
      load_matrix(r, block);
    }
  }
};
template <class T, bool kAlongRows, int kStride = 1>
using OperandA = Operand<T, kAlongRows, kStride, true>;
template <class T, bool kAlongRows, int kStride = 1>
using OperandB = Operand<T, kAlongRows, kStride, false>;

// A from registers: an accumulator of 16 x 16 blocks, rounded to 16 bits on the way.
template <DType kType, int M, int K>
struct Rounded {
  const float (&x)[M][K];

  JF_DEVICE void load(u32 (&r)[4], int i, int k) const {
#pragma unroll
    for (int j = 0; j < 4; j++) r[j] = pack<kType>(x[i][8 * k + 2 * j], x[i][8 * k + 2 * j + 1]);
  }
};
template <DType kType, int M, int K>
JF_DEVICE Rounded<kType, M, K> rounded(const float (&x)[M][K]) {
  return {x};
}

// c[m] += A B for 16 rows at a time and N / 8 blocks of 16 columns: registers 8 n .. 8 n + 7 of c[m] are block (m, n).
template <DType kType, int kSteps, int M, int N, class A, class B>
JF_DEVICE void multiply(float (&c)[M][N], const A& a, const B& b) {
#pragma unroll
  for (int k = 0; k < kSteps; k++) {
    u32 rows[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) a.load(rows[m], m, k);
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
      u32 columns[4];
      b.load(columns, n, k);
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma<kType>(&c[m][8 * n], rows[m], columns[0], columns[1]);
        mma<kType>(&c[m][8 * n + 4], rows[m], columns[2], columns[3]);
      }
    }
  }
}

template <int M, int N>
JF_DEVICE void clear(float (&c)[M][N]) {
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int i = 0; i < N; i++) c[m][i] = 0.f;
  }
}

// Stores `count` rows of a tile, from row `first` on, to rows of an array from row `to` on; thread `thread` of
// kThreads.
template <class T, int kUsed, int kThreads>
JF_DEVICE void store_rows(u32 tile, int first, const HeadRows& rows, int to, int count, int thread) {
  for (int r = thread / T::kLanes; r < count; r += kThreads / T::kLanes) {
    for (int c = thread % T::kLanes; c < kUsed / 8; c += T::kLanes) {
      *reinterpret_cast<uint4*>(const_cast<char*>(rows(to + r)) + 16 * c) =
          load_shared_16(tile + T::offset(first + r, c));
    }
  }
}

// Where block `index` of a grid stands whose blocks are numbered in sections of (batch entry, head) pairs, tile by tile
// inside one.
struct TilePlace {
  int tile, pair;
};
JF_DEVICE TilePlace place_in_sections(int index, int pairs, int tiles, int section) {
  const int first = index / (section * tiles) * section, width = min(section, pairs - first),
            within = index % (section * tiles);
  return {within / width, first + within % width};
}

}  // namespace jf
