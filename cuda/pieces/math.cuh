// Scalar device arithmetic that every kernel uses: constants, conversions, loads of one element.
#pragma once
#include "pieces/ptx.cuh"

namespace jf {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

JF_DEVICE float infinity() { return __int_as_float(0x7f800000); }
JF_DEVICE float not_a_number() { return __int_as_float(0x7fffffff); }

// 2^x for x below 127 on the FMA units, relative error under 1e-4: below the rounding of a bf16 probability. NaN stays.
JF_DEVICE float exp2_software(float x) {
  x = max_or_nan(x, -127.f);
  const float shifted = x + 12582912.f;  // 1.5 * 2^23: the integer nearest to x stands in the low bits
  const float f = x - (shifted - 12582912.f);
  const float p = fmaf(fmaf(fmaf(0.0551716685f, f, 0.240226462f), f, 0.693201244f), f, 1.f);
  return p * __int_as_float((__float_as_int(shifted) << 23) + 0x3f800000);  // 0 for the least x
}

// Of every 16 exponentials, kSoftware run on the FMA units, spread evenly.
template <int kSoftware>
JF_DEVICE float exp2_shared(float x, int i) {
  return (i * kSoftware) % 16 < kSoftware ? exp2_software(x) : exp2_fast(x);
}

template <DType kType>
JF_DEVICE float to_float(unsigned short bits) {
  if constexpr (kType == DType::kBF16) {
    return __int_as_float(static_cast<u32>(bits) << 16);
  } else {
    return half_to_float(bits);
  }
}

// Element `index` of a read-only array of the type.
template <DType kType>
JF_DEVICE float load_float(const void* data, long long index) {
  if constexpr (kType == DType::kF32) {
    return __ldg(static_cast<const float*>(data) + index);
  } else {
    return to_float<kType>(__ldg(static_cast<const unsigned short*>(data) + index));
  }
}

// Element `index` of the row that batch entry b reads; rows hold `count` elements.
template <class T>
JF_DEVICE const T* row_of(const Rows& rows, int b, long long count = 1) {
  return static_cast<const T*>(rows.data) + rows.batch(b) * count;
}

}  // namespace jf
