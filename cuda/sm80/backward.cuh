// Attention backward with mma.sync, by recomputation: dK, dV and, if kTiles.query_gradient, dQ.
//
//   P = exp(logits - lse),  dP = dO V^T,  dS = P (dP - delta),  dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K
//
// Grid: one block for each (key tile, key head, batch entry), in sections of heads whose arrays share the L2; inside a
// section the first key tiles, which under causal masks are seen by the most queries, come first. A block walks the
// query tiles that see its keys, for every query head of its key head: grouped heads are summed in registers.
//
// Block: kTiles.warps warps. S and dP are divided over a grid of warps by (queries, keys); P and dS then go to shared
// memory in 16 bits, from where dK and dV are divided by (keys, head size) and dQ by (queries, head size).
//
//   shared memory  K     keys x head_dim, at the end dK       V   keys x value_dim, at the end dV
//   (16-bit)       Q     stages x queries x head_dim          dO  stages x queries x value_dim
//                  P, dS queries x keys
//   registers      dK, dV in fp32, and in turns S with dP, and dQ
//
// A step of the loop:
//   wait for Q, dO; barrier A    Q and dO are there for all; nobody reads P, dS or the other stage any more
//   load the next Q, dO          with two stages
//   S, dP; P and dS to shared memory
//   barrier B                    P and dS are there for all
//   dV, dK
//   barrier C; load the next     with one stage: nobody reads Q and dO any more
//   dQ
//
// dQ leaves by fp32 atomics to dq_sums, zero at the start: [batch, q_heads, padded_len / 16, head_dim / 16] blocks of
// 16 x 16 in the order of the registers (add_query_gradient), so that a warp's additions are contiguous;
// sm80/convert_dq.cuh puts them in order. The order of the additions varies from run to run, so the deterministic
// variant leaves dQ to sm80/query_gradient.cuh.
//
// Rows past their lengths are read as zeros, and delta.cuh makes their probabilities 0. Limits: as sm80/forward.cuh.
#include "sm80/args.h"
#include "sm80/gradients.cuh"
#include "sm80/tile.cuh"

namespace jf {

constexpr int kThreads = 32 * kTiles.warps;
constexpr int kQueries = kTiles.queries, kKeys = kTiles.keys, kStages = kTiles.stages;
constexpr int kHeadSteps = (kSpec.head_dim + 15) / 16, kValueSteps = (kSpec.value_dim + 15) / 16;  // of an mma's k
// Blocks of a multiprocessor that ptxas is asked for. 0: it may spill for the sake of one more, as it does for four
// warps at head size 128.
constexpr int kFewestBlocks = kTiles.warps == 4 && kTiles.head_dim == 128 && !kTiles.query_gradient ? 1 : 0;

// 16 x 16 blocks of a warp, when kTiles.warps are a grid of `kRows` rows over a product of rows x columns.
template <int kSizeRows, int kSizeColumns, int kGridRows>
struct Division {
  static constexpr int kGridColumns = kTiles.warps / kGridRows;
  static constexpr int kRows = kSizeRows / 16 / kGridRows, kColumns = kSizeColumns / 16 / kGridColumns;
  static_assert(kRows * kGridRows * 16 == kSizeRows && kColumns * kGridColumns * 16 == kSizeColumns &&
                kGridRows * kGridColumns == kTiles.warps);
  // Rows of blocks of a warp are neighbours, columns of blocks are kGridColumns apart, beginning here.
  JF_DEVICE static int first_row() { return static_cast<int>(threadIdx.x) / 32 / kGridColumns * kRows; }
  JF_DEVICE static int first_column() { return static_cast<int>(threadIdx.x) / 32 % kGridColumns; }
};
using Scores = Division<kQueries, kKeys, kTiles.score_rows>;
using KeyGradient = Division<kKeys, kTiles.head_dim, kTiles.key_rows>;
using ValueGradient = Division<kKeys, kTiles.value_dim, kTiles.key_rows>;
using QueryGradient = Division<kQueries, kTiles.head_dim, kTiles.query_rows>;

using HeadTile = Tile<kTiles.head_dim>;
using ValueTile = Tile<kTiles.value_dim>;
using ScoreTile = Tile<kKeys>;

struct alignas(128) Shared {
  unsigned char k[kKeys * HeadTile::kRowBytes];
  unsigned char v[kKeys * ValueTile::kRowBytes];
  unsigned char q[kStages][kQueries * HeadTile::kRowBytes];
  unsigned char dout[kStages][kQueries * ValueTile::kRowBytes];
  unsigned char p[kQueries * ScoreTile::kRowBytes];
  unsigned char ds[kQueries * ScoreTile::kRowBytes];
};

// Rounds a warp's part of P or dS to 16 bits in shared memory.
JF_DEVICE void store_scores(u32 tile, const float (&x)[Scores::kColumns * 8], const Fragment<false>& in_tile) {
#pragma unroll
  for (int i = 0; i < Scores::kColumns * 8; i += 2) {
    store_shared(tile + ScoreTile::offset(in_tile.query(i), in_tile.key(i) / 8) + 4 * (lane_id() % 4),
                 pack<kSpec.dtype>(x[i], x[i + 1]));
  }
}

// Adds one 16 x 16 block of dQ to its 256 sums.
JF_DEVICE void add_query_gradient(float* sums, const float* x) {
#if __CUDA_ARCH__ >= 900
#pragma unroll
  for (int half = 0; half < 2; half++) {
    global_add(sums + 128 * half + 4 * lane_id(),
               float4{x[4 * half], x[4 * half + 1], x[4 * half + 2], x[4 * half + 3]});
  }
#else
#pragma unroll
  for (int i = 0; i < 8; i++) atomicAdd(sums + 32 * i + lane_id(), x[i]);
#endif
}

// dK or dV: through the tile of K or V in shared memory to rows [k0, kv_len) of the array.
template <class T, int kUsed, class Divided, int M, int N>
JF_DEVICE void store_gradient(u32 tile, const float (&x)[M][N], float factor, const HeadRows& rows, int k0,
                              int kv_len) {
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const int row = 16 * (Divided::first_row() + m) + lane_id() / 4 + 8 * fragment_row(i);
      const int chunk = 2 * (Divided::first_column() + i / 8 * Divided::kGridColumns) + i / 4 % 2;
      store_shared(tile + T::offset(row, chunk) + 4 * (lane_id() % 4),
                   pack<kSpec.dtype>(x[m][i] * factor, x[m][i + 1] * factor));
    }
  }
  __syncthreads();  // all of the tile is written
  store_rows<T, kUsed, kThreads>(tile, 0, rows, k0, min(kKeys, kv_len - k0), threadIdx.x);
}

}  // namespace jf

extern "C" __global__ void __launch_bounds__(jf::kThreads, jf::kFewestBlocks)
    sm80_backward(const __grid_constant__ jf::Sm80BackwardArgs args) {
  using namespace jf;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  const Problem& problem = args.problem;
  const TilePlace place = place_in_sections(blockIdx.x, problem.kv_heads * problem.batch, args.tiles, args.section);
  const int batch = place.pair / problem.kv_heads, kv_head = place.pair % problem.kv_heads;
  const int k0 = place.tile * kKeys, group = kSpec.grouped ? problem.q_heads / problem.kv_heads : 1;
  const int first_head = kv_head * group;

  const CallBand band = band_of(problem, args.features, batch);
  Range tiles = tiles_of(band.queries_of(k0, kKeys), kQueries);
  if constexpr (kSpec.segment_ids) {
    tiles = meet(
        tiles, args.segments.query_tiles[static_cast<long long>(batch) * ceil_div(problem.kv_len, kKeys) + place.tile]);
  }

  const auto load_keys = [&] {
    const HeadRows k =
        head_rows(args.k, problem.k_batch(batch), problem.kv_len, problem.kv_heads, kv_head, kSpec.head_dim);
    const HeadRows v =
        head_rows(args.v, problem.v_batch(batch), problem.kv_len, problem.kv_heads, kv_head, kSpec.value_dim);
    load_tile<HeadTile, kKeys, kSpec.head_dim, kThreads>(shared_address(shared.k), k, k0, band.kv_end);
    load_tile<ValueTile, kKeys, kSpec.value_dim, kThreads>(shared_address(shared.v), v, k0, band.kv_end);
  };
  const HeadRows q =
      head_rows(args.q, problem.q_batch(batch), problem.q_len, problem.q_heads, first_head, kSpec.head_dim);
  const HeadRows dout = head_rows(args.dout, batch, problem.q_len, problem.q_heads, first_head, kSpec.value_dim);
  const auto load_queries = [&](int head, int tile, int stage) {  // head: within the group
    const int q0 = tile * kQueries;
    load_tile<HeadTile, kQueries, kSpec.head_dim, kThreads>(shared_address(shared.q[stage]),
                                                            q.of_head(head, kSpec.head_dim), q0, band.q_end);
    load_tile<ValueTile, kQueries, kSpec.value_dim, kThreads>(shared_address(shared.dout[stage]),
                                                              dout.of_head(head, kSpec.value_dim), q0, band.q_end);
    commit_copies();
  };

  float dk[KeyGradient::kRows][KeyGradient::kColumns * 8], dv[ValueGradient::kRows][ValueGradient::kColumns * 8];
  clear(dk);
  clear(dv);
  const int steps = tiles.size() * group;
  if (steps > 0) {
    load_keys();
    load_queries(0, tiles.begin, 0);
  }
  GradientHead head;
  for (int step = 0, in_group = 0, tile = tiles.begin; step < steps; step++) {
    const int stage = kStages == 2 ? step % 2 : 0, q0 = tile * kQueries;
    const u32 shared_q = shared_address(shared.q[stage]), shared_dout = shared_address(shared.dout[stage]);
    if (tile == tiles.begin) {
      head = gradient_head(problem, args.features, band, {args.lse_log2, args.delta}, args.padded_len, batch,
                           first_head + in_group);
    }
    const u32 shared_k = afresh(shared_address(shared.k)), shared_v = afresh(shared_address(shared.v));
    const u32 shared_p = afresh(shared_address(shared.p)), shared_ds = afresh(shared_address(shared.ds));
    const bool last_tile = tile + 1 == tiles.end;
    const int next_tile = last_tile ? tiles.begin : tile + 1, next_in_group = last_tile ? in_group + 1 : in_group;

    wait_copies<0>();
    __syncthreads();  // barrier A
    if (kStages == 2 && step + 1 < steps) load_queries(next_in_group, next_tile, 1 - stage);

    {
      float s[Scores::kRows][Scores::kColumns * 8], dp[Scores::kRows][Scores::kColumns * 8];
      clear(s);
      clear(dp);
      const int row = Scores::first_row(),
                column = Scores::first_column() * Scores::kColumns;  // here columns are neighbours too
      multiply<kSpec.dtype, kHeadSteps>(s, OperandA<HeadTile, false>(shared_q, row),
                                        OperandB<HeadTile, false>(shared_k, column));
      multiply<kSpec.dtype, kValueSteps>(dp, OperandA<ValueTile, false>(shared_dout, row),
                                         OperandB<ValueTile, false>(shared_v, column));
      const bool interior = gradient_interior(band, problem, args.segments, batch, q0, kQueries, k0, kKeys);
#pragma unroll
      for (int m = 0; m < Scores::kRows; m++) {
        const Fragment<false> in_tile = warp_fragment<false>(16 * (row + m), 16 * column);
        const Fragment<false> at = warp_fragment<false>(q0 + 16 * (row + m), k0 + 16 * column);
        score_gradients<true>(s[m], dp[m], at, problem, args.features, head, interior);
        store_scores(shared_p, s[m], in_tile);
        store_scores(shared_ds, dp[m], in_tile);
      }
    }
    __syncthreads();  // barrier B

    multiply<kSpec.dtype, kQueries / 16>(
        dv, OperandA<ScoreTile, true>(shared_p, ValueGradient::first_row()),
        OperandB<ValueTile, true, ValueGradient::kGridColumns>(shared_dout, ValueGradient::first_column()));
    multiply<kSpec.dtype, kQueries / 16>(
        dk, OperandA<ScoreTile, true>(shared_ds, KeyGradient::first_row()),
        OperandB<HeadTile, true, KeyGradient::kGridColumns>(shared_q, KeyGradient::first_column()));
    if constexpr (kStages == 1) {
      __syncthreads();  // barrier C
      if (step + 1 < steps) load_queries(next_in_group, next_tile, 0);
    }
    if constexpr (kTiles.query_gradient) {
      float dq[QueryGradient::kRows][QueryGradient::kColumns * 8];
      clear(dq);
      multiply<kSpec.dtype, kKeys / 16>(
          dq, OperandA<ScoreTile, false>(shared_ds, QueryGradient::first_row()),
          OperandB<HeadTile, true, QueryGradient::kGridColumns>(shared_k, QueryGradient::first_column()));
      const long long block_row = (head.first_row + q0) / 16;
#pragma unroll
      for (int m = 0; m < QueryGradient::kRows; m++) {
#pragma unroll
        for (int n = 0; n < QueryGradient::kColumns; n++) {
          const int block_column = QueryGradient::first_column() + n * QueryGradient::kGridColumns;
          add_query_gradient(
              args.dq_sums +
                  ((block_row + QueryGradient::first_row() + m) * (kTiles.head_dim / 16) + block_column) * 256,
              &dq[m][8 * n]);
        }
      }
    }
    tile = next_tile;
    in_group = next_in_group;
  }

  __syncthreads();  // nobody reads K and V any more: dK and dV take their places
  const HeadRows dk_rows = head_rows(args.dk, batch, problem.kv_len, problem.kv_heads, kv_head, kSpec.head_dim);
  const HeadRows dv_rows = head_rows(args.dv, batch, problem.kv_len, problem.kv_heads, kv_head, kSpec.value_dim);
  store_gradient<HeadTile, kSpec.head_dim, KeyGradient>(shared_address(shared.k), dk, problem.scale, dk_rows, k0,
                                                        problem.kv_len);
  store_gradient<ValueTile, kSpec.value_dim, ValueGradient>(
      shared_address(shared.v), dv, kSpec.dropout ? problem.dropout_scale : 1.f, dv_rows, k0, problem.kv_len);
}
