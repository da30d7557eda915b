// The buffers of a custom call, checked against its attributes.
#pragma once

#include "kernel.h"
#include "xla/ffi/api/ffi.h"

namespace jf {

// Fills the buffers, the features and the batch maps of `launch`, whose call is decoded already. Throws on a buffer of
// another shape or type than the attributes promise: nothing wrong reaches the GPU.
void BindBuffers(const xla::ffi::RemainingArgs& args, const xla::ffi::RemainingRets& results, Launch* launch);

}  // namespace jf
