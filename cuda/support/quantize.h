// Arguments of support/quantize.cuh.
#pragma once
#include "sm90/fp8_args.h"

namespace jf {

// `constexpr jf::QuantizeTiles kTiles{...}` in variant.h, beside a spec with dtype, head sizes and lengths.
struct QuantizeTiles {
  int head;      // head size of the results: 64, 128 or 256
  bool rotate;   // query and key
  DType scores;  // what query and key become: e4m3 or int8
};

// [entries, length, heads, size] -> 8 bits in the layout of sm90/forward_fp8.cuh, scales [entries, heads, ceil(length /
// kScaleBlock)].
struct QuantizeArray {
  const void* from;
  void* to;
  float* scales;
  int entries, length, heads;
  int chunks;    // of the work of one head: see kBlocksPerChunk
  Rows lengths;  // with lengths every batch entry has its own entry
};

struct QuantizeArgs {
  QuantizeArray q, k, v;
};

}  // namespace jf
