// Overlap of a kernel with the one ahead of it on the stream (Hopper and newer; nothing happens on older GPUs).
#pragma once
#include "pieces/math.cuh"

namespace jf {

// A launch marked programmatic starts before the kernel ahead of it has ended: this waits until that has, and its
// writes are visible. Kernels call it before they touch global memory.
JF_DEVICE void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets a kernel so marked start once every block of this one has called it or ended.
JF_DEVICE void dependents_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace jf
