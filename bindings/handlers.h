// The XLA FFI custom calls: instantiate compiles, initialize loads, execute launches.
#pragma once

#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jf {

struct Registration {
  const char* target;
  XLA_FFI_Handler *instantiate, *initialize, *execute;
};

const std::vector<Registration>& Registrations();

}  // namespace jf
