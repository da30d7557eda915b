// The pass that finds which tiles segment ids allow to meet, for the planner of any attention kernel.
#pragma once

#include "kernel.h"
#include "support/segments.h"

namespace jf {

// Its place in a plan. Without segment ids it has no kernels and Run gives null pointers.
struct SegmentPass {
  bool present = false;
  int queries, keys;  // of a tile
  bool key_tiles, query_tiles;
  size_t first_kernel;
  size_t q_bounds, kv_bounds, key_ranges, query_ranges;  // sections of the scratch

  SegmentTiles Run(const Launch& launch) const;
};

// `key_tiles`, `query_tiles`: which of the two ranges are wanted.
SegmentPass AddSegmentPass(const Call& call, int queries, int keys, bool key_tiles, bool query_tiles, Plan* plan);

}  // namespace jf
