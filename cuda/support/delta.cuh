// What the backward needs of each query row beside its vectors:
//
//   lse_log2 = lse * log2 e,   delta = sum(dout * out) - dlse,   so that  p = 2^(logit - lse_log2),  ds = p * (dp -
//   delta).
//
// A row without a visible key, past q_lengths or in the padding gets lse_log2 = +inf and delta = 0: its probabilities
// and score gradients are exactly 0, whatever its vectors hold. On the way, clears the sums that will become dq, and
// the counters of the work. Grid: x over (batch entry, head), y over tiles of kRows rows; kLanes
// lanes read one row, 16 bytes each, all loads of a thread ahead of the first use.
#include "pieces/mask.cuh"
#include "support/delta.h"
#include "support/rows.cuh"

namespace jf {

constexpr int kThreads = 256, kRows = 64;
constexpr int kLanes = kSpec.value_dim > 128 ? 32 : kSpec.value_dim > 64 ? 16 : 8;
constexpr int kPasses = kRows * kLanes / kThreads;

JF_DEVICE float dot_of_pairs(u32 a, u32 b) {
  return to_float<kSpec.dtype>(a & 0xffff) * to_float<kSpec.dtype>(b & 0xffff) +
         to_float<kSpec.dtype>(a >> 16) * to_float<kSpec.dtype>(b >> 16);
}

}  // namespace jf

extern "C" __global__ void __launch_bounds__(jf::kThreads) delta(const __grid_constant__ jf::DeltaArgs args) {
  using namespace jf;
  dependents_launch();
  const Problem& p = args.problem;
  const RowBlock block = last_rows_first(p.q_heads);
  const int head = block.head, b = block.batch, row0 = block.index * kRows;
  const int q_end = band_of(p, args.features, b).q_end;
  const int chunk = threadIdx.x % kLanes, first = row0 + threadIdx.x / kLanes * kPasses;

  uint4 x[kPasses], y[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; i++) {
    x[i] = y[i] = uint4{0, 0, 0, 0};
    if (first + i < q_end && chunk * 8 < kSpec.value_dim) {
      const long long offset =
          ((static_cast<long long>(b) * p.q_len + first + i) * p.q_heads + head) * kSpec.value_dim / 8 + chunk;
      x[i] = __ldg(static_cast<const uint4*>(args.out) + offset);
      y[i] = __ldg(static_cast<const uint4*>(args.dout) + offset);
    }
  }

  const long long pair = static_cast<long long>(b) * p.q_heads + head;
  const long long padded_row0 = pair * args.padded_len + row0;
  if (args.dq_sums != nullptr) {
    float4* sums = reinterpret_cast<float4*>(args.dq_sums + padded_row0 * args.sums_size);
    const int count = min(kRows, args.padded_len - row0) * args.sums_size / 4;
    for (int i = threadIdx.x; i < count; i += kThreads) sums[i] = float4{0.f, 0.f, 0.f, 0.f};
  }

  if (blockIdx.x == 0 && blockIdx.y == 0) {
    for (int i = threadIdx.x; i < args.counter_count; i += kThreads) args.counters[i] = 0;
  }

#pragma unroll
  for (int i = 0; i < kPasses; i++) {
    float sum = dot_of_pairs(x[i].x, y[i].x) + dot_of_pairs(x[i].y, y[i].y) + dot_of_pairs(x[i].z, y[i].z) +
                dot_of_pairs(x[i].w, y[i].w);
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    const int row = first + i;
    if (chunk == 0 && row < args.padded_len) {
      float lse = -infinity();
      if (row < q_end) {
        const long long place = pair * p.q_len + row;
        lse = args.lse[place];
        if constexpr (kSpec.lse_cotangent) sum -= args.dlse[place];
      }
      const bool empty = lse == -infinity();
      args.lse_log2[padded_row0 - row0 + row] = empty ? infinity() : lse * kLog2E;
      args.delta[padded_row0 - row0 + row] = empty ? 0.f : sum;
    }
  }
}
