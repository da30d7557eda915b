// The gradient of a bias in its own shape: dS = P (dP - delta), recomputed for one tile of the bias at a time and
// summed over all that the bias broadcasts over (batch entries, heads, queries, keys), in registers and in a fixed
// order. No array of scores exists.
//
// Grid: one block for each (query tile, key tile, head, batch entry) of the bias; one tile where the axis has size 1.
// Block: a warp owns 16 queries of a tile and all its keys.
//
//   shared memory    Q, dO (queries), K, V (keys), 16-bit; at the end the sums, fp32 queries x keys
#include "sm80/args.h"
#include "sm80/gradients.cuh"
#include "sm80/tile.cuh"

namespace jf {

constexpr int kThreads = 32 * kTiles.warps;
constexpr int kQueries = kTiles.queries, kKeys = kTiles.keys;
constexpr int kHeadSteps = (kSpec.head_dim + 15) / 16, kValueSteps = (kSpec.value_dim + 15) / 16;
static_assert(kQueries == 16 * kTiles.warps, "a warp owns 16 queries");

using HeadTile = Tile<kTiles.head_dim>;
using ValueTile = Tile<kTiles.value_dim>;

struct alignas(128) Inputs {
  unsigned char q[kQueries * HeadTile::kRowBytes];
  unsigned char dout[kQueries * ValueTile::kRowBytes];
  unsigned char k[kKeys * HeadTile::kRowBytes];
  unsigned char v[kKeys * ValueTile::kRowBytes];
};
union Shared {
  Inputs inputs;
  float sums[kQueries][kKeys];
};

JF_DEVICE void store_bias(void* data, long long index, float x) {
  if constexpr (kSpec.bias_dtype == DType::kF32) {
    static_cast<float*>(data)[index] = x;
  } else {
    static_cast<unsigned short*>(data)[index] = pack<kSpec.bias_dtype>(x, 0.f) & 0xffff;
  }
}

}  // namespace jf

extern "C" __global__ void __launch_bounds__(jf::kThreads, 1)  // else ptxas may spill for the sake of a further block
    sm80_bias_gradient(const __grid_constant__ jf::Sm80BackwardArgs args) {
  using namespace jf;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  const u32 shared_q = shared_address(shared.inputs.q), shared_dout = shared_address(shared.inputs.dout);
  const u32 shared_k = shared_address(shared.inputs.k), shared_v = shared_address(shared.inputs.v);
  const Problem& problem = args.problem;
  const Dense& bias = args.features.bias;
  const int warp = threadIdx.x / 32;

  // The tile of the bias, and what it broadcasts over: all of an axis whose stride is 0.
  const int q_tiles = ceil_div(problem.q_len, kQueries), key_tiles = ceil_div(problem.kv_len, kKeys);
  int index = blockIdx.x;
  const auto take = [&](bool own, int size) {  // the indices of one axis that this block covers
    if (!own) return Range{0, size};
    const int i = index % size;
    index /= size;
    return Range{i, i + 1};
  };
  const Range own_keys = take(bias.k_stride != 0, key_tiles), own_queries = take(bias.q_stride != 0, q_tiles);
  const Range own_heads = take(bias.head_stride != 0, problem.q_heads);
  const int own_entry = index;

  float sum[kKeys / 2] = {};
  for (int b = 0; b < problem.batch; b++) {
    if (bias.batch(b) != own_entry) continue;
    const CallBand band = band_of(problem, args.features, b);
    for (int h = own_heads.begin; h < own_heads.end; h++) {
      const int kv_head = kSpec.grouped ? h / (problem.q_heads / problem.kv_heads) : h;
      const GradientHead head =
          gradient_head(problem, args.features, band, {args.lse_log2, args.delta}, args.padded_len, b, h);
      const HeadRows q = head_rows(args.q, problem.q_batch(b), problem.q_len, problem.q_heads, h, kSpec.head_dim);
      const HeadRows dout = head_rows(args.dout, b, problem.q_len, problem.q_heads, h, kSpec.value_dim);
      const HeadRows k =
          head_rows(args.k, problem.k_batch(b), problem.kv_len, problem.kv_heads, kv_head, kSpec.head_dim);
      const HeadRows v =
          head_rows(args.v, problem.v_batch(b), problem.kv_len, problem.kv_heads, kv_head, kSpec.value_dim);
      for (int m = own_queries.begin; m < own_queries.end; m++) {
        const int q0 = m * kQueries;
        Range tiles = meet(own_keys, tiles_of(band.keys_of(q0, kQueries), kKeys));
        if constexpr (kSpec.segment_ids)
          tiles = meet(tiles, args.segments.key_tiles[static_cast<long long>(b) * q_tiles + m]);
        for (int n = tiles.begin; n < tiles.end; n++) {
          const int k0 = n * kKeys;
          __syncthreads();  // nobody reads the tiles before these any more
          load_tile<HeadTile, kQueries, kSpec.head_dim, kThreads>(shared_q, q, q0, band.q_end);
          load_tile<ValueTile, kQueries, kSpec.value_dim, kThreads>(shared_dout, dout, q0, band.q_end);
          load_tile<HeadTile, kKeys, kSpec.head_dim, kThreads>(shared_k, k, k0, band.kv_end);
          load_tile<ValueTile, kKeys, kSpec.value_dim, kThreads>(shared_v, v, k0, band.kv_end);
          commit_copies();
          wait_copies<0>();
          __syncthreads();  // all four tiles are there for all
          float s[1][kKeys / 2], dp[1][kKeys / 2];
          clear(s);
          clear(dp);
          multiply<kSpec.dtype, kHeadSteps>(s, OperandA<HeadTile, false>(shared_q, warp),
                                            OperandB<HeadTile, false>(shared_k, 0));
          multiply<kSpec.dtype, kValueSteps>(dp, OperandA<ValueTile, false>(shared_dout, warp),
                                             OperandB<ValueTile, false>(shared_v, 0));
          const bool interior = gradient_interior(band, problem, args.segments, b, q0, kQueries, k0, kKeys);
          score_gradients<false>(s[0], dp[0], warp_fragment<false>(q0 + 16 * warp, k0), problem, args.features, head,
                                 interior);
#pragma unroll
          for (int i = 0; i < kKeys / 2; i++) sum[i] += dp[0][i];
        }
      }
    }
  }

  // Through shared memory to the bias's own elements; an axis of size 1 is summed within the tile.
  __syncthreads();  // nobody reads the tiles any more: the sums take their place
  const Fragment<false> in_tile = warp_fragment<false>(16 * warp, 0);
#pragma unroll
  for (int i = 0; i < kKeys / 2; i++) shared.sums[in_tile.query(i)][in_tile.key(i)] = sum[i];
  __syncthreads();  // all sums are there
  const bool q_axis = bias.q_stride != 0, k_axis = bias.k_stride != 0;
  const int rows = q_axis ? kQueries : 1, columns = k_axis ? kKeys : 1;
  const int q0 = q_axis ? own_queries.begin * kQueries : 0, k0 = k_axis ? own_keys.begin * kKeys : 0;
  for (int e = threadIdx.x; e < rows * columns; e += kThreads) {
    const int r = e / columns, c = e % columns;
    if ((q_axis && q0 + r >= problem.q_len) || (k_axis && k0 + c >= problem.kv_len)) continue;
    float total = 0.f;
    for (int i = r; i < (q_axis ? r + 1 : kQueries); i++) {
      for (int j = c; j < (k_axis ? c + 1 : kKeys); j++) total += shared.sums[i][j];
    }
    store_bias(args.dbias,
               own_entry * bias.batch_stride + own_heads.begin * bias.head_stride + (q0 + r) * bias.q_stride +
                   (k0 + c) * bias.k_stride,
               total);
  }
}
