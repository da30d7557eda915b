// cuda/pieces/ptx.cuh in C++.
#pragma once
#include "spec.h"

#define JF_DEVICE __device__ __forceinline__

extern thread_local unsigned char dynamic_shared[];

namespace jf {

using u32 = unsigned int;
using u64 = unsigned long long;

JF_DEVICE float exp2_fast(float x) { return exp2f(x); }
JF_DEVICE float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }
JF_DEVICE float log2_fast(float x) { return log2f(x); }
JF_DEVICE float reciprocal(float x) { return 1.f / x; }

template <DType kType>
JF_DEVICE u32 pack(float low, float high) {
  return emulator::pack16(static_cast<int>(kType), low, high);
}
JF_DEVICE float half_to_float(unsigned short bits) { return emulator::to_float(static_cast<int>(DType::kF16), &bits); }
JF_DEVICE u32 pack_e4m3(float a, float b, float c, float d) { return emulator::pack_e4m3(a, b, c, d); }
JF_DEVICE u32 pack_int8(float a, float b, float c, float d) { return emulator::pack_int8(a, b, c, d); }

JF_DEVICE u32 bounded_bf16x2(u32 pair, u32 bound) {
  const auto bounded = [](u32 x, u32 bound) {
    const u32 size = x & 0x7fff, most = bound & 0x7fff;
    return size > 0x7f80 || size < most ? x : most | (x ^ bound) & 0x8000;
  };
  return bounded(pair & 0xffff, bound & 0xffff) | bounded(pair >> 16, bound >> 16) << 16;
}

JF_DEVICE u32 shared_address(const void* p) { return emulator::shared_address(p); }

// Rows of 16 bytes of the 8 x 8 tiles that the lanes name, as 32-bit words: word(tile, row, pair of columns).
template <class Visit>
JF_DEVICE void emulated_matrices(const char* name, u32 row, u32* r, int tiles, Visit visit) {
  struct Lane {
    u32 row;
    u32* r;
  } lane{row, r};
  emulator::collective(name, &lane, [=](void* const* lanes) {
    const auto at = [&](int i) { return *static_cast<Lane*>(lanes[i]); };
    for (int tile = 0; tile < tiles; tile++) {
      unsigned char* rows[8];
      for (int i = 0; i < 8; i++) {
        if (at(8 * tile + i).row % 16 != 0) emulator::fail("%s: a row that is not aligned", name);
        rows[i] = emulator::shared_pointer(at(8 * tile + i).row, 16);
      }
      for (int i = 0; i < 32; i++) visit(rows, i, at(i).r[tile]);
    }
  });
}
// Half-words of the tile that lane `lane` holds as one register.
JF_DEVICE unsigned short* emulated_element(unsigned char* const* rows, int row, int column) {
  return reinterpret_cast<unsigned short*>(rows[row]) + column;
}

JF_DEVICE void load_matrix(u32* r, u32 row) {
  emulated_matrices("ldmatrix", row, r, 4, [](unsigned char* const* rows, int lane, u32& word) {
    word = *emulated_element(rows, lane / 4, lane % 4 * 2) | *emulated_element(rows, lane / 4, lane % 4 * 2 + 1) << 16;
  });
}

JF_DEVICE u64 join_words(u32 low, u32 high) { return static_cast<u64>(high) << 32 | low; }

template <class T>
JF_DEVICE T afresh(T x) {
  return x;
}

JF_DEVICE void global_add(float* to, float4 x) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulator::fail("red.v4: an address that is not aligned");
  const float parts[4] = {x.x, x.y, x.z, x.w};
  for (int i = 0; i < 4; i++) atomicAdd(to + i, parts[i]);
}

JF_DEVICE void dependency_wait() {}  // kernels run one after the other here
JF_DEVICE void dependents_launch() {}

}  // namespace jf
