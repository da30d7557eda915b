// Arguments and tile sizes of sm90/backward.cuh and sm90/backward_wide.cuh: plain C++17, included by the host.
#pragma once
#include "spec.h"
#include "support/segments.h"
#include "tensor_map.h"

namespace jf {

// Tiles of one variant: `constexpr jf::Sm90BackwardTiles kTiles{...}` in variant.h.
struct Sm90BackwardTiles {
  int queries, keys;
  int kv_stages;  // 2: the next key tile arrives, and its first step starts, while this one ends
  int q_stages, dout_stages;
  bool own_dq;  // a block works through all key tiles of a (batch entry, key head) and so finishes its dq alone
  bool first_keys_store;  // a pair's first key tile stores its dq, to which the others then add
};

// The work items from `first` on are cut into `pieces` each, by queries: those of a last round that would leave
// multiprocessors idle. pieces = 1: none is.
struct PieceGroups {
  int first, pieces;
};

// When the first key tiles come that store dq, in sections of pairs: those of `ahead` sections before all other tiles,
// so that every multiprocessor begins with one; then each section's so many sections before its other tiles that these
// seldom wait, and find what was stored in the L2.
struct FirstKeys {
  int ahead, lead;  // 1 <= lead <= ahead <= sections
};

struct Sm90BackwardArgs {
  TensorMap q, dout;  // boxes of 64 elements x kTiles.queries
  TensorMap k, v;     // boxes of 64 elements x kTiles.keys
  TensorMap dk, dv;   // boxes of 64 elements x 64 keys; sm90/backward_wide.cuh: x kTiles.keys
  Problem problem;
  Features features;
  SegmentTiles segments;
  const float* lse_log2;  // see support/delta.cuh
  const float* delta;
  float* dq_sums;  // see support/dq.cuh; own_dq: room for the heads of one block after the other
  void* dq;        // own_dq: [batch, q_len, q_heads, head_dim]
  int* counters;   // 0 at launch: work drawn, or for each split key tile the pieces done
  int* turns;      // deterministic: [batch, q_heads, q_tiles], 0 at launch
  int* stored;     // first_keys_store: [batch, kv_heads], 0 at launch, 1 when the first key tile is done
  int key_tiles, q_tiles;
  int section;  // (batch entry, key head) pairs whose key tiles are interleaved: what they read shares the L2
  FirstKeys first_keys;
  PieceGroups split;
  float* piece_sums;  // [split key tiles, pieces, accumulators of a block]
};

// Head sizes above 128, of q and k or of v, take sm90/backward_wide.cuh.
constexpr JF_HOST_DEVICE bool Sm90BackwardIsWide(const Spec& spec) {
  return spec.head_dim > 128 || spec.value_dim > 128;
}

// Key tiles may be cut into pieces where all take the same time and each has its block.
constexpr JF_HOST_DEVICE bool Sm90BackwardMaySplit(const Spec& spec, const Sm90BackwardTiles& tiles) {
  return tiles.kv_stages == 1 && !spec.deterministic && !spec.causal && !spec.window_left && !spec.window_right &&
         !spec.segment_ids;
}

// A head size as the tiles hold it: zeros fill the rest.
constexpr JF_HOST_DEVICE int Sm90BackwardTileSize(const Spec& spec, int head_size) {
  if (Sm90BackwardIsWide(spec)) return head_size <= 128 ? 128 : 256;
  return head_size <= 64 ? 64 : head_size <= 96 ? 96 : 128;
}

// Dynamic shared memory of a block: struct Shared of the kernel.
constexpr JF_HOST_DEVICE int Sm90BackwardSharedBytes(const Spec& spec, const Sm90BackwardTiles& tiles) {
  const int head_row = (Sm90BackwardTileSize(spec, spec.head_dim) + 63) / 64 * 128;
  const int value_row = (Sm90BackwardTileSize(spec, spec.value_dim) + 63) / 64 * 128;
  const int keys = tiles.kv_stages * tiles.keys * (head_row + value_row);
  const int queries =
      tiles.queries * (tiles.q_stages * (head_row + 4) + tiles.dout_stages * (value_row + 4));  // 4: lse_log2, delta
  const int work = (tiles.kv_stages + 1) / 2 * 8;
  const int barriers = 16 * (tiles.kv_stages + tiles.q_stages + tiles.dout_stages + 3);
  const int scores = (Sm90BackwardIsWide(spec) ? 4 : 2 * tiles.queries / 64) * tiles.keys * 128;  // P and dS, or dS
  return (keys + queries + work + barriers + 1023) / 1024 * 1024 + scores;
}

}  // namespace jf
