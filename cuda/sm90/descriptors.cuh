// How wgmma is told where its operands lie in shared memory.
#pragma once
#include "pieces/ptx.cuh"

namespace jf {

// Operands of wgmma in shared memory, as TMA writes them with the 128-byte swizzle: atoms of 8 rows x 128 bytes, rows
// packed. K-major: the product sums along the 128 bytes. A step along K adds its bytes to the address.
JF_DEVICE u64 descriptor_k_major(u32 address) {
  return static_cast<u64>((address & 0x3ffff) >> 4) | 1ull << 16 | static_cast<u64>(1024 >> 4) << 32 | 1ull << 62;
}
// MN-major (16-bit types): the product sums along the rows; the next 64 columns lie `column_stride` bytes on. A step of
// 16 along K adds 16 rows to the address.
JF_DEVICE u64 descriptor_mn_major(u32 address, u32 column_stride) {
  return static_cast<u64>((address & 0x3ffff) >> 4) | static_cast<u64>(column_stride >> 4) << 16 |
         static_cast<u64>(1024 >> 4) << 32 | 1ull << 62;
}
// The descriptor of what lies `bytes` further on. Cheaper than a new one: an addition to its low word.
JF_DEVICE u64 descriptor_after(u64 descriptor, u32 bytes) {
  return (descriptor & ~0xffffffffull) | (static_cast<u32>(descriptor) + (bytes >> 4));
}
// Where 16-byte chunk `chunk` (0 to 7) of row `row` stands in such a tile.
JF_DEVICE u32 swizzled_offset(u32 row, u32 chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

}  // namespace jf
