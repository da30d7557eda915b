// The CUDA driver, found at run time: the extension builds and imports on machines without it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "tensor_map.h"

namespace jf::driver {

using Function = const void*;  // a loaded kernel: valid on every device

// Name and value of the attributes of a launch, as in CUlaunchAttribute.
struct LaunchAttribute {
  int id;
  char padding[4];
  union {
    char raw[64];
    unsigned cluster[3];
    int programmatic;
  };
};

// As CUlaunchConfig.
struct LaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

// Every function throws jf::Error where the driver is missing or fails, with what to do about it.

int Version();  // 13000 for CUDA 13.0
int DeviceCount();
std::string DeviceName(int device);
int Arch(int device);  // compute capability, 10 * major + minor
int Multiprocessors(int device);

Function LoadKernel(const std::string& cubin, const std::string& entry);
// Loads the kernel into the current context of `device` and raises its limit of dynamic shared memory.
void PrepareKernel(Function function, int device, size_t shared_bytes);

void LaunchKernel(const LaunchConfig& config, Function function, const void* const* args);
void ZeroAsync(void* data, size_t bytes, void* stream);

// cuTensorMapEncodeTiled with the driver's own numbers for the element type and the swizzle, rank 4.
TensorMap EncodeTiled(int element_type, const void* data, const uint64_t* sizes, const uint64_t* byte_strides,
                      const uint32_t* box, int swizzle);

}  // namespace jf::driver
