// dq = scale * the fp32 sums of the backward, in the query's type.
//
// The sums lie in the order of the accumulators of mma and wgmma, so that a thread adds its four registers of 8 columns
// as 16 bytes: [batch, head, 64 queries, 8 elements] blocks of 128 threads x 4, where thread 32 w + 4 r + c holds rows
// 16 w + r and 16 w + r + 8, columns 2 c and 2 c + 1.
// Grid: x over (batch entry, head), y over 64 queries; a thread makes 8 elements of two rows.
#include "pieces/fragment.cuh"
#include "support/dq.h"
#include "support/rows.cuh"

namespace jf {
constexpr int kThreads = 256, kBlocks = (kSpec.head_dim + 7) / 8;
}

extern "C" __global__ void __launch_bounds__(jf::kThreads) dq_from_sums(const __grid_constant__ jf::DqArgs args) {
  using namespace jf;
  dependency_wait();
  const RowBlock rows = last_rows_first(args.q_heads);
  const int head = rows.head, b = rows.batch, row0 = rows.index * 64;
  const float4* sums = reinterpret_cast<const float4*>(
      args.sums + ((static_cast<long long>(b) * args.q_heads + head) * args.padded_len + row0) * kTiles.sums_size);
  uint4* dq = static_cast<uint4*>(args.dq);
#pragma unroll
  for (int start = 0; start < 32 * kBlocks; start += kThreads) {
    const int i = start + threadIdx.x, pair = i / 4 % 32, block = i / 128 * 4 + i % 4;
    if (block >= kBlocks) continue;
    float4 x[4];
#pragma unroll
    for (int c = 0; c < 4; c++) x[c] = __ldcs(sums + block * 128 + pair * 4 + c);
    const float scale = args.scale;
    const uint4 low{
        pack<kSpec.dtype>(x[0].x * scale, x[0].y * scale), pack<kSpec.dtype>(x[1].x * scale, x[1].y * scale),
        pack<kSpec.dtype>(x[2].x * scale, x[2].y * scale), pack<kSpec.dtype>(x[3].x * scale, x[3].y * scale)};
    const uint4 high{
        pack<kSpec.dtype>(x[0].z * scale, x[0].w * scale), pack<kSpec.dtype>(x[1].z * scale, x[1].w * scale),
        pack<kSpec.dtype>(x[2].z * scale, x[2].w * scale), pack<kSpec.dtype>(x[3].z * scale, x[3].w * scale)};
    const int row = row0 + pair / 8 * 16 + pair % 8;
    const long long to =
        ((static_cast<long long>(b) * args.q_len + row) * args.q_heads + head) * (kSpec.head_dim / 8) + block;
    if (row < args.q_len) dq[to] = low;
    if (row + 8 < args.q_len) dq[to + 8ll * args.q_heads * (kSpec.head_dim / 8)] = high;
  }
}
