// What the two backward kernels of Hopper share: the order of the work, the rings in shared memory and the thread that
// fills them, the logits of a tile of scores, the sums of dq.
#pragma once
#include "pieces/dropout.cuh"
#include "pieces/score.cuh"
#include "sm90/backward_args.h"
#include "sm90/first_keys.cuh"
#include "sm90/ptx.cuh"

namespace jf {

constexpr int kQueries = kTiles.queries, kKeys = kTiles.keys;
constexpr int kKvStages = kTiles.kv_stages, kQStages = kTiles.q_stages, kDoutStages = kTiles.dout_stages;
constexpr bool kOwnDq = kTiles.own_dq, kFirstKeysStore = kTiles.first_keys_store;
// A second slot for K and V lets blocks go from work item to work item; with one there is a block for each.
constexpr bool kPersistent = kKvStages == 2;
static_assert(kPersistent || !kOwnDq);
// Key tiles add to a query tile's dq in turn, in a fixed order: the one that reaches it first goes first. Blocks draw
// key tiles in that order too, so that nobody waits for work that has not been drawn.
constexpr bool kTurns = kSpec.deterministic && !kOwnDq;
static_assert(!kTurns || !kSpec.segment_ids);  // turn_of counts every key tile of the band
static_assert(!kFirstKeysStore || !(kTurns || kOwnDq));
// Who may wait for another block's work draws all of its own, so that what it waits for is under way. (Blocks with one
// work item each are started in the order of their numbers.)
constexpr bool kDrawsAll = kTurns || (kFirstKeysStore && kPersistent);
constexpr bool kSplits = Sm90BackwardMaySplit(kSpec, kTiles);
constexpr bool kLastKeysFirst = kTurns && (kSpec.causal || kSpec.window_right);
constexpr int kHead = Sm90BackwardTileSize(kSpec, kSpec.head_dim),
              kValue = Sm90BackwardTileSize(kSpec, kSpec.value_dim);
constexpr int kHeadAtoms = (kHead + 63) / 64, kValueAtoms = (kValue + 63) / 64;  // of 64 elements: 128 bytes a row
constexpr int kDqBlocks = kQueries / 64 * (kHead / 8);                           // of 64 queries x 8 elements
constexpr bool kMasks = kSpec.causal || kSpec.window_left || kSpec.window_right;
// Consumers of sm90/backward.cuh that need all registers there are even beside turns: by measurement, and because ptxas
// serialises some without.
constexpr bool kFullConsumers = !Sm90BackwardIsWide(kSpec) && kQueries == 64 && (kMasks || kSpec.mask || kSpec.dropout);
// Whether the producer's warpgroup gets more: for further key tiles, or for turns.
constexpr bool kServesMore = kPersistent || (kTurns && !kFullConsumers);
constexpr int kProducerRegisters = kServesMore ? 40 : 24, kConsumerRegisters = kServesMore ? 232 : 240;
static_assert(kProducerRegisters + 2 * kConsumerRegisters == 3 * (65536 / 384 / 8 * 8));

enum NamedBarrier { kAllConsumers = 1, kWarpgroup = 2 };  // kWarpgroup + g

struct alignas(1024) Rings {
  unsigned char k[kKvStages][kHeadAtoms * kKeys * 128];
  unsigned char v[kKvStages][kValueAtoms * kKeys * 128];
  unsigned char q[kQStages][kHeadAtoms * kQueries * 128];
  unsigned char dout[kDoutStages][kValueAtoms * kQueries * 128];
  float lse_log2[kQStages][kQueries], delta[kDoutStages][kQueries];
  int work[kKvStages];  // what the slot of K and V holds, or -1: the end
  u64 kv_full[kKvStages], kv_free[kKvStages];
  u64 q_full[kQStages], q_free[kQStages], dout_full[kDoutStages], dout_free[kDoutStages];
  u64 turn_came[2], turn_used[2], turn_passed[2];  // of every other step
};

JF_DEVICE u32 barrier_of(const u64* barriers, u32 slot) { return shared_address(barriers) + 8 * slot; }

JF_DEVICE void init_rings(Rings& rings) {
  auto init = [](u64* barriers, int count, u32 arrivals) {
    for (int i = 0; i < count; i++) barrier_init(barrier_of(barriers, i), arrivals);
  };
  init(rings.kv_full, kKvStages, 1 + kFirstKeysStore);
  init(rings.kv_free, kKvStages, kTurns ? 4 : 2);
  init(rings.q_full, kQStages, 1);
  init(rings.q_free, kQStages, 2);
  init(rings.dout_full, kDoutStages, 1);
  init(rings.dout_free, kDoutStages, 2);
  init(rings.turn_came, 2, 1);
  init(rings.turn_used, 2, 256);
  init(rings.turn_passed, 2, 1);
  barrier_init_fence();
}

// Place in a ring of kSize slots; parity of the phase that fills the slot for this use.
template <int kSize>
struct Ring {
  u32 slot = 0, parity = 0;
  JF_DEVICE void advance() {
    if (++slot == kSize) slot = 0, parity ^= 1;
  }
};

// ---- Order of the work

// kKeys keys of one key head of one batch entry, and the query tiles that see any of them.
struct KeyTile {
  int batch, kv_head, index;
  CallBand band;
  Range query_tiles;
  int split, piece, pieces;  // the number of a split key tile, and which part of its query tiles this is
};

// Work item `work`, in the order in which blocks draw them: sections of pairs, inside one the first keys first, which
// causal attention shows to most queries. own_dq: all key tiles of one pair after the other.
JF_DEVICE Place place_of(const Sm90BackwardArgs& args, int work) {
  const int pairs = args.problem.batch * args.problem.kv_heads;
  if constexpr (kFirstKeysStore) {
    return place_after_first_keys(args.first_keys, pairs, args.section, args.key_tiles, work);
  }
  const int section = kOwnDq ? 1 : args.section;
  const int first = work / (section * args.key_tiles) * section, width = min(section, pairs - first);
  const int rest = work - first * args.key_tiles;
  return {first + rest % width, kLastKeysFirst ? args.key_tiles - 1 - rest / width : rest / width};
}

JF_DEVICE KeyTile key_tile_of(const Sm90BackwardArgs& args, int work) {
  KeyTile tile;
  tile.split = tile.piece = 0, tile.pieces = 1;
  if constexpr (kSplits) {
    if (work >= args.split.first) {
      tile.pieces = args.split.pieces;
      tile.split = (work - args.split.first) / tile.pieces, tile.piece = (work - args.split.first) % tile.pieces;
      work = args.split.first + tile.split;
    }
  }
  const Place place = place_of(args, work);
  tile.batch = place.pair / args.problem.kv_heads;
  tile.kv_head = place.pair % args.problem.kv_heads;
  tile.index = place.key_tile;
  tile.band = band_of(args.problem, args.features, tile.batch);
  tile.query_tiles = tiles_of(tile.band.queries_of(tile.index * kKeys, kKeys), kQueries);
  if constexpr (kSpec.segment_ids) {
    tile.query_tiles = meet(tile.query_tiles, args.segments.query_tiles[tile.batch * args.key_tiles + tile.index]);
  }
  if constexpr (kSplits) {
    const int begin = tile.query_tiles.begin, size = tile.query_tiles.size();
    tile.query_tiles = {begin + size * tile.piece / tile.pieces, begin + size * (tile.piece + 1) / tile.pieces};
  }
  return tile;
}

// The producer's: this block's first item of work, and the one after `work`; -1 if there is none (others may have drawn
// all of it before this block's first draw).
JF_DEVICE int work_or_end(const Sm90BackwardArgs& args, int work) {
  return work < args.problem.batch * args.problem.kv_heads * args.key_tiles ? work : -1;
}
JF_DEVICE int first_work(const Sm90BackwardArgs& args) {
  if constexpr (kDrawsAll) return work_or_end(args, atomicAdd(args.counters, 1));
  return kOwnDq ? blockIdx.x * args.key_tiles : blockIdx.x;
}
JF_DEVICE int next_work(const Sm90BackwardArgs& args, int work) {
  if constexpr (kOwnDq) {
    const int next = work + 1;
    return work_or_end(args, next % args.key_tiles == 0 ? next + (gridDim.x - 1) * args.key_tiles : next);
  } else if constexpr (kPersistent) {
    return work_or_end(args, (kDrawsAll ? 0 : gridDim.x) + atomicAdd(args.counters, 1));
  }
  return -1;
}

// Everyone else's: what lies in a slot of K and V that is full.
JF_DEVICE int work_in(const Rings& shared, u32 slot) {
  return kPersistent || kTurns ? shared.work[slot] : static_cast<int>(blockIdx.x);
}

template <class Visit>
JF_DEVICE void for_each_step(const Sm90BackwardArgs& args, const KeyTile& tile, Visit visit) {
  const int group = kSpec.grouped ? args.problem.q_heads / args.problem.kv_heads : 1;
  for (int head = tile.kv_head * group; head < (tile.kv_head + 1) * group; head++) {
#pragma unroll 1
    for (int m = tile.query_tiles.begin; m < tile.query_tiles.end; m++) {
      visit(head, m, m + 1 == tile.query_tiles.end && head + 1 == (tile.kv_head + 1) * group);
    }
  }
}

JF_DEVICE int* stored_flag(const Sm90BackwardArgs& args, const KeyTile& tile) {
  return args.stored + tile.batch * args.problem.kv_heads + tile.kv_head;
}

// ---- Producer: one thread

JF_DEVICE void load_tile(u32 to, const TensorMap& map, u32 barrier, int atoms, int rows, int head, int row, int batch) {
  for (int atom = 0; atom < atoms; atom++) tma_load(to + atom * rows * 128, map, barrier, atom * 64, head, row, batch);
}

JF_DEVICE void produce(const Sm90BackwardArgs& args, Rings& shared) {
  const Problem& p = args.problem;
  Ring<kKvStages> kv;
  Ring<kQStages> q;
  Ring<kDoutStages> dout;
  int work = first_work(args);
  do {
    const u32 kv_full = barrier_of(shared.kv_full, kv.slot);
    barrier_wait(barrier_of(shared.kv_free, kv.slot), kv.parity ^ 1);
    shared.work[kv.slot] = work;
    if (work < 0) {
      for (int i = 0; i < 1 + kFirstKeysStore; i++) barrier_arrive(kv_full);
      return;
    }
    const KeyTile tile = key_tile_of(args, work);
    barrier_arrive_expect(kv_full, sizeof shared.k[0] + sizeof shared.v[0]);
    load_tile(shared_address(shared.k[kv.slot]), args.k, kv_full, kHeadAtoms, kKeys, tile.kv_head, tile.index * kKeys,
              p.k_batch(tile.batch));
    load_tile(shared_address(shared.v[kv.slot]), args.v, kv_full, kValueAtoms, kKeys, tile.kv_head, tile.index * kKeys,
              p.v_batch(tile.batch));
    kv.advance();
    // The consumers begin when the sums are there to add to, which is seen while the first loads are on their way.
    bool begun = !kFirstKeysStore;
    const auto begin = [&] {
      if (begun) return;
      if (tile.index != 0) await_flag(stored_flag(args, tile), 1);
      barrier_arrive(kv_full);
      begun = true;
    };
    for_each_step(args, tile, [&](int head, int m, bool) {
      const long long row = ((static_cast<long long>(tile.batch) * p.q_heads + head) * args.q_tiles + m) * kQueries;
      const u32 q_full = barrier_of(shared.q_full, q.slot), dout_full = barrier_of(shared.dout_full, dout.slot);
      barrier_wait(barrier_of(shared.q_free, q.slot), q.parity ^ 1);
      barrier_arrive_expect(q_full, sizeof shared.q[0] + sizeof shared.lse_log2[0]);
      load_tile(shared_address(shared.q[q.slot]), args.q, q_full, kHeadAtoms, kQueries, head, m * kQueries,
                p.q_batch(tile.batch));
      bulk_load(shared_address(shared.lse_log2[q.slot]), args.lse_log2 + row, sizeof shared.lse_log2[0], q_full);
      barrier_wait(barrier_of(shared.dout_free, dout.slot), dout.parity ^ 1);
      barrier_arrive_expect(dout_full, sizeof shared.dout[0] + sizeof shared.delta[0]);
      load_tile(shared_address(shared.dout[dout.slot]), args.dout, dout_full, kValueAtoms, kQueries, head, m * kQueries,
                tile.batch);
      bulk_load(shared_address(shared.delta[dout.slot]), args.delta + row, sizeof shared.delta[0], dout_full);
      q.advance();
      dout.advance();
      begin();
    });
    begin();
    work = next_work(args, work);
  } while (kPersistent);
}

// ---- Turns: two more threads

JF_DEVICE int turn_of(const KeyTile& tile, int m) {
  const Range key_tiles = tiles_of(tile.band.keys_of(m * kQueries, kQueries), kKeys);
  return kLastKeysFirst ? key_tiles.end - 1 - tile.index : tile.index - key_tiles.begin;
}

// Visits the steps of the key tiles that the producer has drawn.
template <class Visit>
JF_DEVICE void follow_work(const Sm90BackwardArgs& args, Rings& shared, Visit visit) {
  Ring<kKvStages> kv;
  do {
    barrier_wait(barrier_of(shared.kv_full, kv.slot), kv.parity);
    const int work = work_in(shared, kv.slot);
    if (work < 0) return;
    const KeyTile tile = key_tile_of(args, work);
    for_each_step(args, tile, [&](int head, int m, bool) {
      int* flag = args.turns + (static_cast<long long>(tile.batch) * args.problem.q_heads + head) * args.q_tiles + m;
      visit(flag, turn_of(tile, m));
    });
    barrier_arrive(barrier_of(shared.kv_free, kv.slot));
    kv.advance();
  } while (kPersistent);
}

JF_DEVICE void await_turns(const Sm90BackwardArgs& args, Rings& shared) {
  Ring<2> ring;
  follow_work(args, shared, [&](const int* flag, int turn) {
    barrier_wait(barrier_of(shared.turn_passed, ring.slot), ring.parity ^ 1);
    await_flag(flag, turn);
    barrier_arrive(barrier_of(shared.turn_came, ring.slot));
    ring.advance();
  });
}

JF_DEVICE void pass_turns(const Sm90BackwardArgs& args, Rings& shared) {
  Ring<2> ring;
  follow_work(args, shared, [&](int* flag, int turn) {
    barrier_wait(barrier_of(shared.turn_used, ring.slot), ring.parity);
    pass_flag(flag, turn + 1);
    barrier_arrive(barrier_of(shared.turn_passed, ring.slot));
    ring.advance();
  });
}

// Everything warpgroup 0 does.
JF_DEVICE void serve(const Sm90BackwardArgs& args, Rings& shared) {
  registers_release<kProducerRegisters>();
  if (threadIdx.x == 0) produce(args, shared);
  if constexpr (kTurns) {
    if (threadIdx.x == 32) await_turns(args, shared);
    if (threadIdx.x == 64) pass_turns(args, shared);
  }
}

// ---- Consumers

// When all of them have come to the end of a key tile.
JF_DEVICE void pass_stored(const Sm90BackwardArgs& args, const KeyTile& tile) {
  if (kFirstKeysStore && tile.index == 0 && threadIdx.x == 128) pass_flag(stored_flag(args, tile), 1);
}

// Zeroes rows [first, rows) of a tile, if there are any: they hold what lies past a length, and 0 * NaN is NaN.
template <int kRows, int kAtoms>
JF_DEVICE void clear_rows(unsigned char (&tile)[kAtoms * kRows * 128], int first) {
  for (int i = threadIdx.x - 128; i < kAtoms * kRows * 8; i += 256) {
    if (i / 8 % kRows >= first) reinterpret_cast<uint4*>(tile)[i] = uint4{0, 0, 0, 0};
  }
}

// Raw products with the group's keys become logits in the units of score.unit, -inf where the pair is not visible.
// inside: every pair of the tile is visible, by the band.
template <bool kTransposed, int N, int M>
JF_DEVICE void make_logits(float (&s)[N], float (&derivative)[M], const Fragment<kTransposed>& at,
                           const Sm90BackwardArgs& args, const KeyTile& tile, bool inside, int head, int m,
                           const Score& score) {
  transform_scores<kSpec.softcap>(s, derivative, at, score);
  if (!inside) hide_outside_band(s, at, tile.band);
  if constexpr (kSpec.segment_ids) {
    if (!args.segments.q_bounds[tile.batch * args.q_tiles + m].same_single_id(
            args.segments.kv_bounds[tile.batch * args.key_tiles + tile.index])) {
      hide_other_segments(s, at, segments_of(args.problem, args.features, tile.band, tile.batch));
    }
  }
  if constexpr (kSpec.mask) hide_masked(s, at, args.problem, args.features, tile.batch, head);
}

// Leaves a piece's dk and dv where the other pieces find them. The last to do so goes on with the sums of all; the
// order in which they are added does not depend on which one that is.
template <int N, int M>
JF_DEVICE bool sum_pieces(const Sm90BackwardArgs& args, Rings& shared, const KeyTile& tile, float* dk, float* dv) {
  static_assert(N % 4 == 0 && M % 4 == 0);
  const int thread = threadIdx.x - 128;
  float4* sums = reinterpret_cast<float4*>(args.piece_sums) +
                 static_cast<long long>(tile.split) * tile.pieces * (N + M) / 4 * 256 + thread;
  const auto place = [&](int piece, int i) { return sums + (piece * (N + M) / 4 + i) * 256; };
#pragma unroll
  for (int i = 0; i < N; i += 4) *place(tile.piece, i / 4) = float4{dk[i], dk[i + 1], dk[i + 2], dk[i + 3]};
#pragma unroll
  for (int i = 0; i < M; i += 4) *place(tile.piece, (N + i) / 4) = float4{dv[i], dv[i + 1], dv[i + 2], dv[i + 3]};
  named_sync(kAllConsumers, 256);
  if (thread == 0) shared.work[0] = count_up(args.counters + tile.split);
  named_sync(kAllConsumers, 256);
  if (shared.work[0] != tile.pieces - 1) return false;
#pragma unroll
  for (int i = 0; i < N; i++) dk[i] = 0.f;
#pragma unroll
  for (int i = 0; i < M; i++) dv[i] = 0.f;
  for (int piece = 0; piece < tile.pieces; piece++) {
    const auto add = [&](float* to, int i) {
      const float4 x = __ldcg(place(piece, i));
      to[0] += x.x, to[1] += x.y, to[2] += x.z, to[3] += x.w;
    };
#pragma unroll
    for (int i = 0; i < N; i += 4) add(dk + i, i / 4);
#pragma unroll
    for (int i = 0; i < M; i += 4) add(dv + i, (N + i) / 4);
  }
  return true;
}

// Adds a warpgroup's 64 queries x 64 elements of dq to those of the earlier key tiles; see support/dq.cuh for the
// order.
struct DqSum {
  float* part;       // of this thread in the query tile's accumulators
  int blocks;        // of 8 elements
  bool first, last;  // of the key tiles that add to this query tile; last: own_dq alone

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
      if ((kOwnDq || kFirstKeysStore) && first) {
        __stcg(reinterpret_cast<float4*>(part + i * 512), x);
      } else {
        global_add(part + i * 512, x);
      }
    }
  }
};

}  // namespace jf
