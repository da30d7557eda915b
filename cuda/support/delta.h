// Arguments of support/delta.cuh.
#pragma once
#include "spec.h"

namespace jf {

struct DeltaArgs {
  Problem problem;
  Rows q_lengths;
  const void *out, *dout;   // [batch, q_len, q_heads, value_dim]
  const float *lse, *dlse;  // [batch, q_heads, q_len]
  float *lse2, *delta;      // [batch, q_heads, padded_len]
  int padded_len;           // q_len rounded up to whole tiles: a multiple of 64
  float* dq_acc;            // [batch, q_heads, padded_len, acc_size] to clear, or null
  int acc_size;
};

}  // namespace jf
