// Arguments and tile sizes of sm90/forward_fp8.cuh: plain C++17, included by the host.
#pragma once
#include "spec.h"
#include "support/segments.h"
#include "tensor_map.h"

namespace jf {

constexpr int kScaleBlock = 32;  // tokens that share a scale
constexpr int kItems = 4;        // of a block on the way: no group waits for the slowest one, nor for the counter
constexpr int kValueChunk = 16;  // keys that stand together in the layout of the value
// int8 has no NaN: a token of query or key that holds one is this byte throughout, and the scale of its block negative.
constexpr unsigned char kNaNByte = 0x80;

// Tiles of one variant: `constexpr jf::Sm90Fp8Tiles kTiles{...}` in variant.h.
struct Sm90Fp8Tiles {
  int queries, keys;  // rows and columns of a score tile; one consumer warpgroup for each 64 queries
  int head;           // head size of query, key and value in shared memory: 64, 128 or 256
  int stages;         // key and value tiles on the way
  int q_stages;       // query tiles on the way
  DType out;
};

struct Sm90Fp8Args {
  TensorMap q, k, v, out;
  Problem problem;
  Features features;
  const float* q_scale;  // [batch, q_heads, ceil(q_len / kScaleBlock)]
  const float* k_scale;  // [batch, kv_heads, ceil(kv_len / kScaleBlock)]
  const float* v_scale;  // [batch, kv_heads, ceil(kv_len / kScaleBlock)]
  float* lse;
  SegmentTiles segments;
  int* counter;  // zero at launch: how many work items beyond the first of each block were taken
  int q_tiles;   // of one (batch entry, head)
  int row0;      // of the first of them: a multiple of 64, at most 0
  int pairs;     // (batch entry, head): a work item is a query tile of one
  int section;   // (batch entry, head) pairs that run side by side: their keys and values share the L2
};

}  // namespace jf
