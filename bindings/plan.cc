#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <vector>

namespace jf {
namespace {

// Which planner is asked for what, in order of preference.
struct Row {
  std::string_view family;
  Direction direction;
  int first_arch, last_arch;
  Planner planner;
};

const std::vector<Row>& Table() {
  static const std::vector<Row> table = {
      {"sm90", Direction::kForward, 90, 90, PlanSm90Forward},
      {"sm80", Direction::kForward, 80, 129, PlanSm80Forward},
      {"sm90", Direction::kBackward, 90, 90, PlanSm90Backward},
      {"sm80", Direction::kBackward, 80, 129, PlanSm80Backward},
      {"sm80", Direction::kBiasGradient, 80, 129, PlanSm80BiasGradient},
      {"sm90", Direction::kQuantize, 90, 90, PlanQuantize},
      {"sm90", Direction::kForwardFp8, 90, 90, PlanSm90ForwardFp8},
  };
  return table;
}

// $JAX_FLASH_KERNELS names the one family of kernels to use ("sm80"), for tests and measurements: all where it is
// unset or empty.
bool Allowed(std::string_view family) {
  static const char* const only = std::getenv("JAX_FLASH_KERNELS");
  return only == nullptr || *only == '\0' || family == only;
}

// One architecture for each set of planners and tile tables.
constexpr int kArchs[] = {80, 86, 89, 90, 100, 120};

DType DecodeDType(std::string_view name) {
  if (name == "none") return DType::kNone;
  if (name == "float16") return DType::kF16;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float32") return DType::kF32;
  if (name == "float8_e4m3fn") return DType::kE4M3;
  if (name == "int8") return DType::kInt8;
  throw Error("no kernel knows the data type " + std::string(name));
}

int Size(const Attributes& attributes, const char* name) {
  const int64_t value = attributes.Integer(name);
  if (value < -1 || value > std::numeric_limits<int>::max()) {
    throw Error(std::string(name) + " = " + std::to_string(value) + " is out of range");
  }
  return static_cast<int>(value);
}

std::string ArchName(int arch) {
  return "compute capability " + std::to_string(arch / 10) + "." + std::to_string(arch % 10);
}

}  // namespace

Direction DirectionOf(std::string_view target) {
  if (target == "jax_flash_forward") return Direction::kForward;
  if (target == "jax_flash_backward") return Direction::kBackward;
  if (target == "jax_flash_bias_gradient") return Direction::kBiasGradient;
  if (target == "jax_flash_quantize") return Direction::kQuantize;
  if (target == "jax_flash_forward_fp8") return Direction::kForwardFp8;
  throw Error("unknown custom call " + std::string(target));
}

Call DecodeCall(Direction direction, const Attributes& attributes) {
  Call call{};
  call.direction = direction;
  call.kv_splits = Size(attributes, "kv_splits");

  Problem& problem = call.problem;
  problem.batch = Size(attributes, "batch");
  problem.q_heads = Size(attributes, "q_heads");
  problem.kv_heads = Size(attributes, "kv_heads");
  problem.q_len = Size(attributes, "q_len");
  problem.kv_len = Size(attributes, "kv_len");
  problem.window_left = Size(attributes, "window_left");
  problem.window_right = Size(attributes, "window_right");
  problem.scale = attributes.Number("scale");
  problem.softcap = attributes.Number("softcap");
  const float dropout_rate = attributes.Number("dropout_rate");
  problem.dropout_threshold = std::max(1u, static_cast<unsigned>(std::lround((1.0 - dropout_rate) * 65536.0)));
  problem.dropout_scale = 65536.0f / static_cast<float>(problem.dropout_threshold);

  Spec& spec = call.spec;
  spec.dtype = DecodeDType(attributes.Text("dtype"));
  spec.bias_dtype = DecodeDType(attributes.Text("bias_dtype"));
  spec.head_dim = Size(attributes, "head_dim");
  spec.value_dim = Size(attributes, "value_dim");
  spec.causal = attributes.Flag("causal");
  spec.window_left = problem.window_left >= 0;
  spec.window_right = problem.window_right >= 0;
  spec.q_offset = attributes.Flag("q_offset");
  spec.segment_ids = attributes.Flag("segment_ids");
  spec.q_lengths = attributes.Flag("q_lengths");
  spec.kv_lengths = attributes.Flag("kv_lengths");
  spec.mask = attributes.Flag("mask");
  spec.alibi = attributes.Flag("alibi");
  spec.softcap = problem.softcap > 0;
  spec.sinks = attributes.Flag("sinks");
  spec.dropout = dropout_rate > 0;
  spec.grouped = problem.q_heads != problem.kv_heads;
  const bool backward = direction == Direction::kBackward || direction == Direction::kBiasGradient;
  spec.lse_cotangent = backward && attributes.Flag("lse_cotangent");
  spec.deterministic = attributes.Flag("deterministic");
  if (direction == Direction::kForwardFp8) call.out_dtype = DecodeDType(attributes.Text("out_dtype"));
  if (direction == Direction::kQuantize) {
    call.quantized = DecodeDType(attributes.Text("quantized"));
    call.rotate = attributes.Flag("rotate");
  }
  return call;
}

std::string CallKey(const Call& call) {
  std::string key;
  auto append = [&](const auto& field) { key.append(reinterpret_cast<const char*>(&field), sizeof field); };
  ForEachField(call.spec, append);
  const Problem& problem = call.problem;
  append(problem.batch);
  append(problem.q_heads);
  append(problem.kv_heads);
  append(problem.q_len);
  append(problem.kv_len);
  append(problem.window_left);
  append(problem.window_right);
  append(problem.scale);
  append(problem.softcap);
  append(problem.dropout_threshold);
  append(call.direction);
  append(call.kv_splits);
  append(call.arch);
  append(call.out_dtype);
  append(call.quantized);
  append(call.rotate);
  return key;
}

Planned MakePlan(const Call& call) {
  const Problem& problem = call.problem;
  if (problem.batch < 1 || problem.q_heads < 1 || problem.q_len < 1 || problem.kv_len < 1) {
    return Refusal{"an array of size 0 needs no kernel"};
  }
  if (problem.kv_heads < 1 || problem.q_heads % problem.kv_heads != 0) {
    return Refusal{"q_heads is not a multiple of kv_heads"};
  }
  std::string reasons;
  for (const Row& row : Table()) {
    if (row.direction != call.direction || call.arch < row.first_arch || call.arch > row.last_arch) continue;
    if (!Allowed(row.family)) continue;
    Planned planned = row.planner(call);
    if (std::holds_alternative<Plan>(planned)) return planned;
    reasons += (reasons.empty() ? "" : "; ") + std::get<Refusal>(planned).reason;
  }
  return Refusal{reasons.empty() ? "there is no kernel for GPUs of " + ArchName(call.arch) : reasons};
}

size_t ScratchBytes(Call call) {
  size_t bytes = 0;
  for (int arch : kArchs) {
    call.arch = arch;
    const Planned planned = MakePlan(call);
    if (const Plan* plan = std::get_if<Plan>(&planned)) bytes = std::max(bytes, plan->scratch_bytes);
  }
  return bytes;
}

}  // namespace jf
