// What the emulated driver asks of the emulator.
#pragma once
#include <cstdint>
#include <string>

#include "emulator.h"

namespace emulator {

using Kernel = void (*)(void* const* args);

// Runs a grid to its end; the result is '' or what went wrong. The seed decides the order of everything.
std::string run_grid(Kernel kernel, void* const* args, Index grid, unsigned threads, int multiprocessors,
                     unsigned seed);

// What cuTensorMapEncodeTiled leaves in the 128 bytes of a TensorMap.
struct Tensor {
  unsigned char* data;
  uint64_t sizes[4], strides[3];  // bytes
  uint32_t box[4];
  int bytes;    // of an element
  int swizzle;  // 0: none, 1 to 3: of 32, 64, 128 bytes
};
static_assert(sizeof(Tensor) <= 128);

}  // namespace emulator
