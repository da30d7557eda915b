// Puts the sums of sm80/backward.cuh (blocks of 16 x 16 in register order, fp32) in order as dq, times the scale, in 16
// bits. Grid: x over (batch entry, head), y over 16 rows a warp.
#include "pieces/fragment.cuh"
#include "sm80/args.h"
#include "sm80/tile.cuh"

namespace jf {

using HeadTile = Tile<kTiles.head_dim>;

// The inverse of add_query_gradient.
JF_DEVICE void load_sums(float (&x)[8], const float* sums) {
#if __CUDA_ARCH__ >= 900
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float4 v = *reinterpret_cast<const float4*>(sums + 128 * half + 4 * lane_id());
    x[4 * half] = v.x, x[4 * half + 1] = v.y, x[4 * half + 2] = v.z, x[4 * half + 3] = v.w;
  }
#else
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = sums[32 * i + lane_id()];
#endif
}

}  // namespace jf

extern "C" __global__ void __launch_bounds__(32 * kTiles.warps)
    sm80_convert_dq(const __grid_constant__ jf::Sm80BackwardArgs args) {
  using namespace jf;
  alignas(128) __shared__ unsigned char staging[kTiles.warps][16 * HeadTile::kRowBytes];
  const Problem& p = args.problem;
  const int warp = threadIdx.x / 32, block_row = blockIdx.y * kTiles.warps + warp;
  if (16 * block_row >= p.q_len) return;
  const u32 rows = shared_address(staging[warp]);
  const float* sums =
      args.dq_sums + (static_cast<long long>(blockIdx.x) * (args.padded_len / 16) + block_row) * (16 * kTiles.head_dim);
#pragma unroll
  for (int n = 0; n < kTiles.head_dim / 16; n++) {
    float x[8];
    load_sums(x, sums + 256 * n);
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      store_shared(rows + HeadTile::offset(lane_id() / 4 + 8 * fragment_row(i), 2 * n + i / 4) + 4 * (lane_id() % 4),
                   pack<kSpec.dtype>(x[i] * p.scale, x[i + 1] * p.scale));
    }
  }
  __syncwarp();  // the warp reads what its lanes wrote
  const HeadRows dq =
      head_rows(args.dq, blockIdx.x / p.q_heads, p.q_len, p.q_heads, blockIdx.x % p.q_heads, kSpec.head_dim);
  store_rows<HeadTile, kSpec.head_dim, 32>(rows, 0, dq, 16 * block_row, min(16, p.q_len - 16 * block_row), lane_id());
}
