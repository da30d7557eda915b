// Arguments and tile sizes of the sm80 kernels: plain C++17, included by the host.
#pragma once
#include "spec.h"
#include "support/segments.h"

namespace jf {

// Tiles of one variant: `constexpr jf::Sm80Tiles kTiles{...}` in variant.h.
struct Sm80Tiles {
  int queries, keys;        // rows and columns of a score tile
  int head_dim, value_dim;  // what head sizes are padded to in shared memory
  int warps;
  bool packed;  // forward: the query heads of a key head are rows of one tile
  bool split;   // forward: key tiles are divided over the grid
};

struct Sm80ForwardArgs {
  Problem problem;
  Features features;
  const void *q, *k, *v;
  void* out;
  float* lse;
  float* partial_out;  // split: [splits, batch, q_len, q_heads, value_dim], normalised
  float* partial_lse;  // split: [splits, batch, q_heads, q_len], natural, without the sink
  SegmentTiles segments;
  int tiles;  // query tiles of one (batch entry, head)
  int splits;
  int section;  // (batch entry, head) pairs that run side by side: their keys and values share the L2
};

// Tiles of a backward variant, and how its warps divide the products: each as a grid of `..._rows` rows of warps.
struct Sm80BackwardTiles {
  int queries, keys;
  int head_dim, value_dim;
  int warps;
  int score_rows;       // S, dP [queries, keys]
  int key_rows;         // dK, dV [keys, head size]
  int query_rows;       // dQ [queries, head size]
  int stages;           // of the buffers of Q and dO
  bool query_gradient;  // whether this kernel also adds up dQ
};

struct Sm80BackwardArgs {
  Problem problem;
  Features features;
  const void *q, *k, *v, *dout;
  void *dq, *dk, *dv;
  float* dq_sums;                 // see sm80/backward.cuh; null if the kernel does not add dQ up
  const float *lse_log2, *delta;  // [batch, q_heads, padded_len]
  void* dbias;                    // bias_gradient: laid out as Features::bias
  SegmentTiles segments;
  int padded_len;  // q_len rounded up to whole query tiles
  int tiles;       // of one (batch entry, head): key tiles; query_gradient: query tiles
  int section;     // (batch entry, head) pairs that run side by side
};

}  // namespace jf
