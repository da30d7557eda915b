// cuda/sm90/ptx.cuh in C++.
#pragma once
#include "sm90/descriptors.cuh"
#include "tensor_map.h"

namespace jf {

JF_DEVICE void barrier_init(u32 barrier, u32 arrivals) { emulator::mbarrier_init(barrier, arrivals); }
JF_DEVICE void barrier_init_fence() {}
JF_DEVICE void barrier_arrive(u32 barrier) { emulator::mbarrier_arrive(barrier, 0); }
JF_DEVICE void barrier_arrive_expect(u32 barrier, u32 bytes) { emulator::mbarrier_arrive(barrier, bytes); }
JF_DEVICE void barrier_wait(u32 barrier, u32 parity) { emulator::mbarrier_wait(barrier, parity); }

JF_DEVICE void named_sync(int id, int threads) { emulator::named_barrier("bar.sync", id, threads, true); }
JF_DEVICE void named_arrive(int id, int threads) { emulator::named_barrier("bar.arrive", id, threads, false); }

template <int kCount>
JF_DEVICE void registers_release() {
  emulator::collective("setmaxnreg.dec", nullptr, [](void* const*) {});
}
template <int kCount>
JF_DEVICE void registers_acquire() {
  emulator::collective("setmaxnreg.inc", nullptr, [](void* const*) {});
}

JF_DEVICE void tma_prefetch(const TensorMap&) {}
JF_DEVICE void tma_load(u32 to, const TensorMap& map, u32 barrier, int c0, int c1, int c2, int c3) {
  emulator::tensor_load(to, &map, barrier, {c0, c1, c2, c3});
}
JF_DEVICE void tma_load_once(u32 to, const TensorMap& map, u32 barrier, int c0, int c1, int c2, int c3) {
  tma_load(to, map, barrier, c0, c1, c2, c3);
}
JF_DEVICE void tma_store(const TensorMap& map, u32 from, int c0, int c1, int c2, int c3) {
  emulator::tensor_store(&map, from, {c0, c1, c2, c3});
}
JF_DEVICE void bulk_load(u32 to, const void* from, u32 bytes, u32 barrier) {
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0) {
    emulator::fail("cp.async.bulk: not aligned to 16 bytes");
  }
  unsigned char* target = emulator::shared_pointer(to, bytes);
  emulator::in_background([=] {
    std::memcpy(target, from, bytes);
    emulator::mbarrier_complete(barrier, bytes);
  });
}
JF_DEVICE void bulk_commit() { emulator::commit(emulator::Queue::kStores); }
template <int kPending>
JF_DEVICE void bulk_wait_read() {
  emulator::wait(emulator::Queue::kStores, kPending);
}
template <int kPending>
JF_DEVICE void bulk_wait() {
  emulator::wait(emulator::Queue::kStores, kPending);
}

JF_DEVICE void await_flag(const int* flag, int value) {
  while (__atomic_load_n(flag, __ATOMIC_ACQUIRE) != value) emulator::yield();
}
JF_DEVICE void pass_flag(int* flag, int value) { __atomic_store_n(flag, value, __ATOMIC_RELEASE); }
JF_DEVICE int count_up(int* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL); }
JF_DEVICE void store_zeros_16(u32 to) { std::memset(emulator::shared_pointer(to, 16), 0, 16); }
JF_DEVICE void async_fence() {}

JF_DEVICE void store_matrix(u32 row, u32 r0, u32 r1, u32 r2, u32 r3) {
  u32 r[4] = {r0, r1, r2, r3};
  emulated_matrices("stmatrix", row, r, 4, [](unsigned char* const* rows, int lane, u32& word) {
    *emulated_element(rows, lane / 4, lane % 4 * 2) = word & 0xffff;
    *emulated_element(rows, lane / 4, lane % 4 * 2 + 1) = word >> 16;
  });
}
JF_DEVICE void emulated_store_transposed(u32 row, u32* r, int tiles) {
  emulated_matrices("stmatrix.trans", row, r, tiles, [](unsigned char* const* rows, int lane, u32& word) {
    *emulated_element(rows, lane % 4 * 2, lane / 4) = word & 0xffff;
    *emulated_element(rows, lane % 4 * 2 + 1, lane / 4) = word >> 16;
  });
}
JF_DEVICE void store_matrix_transposed(u32 row, u32 r0, u32 r1, u32 r2, u32 r3) {
  u32 r[4] = {r0, r1, r2, r3};
  emulated_store_transposed(row, r, 4);
}
JF_DEVICE void store_matrix_transposed(u32 row, u32 r0, u32 r1) {
  u32 r[2] = {r0, r1};
  emulated_store_transposed(row, r, 2);
}

JF_DEVICE void wgmma_fence() { emulator::wgmma_fence(); }
JF_DEVICE void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending>
JF_DEVICE void wgmma_wait() {
  emulator::wgmma_wait(kPending);
}
JF_DEVICE void hold_waits(bool) {}
template <class T, int N>
JF_DEVICE void pin(T (&)[N]) {}

JF_DEVICE float fma_ordered(float a, float b, float c) { return fmaf(a, b, c); }
JF_DEVICE float add_ordered(float a, float b) { return a + b; }
JF_DEVICE float exp2_ordered(float x) { return exp2_fast(x); }
JF_DEVICE u32 pack_e4m3_ordered(const float* x) { return pack_e4m3(x[0], x[1], x[2], x[3]); }

template <DType kType, bool kTransposeA = false, bool kTransposeB = false, class Sum, int N>
JF_DEVICE void wgmma(Sum (&d)[N], u64 a, u64 b, bool accumulate) {
  emulator::wgmma({d, nullptr, a, b, static_cast<int>(kType), 2 * N, accumulate, kTransposeA, kTransposeB});
}
template <DType kType, bool kTransposeB = false, int N>
JF_DEVICE void wgmma(float (&d)[N], const u32* a, u64 b, bool accumulate) {
  emulator::wgmma({d, a, 0, b, static_cast<int>(kType), 2 * N, accumulate, false, kTransposeB});
}

}  // namespace jf
