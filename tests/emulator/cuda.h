// CUDA C++ as plain C++: included ahead of everything else that the emulator compiles.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __constant__
#define __shared__ thread_local  // a thread of the host is a multiprocessor
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (emulator::place().thread)
#define blockIdx (emulator::place().block)
#define blockDim (emulator::place().block_size)
#define gridDim (emulator::place().grid)

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct int2 {
  int x, y;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class A, class B>
auto min(A a, B b) {
  return a < b ? a : b;
}
template <class A, class B>
auto max(A a, B b) {
  return a < b ? b : a;
}

template <class To, class From>
To emulated_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline int __vimax3_s32(int a, int b, int c) { return max(max(a, b), c); }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T x) {
  *p = x;
}

inline int atomicAdd(int* to, int x) { return __atomic_fetch_add(to, x, __ATOMIC_SEQ_CST); }
inline float atomicAdd(float* to, float x) {
  unsigned* word = reinterpret_cast<unsigned*>(to);
  unsigned seen = __atomic_load_n(word, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(word, &seen, __float_as_uint(emulated_bits<float>(seen) + x), false,
                                      __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return emulated_bits<float>(seen);
}

inline void __syncthreads() { emulator::named_barrier("__syncthreads", 0, blockDim.x, true); }
inline void __syncwarp() {
  emulator::collective("__syncwarp", nullptr, [](void* const*) {});
}

// Each lane gets the value of the lane that it names.
template <class T>
T emulated_shuffle(const char* name, unsigned mask, T x, int from) {
  if (mask != ~0u) emulator::fail("%s of a part of a warp", name);
  struct Lane {
    T value;
    int from;
    T result;
  } lane{x, from, {}};
  emulator::collective(name, &lane, [](void* const* lanes) {
    for (int i = 0; i < 32; i++) {
      Lane& lane = *static_cast<Lane*>(lanes[i]);
      lane.result = static_cast<Lane*>(lanes[lane.from])->value;
    }
  });
  return lane.result;
}
template <class T>
T __shfl_sync(unsigned mask, T x, int lane) {
  return emulated_shuffle("__shfl_sync", mask, x, lane % 32);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits) {
  return emulated_shuffle("__shfl_xor_sync", mask, x, (threadIdx.x % 32) ^ bits);
}
inline unsigned emulated_ballot(const char* name, unsigned mask, bool x) {
  if (mask != ~0u) emulator::fail("%s of a part of a warp", name);
  unsigned bits = x;
  emulator::collective(name, &bits, [](void* const* lanes) {
    unsigned all = 0;
    for (int i = 0; i < 32; i++) all |= *static_cast<unsigned*>(lanes[i]) << i;
    for (int i = 0; i < 32; i++) *static_cast<unsigned*>(lanes[i]) = all;
  });
  return bits;
}
inline unsigned __ballot_sync(unsigned mask, bool x) { return emulated_ballot("__ballot_sync", mask, x); }
inline bool __any_sync(unsigned mask, bool x) { return emulated_ballot("__any_sync", mask, x) != 0; }
