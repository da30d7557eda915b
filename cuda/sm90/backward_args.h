// Arguments and tile sizes of sm90/backward.cuh: plain C++17, included by the host.
#pragma once
#include "spec.h"
#include "support/segments.h"
#include "tensor_map.h"

namespace jf {

// Tiles of one variant: `constexpr jf::Sm90BackwardTiles kTiles{...}` in variant.h.
struct Sm90BackwardTiles {
  int queries;    // of a step
  int kv_stages;  // 2: the next key tile arrives, and its first step starts, while this one ends
  bool own_dq;    // a block works through all key tiles of a (batch entry, key head) and so finishes its dq alone
};

struct Sm90BackwardArgs {
  TensorMap q, dout;  // boxes of 64 elements x kTiles.queries
  TensorMap k, v;     // boxes of 64 elements x 128 keys
  TensorMap dk, dv;   // boxes of 64 elements x 64 keys
  Problem problem;
  Features features;
  SegmentTiles segments;
  const float* lse_log2;  // see support/delta.cuh
  const float* delta;
  float* dq_sums;  // see support/dq.cuh; own_dq: room for the heads of one block after the other
  void* dq;        // own_dq: [batch, q_len, q_heads, head_dim]
  int key_tiles, q_tiles;
  int section;  // (batch entry, key head) pairs whose key tiles are interleaved: what they read shares the L2
};

// Head sizes as the tiles hold them: zeros fill the rest.
constexpr JF_HOST_DEVICE int Sm90BackwardTileSize(int head_size) {
  return head_size <= 64 ? 64 : head_size <= 96 ? 96 : 128;
}

}  // namespace jf
