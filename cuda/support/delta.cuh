// What the backward needs of every query row: delta = sum(dout * out) - dlse, and the lse in log2 units. Rows that see
// nothing, lie past their length or pad the last tile get lse2 = +inf and delta = 0: their probabilities come out as 0.
// On the way, clears the accumulators of dq. Bytes: out and dout once, the accumulators once.
// Grid: x over batch entries and, within one, kRows rows; y over heads; a row is read by kLanes lanes, 16 bytes each.
#include "pieces/dependency.cuh"
#include "pieces/fragment.cuh"
#include "support/delta.h"

namespace jf {

constexpr int kRows = 64, kWarps = 8, kRowsOfWarp = kRows / kWarps;
constexpr int kLanes = kSpec.value_dim <= 32 ? 4 : kSpec.value_dim <= 64 ? 8 : kSpec.value_dim <= 128 ? 16 : 32;
constexpr int kRowsAtOnce = 32 / kLanes, kPasses = kRowsOfWarp / kRowsAtOnce;

JF_DEVICE float dot(u32 x, u32 y) {
  return to_float<kSpec.dtype>(x & 0xffff) * to_float<kSpec.dtype>(y & 0xffff) +
         to_float<kSpec.dtype>(x >> 16) * to_float<kSpec.dtype>(y >> 16);
}

}  // namespace jf

extern "C" __global__ void __launch_bounds__(32 * jf::kWarps) delta(const __grid_constant__ jf::DeltaArgs args) {
  using namespace jf;
  dependents_launch();
  const Problem& p = args.problem;
  const int blocks = args.padded_len / kRows, head = blockIdx.y, b = blockIdx.x / blocks;
  const int row0 = blockIdx.x % blocks * kRows;
  const int lane = lane_id() % kLanes, first = row0 + threadIdx.x / 32 * kRowsOfWarp + lane_id() / kLanes;
  int q_end = p.q_len;
  if constexpr (kSpec.q_lengths) q_end = min(q_end, *row_of<int>(args.q_lengths, b));

  uint4 out[kPasses], dout[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; pass++) {
    const int row = first + pass * kRowsAtOnce;
    out[pass] = dout[pass] = uint4{0, 0, 0, 0};
    if (row < q_end && lane * 8 < kSpec.value_dim) {
      const long long i = ((static_cast<long long>(b) * p.q_len + row) * p.q_heads + head) * kSpec.value_dim / 8 + lane;
      out[pass] = __ldg(static_cast<const uint4*>(args.out) + i);
      dout[pass] = __ldg(static_cast<const uint4*>(args.dout) + i);
    }
  }

  const long long head_row = (static_cast<long long>(b) * p.q_heads + head) * args.padded_len;
  if (args.dq_acc != nullptr) {
    float4* acc = reinterpret_cast<float4*>(args.dq_acc + (head_row + row0) * args.acc_size);
    for (int i = threadIdx.x; i < kRows * args.acc_size / 4; i += 32 * kWarps) acc[i] = float4{0, 0, 0, 0};
  }

#pragma unroll
  for (int pass = 0; pass < kPasses; pass++) {
    const uint4 x = out[pass], y = dout[pass];
    float sum = dot(x.x, y.x) + dot(x.y, y.y) + dot(x.z, y.z) + dot(x.w, y.w);
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    const int row = first + pass * kRowsAtOnce;
    if (lane == 0) {
      const long long i = (static_cast<long long>(b) * p.q_heads + head) * p.q_len + row;
      const float lse = row < q_end ? args.lse[i] : -infinity();
      const bool neutral = lse == -infinity();
      if (kSpec.lse_cotangent && !neutral) sum -= args.dlse[i];
      args.lse2[head_row + row] = neutral ? infinity() : lse * kLog2E;
      args.delta[head_row + row] = neutral ? 0.f : sum;
    }
  }
}
