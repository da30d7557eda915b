// NVRTC, found at run time, and the memory and disk caches of what it made.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace jf::compiler {

struct Settings {
  std::vector<std::string> nvrtc;  // libraries to try, in order
  std::string kernels;             // the folder cuda/
  std::string cache;               // folder; empty: no disk cache
  std::string dump;                // folder for source, cubin and log of each kernel; empty: none
};

void Configure(Settings settings);

struct Compilation {
  std::string cubin;
  std::string log;  // registers, spills and shared memory, as ptxas prints them
  bool cached;      // came from the disk cache
};

// Thread safe. Throws with the log of the compiler, also where ptxas gave up the asynchrony of wgmma.
Compilation Compile(const KernelVariant& kernel, int arch);

struct Nvrtc {
  std::string path;
  int major, minor;
};

// The library that compiles; throws with what to install where there is none.
Nvrtc FindNvrtc();

}  // namespace jf::compiler
