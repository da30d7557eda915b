// The order in which the kernels around the backward take rows.
#pragma once
#include "pieces/math.cuh"

namespace jf {

struct RowBlock {
  int batch, head, index;  // of a block of rows
};

// Grid: x over (batch entry, head), y over blocks of rows. All heads of a row lie side by side; last rows first: they
// are what the kernel ahead left in the L2, and the next one, which starts with the first, finds those there.
JF_DEVICE RowBlock last_rows_first(int heads) {
  const int from_end = gridDim.x * gridDim.y - 1 - (blockIdx.y * gridDim.x + blockIdx.x), rest = from_end / heads;
  return {rest / static_cast<int>(gridDim.y), from_end % heads, rest % static_cast<int>(gridDim.y)};
}

}  // namespace jf
