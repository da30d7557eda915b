// Attention forward with mma.sync: out = softmax(logits(Q K^T)) V, lse = log sum exp(logits).
//
// Grid: one block for each (query tile, head, batch entry), times the splits of the keys if kTiles.split. Blocks are
// numbered in sections of heads whose keys and values share the L2; inside a section the last query tiles, which under
// causal masks see the most keys, come first.
// Block: kTiles.warps warps; each owns 16 or 32 rows of the tile, all keys and all of the output row.
//
// Key tiles are walked from the last to the first. One buffer each for K and V, and a copy always on the way: while
// S(n) = Q K(n)^T is computed V(n) arrives, while O += P V(n) is computed K(n-1) arrives.
//
//   shared memory  Q  queries x head_dim, at the end the output tile (queries x value_dim)
//   (16-bit)       K  keys x head_dim          V  keys x value_dim
//   registers      S  rows x keys, O  rows x value_dim, of a warp's rows, in fp32; P is rounded to 16 bits in place
//
// Numerics: scores, softmax and output sums in fp32; P unnormalised, at most 2^8 (softmax.cuh), in 16 bits; one
// division at the end.
//
// kTiles.packed: the rows of a tile are all query heads of one key head, row r = query r / group, head r % group, so
// that short queries read the keys once. Only without segment ids and with features that do not depend on the head
// (sinks excepted: the store applies them).
// kTiles.split: block s of the splits takes the s-th part of the key tiles and writes its normalised output and lse in
// fp32; support/combine.cuh adds them up.
//
// Limits: head sizes multiples of 8; fewer than 2^30 rows; offsets into arrays are 64-bit.
#include "pieces/dropout.cuh"
#include "pieces/score.cuh"
#include "pieces/softmax.cuh"
#include "sm80/args.h"
#include "sm80/tile.cuh"

namespace jf {

constexpr int kThreads = 32 * kTiles.warps;
constexpr int kQueries = kTiles.queries, kKeys = kTiles.keys;
constexpr int kBlocks = kQueries / kTiles.warps / 16;   // of 16 rows, one under the other, in a warp
constexpr int kHeadSteps = (kSpec.head_dim + 15) / 16;  // of 16, the k of an mma
constexpr int kValueSteps = (kSpec.value_dim + 15) / 16;
static_assert(kBlocks * 16 * kTiles.warps == kQueries && (kBlocks == 1 || kBlocks == 2));
static_assert(kSpec.head_dim <= kTiles.head_dim && kSpec.value_dim <= kTiles.value_dim && kKeys % 16 == 0);
static_assert(!kTiles.packed || !(kSpec.bias() || kSpec.mask || kSpec.alibi || kSpec.dropout || kSpec.segment_ids),
              "features of a packed tile must not depend on the head");

using QTile = Tile<kTiles.head_dim>;
using VTile = Tile<kTiles.value_dim>;
using Softmax = OnlineSoftmax<true>;

struct alignas(128) Shared {
  static constexpr int kQBytes = kQueries * QTile::kRowBytes, kOutBytes = kQueries * VTile::kRowBytes;
  unsigned char q[kQBytes > kOutBytes ? kQBytes : kOutBytes];
  unsigned char k[kKeys * QTile::kRowBytes];
  unsigned char v[kKeys * VTile::kRowBytes];
};

// What this block computes.
struct Work {
  int tile, head, kv_head, batch, split;
  int row0;   // first row of the tile
  int group;  // query heads of a key head
};

JF_DEVICE Work work_of(const Sm80ForwardArgs& args, int index) {
  const Problem& p = args.problem;
  const int group = kSpec.grouped ? p.q_heads / p.kv_heads : 1;
  const int heads = kTiles.packed ? p.kv_heads : p.q_heads;
  int split = 0;
  if constexpr (kTiles.split) {
    split = index % args.splits;
    index /= args.splits;
  }
  const TilePlace place = place_in_sections(index, heads * p.batch, args.tiles, args.section);
  const int tile = args.tiles - 1 - place.tile, pair = place.pair;
  const int head = pair % heads;
  return {tile, head, kTiles.packed ? head : head / group, pair / heads, split, tile * kQueries, group};
}

// Rows of so many queries.
JF_DEVICE int rows_of(const Work& work, int queries) { return kTiles.packed ? queries * work.group : queries; }
// Row r of the (possibly packed) rows is a query of a head.
JF_DEVICE int query_of(const Work& work, int row) { return kTiles.packed ? row / work.group : row; }
JF_DEVICE int head_of(const Work& work, int row) {
  return kTiles.packed ? work.head * work.group + row % work.group : work.head;
}
// Its place among the [q_len, q_heads] rows of a batch entry.
JF_DEVICE long long place_of(const Work& work, const Problem& p, int row) {
  return static_cast<long long>(query_of(work, row)) * p.q_heads + head_of(work, row);
}

// Normalises and stores this warp's rows; those past the end are zeros with an lse of -inf. What the block computes is
// worked out again, so that it need not stay in registers over the main loop.
JF_DEVICE void store(const Sm80ForwardArgs& args, const Softmax (&softmax)[kBlocks],
                     const float (&o)[kBlocks][kValueSteps * 8], int warp_row) {
  const u32 shared_q = shared_address(dynamic_shared);
  const Problem& problem = args.problem;
  const Work work = work_of(args, afresh(blockIdx.x));
  const int rows_end = rows_of(work, band_of(problem, args.features, work.batch).q_end);
  const int rows_all = rows_of(work, problem.q_len);
  const long long batch_rows =
      static_cast<long long>(work.split * problem.batch + work.batch) * problem.q_len * problem.q_heads;
  if constexpr (!kTiles.split) __syncthreads();  // nobody reads Q any more: the output tile takes its place
#pragma unroll
  for (int m = 0; m < kBlocks; m++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row_in_tile = warp_row + 16 * m + lane_id() / 4 + 8 * r, row = work.row0 + row_in_tile;
      const int head = head_of(work, min(row, rows_all - 1));
      float lse, factor;
      if constexpr (kSpec.sinks && !kTiles.split) {
        factor = softmax[m].finish<true>(r, args.features.sinks[head], lse);
      } else {
        factor = softmax[m].finish<false>(r, 0.f, lse);
      }
      if (kSpec.dropout) factor *= problem.dropout_scale;
      const bool real = row < rows_end;
      if (lane_id() % 4 == 0 && row < rows_all) {
        const long long place = batch_rows + static_cast<long long>(head) * problem.q_len + query_of(work, row);
        (kTiles.split ? args.partial_lse : args.lse)[place] = real ? lse : -infinity();
      }
#pragma unroll
      for (int n = 0; n < kValueSteps * 2; n++) {
        const float x = real ? o[m][4 * n + 2 * r] * factor : 0.f, y = real ? o[m][4 * n + 2 * r + 1] * factor : 0.f;
        if constexpr (kTiles.split) {
          if (row < rows_all && 8 * n < kSpec.value_dim) {
            float* out = args.partial_out + (batch_rows + place_of(work, problem, row)) * kSpec.value_dim;
            *reinterpret_cast<float2*>(out + 8 * n + 2 * (lane_id() % 4)) = float2{x, y};
          }
        } else {
          store_shared(shared_q + VTile::offset(row_in_tile, n) + 4 * (lane_id() % 4), pack<kSpec.dtype>(x, y));
        }
      }
    }
  }
  if constexpr (!kTiles.split) {
    __syncwarp();  // a warp stores the rows that it wrote
    for (int r = lane_id() / VTile::kLanes; r < kBlocks * 16; r += 32 / VTile::kLanes) {
      const int row = work.row0 + warp_row + r;
      if (row >= rows_all) break;
      char* out = static_cast<char*>(args.out) + (batch_rows + place_of(work, problem, row)) * (2 * kSpec.value_dim);
      for (int c = lane_id() % VTile::kLanes; c < kSpec.value_dim / 8; c += VTile::kLanes) {
        *reinterpret_cast<uint4*>(out + 16 * c) = load_shared_16(shared_q + VTile::offset(warp_row + r, c));
      }
    }
  }
}

}  // namespace jf

extern "C" __global__ void __launch_bounds__(jf::kThreads)
    sm80_forward(const __grid_constant__ jf::Sm80ForwardArgs args) {
  using namespace jf;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  const u32 shared_q = shared_address(shared.q), shared_k = shared_address(shared.k),
            shared_v = shared_address(shared.v);
  const Problem& problem = args.problem;
  const Work work = work_of(args, blockIdx.x);
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * kBlocks * 16;  // first row of this warp, within the tile

  const CallBand band = band_of(problem, args.features, work.batch);
  const int rows_end = rows_of(work, band.q_end);
  const int query0 = query_of(work, work.row0), queries = query_of(work, work.row0 + kQueries - 1) - query0 + 1;
  Range tiles = tiles_of(band.keys_of(query0, queries), kKeys);
  IdBounds q_ids;
  if constexpr (kSpec.segment_ids) {
    const long long index = static_cast<long long>(work.batch) * ceil_div(problem.q_len, kQueries) + work.tile;
    tiles = meet(tiles, args.segments.key_tiles[index]);
    q_ids = args.segments.q_bounds[index];
  }
  if constexpr (kTiles.split) {
    const int part = (tiles.size() + args.splits - 1) / args.splits;
    tiles = meet(tiles, {tiles.begin + work.split * part, tiles.begin + (work.split + 1) * part});
  }
  // Rows past the end compute like the others and are dropped by the store, so that a partial tile masks no more than a
  // full one.
  CallBand keys_band = band;
  keys_band.q_end = kFar;

  const HeadRows k_rows =
      head_rows(args.k, problem.k_batch(work.batch), problem.kv_len, problem.kv_heads, work.kv_head, kSpec.head_dim);
  const HeadRows v_rows =
      head_rows(args.v, problem.v_batch(work.batch), problem.kv_len, problem.kv_heads, work.kv_head, kSpec.value_dim);
  const auto load_k = [&](int n) {
    load_tile<QTile, kKeys, kSpec.head_dim, kThreads>(shared_k, k_rows, n * kKeys, band.kv_end);
    commit_copies();
  };
  const auto load_v = [&](int n) {
    load_tile<VTile, kKeys, kSpec.value_dim, kThreads>(shared_v, v_rows, n * kKeys, band.kv_end);
    commit_copies();
  };
  const auto load_q = [&] {
    const HeadRows rows =
        head_rows(args.q, problem.q_batch(work.batch), problem.q_len, problem.q_heads, 0, kSpec.head_dim);
    copy_tile<QTile, kQueries, kSpec.head_dim, kThreads>(shared_q, rows_end - work.row0, [&](int r) {
      return rows.data + place_of(work, problem, work.row0 + r) * (2 * kSpec.head_dim);
    });
  };

  const Score score = score_of(problem, args.features, work.batch, work.head);
  const auto mask = [&](float (&s)[kKeys / 2], const Fragment<false>& at) {
    hide_outside_band(s, at, keys_band);
    if constexpr (kSpec.segment_ids)
      hide_other_segments<false>(s, at, segments_of(problem, args.features, band, work.batch));
  };
  const auto interior = [&](int n) {
    if (!keys_band.interior(query0, queries, n * kKeys, kKeys)) return false;
    if constexpr (!kSpec.segment_ids) return true;
    return q_ids.same_single_id(
        args.segments.kv_bounds[static_cast<long long>(work.batch) * ceil_div(problem.kv_len, kKeys) + n]);
  };

  Softmax softmax[kBlocks];
  float o[kBlocks][kValueSteps * 8];
#pragma unroll
  for (int m = 0; m < kBlocks; m++) softmax[m].reset();
  clear(o);

  if (tiles.size() > 0) {
    load_q();
    load_k(tiles.end - 1);
  }
  for (int n = tiles.end - 1; n >= tiles.begin; n--) {
    wait_copies<0>();
    __syncthreads();  // K(n), and the first time Q, are there for all; nobody reads V(n+1) any more
    load_v(n);
    float s[kBlocks][kKeys / 2];
    clear(s);
    multiply<kSpec.dtype, kHeadSteps>(s, OperandA<QTile, false>(afresh(shared_q), warp_row / 16),
                                      OperandB<QTile, false>(afresh(shared_k), 0));
    wait_copies<0>();
    __syncthreads();  // V(n) is there for all; nobody reads K(n) any more
    if (n > tiles.begin) load_k(n - 1);

    const bool inside = interior(n);
#pragma unroll
    for (int m = 0; m < kBlocks; m++) {
      Fragment<false> at = warp_fragment<false>(work.row0 + warp_row + 16 * m, n * kKeys);
      if constexpr (kTiles.packed) at.row[0] /= work.group, at.row[1] /= work.group;
      transform_scores(s[m], at, score);
      if constexpr (kSpec.mask) hide_masked(s[m], at, problem, args.features, work.batch, work.head);
      if (!inside) mask(s[m], at);
      float rescale[2];
      if (softmax[m].step<false>(s[m], rescale, Linear{score.unit})) {
#pragma unroll
        for (int i = 0; i < kValueSteps * 8; i++) o[m][i] *= rescale[fragment_row(i)];
      }
      if constexpr (kSpec.dropout) {
        for_each_kept<kKeys / 2>(dropout_of(problem, args.features, work.batch, work.head), at,
                                 [&](int i, bool kept) { s[m][i] = kept ? s[m][i] : 0.f; });
      }
    }
    multiply<kSpec.dtype, kKeys / 16>(o, rounded<kSpec.dtype>(s), OperandB<VTile, true>(afresh(shared_v), 0));
  }
  store(args, softmax, o, warp_row);
}
