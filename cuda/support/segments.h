// Which tiles segment ids allow to meet: arguments of support/segments.cuh, and what it makes for the attention
// kernels.
#pragma once
#include "pieces/mask.cuh"
#include "spec.h"

namespace jf {

// Null without segment ids.
struct SegmentTiles {
  const IdBounds* q_bounds;   // [batch, query tiles]: ids of each tile
  const IdBounds* kv_bounds;  // [batch, key tiles]
  const Range* key_tiles;     // [batch, query tiles]: the smallest range of key tiles that holds all it can meet
  const Range* query_tiles;   // [batch, key tiles]
};

struct SegmentArgs {
  Problem problem;
  Features features;
  int queries, keys;  // of a tile
  IdBounds *q_bounds, *kv_bounds;
  Range *key_tiles, *query_tiles;  // one may be null: not wanted
};

}  // namespace jf
