// Attention backward on Hopper for head sizes up to 128. Of each visible pair, with x = q . k and the logit l(scale x):
//
//   p = exp(l - lse), dp = dout . v, dl = p (dp - delta), delta = sum(dout * out) - dlse
//   dv = sum_q p dout, dk = scale sum_q l' dl q, dq = scale sum_k l' dl k
//
// Grid: a block takes 128 keys of a key head and walks the query tiles that see any of them, head by head of the group;
// dk and dv stay in registers. Blocks come in sections of (batch entry, key head) pairs, the first keys of all pairs of
// a section first. dq leaves as fp32 additions to global memory, in the order of the registers (support/dq.cuh puts it
// right); the sums were cleared by support/delta.cuh. With own_dq a block walks all keys of a pair, one key tile after
// the other: the first stores, the last adds, converts and writes dq, and nothing needs clearing or converting.
//
// Roles: warpgroup 0 loads (one thread, TMA); warpgroups 1 and 2 have 64 keys each and compute, for every query tile,
//   S^T = K Q^T and dP^T = V dO^T     operands in shared memory
//   dV += P^T dO and dK += dS^T Q     P^T and dS^T from registers: an accumulator is an A operand
//   dQ = dS K                         dS^T of both warpgroups from shared memory; half of dQ each
//
// Tiles (queries x keys): 128 x 128 at head size 64, else 64 x 128 (at head size 64, too, where the scores need more
// registers than the plain ones). Rings: two stages of Q + lse_log2 and of dO + delta, two buffers of dS^T, one or two
// of K and V, in that order of struct Shared: 160 KiB at head size 128 with one stage of K and V, 224 KiB with two.
//
// mbarriers       arrives                              waits
//   kv_full       producer + bytes                     consumers, once a key tile
//   kv_free       one thread a warpgroup, when dK and  producer, before the key tile that takes the slot
//                 dV, which leave from K's and V's
//                 place, have been read
//   q_full        producer + bytes                     consumers, before S^T
//   q_free        one thread a warpgroup, after dK     producer
//   dout_full     producer + bytes                     consumers, before dP^T
//   dout_free     one thread a warpgroup, after dV     producer
// Named barriers: kAllConsumers between writing dS^T and reading the other's; kWarpgroup + g before a store by TMA.
//
// Registers: 168 a thread at launch; 24 for the producer, 240 for the consumers (dk, dv 64 + 64, S^T, dP^T 32 + 32 or
// 64 + 64, P^T and dS^T as operands 16 + 16 or 32 + 32 once the former are spent; dq takes the place of S^T).
//
// Numerics: fp32 throughout but for P and dS, rounded to the operands' type. Rows that see nothing come with lse_log2 =
// +inf and give p = 0. What lies past a length may be NaN: it is cleared in shared memory. Limits: float16 and
// bfloat16, head sizes multiples of 8 up to 128.
#include "pieces/dependency.cuh"
#include "pieces/dropout.cuh"
#include "pieces/score.cuh"
#include "sm90/backward_args.h"
#include "sm90/ptx.cuh"

namespace jf {

constexpr int kQueries = kTiles.queries, kKeys = 128, kStages = 2, kKvStages = kTiles.kv_stages;
constexpr int kHead = Sm90BackwardTileSize(kSpec.head_dim), kValue = Sm90BackwardTileSize(kSpec.value_dim);
constexpr int kHeadAtoms = (kHead + 63) / 64, kValueAtoms = (kValue + 63) / 64;  // of 64 elements: 128 bytes a row
constexpr int kScores = kQueries / 2;  // accumulator registers of a thread: S^T and dP^T, 64 keys x queries
constexpr int kDqBlocks = kQueries / 64 * (kHead / 8);  // of 64 queries x 8 elements
constexpr bool kOwnDq = kTiles.own_dq;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kProducerRegisters + 2 * kConsumerRegisters == 3 * (65536 / 384 / 8 * 8));

// A warpgroup's share of dQ = dS K is 64 queries x 64 elements: half of the queries, of the elements, or (if there are
// just so many of both) of the keys.
constexpr bool kSplitQueries = kQueries == 128, kSplitElements = kHead > 64,
               kSplitKeys = !kSplitQueries && !kSplitElements;
constexpr int kDqKeys = kSplitKeys ? 64 : kKeys;
static_assert((kQueries == 64 || kQueries == 128) && !(kSplitQueries && kSplitElements) && !(kOwnDq && kSplitKeys));

struct alignas(1024) Shared {
  unsigned char k[kKvStages][kHeadAtoms * kKeys * 128];
  unsigned char v[kKvStages][kValueAtoms * kKeys * 128];
  unsigned char q[kStages][kHeadAtoms * kQueries * 128];
  unsigned char dout[kStages][kValueAtoms * kQueries * 128];
  unsigned char ds[2][kQueries / 64][kKeys * 128];  // dS^T: rows are keys
  float lse_log2[kStages][kQueries], delta[kStages][kQueries];
  u64 kv_full[kKvStages], kv_free[kKvStages];
  u64 q_full[kStages], q_free[kStages], dout_full[kStages], dout_free[kStages];
};
enum NamedBarrier { kAllConsumers = 1, kWarpgroup = 2 };  // kWarpgroup + g

// An operand that lies `bytes` on from the one described.
JF_DEVICE u64 advance(u64 descriptor, u32 bytes) {
  return (descriptor & 0xffffffff00000000ull) | (static_cast<u32>(descriptor) + (bytes >> 4));
}

JF_DEVICE u32 barrier_of(const u64* barriers, u32 slot) { return shared_address(barriers) + 8 * slot; }

// Place in a ring of kSize slots; parity of the phase that fills the slot for this use.
template <int kSize>
struct Ring {
  u32 slot = 0, parity = 0;
  JF_DEVICE void advance() {
    if (++slot == kSize) slot = 0, parity ^= 1;
  }
};

// ---- Order of the work

// 128 keys of one key head of one batch entry, and the query tiles that see any of them.
struct KeyTile {
  int batch, kv_head, index;
  CallBand band;
  Range query_tiles;
};

JF_DEVICE KeyTile key_tile_of(const Sm90BackwardArgs& args, int pair, int index) {
  KeyTile tile;
  tile.batch = pair / args.problem.kv_heads;
  tile.kv_head = pair % args.problem.kv_heads;
  tile.index = index;
  tile.band = band_of(args.problem, args.features, tile.batch);
  tile.query_tiles = tiles_of(tile.band.queries_of(index * kKeys, kKeys), kQueries);
  if constexpr (kSpec.segment_ids) {
    tile.query_tiles = meet(tile.query_tiles, args.segments.query_tiles[tile.batch * args.key_tiles + index]);
  }
  return tile;
}

template <class Visit>
JF_DEVICE void for_each_key_tile(const Sm90BackwardArgs& args, Visit visit) {
  const int pairs = args.problem.batch * args.problem.kv_heads, block = blockIdx.x;
  if constexpr (kOwnDq) {
    for (int pair = block; pair < pairs; pair += gridDim.x) {
      for (int index = 0; index < args.key_tiles; index++) visit(key_tile_of(args, pair, index));
    }
  } else {  // sections of pairs; inside one the first keys, which causal attention shows to most queries, come first
    const int first = block / (args.section * args.key_tiles) * args.section, width = min(args.section, pairs - first);
    const int rest = block - first * args.key_tiles;
    visit(key_tile_of(args, first + rest % width, rest / width));
  }
}

template <class Visit>
JF_DEVICE void for_each_step(const Sm90BackwardArgs& args, const KeyTile& tile, Visit visit) {
  const int group = kSpec.grouped ? args.problem.q_heads / args.problem.kv_heads : 1;
  for (int head = tile.kv_head * group; head < (tile.kv_head + 1) * group; head++) {
    for (int m = tile.query_tiles.begin; m < tile.query_tiles.end; m++) visit(head, m);
  }
}

// ---- Producer: one thread

JF_DEVICE void load_tile(u32 to, const TensorMap& map, u32 barrier, int atoms, int rows, int head, int row, int batch) {
  for (int atom = 0; atom < atoms; atom++) tma_load(to + atom * rows * 128, map, barrier, atom * 64, head, row, batch);
}

JF_DEVICE void produce(const Sm90BackwardArgs& args, Shared& shared) {
  const Problem& p = args.problem;
  Ring<kKvStages> kv;
  Ring<kStages> ring;
  for_each_key_tile(args, [&](const KeyTile& tile) {
    const u32 kv_full = barrier_of(shared.kv_full, kv.slot);
    barrier_wait(barrier_of(shared.kv_free, kv.slot), kv.parity ^ 1);
    barrier_arrive_expect(kv_full, sizeof shared.k[0] + sizeof shared.v[0]);
    load_tile(shared_address(shared.k[kv.slot]), args.k, kv_full, kHeadAtoms, kKeys, tile.kv_head, tile.index * kKeys,
              p.k_batch(tile.batch));
    load_tile(shared_address(shared.v[kv.slot]), args.v, kv_full, kValueAtoms, kKeys, tile.kv_head, tile.index * kKeys,
              p.v_batch(tile.batch));
    kv.advance();
    for_each_step(args, tile, [&](int head, int m) {
      const long long row = ((static_cast<long long>(tile.batch) * p.q_heads + head) * args.q_tiles + m) * kQueries;
      const u32 q_full = barrier_of(shared.q_full, ring.slot), dout_full = barrier_of(shared.dout_full, ring.slot);
      barrier_wait(barrier_of(shared.q_free, ring.slot), ring.parity ^ 1);
      barrier_arrive_expect(q_full, sizeof shared.q[0] + sizeof shared.lse_log2[0]);
      load_tile(shared_address(shared.q[ring.slot]), args.q, q_full, kHeadAtoms, kQueries, head, m * kQueries,
                p.q_batch(tile.batch));
      bulk_load(shared_address(shared.lse_log2[ring.slot]), args.lse_log2 + row, sizeof shared.lse_log2[0], q_full);
      barrier_wait(barrier_of(shared.dout_free, ring.slot), ring.parity ^ 1);
      barrier_arrive_expect(dout_full, sizeof shared.dout[0] + sizeof shared.delta[0]);
      load_tile(shared_address(shared.dout[ring.slot]), args.dout, dout_full, kValueAtoms, kQueries, head, m * kQueries,
                tile.batch);
      bulk_load(shared_address(shared.delta[ring.slot]), args.delta + row, sizeof shared.delta[0], dout_full);
      ring.advance();
    });
  });
}

// ---- Consumers: two warpgroups of 64 keys each

// Zeroes rows [first, rows) of a tile, if there are any: they hold what lies past a length, and 0 * NaN is NaN.
template <int kRows, int kAtoms>
JF_DEVICE void clear_rows(unsigned char (&tile)[kAtoms * kRows * 128], int first) {
  for (int i = threadIdx.x - 128; i < kAtoms * kRows * 8; i += 256) {
    if (i / 8 % kRows >= first) reinterpret_cast<uint4*>(tile)[i] = uint4{0, 0, 0, 0};
  }
}

// A 64 x N accumulator to rows [row0, row0 + 64) of a tile in shared memory.
template <int N>
JF_DEVICE void store_accumulator(u32 tile, int atom_bytes, int row0, const float (&x)[N], float scale) {
  const u32 row = row0 + lane_id() % 16;
#pragma unroll
  for (int i = 0; i < N; i += 8) {
    const u32 chunk = i / 4 % 8 + lane_id() / 16;
    store_matrix(
        tile + i / 32 * atom_bytes + swizzled_offset(row, chunk), pack<kSpec.dtype>(x[i] * scale, x[i + 1] * scale),
        pack<kSpec.dtype>(x[i + 2] * scale, x[i + 3] * scale), pack<kSpec.dtype>(x[i + 4] * scale, x[i + 5] * scale),
        pack<kSpec.dtype>(x[i + 6] * scale, x[i + 7] * scale));
  }
}

// Adds a warpgroup's 64 queries x 64 elements of dq to those of the earlier key tiles; see support/dq.cuh for the
// order.
struct DqSum {
  float* part;       // of this thread in the query tile's accumulators
  int blocks;        // of 8 elements
  bool first, last;  // own_dq: of the key tiles that add to this query tile

  JF_DEVICE void load_earlier(float (&earlier)[32]) const {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float4 x = first || i >= blocks ? float4{} : __ldcg(reinterpret_cast<const float4*>(part + i * 512));
      earlier[4 * i] = x.x, earlier[4 * i + 1] = x.y, earlier[4 * i + 2] = x.z, earlier[4 * i + 3] = x.w;
    }
  }
  JF_DEVICE void add(const float (&dq)[32]) const {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (kHead == 96 && i >= blocks) break;
      const float4 x{dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]};
      if (kOwnDq && first) {
        __stcg(reinterpret_cast<float4*>(part + i * 512), x);
      } else {
        global_add(part + i * 512, x);
      }
    }
  }
};

JF_DEVICE void store_dq(const Sm90BackwardArgs& args, const float (&dq)[32], const KeyTile& tile, int head, int row,
                        int column) {
  const Problem& p = args.problem;
  u32* out = static_cast<u32*>(args.dq);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (row + 8 * half >= p.q_len) break;
    const long long base =
        ((static_cast<long long>(tile.batch) * p.q_len + row + 8 * half) * p.q_heads + head) * kSpec.head_dim;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (column + 8 * i >= kSpec.head_dim) break;
      out[(base + column + 8 * i) / 2] =
          pack<kSpec.dtype>(dq[4 * i + 2 * half] * p.scale, dq[4 * i + 2 * half + 1] * p.scale);
    }
  }
}

JF_DEVICE void consume(const Sm90BackwardArgs& args, Shared& shared) {
  const Problem& p = args.problem;
  const int g = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, thread = threadIdx.x % 128, warp = thread / 32;
  const int dq_query0 = kSplitQueries ? 64 * g : 0, dq_element0 = kSplitElements ? 64 * g : 0,
            dq_key0 = kSplitKeys ? 64 * g : 0;
  const int dq_block0 = kSplitKeys ? 0 : 8 * g;
  float dk[kHead / 2], dv[kValue / 2], s[kScores], dp[kScores], dq[32];
  u32 p16[kScores / 2], ds16[kScores / 2];  // P^T and dS^T as A operands
  Ring<kKvStages> kv;
  Ring<kStages> ring;
  u32 step = 0;

  for_each_key_tile(args, [&](const KeyTile& tile) {
    const int key0 = tile.index * kKeys;
    const u32 k_tile = shared_address(shared.k[kv.slot]), v_tile = shared_address(shared.v[kv.slot]);
    const u64 k_rows = descriptor_k_major(k_tile + g * 8192), v_rows = descriptor_k_major(v_tile + g * 8192);
    const u64 k_columns = descriptor_mn_major(k_tile + dq_element0 / 64 * kKeys * 128 + dq_key0 * 128, 0);
#pragma unroll
    for (int i = 0; i < kHead / 2; i++) dk[i] = 0.f;
#pragma unroll
    for (int i = 0; i < kValue / 2; i++) dv[i] = 0.f;
    barrier_wait(barrier_of(shared.kv_full, kv.slot), kv.parity);
    if constexpr (kSpec.kv_lengths) {
      if (key0 + kKeys > tile.band.kv_end) {
        clear_rows<kKeys, kHeadAtoms>(shared.k[kv.slot], tile.band.kv_end - key0);
        clear_rows<kKeys, kValueAtoms>(shared.v[kv.slot], tile.band.kv_end - key0);
        async_fence();
        named_sync(kAllConsumers, 256);
      }
    }

    for_each_step(args, tile, [&](int head, int m) {
      const int query0 = m * kQueries;
      const u32 q_tile = shared_address(shared.q[ring.slot]), dout_tile = shared_address(shared.dout[ring.slot]);
      const u32 ds_tile = shared_address(shared.ds[step & 1]);
      const u64 q_rows = descriptor_k_major(q_tile), dout_rows = descriptor_k_major(dout_tile);
      const u64 q_columns = descriptor_mn_major(q_tile, kQueries * 128);
      const u64 dout_columns = descriptor_mn_major(dout_tile, kQueries * 128);
      const u64 ds_columns = descriptor_mn_major(ds_tile + dq_query0 / 64 * kKeys * 128 + dq_key0 * 128, 0);
      barrier_wait(barrier_of(shared.q_full, ring.slot), ring.parity);
      if constexpr (kSpec.q_lengths) {
        if (query0 + kQueries > tile.band.q_end) {
          barrier_wait(barrier_of(shared.dout_full, ring.slot), ring.parity);
          clear_rows<kQueries, kHeadAtoms>(shared.q[ring.slot], tile.band.q_end - query0);
          clear_rows<kQueries, kValueAtoms>(shared.dout[ring.slot], tile.band.q_end - query0);
          async_fence();
          named_sync(kAllConsumers, 256);
        }
      }
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kHead / 16; i++) {  // S^T = K Q^T
        wgmma<kSpec.dtype>(s, advance(k_rows, i / 4 * kKeys * 128 + i % 4 * 32),
                           advance(q_rows, i / 4 * kQueries * 128 + i % 4 * 32), i != 0);
      }
      wgmma_commit();
      barrier_wait(barrier_of(shared.dout_full, ring.slot), ring.parity);
#pragma unroll
      for (int i = 0; i < kValue / 16; i++) {  // dP^T = V dO^T
        wgmma<kSpec.dtype>(dp, advance(v_rows, i / 4 * kKeys * 128 + i % 4 * 32),
                           advance(dout_rows, i / 4 * kQueries * 128 + i % 4 * 32), i != 0);
      }
      wgmma_commit();

      wgmma_wait<1>();
      pin(s);
      const Fragment<true> at = warp_fragment<true>(key0 + g * 64 + warp * 16, query0);
      const Score score = score_of(p, args.features, tile.batch, head);
      float derivative[kSpec.softcap ? kScores : 1];
      transform_scores<kSpec.softcap>(s, derivative, at, score);
      if (!tile.band.interior(query0, kQueries, key0, kKeys)) hide_outside_band(s, at, tile.band);
      if constexpr (kSpec.segment_ids) {
        if (!args.segments.q_bounds[tile.batch * args.q_tiles + m].same_single_id(
                args.segments.kv_bounds[tile.batch * args.key_tiles + tile.index])) {
          hide_other_segments(s, at, segments_of(p, args.features, tile.band, tile.batch));
        }
      }
      if constexpr (kSpec.mask) hide_masked(s, at, p, args.features.mask, tile.batch, head);
#pragma unroll
      for (int i = 0; i < kScores; i += 4) {
        const float2 lse_log2 =
            *reinterpret_cast<const float2*>(&shared.lse_log2[ring.slot][2 * i + lane_id() % 4 * 2]);
#pragma unroll
        for (int j = 0; j < 4; j++) s[i + j] = exp2_fast(fmaf(s[i + j], score.unit, j & 1 ? -lse_log2.y : -lse_log2.x));
      }

      wgmma_wait<0>();
      pin(dp);
      if constexpr (kSpec.dropout) {
        const Dropout dropout = dropout_of(p, args.features, tile.batch, head);
        for_each_kept<kScores>(dropout, at, [&](int i, bool kept) {
          dp[i] = kept ? dp[i] * dropout.scale : 0.f;
          const float dropped = kept ? s[i] * dropout.scale : 0.f;
          if (i & 1) {
            p16[i / 2] |= pack<kSpec.dtype>(0.f, dropped);
          } else {
            p16[i / 2] = pack<kSpec.dtype>(dropped, 0.f);
          }
        });
      }
#pragma unroll
      for (int i = 0; i < kScores; i += 4) {
        const float2 delta = *reinterpret_cast<const float2*>(&shared.delta[ring.slot][2 * i + lane_id() % 4 * 2]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          dp[i + j] = s[i + j] * (dp[i + j] - (j & 1 ? delta.y : delta.x));
          if constexpr (kSpec.softcap) dp[i + j] *= derivative[i + j];
        }
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          if constexpr (!kSpec.dropout) p16[(i + j) / 2] = pack<kSpec.dtype>(s[i + j], s[i + j + 1]);
          ds16[(i + j) / 2] = pack<kSpec.dtype>(dp[i + j], dp[i + j + 1]);
        }
      }
#pragma unroll
      for (int i = 0; i < kScores / 2; i += 4) {
        const u32 chunk = i / 2 % 8 + lane_id() / 16;
        store_matrix(ds_tile + i / 16 * kKeys * 128 + swizzled_offset(g * 64 + warp * 16 + lane_id() % 16, chunk),
                     ds16[i], ds16[i + 1], ds16[i + 2], ds16[i + 3]);
      }
      async_fence();
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kQueries / 16; i++) {  // dV += P^T dO
        wgmma<kSpec.dtype, true>(dv, &p16[4 * i], advance(dout_columns, i * 2048), true);
      }
      wgmma_commit();
      // Both warpgroups have written their dS^T, and are done with the dQ that reads the buffer written next.
      named_sync(kAllConsumers, 256);
#pragma unroll
      for (int i = 0; i < kDqKeys / 16; i++) {  // dQ = dS K
        wgmma<kSpec.dtype, true, true>(dq, advance(ds_columns, i * 2048), advance(k_columns, i * 2048), i != 0);
      }
      wgmma_commit();
#pragma unroll
      for (int i = 0; i < kQueries / 16; i++) {  // dK += dS^T Q
        wgmma<kSpec.dtype, true>(dk, &ds16[4 * i], advance(q_columns, i * 2048), true);
      }
      wgmma_commit();

      wgmma_wait<2>();
      pin(dv);
      if (thread == 0) barrier_arrive(barrier_of(shared.dout_free, ring.slot));
      const int group = kSpec.grouped ? p.q_heads / p.kv_heads : 1;
      const long long dq_head = kOwnDq ? static_cast<long long>(blockIdx.x) * group + head % group
                                       : static_cast<long long>(tile.batch) * p.q_heads + head;
      const int last_key = kOwnDq ? tile.band.keys_of(query0, kQueries).end - 1 : 0;
      const DqSum sum{args.dq_sums + ((dq_head * args.q_tiles + m) * kDqBlocks + dq_block0) * 512 + thread * 4,
                      kDqBlocks - dq_block0, tile.index == 0, tile.index == last_key / kKeys};
      if (kOwnDq && sum.last) {
        float earlier[32];
        sum.load_earlier(earlier);
        wgmma_wait<1>();
        pin(dq);
#pragma unroll
        for (int i = 0; i < 32; i++) dq[i] += earlier[i];
        store_dq(args, dq, tile, head, query0 + dq_query0 + warp * 16 + lane_id() / 4, dq_element0 + lane_id() % 4 * 2);
      } else {
        wgmma_wait<1>();
        pin(dq);
        sum.add(dq);
      }
      wgmma_wait<0>();
      pin(dk);
      if (thread == 0) barrier_arrive(barrier_of(shared.q_free, ring.slot));
      ring.advance();
      step++;
    });

    named_sync(kAllConsumers, 256);  // all reads of K and V are over: dK and dV take their place
    store_accumulator(k_tile, kKeys * 128, g * 64 + warp * 16, dk, p.scale);
    store_accumulator(v_tile, kKeys * 128, g * 64 + warp * 16, dv, 1.f);
    async_fence();
    named_sync(kWarpgroup + g, 128);
    if (thread == 0) {
      for (int atom = 0; atom < kHeadAtoms; atom++) {
        tma_store(args.dk, k_tile + atom * kKeys * 128 + g * 8192, atom * 64, tile.kv_head, key0 + g * 64, tile.batch);
      }
      for (int atom = 0; atom < kValueAtoms; atom++) {
        tma_store(args.dv, v_tile + atom * kKeys * 128 + g * 8192, atom * 64, tile.kv_head, key0 + g * 64, tile.batch);
      }
      bulk_commit();
      bulk_wait_read<0>();
      barrier_arrive(barrier_of(shared.kv_free, kv.slot));
    }
    kv.advance();
  });
}

}  // namespace jf

extern "C" __global__ void __launch_bounds__(384, 1) sm90_backward(const __grid_constant__ jf::Sm90BackwardArgs args) {
  using namespace jf;
  extern __shared__ unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kKvStages; i++) {
      barrier_init(barrier_of(shared.kv_full, i), 1);
      barrier_init(barrier_of(shared.kv_free, i), 2);
    }
    for (int i = 0; i < kStages; i++) {
      barrier_init(barrier_of(shared.q_full, i), 1);
      barrier_init(barrier_of(shared.q_free, i), 2);
      barrier_init(barrier_of(shared.dout_full, i), 1);
      barrier_init(barrier_of(shared.dout_free, i), 2);
    }
    barrier_init_fence();
  }
  __syncthreads();
  dependency_wait();  // lse_log2, delta and the cleared dq_sums come from the kernel ahead
  if (threadIdx.x < 128) {
    registers_release<kProducerRegisters>();
    if (threadIdx.x == 0) produce(args, shared);
  } else {
    registers_acquire<kConsumerRegisters>();
    consume(args, shared);
  }
}
