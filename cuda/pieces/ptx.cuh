// Instructions that kernels of every architecture use, as functions. All assembly of cuda/ stands in the three ptx.cuh
// (here, sm80/, sm90/); tests/emulator/ has the same functions in C++, which run without a GPU.
#pragma once
#include "spec.h"

#define JF_DEVICE __device__ __forceinline__

// Of a block; its size is an argument of the launch.
extern __shared__ unsigned char dynamic_shared[];

namespace jf {

using u32 = unsigned int;
using u64 = unsigned long long;

JF_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

JF_DEVICE float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

JF_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

JF_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two values as one 32-bit register of the 16-bit type, the first in the low half.
template <DType kType>
JF_DEVICE u32 pack(float low, float high) {
  u32 r;
  if constexpr (kType == DType::kBF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  }
  return r;
}

JF_DEVICE float half_to_float(unsigned short bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}

// Four values as e4m3, the first in the lowest byte; what is too large becomes the largest.
JF_DEVICE u32 pack_e4m3(float a, float b, float c, float d) {
  u32 r;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(r)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return r;
}

// Four values as int8, rounded to the nearest, the first in the lowest byte; what is too large becomes the largest.
JF_DEVICE u32 pack_int8(float a, float b, float c, float d) {
  u32 r;
  asm("{\n.reg .s32 i, j;\n.reg .b32 high;\n"
      "cvt.rni.s32.f32 i, %3;\ncvt.rni.s32.f32 j, %4;\ncvt.pack.sat.s8.s32.b32 high, j, i, 0;\n"
      "cvt.rni.s32.f32 i, %1;\ncvt.rni.s32.f32 j, %2;\ncvt.pack.sat.s8.s32.b32 %0, j, i, high;\n}"
      : "=r"(r)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return r;
}

// A pair of bf16, no larger in size than another, which is positive; NaN stays NaN.
JF_DEVICE u32 bounded_bf16x2(u32 pair, u32 bound) {
  asm("min.NaN.xorsign.abs.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(bound));
  return pair;
}

// Hidden from the compiler, which would make 64-bit arithmetic of what is done to a word.
JF_DEVICE u64 join_words(u32 low, u32 high) {
  u64 r;
  asm("mov.b64 %0, {%1, %2};" : "=l"(r) : "r"(low), "r"(high));
  return r;
}

JF_DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// Four 8 x 8 tiles of 16-bit elements; lane l gives the address of row l % 8 of tile l / 8.
JF_DEVICE void load_matrix(u32* r, u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// The same value, of unknown origin: what is computed from it stays where it is written, instead of in registers that
// live through a loop.
template <class T>
JF_DEVICE T afresh(T x) {
  asm volatile("" : "+r"(x));
  return x;
}
JF_DEVICE float afresh(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

#if __CUDA_ARCH__ >= 900
// Adds to four floats in global memory (16-byte aligned), without waiting.
JF_DEVICE void global_add(float* to, float4 x) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w)
               : "memory");
}
#endif

// A launch marked programmatic starts before the kernel ahead of it has ended: this waits until that has, and its
// writes are visible. Kernels call it before they touch global memory. (Nothing happens on GPUs older than Hopper.)
JF_DEVICE void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets a kernel so marked start once every block of this one has called it or ended.
JF_DEVICE void dependents_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace jf
