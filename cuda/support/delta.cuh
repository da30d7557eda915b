// What the backward needs of each query row beside its vectors:
//
//   lse_log2 = lse * log2 e,   delta = sum(dout * out) - dlse,   so that  p = 2^(logit - lse_log2),  ds = p * (dp -
//   delta).
//
// A row without a visible key, past q_lengths or in the padding gets lse_log2 = +inf and delta = 0: its probabilities
// and score gradients are exactly 0, whatever its vectors hold. Grid: x over (batch entry, head), y over tiles of kRows
// rows; kLanes lanes read one row, 16 bytes each.
#include "pieces/mask.cuh"
#include "support/delta.h"

namespace jf {

constexpr int kThreads = 128, kRows = 64;
constexpr int kLanes = kSpec.value_dim > 128 ? 32 : kSpec.value_dim > 64 ? 16 : 8;

JF_DEVICE float dot_of_pairs(u32 a, u32 b) {
  return to_float<kSpec.dtype>(a & 0xffff) * to_float<kSpec.dtype>(b & 0xffff) +
         to_float<kSpec.dtype>(a >> 16) * to_float<kSpec.dtype>(b >> 16);
}

}  // namespace jf

extern "C" __global__ void __launch_bounds__(jf::kThreads) delta(const __grid_constant__ jf::DeltaArgs args) {
  using namespace jf;
  const Problem& p = args.problem;
  const int head = blockIdx.x % p.q_heads, b = blockIdx.x / p.q_heads;
  const int q_end = band_of(p, args.features, b).q_end;
  const int chunk = threadIdx.x % kLanes;
#pragma unroll 4
  for (int r = threadIdx.x / kLanes; r < kRows; r += kThreads / kLanes) {
    const int row = blockIdx.y * kRows + r;
    float sum = 0.f;
    if (row < q_end && chunk * 8 < kSpec.value_dim) {
      const long long offset =
          ((static_cast<long long>(b) * p.q_len + row) * p.q_heads + head) * kSpec.value_dim + chunk * 8;
      const uint4 x = *reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(args.out) + offset);
      const uint4 y = *reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(args.dout) + offset);
      sum = dot_of_pairs(x.x, y.x) + dot_of_pairs(x.y, y.y) + dot_of_pairs(x.z, y.z) + dot_of_pairs(x.w, y.w);
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (chunk == 0 && row < args.padded_len) {
      float lse = -infinity();
      if (row < q_end) {
        const long long place = static_cast<long long>(blockIdx.x) * p.q_len + row;
        lse = args.lse[place];
        if constexpr (kSpec.lse_cotangent) sum -= args.dlse[place];
      }
      const bool empty = lse == -infinity();
      const long long place = static_cast<long long>(blockIdx.x) * args.padded_len + row;
      args.lse_log2[place] = empty ? infinity() : lse * kLog2E;
      args.delta[place] = empty ? 0.f : sum;
    }
  }
}
