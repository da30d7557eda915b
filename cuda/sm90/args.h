// Arguments and tile sizes of the sm90 kernels: plain C++17, included by the host.
#pragma once
#include "spec.h"
#include "support/segments.h"
#include "tensor_map.h"

namespace jf {

// Tiles of one variant of sm90/forward.cuh: `constexpr jf::Sm90ForwardTiles kTiles{...}` in variant.h.
struct Sm90ForwardTiles {
  int rows, keys;    // of a tile of scores; 64 rows a consumer warpgroup
  int stages;        // of the ring of key and value tiles
  int q_stages;      // 2: the next tile's queries arrive before this one's are done with; the output is staged
  bool q_registers;  // queries wait in registers, not in shared memory, which then has room and bandwidth to spare
  int packed;        // query heads of a key head whose rows share a tile; 1: each head has its own
  bool dynamic;      // tiles are drawn from a counter, else dealt out in advance
  bool close_tops;   // of many keys: the running maxima stay close where it counts (CloseLinear)
  bool bias_tiles;   // TMA brings the bias, 16 bits each, with the keys; else each thread reads its own elements
};

struct Sm90ForwardArgs {
  // Boxes of 64 elements x (packed heads x queries) of a tile (q) or a warpgroup (out), or x keys.
  TensorMap q, k, v, out_map;
  Problem problem;
  Features features;
  void* out;
  float* lse;
  SegmentTiles segments;
  int* counter;  // dynamic: 0 at launch
  int tiles;     // of one head (or pack of heads) of one batch entry
  int section;   // heads (or packs) of any batch entry whose tiles are interleaved: their keys and values share the L2
  TensorMap bias;  // bias_tiles: boxes of 64 keys x the queries of a tile
};

}  // namespace jf
