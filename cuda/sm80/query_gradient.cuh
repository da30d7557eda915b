// dQ without atomics, for the deterministic backward: dQ = scale dS K with dS recomputed as in sm80/backward.cuh.
//
// Grid: one block for each (query tile, head, batch entry), in the order of sm80/forward.cuh. Block: a warp owns 16
// queries of the tile, all keys and all of the dQ row, so that dS goes from the accumulator to the next product in
// registers.
//
//   shared memory    Q queries x head_dim (at the end: dQ), dO queries x value_dim, K keys x head_dim, V keys x
//   value_dim (16-bit)
//
// A step:   wait for K, V   barrier   S, dP   barrier: nobody reads V   load the next V   dS, dQ   barrier: nobody
// reads K   load the next K
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

struct alignas(128) Shared {
  unsigned char q[kQueries * HeadTile::kRowBytes];
  unsigned char dout[kQueries * ValueTile::kRowBytes];
  unsigned char k[kKeys * HeadTile::kRowBytes];
  unsigned char v[kKeys * ValueTile::kRowBytes];
};

}  // namespace jf

extern "C" __global__ void __launch_bounds__(jf::kThreads)
    sm80_query_gradient(const __grid_constant__ jf::Sm80BackwardArgs args) {
  using namespace jf;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  const u32 shared_q = shared_address(shared.q), shared_dout = shared_address(shared.dout);
  const u32 shared_k = shared_address(shared.k), shared_v = shared_address(shared.v);
  const Problem& problem = args.problem;
  const TilePlace place = place_in_sections(blockIdx.x, problem.q_heads * problem.batch, args.tiles, args.section);
  const int tile = args.tiles - 1 - place.tile, head_index = place.pair % problem.q_heads,
            batch = place.pair / problem.q_heads;
  const int kv_head = kSpec.grouped ? head_index / (problem.q_heads / problem.kv_heads) : head_index;
  const int q0 = tile * kQueries, warp = threadIdx.x / 32;

  const CallBand band = band_of(problem, args.features, batch);
  Range tiles = tiles_of(band.keys_of(q0, kQueries), kKeys);
  if constexpr (kSpec.segment_ids) {
    tiles = meet(tiles, args.segments.key_tiles[static_cast<long long>(batch) * args.tiles + tile]);
  }
  const HeadRows q =
      head_rows(args.q, problem.q_batch(batch), problem.q_len, problem.q_heads, head_index, kSpec.head_dim);
  const HeadRows dout = head_rows(args.dout, batch, problem.q_len, problem.q_heads, head_index, kSpec.value_dim);
  const HeadRows k =
      head_rows(args.k, problem.k_batch(batch), problem.kv_len, problem.kv_heads, kv_head, kSpec.head_dim);
  const HeadRows v =
      head_rows(args.v, problem.v_batch(batch), problem.kv_len, problem.kv_heads, kv_head, kSpec.value_dim);
  const auto load_k = [&](int n) {
    load_tile<HeadTile, kKeys, kSpec.head_dim, kThreads>(shared_k, k, n * kKeys, band.kv_end);
    commit_copies();
  };
  const auto load_v = [&](int n) {
    load_tile<ValueTile, kKeys, kSpec.value_dim, kThreads>(shared_v, v, n * kKeys, band.kv_end);
    commit_copies();
  };
  if (tiles.size() > 0) {
    load_tile<HeadTile, kQueries, kSpec.head_dim, kThreads>(shared_q, q, q0, band.q_end);
    load_tile<ValueTile, kQueries, kSpec.value_dim, kThreads>(shared_dout, dout, q0, band.q_end);
    load_v(tiles.begin);
    load_k(tiles.begin);
  }
  const GradientHead head =
      gradient_head(problem, args.features, band, {args.lse_log2, args.delta}, args.padded_len, batch, head_index);
  float dq[1][kTiles.head_dim / 2];
  clear(dq);
  for (int n = tiles.begin; n < tiles.end; n++) {
    wait_copies<0>();
    __syncthreads();  // K(n), V(n), and the first time Q, dO, are there for all
    float s[1][kKeys / 2], dp[1][kKeys / 2];
    clear(s);
    clear(dp);
    multiply<kSpec.dtype, kHeadSteps>(s, OperandA<HeadTile, false>(shared_q, warp),
                                      OperandB<HeadTile, false>(shared_k, 0));
    multiply<kSpec.dtype, kValueSteps>(dp, OperandA<ValueTile, false>(shared_dout, warp),
                                       OperandB<ValueTile, false>(shared_v, 0));
    __syncthreads();  // nobody reads V(n) any more
    if (n + 1 < tiles.end) load_v(n + 1);
    const bool interior = gradient_interior(band, problem, args.segments, batch, q0, kQueries, n * kKeys, kKeys);
    score_gradients<true>(s[0], dp[0], warp_fragment<false>(q0 + 16 * warp, n * kKeys), problem, args.features, head,
                          interior);
    multiply<kSpec.dtype, kKeys / 16>(dq, rounded<kSpec.dtype>(dp), OperandB<HeadTile, true>(shared_k, 0));
    __syncthreads();  // nobody reads K(n) any more
    if (n + 1 < tiles.end) load_k(n + 1);
  }

  // Through the warp's own rows of the Q tile, which nobody else reads, to dq.
#pragma unroll
  for (int i = 0; i < kTiles.head_dim / 2; i += 2) {
    store_shared(
        shared_q + HeadTile::offset(16 * warp + lane_id() / 4 + 8 * fragment_row(i), i / 4) + 4 * (lane_id() % 4),
        pack<kSpec.dtype>(dq[0][i] * problem.scale, dq[0][i + 1] * problem.scale));
  }
  __syncwarp();  // the warp reads what its lanes wrote
  const HeadRows dq_rows = head_rows(args.dq, batch, problem.q_len, problem.q_heads, head_index, kSpec.head_dim);
  store_rows<HeadTile, kSpec.head_dim, 32>(shared_q, 16 * warp, dq_rows, q0 + 16 * warp,
                                           min(16, problem.q_len - q0 - 16 * warp), lane_id());
}
