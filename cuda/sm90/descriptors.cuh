// How wgmma is told where its operands lie in shared memory: the low word of a descriptor holds the address in units of
// 16 bytes and one stride, the high word the other stride and the swizzle.
#pragma once
#include "pieces/ptx.cuh"

namespace jf {

// Operands of wgmma in shared memory, as TMA writes them with the 128-byte swizzle: atoms of 8 rows x 128 bytes, rows
// packed. K-major: the product sums along the 128 bytes. A step along K adds its bytes to the address.
constexpr u32 kSwizzled8Rows = 1024 >> 4 | 1u << 30;
JF_DEVICE u64 descriptor_k_major(u32 address) { return join_words(address >> 4 | 1u << 16, kSwizzled8Rows); }
// MN-major (16-bit types): the product sums along the rows; the next 64 columns lie `column_stride` bytes on. A step of
// 16 along K adds 16 rows to the address.
JF_DEVICE u64 descriptor_mn_major(u32 address, u32 column_stride) {
  return join_words(address >> 4 | column_stride >> 4 << 16, kSwizzled8Rows);
}
// The descriptor of what lies `bytes` further on. Cheaper than a new one: an addition to its low word.
JF_DEVICE u64 descriptor_after(u64 descriptor, u32 bytes) {
  return join_words(static_cast<u32>(descriptor) + (bytes >> 4), kSwizzled8Rows);
}
// Where 16-byte chunk `chunk` (0 to 7) of row `row` stands in such a tile.
JF_DEVICE u32 swizzled_offset(u32 row, u32 chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

}  // namespace jf
