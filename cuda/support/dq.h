// Arguments of support/dq.cuh.
#pragma once

namespace jf {

struct DqArgs {
  const float* sums;
  void* dq;  // [batch, q_len, q_heads, head_dim]
  int q_len, q_heads, padded_len;
  float scale;
};

// `constexpr jf::DqTiles kTiles{...}` in variant.h.
struct DqTiles {
  int sums_size;  // elements of a row of the sums, at least head_dim
};

}  // namespace jf
