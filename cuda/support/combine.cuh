// Adds up the parts of an attention whose keys were split: out = sum_s w_s out_s / sum_s w_s, w_s = exp(lse_s - max
// lse); the sink joins the denominator here. In a fixed order: the same bits from run to run. Grid: one warp a row
// (batch entry, query, head), kWarps a block.
#include "pieces/fragment.cuh"
#include "support/combine.h"

namespace jf {
constexpr int kWarps = 4;
}

extern "C" __global__ void __launch_bounds__(32 * jf::kWarps) combine(const __grid_constant__ jf::CombineArgs args) {
  using namespace jf;
  const long long rows = static_cast<long long>(args.batch) * args.q_len * args.q_heads;
  const long long row = static_cast<long long>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const int head = row % args.q_heads;
  const long long query = row / args.q_heads % args.q_len, b = row / args.q_heads / args.q_len;
  const long long lse_row = (b * args.q_heads + head) * args.q_len + query;

  float top = -infinity();
  for (int s = 0; s < args.splits; s++) top = fmaxf(top, args.partial_lse[s * rows + lse_row]);
  const bool empty = top == -infinity();
  if (kSpec.sinks && !empty) top = fmaxf(top, args.sinks[head]);
  float total = 0.f;
  if (!empty) {
    for (int s = 0; s < args.splits; s++) total += exp2_fast((args.partial_lse[s * rows + lse_row] - top) * kLog2E);
    if constexpr (kSpec.sinks) total += exp2_fast((args.sinks[head] - top) * kLog2E);
  }
  if (lane_id() == 0) args.lse[lse_row] = empty ? -infinity() : top + log2_fast(total) * kLn2;

  for (int i = 2 * lane_id(); i < kSpec.value_dim; i += 64) {
    float x = 0.f, y = 0.f;
    for (int s = 0; s < args.splits && !empty; s++) {
      const float weight = exp2_fast((args.partial_lse[s * rows + lse_row] - top) * kLog2E) / total;
      const float2 part = *reinterpret_cast<const float2*>(args.partial_out + (s * rows + row) * kSpec.value_dim + i);
      x = fmaf(weight, part.x, x);
      y = fmaf(weight, part.y, y);
    }
    reinterpret_cast<u32*>(args.out)[(row * kSpec.value_dim + i) / 2] = pack<kSpec.dtype>(x, y);
  }
}
