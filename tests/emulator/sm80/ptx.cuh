// cuda/sm80/ptx.cuh in C++.
#pragma once
#include "pieces/ptx.cuh"

namespace jf {

template <DType kType>
JF_DEVICE void mma(float* c, const u32 (&a)[4], u32 b0, u32 b1) {
  struct Lane {
    float* c;
    u32 a[4], b[2];
  } lane{c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::collective("mma", &lane, [](void* const* lanes) {
    const auto value = [](u32 word, int half) {
      const unsigned short bits = half ? word >> 16 : word & 0xffff;
      return emulator::to_float(static_cast<int>(kType), &bits);
    };
    float a[16][16], b[16][8];
    for (int i = 0; i < 32; i++) {
      const Lane& lane = *static_cast<Lane*>(lanes[i]);
      for (int half = 0; half < 2; half++) {
        const int k = i % 4 * 2 + half;
        for (int r = 0; r < 4; r++) a[i / 4 + r % 2 * 8][k + r / 2 * 8] = value(lane.a[r], half);
        for (int r = 0; r < 2; r++) b[k + 8 * r][i / 4] = value(lane.b[r], half);
      }
    }
    for (int i = 0; i < 32; i++) {
      float* c = static_cast<Lane*>(lanes[i])->c;
      for (int r = 0; r < 4; r++) {
        float sum = 0.f;
        for (int k = 0; k < 16; k++) sum += a[i / 4 + r / 2 * 8][k] * b[k][i % 4 * 2 + r % 2];
        c[r] += sum;
      }
    }
  });
}

JF_DEVICE void load_matrix_transposed(u32* r, u32 row) {
  emulated_matrices("ldmatrix.trans", row, r, 4, [](unsigned char* const* rows, int lane, u32& word) {
    word = *emulated_element(rows, lane % 4 * 2, lane / 4) | *emulated_element(rows, lane % 4 * 2 + 1, lane / 4) << 16;
  });
}

JF_DEVICE void copy_async(u32 shared, const void* global, bool valid) {
  unsigned char* to = emulator::shared_pointer(shared, 16);
  if (shared % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0)) {
    emulator::fail("cp.async: an address that is not aligned");
  }
  emulator::enqueue(emulator::Queue::kCopies, [=] { valid ? std::memcpy(to, global, 16) : std::memset(to, 0, 16); });
}
JF_DEVICE void commit_copies() { emulator::commit(emulator::Queue::kCopies); }
template <int kPending>
JF_DEVICE void wait_copies() {
  emulator::wait(emulator::Queue::kCopies, kPending);
}

JF_DEVICE void store_shared(u32 address, u32 value) { std::memcpy(emulator::shared_pointer(address, 4), &value, 4); }
JF_DEVICE uint4 load_shared_16(u32 address) {
  uint4 r;
  std::memcpy(&r, emulator::shared_pointer(address, 16), 16);
  return r;
}

}  // namespace jf
