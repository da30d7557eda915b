// Arguments of support/combine.cuh.
#pragma once
#include "spec.h"

namespace jf {

constexpr int kCombineWarps = 4;      // of a block
constexpr int kCombineElements = 64;  // of a row, by one warp

struct CombineArgs {
  const float* partial_out;  // [splits, batch, q_len, q_heads, value_dim]
  const float* partial_lse;  // [splits, batch, q_heads, q_len], natural, without the sink
  const float* sinks;        // [q_heads] if the spec has them
  void* out;                 // [batch, q_len, q_heads, value_dim]
  float* lse;                // [batch, q_heads, q_len]
  int splits, batch, q_len, q_heads;
};

}  // namespace jf
