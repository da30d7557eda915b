// What bindings/kernels/<arch>_<direction>.cc implements: a planner, which says how its kernel would run a call or why
// it cannot, and inside the plan the function that launches it.
//
//   Planned PlanSm80Forward(const Call& call) {
//     if (call.spec.dtype == DType::kF32) return Refusal{"float32 has no kernel"};
//     Plan plan{"sm80_forward"};
//     const int tile = 64;
//     plan.kernels.push_back({"sm80/forward.cuh", "sm80_forward",
//                             VariantText(call.spec, "constexpr Tiles kTiles{64, 64};\n"), 128, 49152});
//     plan.facts = {{"tile", "64 x 64"}, {"grid", "query tiles x heads x batch"}};
//     const size_t partial = plan.AddScratch(...);
//     plan.launch = [=](const Launch& launch) {
//       const Problem& problem = launch.call.problem;
//       Sm80ForwardArgs args{problem, launch.features, launch.buffers.q, ..., launch.Scratch<float>(partial)};
//       launch.Run(0, {{CeilDiv(problem.q_len, tile), unsigned(problem.q_heads), unsigned(problem.batch)}}, args);
//     };
//     return plan;
//   }
//
// The planner is then declared at the end of this file and named in the table of plan.cc.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "spec.h"
#include "tensor_map.h"

namespace jf {

// Any failure of the extension; at the edge it becomes an XLA or a Python error.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Direction { kForward, kBackward, kBiasGradient, kQuantize, kForwardFp8 };

// One custom call as a planner sees it: everything but the arrays.
struct Call {
  Direction direction;
  Spec spec;
  Problem problem;  // its batch maps depend on the arrays: set at launch only
  int kv_splits;    // forward: parts of the key sequence to compute apart, as asked for
  int arch;         // compute capability, 10 * major + minor
  DType out_dtype;  // kForwardFp8: of out
  DType quantized;  // kQuantize: what query and key become
  bool rotate;      // kQuantize: query and key
};

// One kernel to compile.
struct KernelVariant {
  std::string source;   // file under cuda/, compiled after variant.h
  std::string entry;    // its extern "C" __global__ function
  std::string variant;  // text of variant.h: see VariantText
  int threads;          // of a block
  size_t shared_bytes;  // dynamic shared memory of a block
};

// Calls visit(field) for every field, in order; a field that is missing here does not compile.
template <typename Visit>
void ForEachField(const Spec& spec, Visit&& visit) {
  const auto& [dtype, bias_dtype, head_dim, value_dim, causal, window_left, window_right, q_offset, segment_ids,
               q_lengths, kv_lengths, mask, alibi, softcap, sinks, dropout, grouped, lse_cotangent, deterministic] =
      spec;
  auto all = [&](const auto&... fields) { (visit(fields), ...); };
  all(dtype, bias_dtype, head_dim, value_dim, causal, window_left, window_right, q_offset, segment_ids, q_lengths,
      kv_lengths, mask, alibi, softcap, sinks, dropout, grouped, lse_cotangent, deterministic);
}

// Text of variant.h: `kSpec`, then whatever the kernel file expects beside it (`kTiles`). A support kernel that reads
// only part of the spec passes one with the rest cleared, so that its variants are shared.
std::string VariantText(const Spec& spec, const std::string& rest);

class Launch;

struct Plan {
  std::string name;
  std::vector<KernelVariant> kernels = {};
  std::vector<std::pair<std::string, std::string>> facts = {};  // for people: tile sizes, grid, ...
  std::function<void(const Launch&)> launch = {};               // runs in every execution: no allocation, no waiting
  size_t scratch_bytes = 0;

  // Reserves a section of the scratch buffer (its content is undefined at launch); the result is what Launch::Scratch
  // takes.
  size_t AddScratch(size_t bytes) {
    const size_t offset = scratch_bytes;
    scratch_bytes += (bytes + 255) / 256 * 256;
    return offset;
  }
};

struct Refusal {
  std::string reason;  // "head_dim 192 with value_dim 64 has no kernel"
};

using Planned = std::variant<Plan, Refusal>;
using Planner = Planned (*)(const Call&);

// Query, key and value in 8 bits with their scales: what kQuantize makes and kForwardFp8 takes. See sm90/fp8_args.h.
struct Fp8Buffers {
  void *q, *k, *v;
  float *q_scale, *k_scale, *v_scale;
};

// The arrays of a call on the device; null where the direction has none. Backward directions read out and lse.
struct Buffers {
  const void *q, *k, *v;
  void* out;
  float* lse;
  const void* dout;
  const float* dlse;
  void *dq, *dk, *dv;
  void* dbias;  // shape and strides of Features::bias
  Fp8Buffers fp8;
  unsigned char* scratch;
};

struct Extent {
  unsigned x = 1, y = 1, z = 1;
};

struct LaunchShape {
  Extent grid;
  Extent cluster = {};
  bool programmatic = false;  // may start before the kernel ahead of it on the stream has ended (griddepcontrol)
};

// One execution of a plan.
class Launch {
 public:
  Call call;  // batch maps set
  Buffers buffers;
  Features features;  // null where the spec has none
  int multiprocessors;

  // Launches kernel `index` of the plan. Arguments are passed by value and must match the kernel's parameters exactly.
  template <typename... Args>
  void Run(size_t index, const LaunchShape& shape, const Args&... args) const {
    const void* pointers[] = {&args...};
    RunKernel(index, shape, pointers);
  }

  // Fills with zeros, on the stream.
  void Zero(void* data, size_t bytes) const;

  template <typename T>
  T* Scratch(size_t offset) const {
    return reinterpret_cast<T*>(buffers.scratch + offset);
  }

  const Plan* plan;
  const void* const* functions;  // one loaded kernel for each of plan->kernels
  void* stream;

 private:
  void RunKernel(size_t index, const LaunchShape& shape, const void* const* args) const;
};

enum class Swizzle { kNone, k32Bytes, k64Bytes, k128Bytes };

// A 4-D tensor for TMA, innermost axis first (axes that are not needed: size 1, box 1). Reads outside give zeros.
struct TiledTensor {
  const void* data;
  DType dtype;
  std::array<uint64_t, 4> sizes;
  std::array<uint64_t, 3> strides;  // of axes 1 to 3, in elements; each a multiple of 16 bytes
  std::array<uint32_t, 4> box;
  Swizzle swizzle;
};

TensorMap EncodeTensorMap(const TiledTensor& tensor);

// A dense [batch, length, heads, size] array as TMA axes (size, heads, length, batch).
TiledTensor HeadsTensor(const void* data, DType dtype, int batch, int length, int heads, int size,
                        std::array<uint32_t, 4> box, Swizzle swizzle);

constexpr unsigned CeilDiv(long long value, long long divisor) {
  return static_cast<unsigned>((value + divisor - 1) / divisor);
}

// The planners, each in kernels/<its name>.cc.
Planned PlanSm90Forward(const Call& call);
Planned PlanSm80Forward(const Call& call);
Planned PlanSm80Backward(const Call& call);
Planned PlanSm80BiasGradient(const Call& call);
Planned PlanSm90Backward(const Call& call);
Planned PlanSm90ForwardFp8(const Call& call);
Planned PlanQuantize(const Call& call);

}  // namespace jf
