// A TMA descriptor: encoded on the host for every call, passed to the kernel by value as a __grid_constant__ argument.
#pragma once

namespace jf {

struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

}  // namespace jf
