// Adds up the parts of an attention whose keys were split: out = sum_s w_s out_s / sum_s w_s, w_s = exp(lse_s - max
// lse); the sink joins the denominator here. In a fixed order: the same bits from run to run. Grid: one warp for
// kCombineElements of a row (batch entry, query, head), kCombineWarps a block. Rows are few, so what counts is that the
// loads of all parts are on their way together: each lane has the lse of every 32nd part.
#include "pieces/fragment.cuh"
#include "support/combine.h"

extern "C" __global__ void __launch_bounds__(32 * jf::kCombineWarps)
    combine(const __grid_constant__ jf::CombineArgs args) {
  using namespace jf;
  constexpr int kPieces = (kSpec.value_dim + kCombineElements - 1) / kCombineElements;
  static_assert(kCombineElements == 2 * 32);
  const long long rows = static_cast<long long>(args.batch) * args.q_len * args.q_heads;
  const long long warp = static_cast<long long>(blockIdx.x) * kCombineWarps + threadIdx.x / 32, row = warp / kPieces;
  if (row >= rows) return;
  const int piece = warp % kPieces, head = row % args.q_heads;
  const long long query = row / args.q_heads % args.q_len, b = row / args.q_heads / args.q_len;
  const long long lse_row = (b * args.q_heads + head) * args.q_len + query;
  const auto lse_of = [&](int part) {
    return part < args.splits ? args.partial_lse[part * rows + lse_row] : -infinity();
  };

  float top = -infinity();
  for (int s = lane_id(); s < args.splits; s += 32) top = fmaxf(top, lse_of(s));
  for (int distance = 16; distance > 0; distance /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, distance));
  const bool empty = top == -infinity();
  if (kSpec.sinks && !empty) top = fmaxf(top, args.sinks[head]);
  float total = 0.f;
  if (!empty) {
    for (int s = lane_id(); s < args.splits; s += 32) total += exp2_fast((lse_of(s) - top) * kLog2E);
    for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(~0u, total, distance);
    if constexpr (kSpec.sinks) total += exp2_fast((args.sinks[head] - top) * kLog2E);
  }
  if (lane_id() == 0 && piece == 0) args.lse[lse_row] = empty ? -infinity() : top + log2_fast(total) * kLn2;

  const int i = kCombineElements * piece + 2 * lane_id();
  const bool real = i < kSpec.value_dim;
  float x = 0.f, y = 0.f;
  for (int first = 0; first < args.splits && !empty; first += 32) {
    const float weight = exp2_fast((lse_of(first + lane_id()) - top) * kLog2E) / total;
    const int parts = min(32, args.splits - first);
#pragma unroll 8
    for (int s = 0; s < parts; s++) {
      const float factor = __shfl_sync(~0u, weight, s);
      const float* out = args.partial_out + ((first + s) * rows + row) * kSpec.value_dim + i;
      const float2 part = real ? *reinterpret_cast<const float2*>(out) : float2{};
      x = fmaf(factor, part.x, x);
      y = fmaf(factor, part.y, y);
    }
  }
  if (real) reinterpret_cast<u32*>(args.out)[(row * kSpec.value_dim + i) / 2] = pack<kSpec.dtype>(x, y);
}
